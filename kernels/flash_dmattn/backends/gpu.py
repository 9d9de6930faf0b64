"""Whether torch has a GPU to run on, in words."""

import torch


def why_no_gpu() -> str | None:
    """Returns why no CUDA GPU can be used here, or None."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "no CUDA GPU is visible to torch"
