"""Times whole steps of a distillation, of both stages, with plain and with compiled decoder layers.

    python scripts/benchmark_distillation_step.py --model MODEL --tokens tok.pt --profile --output step.json

tok.pt holds {"train": token ids (N,)}. A step is teacher, student, loss, backward and optimizer, as the stages of
`flash-dmattn distill` take it. The first WARMUP steps of a row compile. `start_seconds` is how much longer they
took than as many later ones; `graphs` and `graph_breaks` say what became of the layers. A layer that
torch.compile gives up on after too many recompilations is an error here. Milliseconds are the median.
With --profile one more step, under a profiler, says how many kernels it launches and how long they take together.
"""

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from benchmark_report import environment, header, save_json
from compare_recipes import convert, find_source
from flash_dmattn_hf.training.recipe import STAGES, Recipe
from flash_dmattn_hf.training.stages import train_stage

WARMUP = 3
TOP = 25


class Watch(TrainerCallback):
    """Times every step, and profiles the last one if it is to."""

    def __init__(self, device: str, profiled: int | None) -> None:
        self.device, self.profiled, self.seconds, self.profiler = device, profiled, [], None

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == WARMUP and self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if state.global_step == self.profiled:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self.device == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.profiler = torch.profiler.profile(activities=activities)
            self.profiler.__enter__()
        self._begun = self._now()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seconds.append(self._now() - self._begun)
        if state.global_step - 1 == self.profiled:
            self.profiler.__exit__(None, None, None)


def main() -> None:
    arguments = parse()
    where = environment(arguments.device)
    print(header(where), flush=True)
    source = find_source(arguments.model)
    tokens = torch.load(arguments.tokens, weights_only=True)["train"].long()
    rows = []
    for compiles in arguments.compile:
        recipe = make_recipe(arguments, compiles)
        model = convert(source, recipe, tokens, arguments.device)
        for stage in STAGES:
            model, row = measure(model, stage, recipe, tokens, arguments)
            rows.append({"stage": stage, "compile": compiles, **row})
            print(", ".join(f"{name} {value}" for name, value in rows[-1].items() if name != "profile"), flush=True)
            if arguments.output:
                settings = {name: str(value) for name, value in vars(arguments).items()}
                report = {"environment": where, "command": shlex.join(["python", *sys.argv]), "settings": settings}
                save_json(arguments.output, {**report, "rows": rows})
        del model


def make_recipe(arguments: argparse.Namespace, compiles: bool) -> Recipe:
    total = WARMUP + arguments.steps + arguments.profile
    return Recipe(
        keep_window_size=arguments.keep_window_size,
        length=arguments.length,
        batch_size=arguments.batch_size,
        steps=2 * total,
        importance_share=0.5,
        evaluations=0,
        save_steps=10**6,
        compile=compiles,
    )


def measure(model, stage: str, recipe: Recipe, tokens: torch.Tensor, arguments: argparse.Namespace):
    """Returns the model, trained for the steps of a stage, and the row of figures."""
    torch.compiler.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # or the layer would run uncompiled
    counters = torch._dynamo.utils.counters
    counters.clear()
    watch = Watch(arguments.device, WARMUP + arguments.steps if arguments.profile else None)
    with tempfile.TemporaryDirectory() as folder:
        model, log = train_stage(model, stage, recipe, tokens, Path(folder), callbacks=[watch])
    seconds = watch.seconds[WARMUP : WARMUP + arguments.steps]
    middle = statistics.median(seconds)
    row = {
        "milliseconds": round(1e3 * middle, 2),
        "tokens_per_second": round(recipe.batch_size * recipe.length / middle),
        "start_seconds": round(sum(watch.seconds[:WARMUP]) - WARMUP * middle, 2),
        "graphs": counters["stats"].get("unique_graphs", 0),
        "graph_breaks": sum(counters["graph_break"].values()),
        "train_loss": next(entry["train_loss"] for entry in reversed(log) if "train_loss" in entry),
    }
    if arguments.device == "cuda":
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    if watch.profiler is not None:
        row |= summary(watch.profiler, arguments.device)
    return model, row


def summary(profiler: torch.profiler.profile, device: str) -> dict:
    """Returns kernels launched, their time together, and the largest by time and by launches; on a CPU operations."""
    kind = torch.autograd.DeviceType.CUDA if device == "cuda" else torch.autograd.DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == kind]
    found = [
        {
            "name": event.key[:160],
            "launches": event.count,
            "milliseconds": (event.self_device_time_total if device == "cuda" else event.self_cpu_time_total) / 1e3,
        }
        for event in events
    ]
    return {
        "launches": sum(entry["launches"] for entry in found),
        "kernel_milliseconds": round(sum(entry["milliseconds"] for entry in found), 2),
        "profile": {name: sorted(found, key=lambda entry: -entry[name])[:TOP] for name in ("milliseconds", "launches")},
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the dense model: a directory, a name, or a GGUF file")
    parser.add_argument("--tokens", required=True, type=Path, help="token ids to train on")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--keep-window-size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10, help=f"that are timed, after {WARMUP} others")
    parser.add_argument("--compile", choices=["both", "on", "off"], default="both")
    parser.add_argument("--profile", action="store_true", help="count the kernels of one more step")
    parser.add_argument("--output", metavar="JSON", type=Path, help="write the figures to this file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    arguments.compile = {"both": [False, True], "on": [True], "off": [False]}[arguments.compile]
    return arguments


if __name__ == "__main__":
    main()
