"""The gate that gives every key its importance: the submodule `self_attn.dma` of an attention module."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, initialization

from flash_dmattn.token_importance import can_fuse, token_importance
from flash_dmattn_hf.config import SECTION, DynamicMaskConfig, Windows
from flash_dmattn_hf.forms import FORMS
from flash_dmattn_hf.gates.hidden_states import take_hidden_states
from flash_dmattn_hf.names import GATE_NAME
from flash_dmattn_hf.thread_slot import ThreadSlot

_WITHOUT_FLOAT64 = ("mps", "xpu")
"""Types of devices, some of which have no float64."""
_BLOCK = 8192
"""Tokens that are projected at once in float64."""

numbers_compared = ThreadSlot()
"""Whether every gate of this thread's models has been found to have its layer's number. Layers that are compiled one by
one would not share what depends on a number of theirs."""


def get_gate(module: nn.Module) -> "ImportanceGate | None":
    """Returns the gate of an attention module, None if it has none; layers may have been taken out or renumbered."""
    gate = getattr(module, GATE_NAME, None)
    if gate is not None and not numbers_compared.slot.content and gate.layer_idx != module.layer_idx:
        for part in parts_of(gate):
            part.renumber(module.layer_idx)
    return gate


def parts_of(gate: Any) -> "list[Gate]":
    """Returns the gates in what an attention module has for one: PEFT wraps a gate and its copies."""
    found = gate.modules() if isinstance(gate, nn.Module) else (gate,)
    return [part for part in found if isinstance(part, Gate)]


def source_of(gate: "Gate", value: torch.Tensor) -> torch.Tensor:
    """Returns what a gate reads of the tokens that its layer attends to, (B, heads, S, dim); once for each forward.

    value: (B, Hkv, S, D), as the cache or the attention function is given them. Returns it, or for
    importance_input="hidden" the hidden states as those of one head, (B, 1, S, hidden size).
    Raises what `take_hidden_states` raises.
    """
    return value if gate.config.importance_input == "value" else take_hidden_states(gate, value).unsqueeze(1)


def importance_of(gate: "Gate", value: torch.Tensor) -> torch.Tensor:
    """Returns the importance (B, Hi, S) of the tokens with these values (B, Hkv, S, D); as `source_of`, once."""
    return gate(source_of(gate, value))


class ImportanceProjection(nn.Module):
    """The projection of a token, its values or its hidden state, to one number per importance head.

    Deliberately no nn.Linear: quantizers and "all-linear" adapters must leave it alone.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: (..., in_features) float32 or float64. Returns (..., out_features), computed in that dtype."""
        bias = None if self.bias is None else self.bias.to(tokens.dtype)
        return F.linear(tokens, self.weight.to(tokens.dtype), bias)


def compute_importance(
    source: torch.Tensor, dt_proj: Callable[[torch.Tensor], torch.Tensor], A: torch.Tensor, form: str, *, exact: bool
) -> torch.Tensor:
    """Returns the importance that a form of `FORMS` computes from A and dt = dt_proj(all heads of a token).

    source: (B, heads, S, dim), as `source_of` returns it. A: (Hi,). form: its name.
    exact: computes in float64 and rounds to what float32 can hold. A product ends in other bits for other batch shapes,
        and equal keys would not tie. In float64 they do. Training goes without, because float64 takes memory: for
        prompts and for single tokens alike.
    Returns (B, Hi, S) in float32, float64 for a float64 source: in bfloat16 distinct keys would tie.
    """
    dtype = torch.float64 if source.dtype == torch.float64 else torch.float32
    inner = torch.float64 if exact and source.device.type not in _WITHOUT_FLOAT64 else dtype
    batch = source.shape[0]
    with torch.autocast(source.device.type, enabled=False):
        tokens = source.transpose(1, 2)
        # In blocks, because a copy of all tokens in float64 takes much memory. With gradients it would be kept anyway.
        in_blocks = exact and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        blocks = tokens.split(_BLOCK, 1) if in_blocks else (tokens,)
        rows = [dt_proj(block.reshape(batch, block.shape[1], -1).to(inner)) for block in blocks]
        # Contiguous, because the compiler mistakes the layout of softplus's backward for tensors that are not.
        dt = (rows[0] if len(rows) == 1 else torch.cat(rows, 1)).transpose(1, 2).contiguous()
        importance = FORMS[form](A.to(inner).unsqueeze(-1), dt)
        return importance.float().to(dtype) if exact else importance


def _is_plain(module: nn.Module) -> bool:
    """Whether nothing hangs on a module's forward, such as a hook that brings its weights."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


