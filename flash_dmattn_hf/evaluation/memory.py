"""The memory that a model's key-value cache takes."""

import torch
from torch import nn
from transformers import Cache

from flash_dmattn_hf.arguments import get_cache
from flash_dmattn_hf.cache.cache import DynamicMaskCache


def cache_bytes(model: nn.Module, input_ids: torch.Tensor) -> int:
    """Returns the bytes of the cache that `generate()` leaves after reading a text, in the dtype of the weights.

    Under autocast a dense cache would hold rotated keys in float32, and ours would not. input_ids: (N,) integers.
    """
    ids = input_ids[None].to(model.get_input_embeddings().weight.device)
    with torch.autocast(ids.device.type, enabled=False):
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=1,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
    return bytes_of_cache(get_cache(out))


def bytes_of_cache(cache: Cache) -> int:
    """Returns the bytes of all tensors in the layers of a cache of transformers or of this package."""
    if isinstance(cache, DynamicMaskCache):
        return cache.nbytes
    return sum(state.nbytes for layer in cache.layers for state in vars(layer).values() if torch.is_tensor(state))
