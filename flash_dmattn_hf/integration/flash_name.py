"""Our name holds "flash", which transformers, and libraries that ask it, take for FlashAttention."""

from collections.abc import Callable
from functools import wraps

from flash_dmattn_hf.arguments import by_name, parameter_names
from flash_dmattn_hf.names import is_ours


def wrap_flash_requested(original: Callable) -> Callable:
    """Answers that FlashAttention is not requested where "flash_dmattn" is.

    FlashAttention takes documents without padding, breaks the graph of a static cache, and is a package of its own.
    """
    names = parameter_names(original)

    @wraps(original)
    def is_flash_attention_requested(*args, **kwargs):
        given = by_name(names, args, kwargs)
        config = given.get("config")
        name = given.get("requested_attention_implementation") if config is None else config._attn_implementation
        return original(*args, **kwargs) and not is_ours(name)

    return is_flash_attention_requested
