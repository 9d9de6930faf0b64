"""Trains the same small model from scratch with several masks, on the same data, and compares what they learn.

    python scripts/from_scratch.py --tokens tok.pt --seconds 80 --output docs/benchmarks/from_scratch

A Llama of 8 layers, width 512 and heads of 64, at 2048 tokens and a window of 256: dense, sliding window, sinks +
window, dynamic masks with the hard mask, and with soft selection whose temperature falls to 0.03. A quarter of their
window is local; soft selection is tried with three quarters, too, and then also with an importance that reads hidden
states instead of values. All start from the same weights and see the same stretches in the same order for the same
number of steps, in bfloat16 autocast over float32 weights. With --seconds the slowest variant fixes how many that is.

Measured with the hard mask on held-out text: the loss of rows beyond the window, and a probe of copying. A span of
foreign text stands at the end of a stretch, with or without an earlier appearance beyond the window; what the model
gains from that is what it still knows of it. --tokens is a file of torch.save with `train` and `test` token ids. Most
parameters would be embeddings, so only the commonest tokens are kept and all others become one.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from random import Random
from textwrap import fill
from typing import NamedTuple

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmark_report import environment, header, save_json
from flash_dmattn_hf import DynamicMaskConfig, convert_model, soft_selection
from flash_dmattn_hf.evaluation import perplexity, share_of_gap
from flash_dmattn_hf.evaluation.final_states import evaluating, logits_of_rows
from flash_dmattn_hf.gates.attach import iter_gates
from flash_dmattn_hf.training import FarReuse, geometric_schedule

LEAD = 8
"""Tokens of a copied span that are not scored: they tell the model what is copied."""
TIMED_STEPS, WARMUP_STEPS = 4, 3


class Variant(NamedTuple):
    """A mask to train with.

    num_sinks: None for dense. local_share: of the window, its newest keys; 1: all that are no sinks. importance_input:
    as in `DynamicMaskConfig`. is_soft: trained with soft selection.
    """

    name: str
    num_sinks: int | None
    local_share: float = 1 / 4
    importance_input: str = "value"
    is_soft: bool = False

    def mask(self, window: int) -> DynamicMaskConfig:
        local = min(int(self.local_share * window), window - self.num_sinks)
        return DynamicMaskConfig(
            window, self.num_sinks, local, dt_proj_bias=True, importance_input=self.importance_input
        )


VARIANTS = (
    Variant("dense", None),
    Variant("sliding window", 0, local_share=1),
    Variant("sinks + window", 4, local_share=1),
    Variant("dynamic masks, hard", 4),
    Variant("dynamic masks, soft", 4, is_soft=True),
    Variant("dynamic masks, soft, 3/4 local", 4, 3 / 4, is_soft=True),
    Variant("dynamic masks, soft, 3/4 local, hidden states", 4, 3 / 4, "hidden", is_soft=True),
)


def main() -> int:
    arguments = parse()
    where = environment(arguments.device)
    print(header(where), flush=True)
    tokens = torch.load(arguments.tokens, weights_only=True)
    for name, ids in tokens.items():
        if len(ids) <= arguments.length:
            raise ValueError(f"{name} of --tokens must hold more than {arguments.length} tokens, got {len(ids)}")
    train_ids, test_ids, covered = reduce_vocabulary(tokens["train"], tokens["test"], arguments.vocabulary)
    print(f"{arguments.vocabulary} tokens cover {covered:.1%} of the held-out text", flush=True)

    steps, step_seconds = arguments.steps, {}
    if steps is None:
        warm = list(batches(train_ids, WARMUP_STEPS + TIMED_STEPS, arguments))
        for variant in VARIANTS:
            step_seconds[variant.name] = time_of_step(variant, warm, arguments)
            print(f"{variant.name}: {step_seconds[variant.name]:.3f} s a step", flush=True)
        steps = max(1, int(arguments.seconds / max(step_seconds.values())))
    report = {
        "environment": where,
        "command": shlex.join(["python", *sys.argv]),
        "options": {key: value for key, value in vars(arguments).items() if key not in ("tokens", "output")},
        "steps": steps,
        "tokens_seen": steps * arguments.batch_size * arguments.length,
        "vocabulary_covers": covered,
        "step_seconds": step_seconds,
        "results": [],
    }
    for variant in VARIANTS:
        model = make_model(variant, arguments)
        losses, seconds = train(model, variant, batches(train_ids, steps, arguments), steps, arguments)
        row = {"variant": variant.name, "seconds": seconds, **measure(model, test_ids, arguments), "losses": losses}
        row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        print(f"{variant.name}: {row['parameters']:,} parameters, {steps} steps in {seconds:.0f} s", flush=True)
        report["results"].append(row)
        add_shares(report["results"])
        write(report, arguments.output)  # a run that is cut off leaves what it has
        del model
    print(table(report))
    return 0


def write(report: dict, prefix: Path) -> None:
    """Writes PREFIX.json, PREFIX.md and PREFIX.png."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    save_json(prefix.with_name(prefix.name + ".json"), report)
    prefix.with_name(prefix.name + ".md").write_text(table(report) + "\n")
    draw(report, prefix.with_name(prefix.name + ".png"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path, metavar="PREFIX", help="of the files to write")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--seconds", type=float, default=80.0, help="of training for the slowest variant")
    budget.add_argument("--steps", type=int, help="of every variant, instead of --seconds")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512, help="a multiple of 128")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--gate-learning-rate", type=float, default=3e-3)
    parser.add_argument("--temperatures", type=float, nargs=2, default=[1.0, 0.03], help="the first and the last")
    parser.add_argument("--stretches", type=int, default=32, help="of held-out text, and probes of copying")
    parser.add_argument("--span", type=int, default=64, help="tokens of a copied span")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and probes")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps, to see that it works")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.length, arguments.window, arguments.span, arguments.stretches = 256, 64, 16, 2
        arguments.batch_size, arguments.vocabulary, arguments.layers, arguments.width = 2, 512, 2, 128
        arguments.seconds = min(arguments.seconds, 5.0)
    if arguments.length < 4 * arguments.window or arguments.span <= LEAD:
        parser.error(f"--length must be at least four times --window, and --span above {LEAD}")
    return arguments


