"""How generate() meets the constant-size cache: it picks ours, and refuses what would be wrong with it.

Each function here takes an original of transformers and returns its replacement; `PATCHES` lists them for
`registration`, which installs and removes them.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.continuous_batching import ContinuousMixin

from flash_dmattn_hf.arguments import by_name, get_cache, name_of_cache, parameter_names
from flash_dmattn_hf.cache.cache import DynamicMaskCache
from flash_dmattn_hf.cache.cuda_graph import CapturedForward, StepForward
from flash_dmattn_hf.cache.settings import check_kept_slots, slot_dtype_of
from flash_dmattn_hf.config import settings_in
from flash_dmattn_hf.gates.attach import iter_gates
from flash_dmattn_hf.integration.kept_cache import keep_cache
from flash_dmattn_hf.names import NAMES, is_ours
from flash_dmattn_hf.versions import FIRST_SERVING, can_serve

_CONSTANT = "the default DynamicMaskCache is of constant size anyway"
_OWN_CACHE = "makes a cache of a class of its own in its forward and takes no other"
_REFUSED = {
    "quantized": 'keys and values in 8 bits are cache_config={"slot_dtype": "float8_e4m3fn"} without it',
    "offloaded": f"evicting needs the keys on the device; {_CONSTANT}",
    "offloaded_static": f"evicting needs the keys on the device; {_CONSTANT}",
    "paged": "pages hold the same tokens for all heads; call model.generate_batch(), which has slots instead",
}


def is_active(model: PreTrainedModel) -> bool:
    """Whether the model's attention runs through flash_dmattn now: gates attached and implementation selected."""
    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    return is_ours(implementation) and next(iter_gates(model), None) is not None


def wrap_prepare_cache(original):
    """Makes generate() use a DynamicMaskCache where it would have made a DynamicCache or a StaticCache.

    The replacement raises ValueError for a `cache_implementation` other than None, "dynamic" and "static", for "static"
    where the model makes its own cache or `DynamicMaskCache` raises, for a `cache_config` with more than "slot_dtype"
    or where the model makes its own cache, and for a cache passed by the caller that is neither a DynamicCache holding
    all keys nor a DynamicMaskCache of this model, or has another slot_dtype.
    """

    @functools.wraps(original)
    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        if not is_active(self):
            return original(self, generation_config, model_kwargs, *args, **kwargs)
        _check_cache_implementation(generation_config.cache_implementation)
        slot_dtype = slot_dtype_of(generation_config)
        if (passed := get_cache(model_kwargs)) is not None:
            check_cache(self, passed)
            _check_slot_dtype(passed, slot_dtype)
            keep_cache(self, model_kwargs)
            return original(self, generation_config, model_kwargs, *args, **kwargs)
        static = generation_config.cache_implementation == "static"
        if static:
            _refuse_static(self)
        if slot_dtype is not None and generation_config.use_cache is not False:
            _refuse_rounding(self)
        with _dynamic(generation_config):
            result = original(self, generation_config, model_kwargs, *args, **kwargs)
        name = name_of_cache(model_kwargs)
        if name is not None and type(model_kwargs[name]) is DynamicCache:
            cache = model_kwargs[name] = DynamicMaskCache(self, static=static, slot_dtype=slot_dtype)
            if generation_config.is_assistant:
                cache.activate_past_recording()
            keep_cache(self, model_kwargs)
        return result

    return _prepare_cache_for_generation


def wrap_assisted_decoding(original):
    """Lets a cache return to its constant size when assisted decoding, which makes it record its past, is over.

    The replacement raises ValueError for a cache that holds tokens already: transformers would process the whole
    prompt a second time, on top of them.
    """

    @functools.wraps(original)
    def _assisted_decoding(self, *args, **kwargs):
        cache = get_cache(kwargs)
        if cache is None or not is_active(self):
            return original(self, *args, **kwargs)
        if cache.get_seq_length() > 0:
            raise ValueError(
                "past_key_values must be empty for assisted decoding and prompt lookup, got a cache of "
                f"{cache.get_seq_length()} tokens: transformers would process the prompt again on top of them"
            )
        was_recording = isinstance(cache, DynamicMaskCache) and any(layer.record_past for layer in cache.mask_layers)
        try:
            return original(self, *args, **kwargs)
        finally:
            if isinstance(cache, DynamicMaskCache) and not was_recording:
                cache.stop_past_recording()

    return _assisted_decoding


def wrap_compiled_call(original):
    """Makes generate() capture the forward of one token on a GPU, unless a `compile_config` wants it compiled."""

    @functools.wraps(original)
    def get_compiled_call(self, compile_config, *args, **kwargs):
        if not is_active(self):
            return original(self, compile_config, *args, **kwargs)
        if compile_config is None:
            devices = {parameter.device for parameter in self.parameters()}
            if len(devices) > 1 or self.device.type != "cuda":  # a graph holds the kernels of one GPU
                return self.__call__
            return StepForward(self, CapturedForward(self))
        return StepForward(self, original(self, compile_config, *args, **kwargs))

    return get_compiled_call


