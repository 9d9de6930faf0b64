"""Every change to transformers and accelerate: what `register()` wraps and `unregister()` puts back."""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    masking_utils,
)
from transformers.distributed.mixin import DistributedMixin
from transformers.integrations import deepspeed
from transformers.integrations.peft import PeftAdapterMixin
from transformers.utils import generic, is_peft_available

from flash_dmattn_hf.gates import doge, soft_selection
from flash_dmattn_hf.integration import adapters, generation, loading, ranks
from flash_dmattn_hf.integration.attention import dynamic_mask_attention_forward
from flash_dmattn_hf.integration.dense_shards import dense_attention_on_ranks
from flash_dmattn_hf.integration.fitting_weights import wrap_zero3_loading
from flash_dmattn_hf.integration.flash_name import wrap_flash_requested
from flash_dmattn_hf.integration.kept_cache import wrap_generate
from flash_dmattn_hf.integration.masks import dynamic_mask_mask, wrap_preprocess_mask_arguments
from flash_dmattn_hf.integration.shards import wrap_loss_function
from flash_dmattn_hf.names import DENSE_ON_RANKS, NAMES
from flash_dmattn_hf.parallel import accelerate

logger = logging.getLogger(__name__)


@dataclass
class Patch:
    """One attribute of transformers that is replaced by `make_wrapper(original)`.

    owner: class or module. attribute: its name. make_wrapper: gets the stored attribute, for a classmethod its
    plain function, and returns the replacement.
    """

    owner: Any
    attribute: str
    make_wrapper: Callable[[Callable], Callable]
    original: Any = field(default=None, repr=False)
    is_applied: bool = False

    def apply(self) -> None:
        """Replaces the attribute; does nothing if that has been done."""
        if self.is_applied:
            return
        self.original = vars(self.owner)[self.attribute]
        is_classmethod = isinstance(self.original, classmethod)
        wrapper = self.make_wrapper(self.original.__func__ if is_classmethod else self.original)
        setattr(self.owner, self.attribute, classmethod(wrapper) if is_classmethod else wrapper)
        self.is_applied = True

    def undo(self) -> None:
        """Puts the original object back; does nothing if the patch is not applied."""
        if not self.is_applied:
            return
        setattr(self.owner, self.attribute, self.original)
        self.original, self.is_applied = None, False


class FunctionPatch(Patch):
    """A function of a module that is replaced in every module that has imported it by name."""

    def apply(self) -> None:
        """Replaces the function wherever it is; modules loaded later import the replacement."""
        if self.is_applied:
            return
        self.original = vars(self.owner)[self.attribute]
        _replace_everywhere(self.attribute, self.original, self.make_wrapper(self.original))
        self.is_applied = True

    def undo(self) -> None:
        """Puts the original function back wherever the replacement is."""
        if not self.is_applied:
            return
        _replace_everywhere(self.attribute, vars(self.owner)[self.attribute], self.original)
        self.original, self.is_applied = None, False


def _replace_everywhere(name: str, old: Callable, new: Callable) -> None:
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is old:
            setattr(module, name, new)


def register() -> None:
    """Makes `attn_implementation="flash_dmattn"` (and "dmattn") known to transformers. Idempotent."""
    functions = dict.fromkeys(NAMES, dynamic_mask_attention_forward) | {DENSE_ON_RANKS: dense_attention_on_ranks}
    for name, function in functions.items():
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, dynamic_mask_mask)
    ranks.register_style()
    for patch in _patches():
        patch.apply()


def unregister() -> None:
    """Puts transformers back as it was before `register()`. Models that use the name can then not run."""
    for patch in reversed(_PATCHES):
        patch.undo()
    _PATCHES.clear()
    for name in (*NAMES, DENSE_ON_RANKS):
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)
    ranks.unregister_style()


_PATCHES: list[Patch] = []


def _patches() -> list[Patch]:
    if not _PATCHES:
        from transformers.models.doge.modeling_doge import DogeAttention

        entries = [
            (PreTrainedModel, "_check_and_adjust_attn_implementation", loading.wrap_check_implementation),
            (PreTrainedModel, "post_init", loading.wrap_post_init),
            (PreTrainedModel, "_initialize_weights", loading.wrap_initialize_weights),
            (PreTrainedModel, "from_pretrained", loading.wrap_from_pretrained),
            (DistributedMixin, "maybe_distribute_model", ranks.wrap_distribute),
            (PreTrainedModel, "_from_config", loading.wrap_load_time),
            (PreTrainedModel, "set_attn_implementation", loading.wrap_set_implementation),
            (PreTrainedConfig, "from_dict", loading.wrap_config_from_dict),
            (PreTrainedModel, "loss_function", wrap_loss_function),
            (masking_utils, "_preprocess_mask_arguments", wrap_preprocess_mask_arguments),
            (DogeAttention, "forward", doge.wrap_forward),
            (GenerationMixin, "generate", lambda original: wrap_generate(soft_selection.wrap_generate(original))),
            (PreTrainedModel, "save_pretrained", adapters.wrap_save_model),
            (PeftAdapterMixin, "load_adapter", adapters.wrap_load_adapter_of_model),
            *generation.PATCHES,
            *accelerate.PATCHES,
        ]
        if is_peft_available():
            from peft import PeftModel

            entries += [
                (PeftModel, "save_pretrained", adapters.wrap_save),
                (PeftModel, "from_pretrained", adapters.wrap_from_pretrained),
                (PeftModel, "load_adapter", adapters.wrap_load_adapter),
            ]
        _PATCHES.extend(Patch(*entry) for entry in entries)
        _PATCHES.append(FunctionPatch(generic, "is_flash_attention_requested", wrap_flash_requested))
        _PATCHES.append(FunctionPatch(deepspeed, "_load_state_dict_into_zero3_model", wrap_zero3_loading))
    return _PATCHES
