"""The CUDA engine: kernels compiled when the package is installed."""
