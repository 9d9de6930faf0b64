"""Trains two-layer models on multi-query associative recall: dense, windows and DMA at equal budget.

    python scripts/benchmark_mqar.py --config configs/mqar/n256.yaml --json mqar.json --png mqar.png

All variants, seeds and learning rates train side by side as one batched model, on the same examples. For every variant
and seed the learning rate with the lowest loss on its own last training batches is kept; accuracy is measured on
sequences with all pairs, drawn anew. Chance is one in the number of values.
"""

import argparse
import statistics
import time

import torch
import yaml
from torch.nn.functional import cross_entropy

from benchmark_report import environment, header, save_json
from mqar import VARIANTS, Models, Optimizer, Run, Task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file with any of the settings below, which the command line overrides")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--num-pairs", type=int, default=32)
    parser.add_argument("--num-symbols", type=int, default=64, help="keys, values and fillers, so many of each")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--num-heads", type=int, default=1)
    parser.add_argument("--keep-window-size", type=int, help="default: seqlen / 4")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[3e-3])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
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
    where = environment(device)
    print(header(where))
    start = time.perf_counter()
    rows, curves = train(arguments, device)
    seconds = time.perf_counter() - start
    table = summarize(arguments, rows)
    print(f"{len(rows)} models in {seconds:.0f} s")
    settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "png")}
    if arguments.json:
        content = {"environment": where, "settings": settings, "seconds": seconds, "table": table, "rows": rows}
        save_json(arguments.json, content | {"curves": curves})
    if arguments.png:
        draw(arguments.png, where, settings, table, curves)


def train(arguments, device: str) -> tuple[list[dict], list[dict]]:
    """Returns a row for every model, and its accuracy along the way."""
    task = Task(arguments.seqlen, arguments.num_pairs, *[arguments.num_symbols] * 3)
    runs = [
        Run(variant, seed, rate)
        for variant in arguments.variants
        for seed in range(arguments.seeds)
        for rate in arguments.learning_rates
    ]
    models = Models(runs, task, arguments.width, arguments.num_heads, arguments.keep_window_size, device)
    optimizer = Optimizer(models, arguments.steps)
    generator = torch.Generator(device).manual_seed(arguments.seed)
    held_out = torch.Generator(device).manual_seed(arguments.seed + 1)
    parameters = list(models.parameters.values())
    late, curves = torch.zeros(len(runs), device=device), []
    for step in range(1, arguments.steps + 1):
        tokens, targets = task.sample(arguments.batch_size, generator, mixed=True)
        losses = losses_of(models, tokens, targets)
        gradients = torch.autograd.grad(losses.sum(), parameters, allow_unused=True, materialize_grads=True)
        optimizer.step(gradients)
        late = late + losses.detach() if step > arguments.steps - 50 else late
        if step % arguments.log_every == 0 or step == arguments.steps:
            accuracy = evaluate(models, task, arguments.batch_size, 1, held_out)
            curves.append({"step": step, "accuracy": accuracy, "loss": losses.tolist()})
            best = {
                v: max(a for r, a in zip(runs, accuracy, strict=True) if r.variant == v) for v in arguments.variants
            }
            print(f"step {step}: best accuracy " + ", ".join(f"{v} {a:.3f}" for v, a in best.items()), flush=True)
    accuracy = evaluate(models, task, arguments.batch_size, 8, held_out)
    rows = [
        {**vars(run), "train_loss": loss / 50, "accuracy": found}
        for run, loss, found in zip(runs, late.tolist(), accuracy, strict=True)
    ]
    return rows, curves


def losses_of(models: Models, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns the mean cross entropy (R,) over what is asked."""
    logits = models.logits(tokens)
    flat = targets.flatten().expand(len(logits), -1)
    losses = cross_entropy(logits.flatten(1, 2).transpose(1, 2), flat, ignore_index=-1, reduction="none")
    return losses.sum(1) / (targets >= 0).sum()


@torch.no_grad()
def evaluate(models: Models, task: Task, batch_size: int, batches: int, generator: torch.Generator) -> list[float]:
    right, asked = 0, 0
    for _ in range(batches):
        tokens, targets = task.sample(batch_size, generator, mixed=False)
        answers = models.logits(tokens).argmax(-1)
        right = right + ((answers == targets) & (targets >= 0)).flatten(1).sum(1)
        asked = asked + (targets >= 0).sum()
    return (right / asked).tolist()


def summarize(arguments, rows: list[dict]) -> list[dict]:
    """Prints and returns mean and spread over seeds, the best learning rate by training loss for each."""
    print(f"{'variant':>15} {'keys':>6} {'accuracy':>9} {'lowest':>8} {'highest':>8} {'deviation':>10}")
    table = []
    for variant in arguments.variants:
        kept = []
        for seed in range(arguments.seeds):
            own = [row for row in rows if (row["variant"], row["seed"]) == (variant, seed)]
            kept.append(min(own, key=lambda row: row["train_loss"])["accuracy"])
        keys = arguments.seqlen if variant == "dense" else arguments.keep_window_size
        deviation = statistics.stdev(kept) if len(kept) > 1 else 0.0
        table.append({"variant": variant, "keys": keys, "accuracies": kept, "mean": statistics.mean(kept)})
        table[-1]["deviation"] = deviation
        print(
            f"{variant:>15} {keys:>6} {table[-1]['mean']:>9.4f} {min(kept):>8.4f} {max(kept):>8.4f} {deviation:>10.4f}"
        )
    print(f"chance: {1 / arguments.num_symbols:.4f}")
    return table


def draw(path: str, where: dict, settings: dict, table: list[dict], curves: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), constrained_layout=True)
    names = [row["variant"] for row in table]
    left.bar(names, [row["mean"] for row in table], alpha=0.5)
    for place, row in enumerate(table):
        left.plot([place] * len(row["accuracies"]), row["accuracies"], "k.")
    left.axhline(1 / settings["num_symbols"], color="gray", linestyle=":", label="chance")
    left.set_ylabel("accuracy")
    left.tick_params(axis="x", rotation=20)
    left.legend()
    per_variant = len(curves[0]["accuracy"]) // len(names)
    for place, name in enumerate(names):
        own = slice(place * per_variant, (place + 1) * per_variant)
        right.plot([c["step"] for c in curves], [max(c["accuracy"][own]) for c in curves], label=name)
    right.set_xlabel("step")
    right.set_ylabel("best accuracy")
    right.legend()
    figure.suptitle(
        f"MQAR, N = {settings['seqlen']}, {settings['num_pairs']} pairs, w = {settings['keep_window_size']}, width "
        f"{settings['width']}, {settings['seeds']} seeds, {where['device']} ({where['date']})"
    )
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
