"""Which versions of transformers this package was tested with, and the warning about others."""

import inspect
import warnings

import transformers
from packaging.version import Version
from transformers import masking_utils

TESTED = ("5.17.0", "5.23.0", "5.24.0")
"""Versions that the whole of tests/hf was run with, oldest first; pyproject.toml requires what lies between."""


FIRST_SERVING = "5.23.0"
"""The first version of transformers whose continuous batching can hold something else than pages."""


def can_serve(version: str = transformers.__version__) -> bool:
    """Whether a version of transformers can do continuous batching with flash_dmattn."""
    return Version(version).release >= Version(FIRST_SERVING).release


def can_mask_chunks() -> bool:
    """Whether generate() can make the masks of chunked layers before a forward, as it does for a static cache.

    transformers 5.17 calls the function for it with an argument that it does not take.
    """
    return "block_sequence_ids" in inspect.signature(masking_utils.create_chunked_causal_mask).parameters


FIRST_MESH = "5.23.0"
"""The first tested version of transformers that shares a model by tensor parallelism and by FSDP at once."""


def can_share_twice(version: str = transformers.__version__) -> bool:
    """Whether a version of transformers can share a model by tensor parallelism and by FSDP at once."""
    return Version(version).release >= Version(FIRST_MESH).release


def is_covered(version: str) -> bool:
    """Whether a version of transformers lies between the oldest and the newest tested one, patches of that included."""
    oldest, newest = Version(TESTED[0]), Version(TESTED[-1])
    return oldest <= Version(version) and Version(version).release[:2] <= newest.release[:2]


def warn_if_untested(version: str = transformers.__version__) -> None:
    """Warns, by name, about a version of transformers that the tests did not cover; the import does so once."""
    if not is_covered(version):
        warnings.warn(
            f"flash_dmattn_hf was tested with transformers {TESTED[0]} to {TESTED[-1]}, not with "
            f"{version}, which is installed: install a tested one if something breaks",
            stacklevel=2,
        )
