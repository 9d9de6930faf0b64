"""Builds the CUDA library of flash_dmattn from kernels/csrc with nvcc and ninja; needs no torch and no GPU.

setup.py uses it through `setuptools_command`; `python -m cuda_build` builds and reports without installing.
"""
