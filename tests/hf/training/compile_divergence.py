"""Compiles the kernel of the divergence for a GPU that need not be here, and prints what each variant takes.

    python compile_divergence.py CAPABILITY      e.g. 90

A line has a name, and then numbers: registers of a thread, bytes of shared memory, bytes of a thread's stack, where
spilled registers go. Not for Triton's interpreter, which compiles nothing: hence a process of its own.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flash_dmattn_hf.training import divergence_kernel

TENSORS = {"nats_ptr": "*fp32", "same_ptr": "*i32", "factors_ptr": "*fp32"}


def compile_kernel(capability, expected, logits, gradient, vocabulary=None, is_aligned=True):
    """Returns registers, shared memory and stack. gradient: its dtype or None. vocabulary: its number if it is 1."""
    kernel = divergence_kernel._divergence
    types = TENSORS | {"expected_ptr": f"*{expected}", "logits_ptr": f"*{logits}"}
    types |= {"gradient_ptr": f"*{gradient or 'fp32'}", "vocabulary": "i32"}
    constants = {"BLOCK": divergence_kernel._BLOCK, "HAS_GRADIENT": gradient is not None}
    if vocabulary is not None:
        constants["vocabulary"] = vocabulary
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name.endswith("_ptr") or (is_aligned and name not in constants)
    }
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": divergence_kernel._WARPS})
    registers, stack = resources(compiled.asm["cubin"])
    return registers, compiled.metadata.shared, stack


def resources(cubin: bytes) -> tuple[int, int]:
    """Returns registers and bytes of stack of a thread."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return tuple(int(number) for number in re.search(r"REG:(\d+) STACK:(\d+)", said).groups())


def main():
    capability = int(sys.argv[1])
    variants = {
        "float32": ("fp32", "fp32", "fp32"),
        "bfloat16": ("bf16", "bf16", "bf16"),
        "bfloat16, operations": ("bf16", "bf16", "fp32"),
        "bfloat16, no gradient": ("bf16", "bf16", None),
        "bfloat16, odd vocabulary": ("bf16", "bf16", "bf16", None, False),
        "float16 after float32, one word": ("fp32", "fp16", "fp16", 1),
    }
    for name, variant in variants.items():
        print(f"{name}:", *compile_kernel(capability, *variant))


if __name__ == "__main__":
    main()
