"""The backends that serve attention under a mask and a bias, best first.

A backend is a module as in `flash_dmattn.backends`, whose backward is told besides whether the bias needs a gradient:

    backward(call, out, stats, dout, dlse, needs_dbias) -> (dquery, dkey, dvalue, dbias or None)

There are no kernels in CUDA here: "cuda" stands for those in Triton.
"""

from flash_dmattn.backends import flex
from flash_dmattn.dense import gpu, reference

DENSE_BACKENDS = {"triton": gpu, "flex": flex, "reference": reference}
