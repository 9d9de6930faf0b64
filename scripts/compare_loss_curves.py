"""Trains the same small model with two engines and compares their loss curves; other seeds show the usual spread.

    python scripts/compare_loss_curves.py --engine cuda --json docs/benchmarks/loss_curves_h100.json

The model, a Llama with heads of 64, learns the bytes of Python's standard library, in bfloat16 autocast over float32
weights. Exits with 1 unless every tenth loss of the engine is within 1 % of the reference engine's from the same seed,
and within the spread of the reference engine over seeds, averaged over those steps.
"""

import argparse
import os
import statistics
import sys
import sysconfig
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmark_report import environment, header, save_json
from flash_dmattn_hf import dynamic_mask_config

REFERENCE = "reference"
EVERY = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="cuda", choices=["cuda", "triton", REFERENCE])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3, help="runs of the reference engine, the first one compared")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--keep-window-size", type=int, default=64)
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--png", help="draw the curves")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("--seeds must be at least 2: one run has no spread")

    where = environment(arguments.device)
    print(header(where))
    tokens = read_bytes(arguments.steps * arguments.batch * arguments.seqlen).view(
        arguments.steps, arguments.batch, arguments.seqlen
    )
    curves = {arguments.engine: [train(arguments, arguments.engine, 0, tokens)], REFERENCE: []}
    curves[REFERENCE] += [train(arguments, REFERENCE, seed, tokens) for seed in range(arguments.seeds)]
    rows = compare(curves[arguments.engine][0], curves[REFERENCE])
    print(f"{'step':>6} {arguments.engine:>10} {REFERENCE:>10} {'differ by':>10} {'spread':>10}")
    for row in rows:
        losses = f"{row['loss']:>10.4f} {row['reference']:>10.4f}"
        print(f"{row['step']:>6} {losses} {row['difference']:>10.2%} {row['spread']:>10.2%}")
    spread = statistics.mean(row["spread"] for row in rows)
    agree = all(row["difference"] <= min(0.01, spread) for row in rows)
    print("the curves agree" if agree else "THE CURVES DO NOT AGREE")
    if arguments.json:
        settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "png")}
        result = {"agree": agree, "rows": rows, "losses": curves}
        save_json(arguments.json, {"environment": where, "settings": settings, **result})
    if arguments.png:
        draw(arguments.png, header(where), curves)
    return 0 if agree else 1


def read_bytes(count: int) -> torch.Tensor:
    """Returns the first `count` bytes of the standard library's modules in the order of their names, int64."""
    content = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        content += path.read_bytes()
        if len(content) >= count:
            return torch.frombuffer(content, dtype=torch.uint8)[:count].long()
    raise ValueError(f"--steps x --batch x --seqlen must be at most {len(content)} bytes, got {count}")


def train(arguments, engine: str, seed: int, tokens: torch.Tensor) -> list[float]:
    """Returns the loss of every step; everything but the engine follows from the seed."""
    os.environ["FLASH_DMATTN_BACKEND"] = engine
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
    losses = []
    for batch in tokens.to(arguments.device):
        with torch.autocast(arguments.device, torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def compare(losses: list[float], references: list[list[float]]) -> list[dict]:
    """A row for every tenth step. spread: the range of the reference's losses over seeds, relative to the first."""
    rows = []
    for step in range(EVERY - 1, len(losses), EVERY):
        of_seeds = [curve[step] for curve in references]
        rows.append(
            {
                "step": step + 1,
                "loss": losses[step],
                "reference": of_seeds[0],
                "difference": abs(losses[step] - of_seeds[0]) / of_seeds[0],
                "spread": (max(of_seeds) - min(of_seeds)) / of_seeds[0],
            }
        )
    return rows


def draw(path: str, title: str, curves: dict[str, list[list[float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for engine, runs in curves.items():
        for seed, losses in enumerate(runs):
            axes.plot(losses, label=f"{engine}, seed {seed}", linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_title(title, fontsize=7)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    sys.exit(main())