def wrap_dynamic_cache(original):
    """Makes `DynamicCache(config=...)` of a flash_dmattn model keep all keys of its sliding-window layers.

    Keys older than a sliding window still compete for the top K, so a cache without importances must not drop
    them. Models make such a cache themselves when they are called with use_cache=True and none.
    """

    names = parameter_names(original)[1:]

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        given = by_name(names, args, kwargs)
        config = given.get("config")
        if config is None or given.get("ddp_cache_data") is not None or isinstance(self, DynamicMaskCache):
            return
        config = config.get_text_config(decoder=True)
        is_sliding = any(isinstance(layer, DynamicSlidingWindowLayer) for layer in self.layers)
        settings = settings_in(config) if is_sliding and config._attn_implementation in NAMES else None
        if settings is None:
            return
        if any(_truncates(layer, settings.window_of(index)) for index, layer in enumerate(self.layers)):
            self.layers = [
                DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer for layer in self.layers
            ]

    return __init__


def wrap_init_continuous_batching(original):
    """Gives a model that runs through flash_dmattn a manager of slots instead of pages.

    The replacement raises ValueError before transformers 5.23, for another slot_dtype than that of a manager that the
    model keeps, and what `SlotBatchingManager` raises.
    """
    names = parameter_names(original)[1:]

    @functools.wraps(original)
    def init_continuous_batching(self, *args, **kwargs):
        active = is_active(self)
        if active and not can_serve():
            raise ValueError(
                f"continuous batching with flash_dmattn needs transformers {FIRST_SERVING} or newer, got "
                f"{transformers.__version__}; call model.generate() on a padded batch"
            )
        if not can_serve():
            return original(self, *args, **kwargs)
        from flash_dmattn_hf.serving.manager import SlotBatchingManager, make_manager

        kept = getattr(self, "_cached_continuous_batching_manager", None)
        if kept is not None and isinstance(kept, SlotBatchingManager) != active:
            self.destroy_cached_continuous_batching_manager()  # it was made for another implementation
            kept = None
        given = by_name(names, args, kwargs)
        if active and kept is None:
            return make_manager(self, **given)
        if active:
            check_kept_slots(kept.generation_config, given.get("generation_config"), self.generation_config)
        return original(self, *args, **kwargs)

    return init_continuous_batching


def check_cache(model: PreTrainedModel, cache) -> None:
    """Raises ValueError unless generating with `cache` is right for a model that runs through flash_dmattn."""
    if isinstance(cache, DynamicMaskCache):
        if not cache.belongs_to(model):
            raise ValueError("past_key_values must be a DynamicMaskCache of this very model, got that of another one")
        return
    if type(cache) is not DynamicCache:
        raise ValueError(
            "past_key_values must be a DynamicMaskCache or a DynamicCache with flash_dmattn, "
            f"got a {type(cache).__name__}; use DynamicMaskCache(model), or pass none"
        )
    for _, _, gate in iter_gates(model):
        if gate.layer_idx < len(cache.layers) and _truncates(
            cache.layers[gate.layer_idx], gate.windows.keep_window_size
        ):
            raise ValueError(
                f"past_key_values must keep all keys of layer {gate.layer_idx}, got a DynamicCache that drops those "
                "beyond its sliding window although they still compete; use DynamicMaskCache(model), or pass none"
            )


def _check_slot_dtype(cache, slot_dtype: torch.dtype | None) -> None:
    if slot_dtype is not None and getattr(cache, "slot_dtype", None) != slot_dtype:
        raise ValueError(
            f"past_key_values must be a DynamicMaskCache(model, slot_dtype={slot_dtype}), as cache_config says, got a "
            f"{type(cache).__name__} whose keys and values are not rounded"
        )


def _truncates(layer, keep_window_size: int) -> bool:
    return isinstance(layer, DynamicSlidingWindowLayer) and layer.sliding_window > keep_window_size


@contextmanager
def _dynamic(generation_config) -> Iterator[None]:
    """Has transformers make a plain DynamicCache, whatever is asked for: it is replaced by one of ours."""
    implementation, generation_config.cache_implementation = generation_config.cache_implementation, None
    try:
        yield
    finally:
        generation_config.cache_implementation = implementation


def _check_cache_implementation(name: str | None) -> None:
    if name not in (None, "dynamic", "static"):
        raise ValueError(
            f"cache_implementation must be None, 'dynamic' or 'static' with flash_dmattn, got {name!r}: "
            f"{_REFUSED.get(name, 'it is not known')}"
        )


def _refuse_static(model: PreTrainedModel) -> None:
    """Raises ValueError for a model that transformers itself cannot generate with over a static cache."""
    why = None
    if not model._supports_default_dynamic_cache():
        why = _OWN_CACHE
    elif model.config.model_type == "paligemma" and hasattr(model.config.get_text_config(), "layer_types"):
        why = "does not take the masks of its sliding and full layers (PaliGemma 2) that generate() makes for it then"
    if why is not None:
        raise ValueError(
            f"cache_implementation must not be 'static' for {type(model).__name__}, which {why}: leave "
            "cache_implementation out"
        )


def _refuse_rounding(model: PreTrainedModel) -> None:
    if not model._supports_default_dynamic_cache():
        raise ValueError(f"cache_config must not have a slot_dtype for {type(model).__name__}, which {_OWN_CACHE}")


PATCHES = [
    (GenerationMixin, "_prepare_cache_for_generation", wrap_prepare_cache),
    (GenerationMixin, "_assisted_decoding", wrap_assisted_decoding),
    (PreTrainedModel, "get_compiled_call", wrap_compiled_call),
    (ContinuousMixin, "init_continuous_batching", wrap_init_continuous_batching),
    (DynamicCache, "__init__", wrap_dynamic_cache),
]