class Gate:
    """What every gate says about its layer to the attention function, the cache and the conversion.

    config: resolved settings, those of the model's config as soon as that has any.
    model_config: the config of the layer's model, whose section `flash_dmattn` may change at any time.
    starts_dense: what None stands for in that section, as `dense` of `DynamicMaskConfig.resolve`.
    layer_idx: index of the layer, as the cache counts; set before config, and changed by `renumber`.
    num_kv_heads, head_dim: of the values. num_importance_heads: Hi.
    sliding_window: the layer's own window in tokens, None for full attention.
    is_latent: whether a cache is given latents, of which the layer makes keys and values afterwards (MLA).
    was_called: whether the attention function has ever been called for this layer.
    soft_selections: those active, the innermost last (`gates.soft_selection`); copies and pickles have none.
    is_on_ranks: whether several ranks load the layer's model together. Where they split the layer by head, the numbers
        of heads are those of this rank.
    """

    model_config: Any = None
    starts_dense = True
    layer_idx: int
    num_kv_heads: int
    num_importance_heads: int
    head_dim: int
    sliding_window: int | None
    is_latent = False
    was_called = False
    is_on_ranks = False
    soft_selections: tuple[Any, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "soft_selections"}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Gate":
        """A copied model has a config of its own; a copy of a layer, or of a gate alone, reads the one it came from."""
        if not any(isinstance(copied, PreTrainedModel) for copied in memo.values()):
            memo.setdefault(id(self.model_config), self.model_config)
        copied = memo[id(self)] = type(self).__new__(type(self))
        vars(copied).update(copy.deepcopy(self.__getstate__(), memo))
        return copied

    @property
    def config(self) -> DynamicMaskConfig:
        """Raises ValueError for a section of the model's config that does not fit the gate's weights or its place."""
        section = getattr(self.model_config, SECTION, None)
        if section != self._section:
            self._follow(section)
        return self._config

    @config.setter
    def config(self, config: DynamicMaskConfig) -> None:
        section = getattr(self.model_config, SECTION, None)
        self._keep(config, copy.deepcopy(section))

    def _follow(self, section: dict[str, Any] | None) -> None:
        if section is None:
            raise ValueError(f"config.{SECTION} must hold the settings of a model with importance gates, got None")
        settings = DynamicMaskConfig.from_dict(section).resolve(dense=self.starts_dense)
        for name in ("importance_heads", "importance_input", "dt_proj_bias"):
            if getattr(settings, name) != getattr(self._config, name):
                raise ValueError(
                    f"config.{SECTION}[{name!r}] of a live model must stay {getattr(self._config, name)!r}, got "
                    f"{getattr(settings, name)!r}: it decides about the shape of the gates"
                )
        is_left_out = settings.layers is not None and self.layer_idx not in settings.layers
        window = settings.window_of(self.layer_idx)
        if is_left_out or (self.sliding_window is not None and self.sliding_window <= window):
            raise ValueError(
                f"config.{SECTION} of a live model must want a gate in layer {self.layer_idx}, which has one, got "
                f"{settings}: save the model with its old settings, and load it with these"
            )
        setattr(self.model_config, SECTION, settings.to_dict())
        self._keep(settings, settings.to_dict())

    def renumber(self, layer_idx: int) -> None:
        """Takes another index, for which the settings may have another window."""
        self.layer_idx = layer_idx
        self._keep(self._config, self._section)

    def _keep(self, config: DynamicMaskConfig, section: dict[str, Any] | None) -> None:
        self._config, self._section, self._window = config, section, config.window_of(self.layer_idx)

    @property
    def windows(self) -> Windows:
        """The windows of this layer, which everything reads here."""
        config = self.config
        return Windows(self._window, config.num_sink_tokens, config.local_window_size, self.sliding_window)


