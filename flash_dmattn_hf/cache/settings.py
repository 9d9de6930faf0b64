"""What a generation config says of the cache: `cache_config={"slot_dtype": "float8_e4m3fn"}`."""

import torch
from transformers import GenerationConfig

from flash_dmattn.float8 import check_slot_dtype

_SLOT_DTYPE = "slot_dtype"


def slot_dtype_of(generation_config: GenerationConfig) -> torch.dtype | None:
    """Returns the `slot_dtype` that a generation config asks for, as for `DynamicMaskCache`.

    Raises ValueError for other settings in its `cache_config`, for one that is no dict, and for another dtype.
    """
    settings = {} if generation_config.cache_config is None else generation_config.cache_config
    if not isinstance(settings, dict):
        raise ValueError(f"cache_config must be a dict such as {{{_SLOT_DTYPE!r}: 'float8_e4m3fn'}}, got {settings!r}")
    if others := sorted(set(settings) - {_SLOT_DTYPE}):
        raise ValueError(f"cache_config must have no setting but {_SLOT_DTYPE!r} with flash_dmattn, got {others}")
    return check_slot_dtype(settings.get(_SLOT_DTYPE))


def check_kept_slots(kept: GenerationConfig, given: GenerationConfig | None, default: GenerationConfig) -> None:
    """Raises ValueError for slots that are not those of the manager of continuous batching that a model keeps.

    kept: what that manager was made with. given: of the present call, None for the model's, which is `default`.
    """
    made, asked = slot_dtype_of(kept), slot_dtype_of(given or default)
    if asked != made and not (given is None and asked is None):
        raise ValueError(
            f"{_SLOT_DTYPE} of cache_config must be {made}, that of the manager which the model keeps "
            f"(persistent_manager=True), got {asked}: call model.destroy_cached_continuous_batching_manager() first"
        )