def reduce_vocabulary(train: torch.Tensor, test: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Gives the size - 1 commonest tokens of `train` new ids from 1 on, all others 0.

    Returns both texts (N,) int64, and the share of `test` that is not 0.
    """
    train, test = train.long(), test.long()
    counts = torch.bincount(train, minlength=int(max(train.max(), test.max())) + 1)
    new_ids = torch.zeros(len(counts), dtype=torch.long)
    commonest = counts.argsort(descending=True, stable=True)[: size - 1]
    new_ids[commonest] = torch.arange(1, len(commonest) + 1)
    return new_ids[train], new_ids[test], (new_ids[test] > 0).double().mean().item()


def batches(train_ids: torch.Tensor, steps: int, arguments: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Yields `steps` batches (B, N), the same for every variant; some stretches repeat spans from far back."""
    size = arguments.batch_size
    data = FarReuse(train_ids, length=arguments.length, count=steps * size, seed=arguments.seed)
    for step in range(steps):
        yield torch.stack([data[step * size + index]["input_ids"] for index in range(size)])


def make_model(variant: Variant, arguments: argparse.Namespace) -> LlamaForCausalLM:
    """Returns a model whose backbone starts the same in every variant."""
    torch.manual_seed(arguments.seed)
    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.width,
        intermediate_size=arguments.width * 11 // 4,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.width // 64,
        num_key_value_heads=arguments.width // 128,
        max_position_embeddings=arguments.length,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    if variant.num_sinks is not None:
        convert_model(model, variant.mask(arguments.window))
        for _, _, gate in iter_gates(model):
            if variant.local_share == 1:
                gate.requires_grad_(False)  # all keys tie, and no key competes
            else:
                nn.init.ones_(gate.A)
                nn.init.normal_(gate.dt_proj.weight, std=config.initializer_range)
    return model.to(arguments.device)


def make_optimizer(model: LlamaForCausalLM, steps: int, arguments: argparse.Namespace):
    """Returns AdamW, gates apart and without decay, and a schedule that warms up and falls to a tenth."""
    gates = [p for _, _, gate in iter_gates(model) for p in gate.parameters() if p.requires_grad]
    in_gates = {id(p) for _, _, gate in iter_gates(model) for p in gate.parameters()}
    backbone = [p for p in model.parameters() if id(p) not in in_gates]
    groups = [
        {"params": [p for p in backbone if p.dim() > 1], "lr": arguments.learning_rate, "weight_decay": 0.1},
        {"params": [p for p in backbone if p.dim() == 1], "lr": arguments.learning_rate, "weight_decay": 0.0},
        {"params": gates, "lr": arguments.gate_learning_rate, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=arguments.device == "cuda")
    warmup = max(1, steps // 20)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 1 - 0.9 * step / steps)
    )


def train(
    model: LlamaForCausalLM, variant: Variant, data: Iterable[torch.Tensor], steps: int, arguments: argparse.Namespace
) -> tuple[list[float], float]:
    """Trains for `steps` batches of `data`. Returns the loss of every step and the seconds."""
    device, temperature = arguments.device, geometric_schedule(*arguments.temperatures)
    softly = soft_selection(model, temperature=temperature(0.0)) if variant.is_soft else nullcontext()
    losses = []
    model.train()
    with softly as soft:
        optimizer, schedule = make_optimizer(model, steps, arguments)
        synchronize(device)
        start = time.perf_counter()
        for step, batch in enumerate(data):
            if soft is not None:
                soft.temperature = temperature(step / max(steps - 1, 1))
            batch = batch.to(device, non_blocking=True)
            with precision(device):
                loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        synchronize(device)
    return torch.stack(losses).tolist(), time.perf_counter() - start


def time_of_step(variant: Variant, data: list[torch.Tensor], arguments: argparse.Namespace) -> float:
    """Returns the seconds of a step after the first ones, which compile kernels."""
    model = make_model(variant, arguments)
    train(model, variant, data[:WARMUP_STEPS], WARMUP_STEPS, arguments)
    return train(model, variant, data[WARMUP_STEPS:], TIMED_STEPS, arguments)[1] / TIMED_STEPS


def precision(device: str) -> AbstractContextManager:
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(model: LlamaForCausalLM, test_ids: torch.Tensor, arguments: argparse.Namespace) -> dict[str, float]:
    """Returns the loss of rows beyond the window, and accuracy and loss of a copied span with and without its source.

    Losses in nats per token. The mask is hard: this is outside of soft_selection.
    """
    length, scored = arguments.length, arguments.length - 1 - arguments.window
    with precision(arguments.device):
        options = {"context_length": length, "score_last": scored, "max_stretches": arguments.stretches}
        loss = perplexity(model, test_ids, **options).nll
        copied, foreign = (probe(model, test_ids, arguments, has_source) for has_source in (True, False))
    return {
        "loss_beyond_window": loss,
        "copy_accuracy": copied[0],
        "copy_loss": copied[1],
        "foreign_accuracy": foreign[0],
        "foreign_loss": foreign[1],
    }


def probe(
    model: LlamaForCausalLM, test_ids: torch.Tensor, arguments: argparse.Namespace, has_source: bool
) -> tuple[float, float]:
    """Returns accuracy and loss on a span at the end of a stretch, which has appeared beyond the window or not."""
    length, span = arguments.length, arguments.span
    rows = torch.arange(length - span + LEAD, length) - 1
    accuracy = loss = 0.0
    with evaluating(model):
        for index in range(arguments.stretches):
            rng = Random(f"{arguments.seed} {index}")
            start, other = (rng.randrange(len(test_ids) - length) for _ in range(2))
            ids = test_ids[start : start + length].clone()
            foreign = test_ids[other : other + span]
            source = rng.randrange(16, length - 2 * span - arguments.window)
            if has_source:
                ids[source : source + span] = foreign
            ids[-span:] = foreign
            logits = logits_of_rows(model, ids, rows).float().cpu()
            accuracy += (logits.argmax(-1) == ids[rows + 1]).double().mean().item()
            loss += nn.functional.cross_entropy(logits, ids[rows + 1]).item()
    return accuracy / arguments.stretches, loss / arguments.stretches


def add_shares(results: list[dict]) -> None:
    """Adds the share of the gap between sinks + window and dense that a variant closes; None until both are there."""
    losses = {row["variant"]: row["loss_beyond_window"] for row in results}
    window, dense = losses.get("sinks + window"), losses.get("dense")
    for row in results:
        is_known = window is not None and dense is not None
        row["share_of_gap"] = share_of_gap(row["loss_beyond_window"], window, dense) if is_known else None


def table(report: dict) -> str:
    options = report["options"]
    lines = [
        f"{header(report['environment'])}. `{report['command']}`",
        "",
        f"N = {options['length']}, w = {options['window']}, {report['steps']} steps, {report['tokens_seen']:,} tokens.",
        "",
        "| variant | parameters | seconds | loss beyond w | gap closed | copied, right; without a source "
        "| gained from the source (nats) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in report["results"]:
        gap = "-" if row["share_of_gap"] is None else f"{row['share_of_gap']:.0%}"
        copied = f"{row['copy_accuracy']:.1%}; {row['foreign_accuracy']:.1%}"
        lines.append(
            f"| {row['variant']} | {row['parameters']:,} | {row['seconds']:.0f} | {row['loss_beyond_window']:.4f} | "
            f"{gap} | {copied} | {row['foreign_loss'] - row['copy_loss']:.3f} |"
        )
    return "\n".join(lines)


def draw(report: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, bars) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for row in report["results"]:
        smooth = max(1, len(row["losses"]) // 50)
        means = [part.mean().item() for part in torch.tensor(row["losses"]).split(smooth)]
        curves.plot([smooth * (index + 1) for index in range(len(means))], means, label=row["variant"], linewidth=1)
    curves.set_xlabel("step")
    curves.set_ylabel("training loss (nats per token)")
    curves.legend()
    names = [fill(row["variant"], 24) for row in report["results"]]
    bars.barh(names, [row["foreign_loss"] - row["copy_loss"] for row in report["results"]])
    bars.invert_yaxis()
    bars.set_xlabel("gained from a source beyond the window (nats)")
    figure.suptitle(header(report["environment"]), fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
