"""Trains two-layer models on multi-query associative recall: dense, windows and DMA at equal budget.

    python scripts/benchmark_mqar.py --config configs/mqar/n256.yaml --json mqar.json --png mqar.png

All variants, schedules, seeds and learning rates train side by side as one batched model, on the same examples and for
the same number of steps. For every variant, schedule and seed the learning rate with the lowest loss on its own last
training batches is kept; accuracy is measured on sequences with all pairs, drawn anew, under the mask that the variant
ends with. Chance is one in the number of values. The schedules stand in `mqar.Run`.
"""

import argparse
import statistics
import time

import torch
import yaml

from benchmark_report import environment, header, save_json
from mqar.calibration import calibrate
from mqar.models import Models, Optimizer
from mqar.task import SCHEDULES, VARIANTS, Run, Task, make_runs
from mqar.training import Step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file with any of the settings below, which the command line overrides")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument(
        "--first-seqlens",
        type=int,
        nargs="*",
        default=[],
        help="lengths to train on before, each for as many steps, with the same number of tokens and share of keys",
    )
    parser.add_argument("--num-pairs", type=int, default=32)
    parser.add_argument("--num-symbols", type=int, default=64, help="keys, values and fillers, so many of each")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--num-heads", type=int, default=1)
    parser.add_argument("--keep-window-size", type=int, help="default: seqlen / 4")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[3e-3])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--seeds", type=int, default=3, help="models of each variant")
    parser.add_argument("--seed", type=int, default=42, help="of the examples")
    parser.add_argument("--log-every", type=int, default=500)
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--png", help="draw accuracy against steps")
    given, _ = parser.parse_known_args()
    if given.config:
        with open(given.config) as file:
            settings = yaml.safe_load(file)
        unknown = set(settings) - set(vars(given))
        if unknown:
            parser.error(f"{given.config} has settings that there are not: {sorted(unknown)}")
        parser.set_defaults(**settings)
    arguments = parser.parse_args()
    arguments.keep_window_size = arguments.keep_window_size or arguments.seqlen // 4

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    where = environment(device)
    print(header(where))
    start = time.perf_counter()
    runs = make_runs(arguments.variants, arguments.schedules, arguments.seeds, arguments.learning_rates)
    rows, curves, fits = train(arguments, runs, device)
    seconds = time.perf_counter() - start
    table = summarize(arguments, rows)
    print(f"{len(rows)} models in {seconds:.0f} s")
    settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "png")}
    if arguments.json:
        content = {"environment": where, "settings": settings, "seconds": seconds, "table": table, "rows": rows}
        save_json(arguments.json, content | {"calibration_r2": fits, "curves": curves})
    if arguments.png:
        draw(arguments.png, where, settings, table, runs, curves)