class ImportanceGate(Gate, nn.Module):
    """Computes the importance of keys and carries the settings that attention and cache need.

    Parameters: `A` (Hi,), `dt_proj.weight` (Hi, Hkv * D or hidden size) and, if configured, `dt_proj.bias` (Hi,).

    config, model_config: as `Gate` says; layer_idx: index of the layer, as the cache counts.
    num_heads, num_kv_heads, head_dim: shape of the attention, head_dim that of the values.
    hidden_size: of what the layer's projections read; needed for importance_input="hidden".
    sliding_window, is_latent: as `Gate` says.
    initializer_range: standard deviation of dt_proj.weight before training.
    """

    def __init__(
        self,
        config: DynamicMaskConfig,
        *,
        model_config: Any = None,
        layer_idx: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        hidden_size: int | None = None,
        sliding_window: int | None = None,
        is_latent: bool = False,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__()
        self.model_config = model_config
        self.layer_idx = layer_idx
        self.config = config
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.num_importance_heads = {"kv": num_kv_heads, "query": num_heads, "shared": 1}[config.importance_heads]
        self.sliding_window = sliding_window
        self.is_latent = is_latent
        self.initializer_range = initializer_range
        self.A = nn.Parameter(torch.zeros(self.num_importance_heads))
        self.source_shape = (num_kv_heads, head_dim) if config.importance_input == "value" else (1, hidden_size)
        in_features = self.source_shape[0] * self.source_shape[1]
        self.dt_proj = ImportanceProjection(in_features, self.num_importance_heads, config.dt_proj_bias)

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        """Returns the importance (B, Hi, S) in float32, float64 for a float64 source.

        source: values (B, Hkv, S, D), or for importance_input="hidden" the hidden states (B, 1, S, hidden size).
        """
        self.check_source(source)
        form, projection = FORMS[self.config.importance], self.dt_proj
        parameters = (projection.weight, projection.bias, self.A)
        is_step = source.shape[2] == 1 and not self.training  # the fused kernel computes in float64, training does not
        if is_step and form.is_fused and _is_plain(projection) and can_fuse(source, *parameters):
            return token_importance(source, *parameters, form.max_exponent)
        return compute_importance(source, projection, self.A, self.config.importance, exact=not self.training)

    def check_source(self, source: torch.Tensor) -> None:
        """Raises ValueError unless a source has the shape that `forward` says."""
        expected = self.source_shape
        if source.dim() != 4 or (source.shape[1], source.shape[3]) != expected:
            raise ValueError(
                f"{self.config.importance_input} of layer {self.layer_idx} must have shape "
                f"(B, {expected[0]}, S, {expected[1]}), got {tuple(source.shape)}"
            )

    def initialize(self) -> None:
        """Initialises the parameters that no checkpoint has given: A as configured, dt_proj.weight randomly.

        At A = 0 all keys tie; dt_proj must not be 0 as well, or nothing would ever have a gradient.
        """
        start = FORMS[self.config.importance].initial_A
        if self.config.initializer_std > 0:
            initialization.normal_(self.A, mean=start, std=self.config.initializer_std)
        else:
            initialization.constant_(self.A, start)
        initialization.normal_(self.dt_proj.weight, mean=0.0, std=self.initializer_range)
        if self.dt_proj.bias is not None:
            initialization.zeros_(self.dt_proj.bias)

    def extra_repr(self) -> str:
        keep, sinks, local, sliding = self.windows
        return (
            f"importance={self.config.importance}, input={self.config.importance_input}, "
            f"heads={self.num_importance_heads}, w={keep}, s={sinks}, r={local}, sliding_window={sliding}"
        )
