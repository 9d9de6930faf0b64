"""Compiles the Triton kernels for a GPU that need not be here, and prints the shared memory that each takes.

    python compile_triton.py CAPABILITY SHARED_MEMORY DTYPE HEAD_DIM      e.g. 89 101376 bfloat16 256

Not for Triton's interpreter, which compiles nothing: hence a process of its own.
"""

import sys
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flash_dmattn.backends.triton import configs, sink_logits
from flash_dmattn.backends.triton.backward_kernels import _dkey_dvalue, _dquery
from flash_dmattn.backends.triton.causal_kernels import LARGEST_BIAS, _causal_forward
from flash_dmattn.backends.triton.decode_kernel import _decode
from flash_dmattn.backends.triton.float8 import FIRST_GPU
from flash_dmattn.backends.triton.forward_kernels import _forward
from flash_dmattn.backends.triton.importance_kernel import _importance
from flash_dmattn.backends.triton.soft_cut import _BLOCK, _cut, _cut_backward

DATA = {"out_ptr", "query_ptr", "key_ptr", "value_ptr", "dout_ptr", "dquery_ptr", "result_ptr", "dresult_ptr"}
INDICES = {f"{name}_ptr" for name in "birth death start positions entries sections stretches contested".split()}
INDICES |= {"arrivals_ptr", "lengths_ptr", "rows_ptr", "victims_ptr"}
INDICES |= {f"{name}_ptr" for name in "cut dying given_contested cu_seqlens".split()}
OTHERS = {"padding_ptr": "*i1", "worst_ptr": "*i64", "scale_ptr": "*fp64", "seed_ptr": "*i64", "keep_scale": "fp32"}
OTHERS |= {"key_scales_ptr": "*bf16", "value_scales_ptr": "*bf16"}
SLOT_DATA = {"keys_ptr", "values_ptr"}
SLOTS = 2048
ALIGNED = {"seqlen_q", "seqlen_k", "capacity", "num_epochs", "tiles_per_epoch"}


def compile_kernel(
    kernel, config, capability, dtype, head_dim, is_listed, is_soft=False, has_dropout=False, is_rounded=False
):
    """Returns the bytes of shared memory that a kernel takes."""
    block_m = getattr(config, "block_m", 16)
    constants = {
        "HEADS": 8,
        "GROUP": 4,
        "HEADS_PER_KV": 1,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK_V": triton.next_power_of_2(head_dim),
        "EPOCH": 512,
        "TILE": block_m // 4,
        "TILES": 16,
        "LISTED": is_listed,
        "HAS_BIAS": True,
        "HAS_SOFTCAP": True,
        "HAS_START": True,
        "HAS_POSITIONS": False,
        "HAS_SOFT": is_soft,
        "HAS_DROPOUT": has_dropout,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "SUM_HEADS": 8,
        "LARGEST_BIAS": LARGEST_BIAS,
        "LARGEST_TOTAL": 2.0**64,
        "BLOCK_M": block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_G": 16,
        "BLOCK_S": 16,
        "GROUP_ROWS": 4,
        "EVEN": True,
        "SPLIT": SLOTS // 16,
        "SPLITS": 16,
        "HAS_PADDING": True,
        "HAS_ROWS": True,
        "ROUNDED": is_rounded,
        "WIDTH": triton.next_power_of_2(head_dim),
        "ROWS": sink_logits._BLOCK // triton.next_power_of_2(head_dim),
        "NUM_INPUTS": 8 * head_dim,
        "BLOCK": config.block_n,
        "HAS_EXP": True,
        "HAS_CONTESTED": True,
        "HAS_KEPT": True,
        "HAS_TEMPERATURE": True,
        "IS_PACKED": True,
    }
    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in SLOT_DATA and is_rounded:
            signature[name] = "*fp8e4nv"
        elif name in DATA | SLOT_DATA:
            signature[name] = types[dtype]
        elif name in INDICES:
            signature[name] = "*i32"
        elif name in OTHERS:
            signature[name] = OTHERS[name]
        elif name.endswith("_ptr") or name.startswith(("soft", "max_exponent", "temperature")):
            signature[name] = "*fp32" if name.endswith("_ptr") else "fp32"
        else:
            signature[name] = "i32"
        if name.endswith(("_ptr", "_stride")) or name in ALIGNED:
            attributes[(index,)] = [["tt.divisibility", 16]]
    used = {name: value for name, value in constants.items() if name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=used, attrs=attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if getattr(config, "max_registers", None) is not None:
        options["maxnreg"] = config.max_registers
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared


def main():
    capability, shared_memory, head_dim = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[4])
    dtype = getattr(torch, sys.argv[3])
    query = torch.empty(1, 1, 8, head_dim, dtype=dtype)
    with patch.object(configs, "_shared_bytes", lambda device: shared_memory):
        decode = (_decode, configs.decode_config(8, SLOTS, query), True)
        kernels = {
            "forward": (_forward, configs.forward_config(query), True),
            "forward without lists": (_causal_forward, configs.causal_config(query), False),
            "dquery": (_dquery, configs.dquery_config(query), True),
            "dkey, dvalue": (_dkey_dvalue, configs.dkey_config(query), True),
            "decode": decode,
            "token importance": (_importance, configs.DecodeConfig(SLOTS, 1024, 4, 1), True),
            "sinks": (sink_logits._scale_rows, configs.DecodeConfig(SLOTS, 1, 4, 1), True),
            "sinks backward": (sink_logits._scale_rows_backward, configs.DecodeConfig(SLOTS, 1, 4, 1), True),
        }
        if divmod(capability, 10) >= FIRST_GPU:
            kernels["decode in 8 bits"] = (*decode, False, False, True)
        soft_kernels = {
            "soft forward": (_forward, configs.forward_config(query, True), True, True),
            "soft dquery": (_dquery, configs.dquery_config(query, True), True, True),
            "soft dkey, dvalue": (_dkey_dvalue, configs.dkey_config(query, True), True, True),
            "forward with dropout": (_forward, configs.forward_config(query, True), True, False, True),
            "dquery with dropout": (_dquery, configs.dquery_config(query, True), True, False, True),
            "dkey, dvalue with dropout": (_dkey_dvalue, configs.dkey_config(query, True), True, False, True),
            "soft cut": (_cut, configs.DecodeConfig(SLOTS, _BLOCK, 8, 1), True),
            "soft cut backward": (_cut_backward, configs.DecodeConfig(SLOTS, _BLOCK, 8, 1), True),
        }
    for name, (kernel, config, *options) in {**kernels, **soft_kernels}.items():
        print(f"{name}: {compile_kernel(kernel, config, capability, dtype, head_dim, *options)}")


if __name__ == "__main__":
    main()