def train(arguments, runs: list[Run], device: str) -> tuple[list[dict], list[dict], dict[str, list[float]]]:
    """Returns a row for every model, its accuracy along the way, and how well the calibrations of conversions fit."""
    symbols = [arguments.num_symbols] * 3
    task = Task(arguments.seqlen, arguments.num_pairs, *symbols)
    first = [Task(seqlen, min(arguments.num_pairs, seqlen // 8), *symbols) for seqlen in arguments.first_seqlens]
    tasks = [*first, task]
    models = Models(runs, task, arguments.width, arguments.num_heads, arguments.keep_window_size, device)
    step_of_all = Step(models, Optimizer(models, arguments.steps))
    generator = torch.Generator(device).manual_seed(arguments.seed)
    held_out = torch.Generator(device).manual_seed(arguments.seed + 1)
    late, curves, fits = torch.zeros(len(runs), device=device), [], {}
    converted = [place for place, run in enumerate(runs) if run.has_importance and run.schedule == "converted"]
    for step in range(1, arguments.steps + 1):
        now = tasks[(step - 1) * len(tasks) // arguments.steps]
        batch_size = arguments.batch_size * task.seqlen // now.seqlen
        if converted and step == (arguments.steps + 1) // 2 + 1:
            fits = calibrate(models, converted, now.sample(batch_size, generator, mixed=True)[0])
        models.advance((step - 1) / arguments.steps, now.seqlen)
        losses = step_of_all(*now.sample(batch_size, generator, mixed=True))
        late = late + losses if step > arguments.steps - 50 else late
        if step % arguments.log_every == 0 or step == arguments.steps:
            accuracy = evaluate(models, task, arguments.batch_size, 1, held_out)
            curves.append({"step": step, "accuracy": accuracy, "loss": losses.tolist()})
            best = {name: max(accuracy[place] for place in places) for name, places in by_name(runs).items()}
            print(f"step {step}: best accuracy " + ", ".join(f"{v} {a:.3f}" for v, a in best.items()), flush=True)
    accuracy = evaluate(models, task, arguments.batch_size, 8, held_out)
    rows = [
        {**vars(run), "train_loss": loss / 50, "accuracy": found}
        for run, loss, found in zip(runs, late.tolist(), accuracy, strict=True)
    ]
    return rows, curves, fits


def by_name(runs: list[Run]) -> dict[str, list[int]]:
    """Returns where the runs of every variant and schedule stand."""
    return {name: [p for p, run in enumerate(runs) if run.name == name] for name in dict.fromkeys(r.name for r in runs)}


@torch.no_grad()
def evaluate(models: Models, task: Task, batch_size: int, batches: int, generator: torch.Generator) -> list[float]:
    """Returns each model's share of right answers under the mask that it ends with."""
    models.advance(1.0, task.seqlen)
    right, asked = 0, 0
    for _ in range(batches):
        tokens, targets = task.sample(batch_size, generator, mixed=False)
        answers = models.logits(tokens).argmax(-1)
        targets = targets[:, -answers.shape[2] :]
        right = right + ((answers == targets) & (targets >= 0)).flatten(1).sum(1)
        asked = asked + (targets >= 0).sum()
    return (right / asked).tolist()


def summarize(arguments, rows: list[dict]) -> list[dict]:
    """Prints and returns mean and spread over seeds, the best learning rate by training loss for each."""
    print(f"{'variant':>24} {'keys':>6} {'accuracy':>9} {'lowest':>8} {'highest':>8} {'deviation':>10}")
    table = []
    for variant, schedule in dict.fromkeys((row["variant"], row["schedule"]) for row in rows):
        kept = []
        for seed in range(arguments.seeds):
            own = [r for r in rows if (r["variant"], r["schedule"], r["seed"]) == (variant, schedule, seed)]
            kept.append(min(own, key=lambda row: row["train_loss"])["accuracy"])
        keys = arguments.seqlen if variant == "dense" else arguments.keep_window_size
        mean, deviation = statistics.mean(kept), statistics.stdev(kept) if len(kept) > 1 else 0.0
        table.append({"variant": variant, "schedule": schedule, "keys": keys, "accuracies": kept, "mean": mean})
        table[-1]["deviation"] = deviation
        name = f"{variant} {schedule}"
        print(f"{name:>24} {keys:>6} {mean:>9.4f} {min(kept):>8.4f} {max(kept):>8.4f} {deviation:>10.4f}")
    print(f"chance: {1 / arguments.num_symbols:.4f}")
    return table


def draw(path: str, where: dict, settings: dict, table: list[dict], runs: list[Run], curves: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), constrained_layout=True)
    for place, row in enumerate(table):
        name = f"{row['variant']} {row['schedule']}"
        left.barh(name, row["mean"], alpha=0.5, color=f"C{VARIANTS.index(row['variant'])}")
        left.plot(row["accuracies"], [place] * len(row["accuracies"]), "k.")
    left.invert_yaxis()
    left.axvline(1 / settings["num_symbols"], color="gray", linestyle=":", label="chance")
    left.set_xlabel("accuracy, a point for each seed")
    left.legend()
    styles = dict(zip(SCHEDULES, ("-", ":"), strict=True))
    for name, places in by_name(runs).items():
        best = [max(curve["accuracy"][place] for place in places) for curve in curves]
        run = runs[places[0]]
        color = f"C{VARIANTS.index(run.variant)}"
        right.plot([c["step"] for c in curves], best, styles[run.schedule], color=color, label=name)
    right.set_xlabel("step")
    right.set_ylabel("best accuracy")
    right.legend(fontsize=7)
    figure.suptitle(
        f"MQAR, N = {settings['seqlen']}, {settings['num_pairs']} pairs, w = {settings['keep_window_size']}, width "
        f"{settings['width']}, {settings['seeds']} seeds, {where['device']} ({where['date']})"
    )
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
