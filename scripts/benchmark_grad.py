"""Compares the gradients of every engine, under masks and biases, with those of the softmax written down in float32.

    python scripts/benchmark_grad.py --test-type all --json grad.json --png grad.png

Relative errors of the gradients to query, key, value and bias, beside those of torch's own attention in the same
precision; rows that see nothing are left out, because torch's have no zero there. An engine passes with errors at most
twice as large as torch's, plus 1e-2 (float32: 1e-4). Exits with 1 when one does not.
"""

import argparse
import sys

import torch

from benchmark_masks import Inputs, Shape, definition, engines, make_inputs, why_not
from benchmark_report import environment, header, median_milliseconds, save_json

GRADIENTS = ("query", "key", "value", "bias")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--test-type", choices=["all", "cuda", "triton", "flex", "reference"], default="all")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--png", help="draw the errors")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    where = environment(device)
    print(header(where))
    wanted = ["cuda", "triton", "flex", "reference"] if arguments.test_type == "all" else [arguments.test_type]
    names = ["sdpa"]
    for name in wanted:
        reason = why_not(name)
        if name == "flex" and device == "cpu":
            reason = "FlexAttention has no backward on a CPU"
        if reason is None:
            names.append(name)
        else:
            print(f"{name}: left out, {reason}")
            if arguments.test_type == name:
                return 1
    print(f"{'case':<55} {'engine':>10} {'ms':>8}  " + " ".join(f"{'d' + name:>9}" for name in GRADIENTS))
    rows = []
    for shape in shapes(device):
        rows += compare(shape, names, device, dtype, arguments)
    if arguments.json:
        settings = {"seed": arguments.seed, "runs": arguments.runs, "dtype": str(dtype)}
        save_json(arguments.json, {"environment": where, "settings": settings, "rows": rows})
    if arguments.png:
        draw(arguments.png, where, rows)
    return 0 if all(row["passed"] for row in rows) else 1


def shapes(device: str) -> list[Shape]:
    length = 128 if device == "cpu" else 1024
    return [
        Shape(1, length, length, heads, kv_heads, head_dim, length // 4, is_causal, mask)
        for heads, kv_heads, head_dim in ((4, 4, 64), (8, 2, 128))
        for mask, is_causal in (("topk", True), ("random", True), ("random", False), ("key", False))
    ]


def compare(shape: Shape, names: list[str], device: str, dtype: torch.dtype, arguments) -> list[dict]:
    inputs = make_inputs(shape, device, dtype, arguments.seed)
    with torch.no_grad():
        sees_any = definition(shape, inputs).any(-1, keepdim=True)  # (B, Sq, H, 1)
    dout = torch.randn_like(inputs.query) * sees_any
    exact = Inputs(*(None if x is None else x.float() if x.is_floating_point() else x for x in vars(inputs).values()))
    leaves = exact.leaves()
    expected = torch.autograd.grad(definition(shape, exact), leaves, dout.float())
    rows = []
    for name in names:
        leaves = inputs.leaves()
        out = engines(shape)[name](inputs)
        found = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        errors = [
            ((one.float() - other).norm() / other.norm()).item() for one, other in zip(found, expected, strict=True)
        ]
        milliseconds = median_milliseconds(
            lambda out=out, leaves=leaves: torch.autograd.grad(out, leaves, dout, retain_graph=True),
            device,
            runs=arguments.runs,
            warmup=arguments.warmup,
        )
        slack = 1e-2 if dtype == torch.bfloat16 else 1e-4
        allowed = [2 * error + slack for error in (rows[0]["errors"].values() if rows else errors)]
        rows.append(
            {
                "case": str(shape),
                "engine": name,
                "milliseconds": milliseconds,
                "errors": dict(zip(GRADIENTS, errors, strict=False)),
                "passed": all(error <= most for error, most in zip(errors, allowed, strict=True)),
            }
        )
        print(
            f"{shape!s:<55} {name:>10} {milliseconds:>8.3f}  "
            + " ".join(f"{error:>9.2e}" for error in errors)
            + ("" if rows[-1]["passed"] else "  FAILED")
        )
    return rows


def draw(path: str, where: dict, rows: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(15, 4), sharey=True, constrained_layout=True)
    for axis, gradient in zip(axes, GRADIENTS, strict=True):
        for name in dict.fromkeys(row["engine"] for row in rows):
            errors = [row["errors"].get(gradient) for row in rows if row["engine"] == name]
            axis.semilogy(errors, marker="o", label=name)
        axis.set_title(f"d{gradient}")
        axis.set_xlabel("case")
        axis.grid(True, which="both", alpha=0.3)
    axes[0].set_ylabel("relative error")
    axes[0].legend()
    figure.suptitle(f"Gradients against the definition, {where['device']} ({where['date']})")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
