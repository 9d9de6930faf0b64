"""Deprecated name of the compiled extension, kept for code that imports it to see whether it is there.

`is_available` says whether the CUDA library of flash_dmattn can be loaded here, `why_unavailable` why not, `path` where
it lies, `architectures` for which GPUs it was compiled. There is nothing to call: use `flash_dmattn`.
"""

import warnings

from flash_dmattn.backends.cuda import library

warnings.warn("flash_dma_cuda is deprecated and holds no functions: use flash_dmattn", DeprecationWarning, stacklevel=2)

why_unavailable: str | None = library.why_unavailable()
is_available: bool = why_unavailable is None
path: str | None = str(library.PATH) if is_available else None
architectures: tuple[str, ...] = library.architectures() if is_available else ()

__all__ = ["architectures", "is_available", "path", "why_unavailable"]
