"""Compares the forward of every engine, under masks and biases, with the softmax written down in float32.

    python scripts/benchmark_forward_equivalence.py --test-type all --json equivalence.json --png equivalence.png

"within" is the share of output elements closer to the definition than 1e-2 + 2e-2 of their size (float32: 1e-5 + 1e-4);
an engine passes with --accuracy-threshold of them. Exits with 1 when one does not.
"""

import argparse
import itertools
import sys

import torch

from benchmark_masks import Shape, definition, engines, make_inputs, why_not
from benchmark_report import environment, header, save_json

HEADS = ((1, 1), (4, 2), (8, 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--verbose", action="store_true", help="a line for every case, not only for every engine")
    parser.add_argument("--accuracy-threshold", type=float, default=0.95, help="share of elements that must be close")
    parser.add_argument("--test-type", choices=["all", "cuda", "triton", "flex", "reference"], default="all")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--png", help="draw the errors")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    where = environment(device)
    print(header(where))
    names = ["cuda", "triton", "flex", "reference"] if arguments.test_type == "all" else [arguments.test_type]
    rows = []
    for name in names:
        reason = why_not(name)
        if reason is not None:
            print(f"{name}: left out, {reason}")
            if arguments.test_type == name:
                return 1
            continue
        rows += [compare(name, shape, device, dtype, arguments) for shape in shapes(device)]
    report(rows, arguments.verbose)
    if arguments.json:
        settings = {"seed": arguments.seed, "accuracy_threshold": arguments.accuracy_threshold, "dtype": str(dtype)}
        save_json(arguments.json, {"environment": where, "settings": settings, "rows": rows})
    if arguments.png:
        draw(arguments.png, where, rows)
    return 0 if all(row["passed"] for row in rows) else 1


def shapes(device: str) -> list[Shape]:
    lengths = ((256, 256), (100, 300), (1, 512)) if device == "cpu" else ((1024, 1024), (1000, 2052), (1, 4096))
    return [
        Shape(2, *length, *heads, head_dim, length[1] // 4, is_causal, mask)
        for length, (heads, head_dim), (mask, is_causal) in itertools.product(
            lengths,
            zip(HEADS, (64, 128, 32), strict=True),
            (("topk", True), ("key", False), ("random", True), ("random", False)),
        )
    ]


def compare(name: str, shape: Shape, device: str, dtype: torch.dtype, arguments) -> dict:
    inputs = make_inputs(shape, device, dtype, arguments.seed)
    with torch.no_grad():
        expected = definition(shape, inputs)
        error = (engines(shape)[name](inputs).float() - expected).abs()
    absolute, relative = (1e-2, 2e-2) if dtype == torch.bfloat16 else (1e-5, 1e-4)
    within = (error <= absolute + relative * expected.abs()).float().mean().item()
    return {
        "engine": name,
        "case": str(shape),
        "max_error": error.max().item(),
        "relative_error": (error.norm() / expected.norm()).item(),
        "within": within,
        "passed": within >= arguments.accuracy_threshold,
    }


def report(rows: list[dict], verbose: bool) -> None:
    if verbose:
        for row in rows:
            print(
                f"{row['engine']:>10}  {row['case']:<55} max {row['max_error']:.2e}"
                f"  relative {row['relative_error']:.2e}  within {row['within']:.4f}"
                f"  {'passed' if row['passed'] else 'FAILED'}"
            )
    print(
        f"{'engine':>10} {'cases':>6} {'passed':>7} {'largest error':>14} {'largest relative':>17} {'least within':>13}"
    )
    for name in dict.fromkeys(row["engine"] for row in rows):
        own = [row for row in rows if row["engine"] == name]
        print(
            f"{name:>10} {len(own):>6} {sum(row['passed'] for row in own):>7} "
            f"{max(row['max_error'] for row in own):>14.2e} {max(row['relative_error'] for row in own):>17.2e} "
            f"{min(row['within'] for row in own):>13.4f}"
        )


def draw(path: str, where: dict, rows: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 4.5), constrained_layout=True)
    for name in dict.fromkeys(row["engine"] for row in rows):
        axis.semilogy([row["relative_error"] for row in rows if row["engine"] == name], marker="o", label=name)
    axis.set_xlabel("case")
    axis.set_ylabel("relative error of the output")
    axis.grid(True, which="both", alpha=0.3)
    axis.legend()
    figure.suptitle(f"Forward against the definition, {where['device']} ({where['date']})")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
