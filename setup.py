"""Maps the import packages to their folders; everything else is in pyproject.toml.

The functional package lives in kernels/flash_dmattn, beside its CUDA sources. `kernels` itself must never
become importable: that is the name of Hugging Face's own package, which transformers imports.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        "flash_dmattn",
        *(f"flash_dmattn.{name}" for name in find_packages("kernels/flash_dmattn")),
        *find_packages(include=["flash_dmattn_hf", "flash_dmattn_hf.*"]),
    ],
    package_dir={"flash_dmattn": "kernels/flash_dmattn", "flash_dmattn_hf": "flash_dmattn_hf"},
)
