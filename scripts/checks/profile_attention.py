"""Profiles the kernels of one forward and backward with Nsight Compute, and says what they are busy with.

    python scripts/checks/profile_attention.py --head-dims 64 128 256 --output docs/benchmarks/profile_h100.txt

Needs ncu (it comes with the CUDA toolkit) and the right to read hardware counters. Rates are percentages of what the
GPU could do over the kernel's time; stalls are cycles between two instructions of a warp, by the reason for waiting.
"""

import argparse
import csv
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import flash_dmattn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the files that all scripts share

from benchmark_report import environment, header  # noqa: E402

SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats")
RATES = {
    "ms": r"gpu__time_duration\.sum",
    "tensor": r"sm__(inst_executed_pipe|pipe)_tensor\w*\.avg\.pct_of_peak_sustained_(active|elapsed)",
    "issue": r"(sm__inst_issued|smsp__issue_active)\.avg\.pct_of_peak_sustained_active",
    "L1": r"l1tex__throughput\.avg\.pct_of_peak_sustained_active",
    "L2": r"lts__throughput\.avg\.pct_of_peak_sustained_elapsed",
    "DRAM": r"(gpu__dram|dram_)_throughput\.avg\.pct_of_peak_sustained_elapsed",
}
STALL = r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio"
NUM_STALLS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--seqlen", type=int, default=32768)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128])
    parser.add_argument("--keep-window-size", type=int, default=2048)
    parser.add_argument("--kernels", default="(forward|backward)_kernel", help="which kernels, as a regular expression")
    parser.add_argument("--output", type=Path, help="write the table to this file")
    parser.add_argument("--raw", type=Path, help="write every metric of ncu to this folder")
    parser.add_argument("--watched", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.watched:
        return attend(arguments)
    if shutil.which("ncu") is None:
        parser.error("ncu is not in PATH: it comes with the CUDA toolkit")

    shape = f"N={arguments.seqlen}, w={arguments.keep_window_size}, 4096 / D query heads, 4 a kv head, iid, bf16"
    lines = [header(environment("cuda")), shape, ""]
    names = "".join(f"{name:>8}" for name in RATES)
    lines.append(f"{'D':>3} {'kernel':<28}{names}  stalls, cycles an instruction")
    for head_dim in arguments.head_dims:
        for metrics in profile(arguments, head_dim):
            lines.append(f"{head_dim:>3} {describe(metrics)}")
    report = "\n".join(lines)
    print(report)
    if arguments.output:
        arguments.output.write_text(report + "\n")


def attend(arguments: argparse.Namespace) -> None:
    """What ncu watches: the second of two forwards and backwards."""
    head_dim, seqlen = arguments.head_dims[0], arguments.seqlen
    num_heads = 4096 // head_dim
    query, dout = torch.randn(2, 1, seqlen, num_heads, head_dim, device="cuda", dtype=torch.bfloat16)
    key, value = torch.randn(2, 1, seqlen, num_heads // 4, head_dim, device="cuda", dtype=torch.bfloat16)
    importance = torch.randn(1, num_heads // 4, seqlen, device="cuda")
    inputs = [tensor.requires_grad_() for tensor in (query, key, value, importance)]
    for is_watched in (False, True):
        torch.cuda.synchronize()
        if is_watched:
            torch.cuda.profiler.start()
        out = flash_dmattn.dynamic_mask_attention(
            *inputs, keep_window_size=arguments.keep_window_size, backend=arguments.backend
        )
        torch.autograd.grad(out, inputs, dout)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def profile(arguments: argparse.Namespace, head_dim: int) -> list[dict[str, str]]:
    """Returns the metrics of every kernel that ncu was asked to watch; raises RuntimeError if there is none."""
    command = ["ncu", "--csv", "--page", "raw", "--profile-from-start", "off", "--clock-control", "none"]
    command += ["--print-units", "base"]
    command += [option for section in SECTIONS for option in ("--section", section)]
    command += ["--kernel-name", f"regex:{arguments.kernels}", sys.executable, __file__, "--watched"]
    command += ["--backend", arguments.backend, "--seqlen", str(arguments.seqlen), "--head-dims", str(head_dim)]
    command += ["--keep-window-size", str(arguments.keep_window_size)]
    run = subprocess.run(command, capture_output=True, text=True)
    if arguments.raw:
        arguments.raw.mkdir(parents=True, exist_ok=True)
        (arguments.raw / f"d{head_dim}.csv").write_text(run.stdout)
    table = [line for line in run.stdout.splitlines() if line.startswith('"')]
    kernels = list(csv.DictReader(io.StringIO("\n".join(table))))[1:]  # below the names stand the units
    if run.returncode != 0 or not kernels:
        raise RuntimeError(f"ncu has watched no kernel:\n{run.stdout[-2000:]}\n{run.stderr[-2000:]}")
    return kernels


def describe(metrics: dict[str, str]) -> str:
    """Returns a kernel's row of the table; "-" where ncu has no such metric."""
    name = re.sub(r"<.*|^void |flash_dmattn::", "", metrics["Kernel Name"])
    cells = []
    for rate, pattern in RATES.items():
        found = [number(value) for metric, value in metrics.items() if re.search(pattern + "$", metric)]
        if rate == "ms":
            found = [nanoseconds / 1e6 for nanoseconds in found]
        cells.append(f"{max(found):>8.2f}" if found else f"{'-':>8}")
    stalls = {}
    for metric, value in metrics.items():
        match = re.search(STALL + "$", metric)
        if match:
            stalls[match[1].replace("_", " ")] = number(value)
    worst = sorted(stalls.items(), key=lambda item: -item[1])[:NUM_STALLS]
    return f"{name:<28}" + "".join(cells) + "  " + ", ".join(f"{reason} {value:.2f}" for reason, value in worst)


def number(text: str) -> float:
    return float(text.replace(",", "") or 0)


if __name__ == "__main__":
    main()
