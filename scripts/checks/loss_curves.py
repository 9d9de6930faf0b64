"""Trains the same small model with two backends and compares their loss curves; other seeds show the usual spread.

    python scripts/checks/loss_curves.py --backend cuda --json docs/benchmarks/loss_curves_h100.json

The model, a Llama with heads of 64, learns the bytes of Python's standard library, in bfloat16 autocast over float32
weights. Exits with 1 unless every tenth loss of the backend is within 1 % of the reference's from the same seed, and
within the spread of the reference over seeds, averaged over those steps.

Two more curves say what this is worth. The reference backend without autocast shows what rounding alone does: whether a
key is kept is a matter of yes or no, so training amplifies rounding, the more the smaller window and batch are. And the
backend with one gradient zeroed must not agree.
"""

import argparse
import contextlib
import importlib
import os
import statistics
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flash_dmattn_hf import dynamic_mask_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the files that all scripts share

from benchmark_report import environment, header, save_json  # noqa: E402

REFERENCE = "reference"
UNROUNDED = "reference without autocast"
ZEROED = "without a gradient"
EVERY = 10
LARGEST_DIFFERENCE = 0.01
GRADIENTS = ("query", "key", "value", "importance")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cuda", choices=["cuda", "triton", REFERENCE])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3, help="runs of the reference backend, the first one compared")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--keep-window-size", type=int, default=128)
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--warmup", type=int, default=20, help="steps over which the learning rate grows")
    parser.add_argument("--zeroed", choices=list(GRADIENTS), default="importance", help="gradient zeroed as a control")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--png", help="draw the curves")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("--seeds must be at least 2: one run has no spread")

    where = environment(arguments.device)
    print(header(where))
    tokens = read_bytes(arguments.steps * arguments.batch, arguments.seqlen)
    tokens = tokens.view(arguments.steps, arguments.batch, arguments.seqlen)
    curves = {arguments.backend: [train(arguments, arguments.backend, 0, tokens)]}
    with zero_gradient(arguments.backend, arguments.zeroed):
        curves[ZEROED] = [train(arguments, arguments.backend, 0, tokens)]
    curves[UNROUNDED] = [train(arguments, REFERENCE, 0, tokens, autocast=False)]
    curves[REFERENCE] = [train(arguments, REFERENCE, seed, tokens) for seed in range(arguments.seeds)]
    rows = compare(curves, arguments.backend)
    columns = ("difference", "rounding", "zeroed", "spread")
    print(f"{'step':>6} {arguments.backend:>10} {REFERENCE:>10}", *(f"{name:>10}" for name in columns))
    for row in rows:
        losses = f"{row['loss']:>10.4f} {row['reference']:>10.4f}"
        print(f"{row['step']:>6} {losses}", *(f"{row[name]:>10.2%}" for name in columns))
    allowed = min(LARGEST_DIFFERENCE, statistics.mean(row["spread"] for row in rows))
    agree, zeroed_agrees = (all(row[name] <= allowed for row in rows) for name in ("difference", "zeroed"))
    print("the curves agree" if agree else "THE CURVES DO NOT AGREE")
    print(f"without the gradient of {arguments.zeroed} they " + ("AGREE AS WELL" if zeroed_agrees else "do not"))
    if arguments.json:
        settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "png")}
        result = {"agree": agree, "zeroed_agrees": zeroed_agrees, "rows": rows, "losses": curves}
        save_json(arguments.json, {"environment": where, "settings": settings, **result})
    if arguments.png:
        draw(arguments.png, header(where), curves)
    return 0 if agree and not zeroed_agrees else 1


def read_bytes(count: int, length: int) -> torch.Tensor:
    """Returns `count` pieces of `length` bytes of the standard library's modules, shuffled, int64 (count, length)."""
    content = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        content += path.read_bytes()
        if len(content) >= count * length:
            pieces = torch.frombuffer(content, dtype=torch.uint8)[: count * length].long().view(count, length)
            return pieces[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    raise ValueError(f"--steps x --batch x --seqlen must be at most {len(content)} bytes, got {count * length}")


@contextlib.contextmanager
def zero_gradient(backend: str, name: str) -> Iterator[None]:
    """Makes the backend's backward return zeros for one of its gradients."""
    module = importlib.import_module(f"flash_dmattn.backends.{backend}")
    right = module.backward

    def wrong(*arguments):
        gradients = list(right(*arguments))
        gradients[GRADIENTS.index(name)].zero_()
        return tuple(gradients)

    module.backward = wrong
    try:
        yield
    finally:
        module.backward = right


def train(arguments, backend: str, seed: int, tokens: torch.Tensor, autocast: bool = True) -> list[float]:
    """Returns the loss of every step; everything but the backend follows from the seed."""
    os.environ["FLASH_DMATTN_BACKEND"] = backend
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=arguments.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=arguments.seqlen,
    )
    with dynamic_mask_config(keep_window_size=arguments.keep_window_size, num_sink_tokens=2, local_window_size=16):
        model = LlamaForCausalLM._from_config(config, attn_implementation="flash_dmattn")
    model.to(arguments.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / arguments.warmup))
    losses = []
    for batch in tokens.to(arguments.device):
        with torch.autocast(arguments.device, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def compare(curves: dict[str, list[list[float]]], backend: str) -> list[dict]:
    """A row for every tenth step, with differences relative to the first run of the reference backend.

    difference: of the backend; rounding: of the reference without autocast; zeroed: of the backend without a gradient;
    spread: the range of the reference's losses over seeds.
    """
    rows = []
    for step in range(EVERY - 1, len(curves[backend][0]), EVERY):
        of_seeds = [curve[step] for curve in curves[REFERENCE]]
        expected = of_seeds[0]
        row = {"step": step + 1, "loss": curves[backend][0][step], "reference": expected}
        for name, run in (("difference", backend), ("rounding", UNROUNDED), ("zeroed", ZEROED)):
            row[name] = abs(curves[run][0][step] - expected) / expected
        rows.append({**row, "spread": (max(of_seeds) - min(of_seeds)) / expected})
    return rows


def draw(path: str, title: str, curves: dict[str, list[list[float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for backend, runs in curves.items():
        for seed, losses in enumerate(runs):
            axes.plot(losses, label=f"{backend}, seed {seed}", linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_title(title, fontsize=7)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    sys.exit(main())
