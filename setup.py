"""Maps the import packages to their folders and builds the CUDA library; everything else is in pyproject.toml.

The functional package lives in kernels/flash_dmattn, beside its CUDA sources. `kernels` itself must never
become importable: that is the name of Hugging Face's own package, which transformers imports.
"""

import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "kernels"))
from cuda_build.setuptools_command import plan_build  # noqa: E402

setup(
    packages=[
        "flash_dma_cuda",
        "flash_dmattn",
        *(f"flash_dmattn.{name}" for name in find_packages("kernels/flash_dmattn")),
        *find_packages(include=["flash_dmattn_hf", "flash_dmattn_hf.*"]),
    ],
    package_dir={
        "flash_dma_cuda": "kernels/flash_dma_cuda",
        "flash_dmattn": "kernels/flash_dmattn",
        "flash_dmattn_hf": "flash_dmattn_hf",
    },
    **plan_build("flash_dmattn"),
)
