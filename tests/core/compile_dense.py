"""Compiles the Triton kernels for masks and biases for a GPU that need not be here; prints the shared memory of each.

    python compile_dense.py CAPABILITY SHARED_MEMORY DTYPE HEAD_DIM [DBIAS]      e.g. 89 101376 bfloat16 256 store

Not for Triton's interpreter, which compiles nothing: hence a process of its own.
"""

import sys
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flash_dmattn.backends.triton import configs as shared_configs
from flash_dmattn.dense import configs
from flash_dmattn.dense.backward_kernels import _dkey_dvalue, _dquery
from flash_dmattn.dense.forward_kernels import _forward
from flash_dmattn.dense.tiles import _classify

DATA = {f"{name}_ptr" for name in "out query key value dout dquery dkey dvalue bias dbias".split()}
TYPES = {"mask_ptr": "*u8", "classes_ptr": "*u8", "order_ptr": "*i32", "counts_ptr": "*i32"}
NUMBERS = {"softmax_scale": "fp32", "softcap": "fp32"}


def compile_kernel(kernel, config, capability, dtype, head_dim, dbias="store"):
    """Returns the compiled kernel."""
    constants = {
        "KV_HEADS": 8,
        "GROUP": 4,
        "MASK_BATCHES": 1,
        "MASK_HEADS": 8,
        "BIAS_HEADS": 8,
        "LIST_HEADS": 8,
        "DBIAS_HEADS": 8,
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "HAS_MASK": True,
        "HAS_WORDS": False,
        "HAS_BIAS": True,
        "HAS_SOFTCAP": False,
        "IS_CAUSAL": True,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "DBIAS": dbias,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "GRAIN_M": config.block_m,
        "GRAIN_N": config.block_n,
        "SPAN": 128 // config.block_n,
        "mask_key_stride": 1,
        "bias_key_stride": 1,
    }
    data = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name == "dbias_ptr" and dbias != "store":
            signature[name] = "*fp32"
        elif name.endswith("_ptr"):
            signature[name] = TYPES.get(name, data if name in DATA else "*fp32")
        else:
            signature[name] = NUMBERS.get(name, "i32")
        if name not in constants and name.endswith(("_ptr", "_stride", "seqlen_q", "seqlen_k")):
            attributes[(index,)] = [["tt.divisibility", 16]]
    used = {name: value for name, value in constants.items() if name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=used, attrs=attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main():
    capability, shared_memory, head_dim = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[4])
    dtype = getattr(torch, sys.argv[3])
    dbias = sys.argv[5] if len(sys.argv) > 5 else "store"
    query = torch.empty(1, 1, 8, head_dim, dtype=dtype)
    with patch.object(shared_configs, "_shared_bytes", lambda device: shared_memory):
        grain = shared_configs.BlockConfig(*configs.grains(query), 4, 1)
        kernels = {
            "classify": (_classify, grain),
            "forward": (_forward, configs.forward_config(query)),
            "dquery": (_dquery, configs.dquery_config(query)),
            "dkey, dvalue": (_dkey_dvalue, configs.dkey_config(query)),
        }
    for name, (kernel, config) in kernels.items():
        print(f"{name}: {compile_kernel(kernel, config, capability, dtype, head_dim, dbias).metadata.shared}")


if __name__ == "__main__":
    main()
