"""Long generation from a batch of prompts of mixed lengths, against one forward that has no cache: do they agree?

    python scripts/checks/generation.py --new-tokens 2000 --json docs/benchmarks/agreement_smollm2_h100.json

`generate()` decodes greedily over a static cache (on a GPU: one CUDA graph), far beyond the window. One uncached
forward over the result then says what recomputing everything would have given: its row t sees tokens up to t only, so
if its best id is the generated one at every row, uncached generation has the same past and chooses the same ids.

    float64   with the reference backend. Importances are rounded to 9 decimals, so that those of equal tokens, which
              differ in the last bit from product to product, tie in both; norms, which Transformers computes in
              float32, in float64. All ids must be equal.
    float32   with the best backend there is. All logits must agree within 1e-3: where the uncached forward is given the
              importances of the run, and with importances of its own where no head had a near tie, that is, two of
              them within 8 units in the last place on either side of what is still visible. Those steps are counted.

In both, every head of every layer must have seen at every step the keys that one pass over all importances shows.
"""

import argparse
import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from flash_dmattn_hf import dynamic_mask_config, iter_gates

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the files that all scripts share

from benchmark_model import reference_engine  # noqa: E402
from benchmark_report import environment, header, save_json  # noqa: E402
from checks.recorded_cache import RecordedLayer, count_other_sets, near_ties, recorded_cache  # noqa: E402

PROMPTS = (
    "The lighthouse keeper wrote in his log every evening, even when nothing had happened. On Monday a storm broke two "
    "windows of the lower room; on Tuesday the supply boat brought flour, oil, and a letter from his sister, who asked "
    "again whether he would not rather live in town. He answered, as he always did, that somebody had to keep the",
    "def merge(left, right):\n    result = []\n    while left and right:\n        if left[0] <= right[0]:\n",
    "Bread needs four things: flour, water, salt and time. The last of them is what most people lack, and so",
    "Once upon a time",
)
TOLERANCE = 1e-3
ULPS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a name or a directory")
    parser.add_argument("--gguf-file", help="the file of weights, for a model in that format")
    parser.add_argument("--new-tokens", type=int, default=2000)
    parser.add_argument("--keep-window-size", type=int, default=64)
    parser.add_argument("--dtypes", nargs="+", default=["float64", "float32"], choices=["float64", "float32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()
    where = environment(arguments.device)
    settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "model")}
    print(header(where))
    model, inputs = load(arguments)
    report = {"environment": where, "settings": settings, "model": arguments.gguf_file or arguments.model, "rows": []}
    for dtype in arguments.dtypes:
        row = check(model.to(getattr(torch, dtype)), inputs, arguments.new_tokens)
        report["rows"].append(row)
        print("\n".join(f"{name}: {value}" for name, value in row.items()), flush=True)
    if arguments.json:
        save_json(arguments.json, report)
    if any(row["faults"] for row in report["rows"]):
        raise SystemExit("cached and uncached generation do not agree")


def load(arguments) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """The model with random importances, small enough that its text stays text, and the prompts as a batch."""
    source = {"gguf_file": arguments.gguf_file} if arguments.gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, **source)
    with warnings.catch_warnings(), dynamic_mask_config(keep_window_size=arguments.keep_window_size):
        warnings.filterwarnings("ignore", message="the importance of this model is untrained")
        model = AutoModelForCausalLM.from_pretrained(
            arguments.model, attn_implementation="flash_dmattn", dtype=torch.float32, **unpacked(source)
        )
    torch.manual_seed(arguments.seed)
    for _, _, gate in iter_gates(model):
        torch.nn.init.normal_(gate.A, std=0.01)
        torch.nn.init.normal_(gate.dt_proj.weight, std=0.2)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = tokenizer.pad_token_id = 2
    tokenizer.padding_side = "left"
    inputs = tokenizer(list(PROMPTS), return_tensors="pt", padding=True).to(arguments.device)
    return model.to(arguments.device).eval(), {name: inputs[name] for name in ("input_ids", "attention_mask")}


def unpacked(source: dict) -> dict:
    """Has weights of a GGUF file unpacked where Transformers would multiply with them as they are, in float32."""
    with contextlib.suppress(ImportError):
        from transformers import GgufConfig

        return {**source, "quantization_config": GgufConfig(dequantize=True)} if source else source
    return source


@torch.no_grad()
def check(model: PreTrainedModel, inputs: dict[str, torch.Tensor], new: int) -> dict:
    """Generates `new` ids a row and compares; "faults" of the result names what does not agree."""
    if model.dtype != torch.float64:
        return compare(model, inputs, new)
    with reference_engine(), exact_norms(model), hooked(model, [lambda module, args, out: out.round(decimals=9)]):
        return compare(model, inputs, new)


def compare(model: PreTrainedModel, inputs: dict[str, torch.Tensor], new: int) -> dict:
    """As `check`, with the backend and the importances as they are."""
    prompt = inputs["input_ids"].shape[1]
    cache = recorded_cache(model, prompt + new, new)
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    start = time.perf_counter()
    result = model.generate(**inputs, past_key_values=cache, max_new_tokens=new, **options)
    ids, logits = result.sequences[:, prompt:], torch.stack(result.logits, dim=1)
    seconds = time.perf_counter() - start

    mask = torch.cat([inputs["attention_mask"], inputs["attention_mask"].new_ones(ids.shape)], dim=1)
    layers, own_importances = cache.mask_layers, []
    with hooked(model, [replay_of(layer, mask) for layer in layers]):
        given = uncached_logits(model, result.sequences, mask, new)
    with hooked(model, [lambda module, args, out: own_importances.append(out)]):
        own = uncached_logits(model, result.sequences, mask, new)
    num_other_sets = sum(int(count_other_sets(layer, layer.history()[0]).sum()) for layer in layers)
    row = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "prompt_tokens": inputs["attention_mask"].sum(1).tolist(),
        "new_tokens": new,
        "seconds": round(seconds, 1),
        "sets_compared": sum(layer.num_steps.item() * layer.victims.numel() for layer in layers),
        "sets_that_differ": num_other_sets,
        "ids": ids.numel(),
        "ids_that_differ": int((own.argmax(-1) != ids).sum()),
        "largest_difference_with_the_importances_of_the_run": largest(given, logits),
        "largest_difference": largest(own, logits),
    }
    if model.dtype == torch.float64:
        row["steps_of_other_sets_uncached"] = count_steps_of_other_sets(layers, own_importances, mask)
        faults = {"ids": row["ids_that_differ"] > 0}
    else:
        row |= apart(layers, own_importances, mask, (own - logits).abs().amax(-1)[:, 1:])
        faults = {
            "logits with the importances of the run": row["largest_difference_with_the_importances_of_the_run"],
            "logits of clear steps": row["largest_difference_of_clear_steps"],
        }
        faults = {name: not difference <= TOLERANCE for name, difference in faults.items()}
    faults["visible sets"] = num_other_sets > 0
    return {**row, "faults": [name for name, is_wrong in faults.items() if is_wrong]}


def apart(layers: list[RecordedLayer], own_importances: list, mask: torch.Tensor, difference: torch.Tensor) -> dict:
    """The steps with near ties and those without.

    own_importances: (B, Hi, S) of every layer, as the uncached forward had them. mask: (B, S), padding on the left.
    difference: (B, steps) largest difference of the logits.
    """
    num_near = near_ties(layers, ULPS)  # (layers, steps, B)
    is_near, is_near_above = (counts.sum(0).T > 0 for counts in (num_near, num_near[1:]))
    row = {
        "steps_with_near_ties_above_the_first_layer": int(is_near_above.sum()),
        "steps_of_other_sets_uncached": count_steps_of_other_sets(layers, own_importances, mask),
    }
    for name, steps in (("clear_steps", ~is_near), ("steps_with_near_ties", is_near)):
        row[name] = int(steps.sum())
        row[f"largest_difference_of_{name}"] = float(difference[steps].max()) if steps.any() else 0.0
    return row


def count_steps_of_other_sets(layers: list[RecordedLayer], own_importances: list, mask: torch.Tensor) -> int:
    """Steps at which a head of the cached run saw other keys than in the uncached forward, by its own importances."""
    num_other_sets = sum(
        count_other_sets(layer, by_position(importance[..., :-1], mask[:, :-1]))  # the last id was never processed
        for layer, importance in zip(layers, own_importances, strict=True)
    )
    return int((num_other_sets > 0).sum())


def uncached_logits(model, sequences: torch.Tensor, mask: torch.Tensor, new: int) -> torch.Tensor:
    """Logits (B, new, vocabulary) that choose the last `new` ids, in float32 as `generate()` has them."""
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    kept = {"use_cache": False, "logits_to_keep": new + 1}
    return model(sequences, attention_mask=mask, position_ids=position_ids, **kept).logits[:, :-1].float()


def largest(one: torch.Tensor, other: torch.Tensor) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def by_position(rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Importances (B, Hi, S) of left-padded rows, moved to the columns of their positions, (B, Hi, N)."""
    length = int(mask.sum(1).max())
    index = torch.arange(length, device=mask.device) + (mask.shape[1] - mask.sum(1, keepdim=True))
    return rows.gather(2, index.clamp(max=mask.shape[1] - 1).unsqueeze(1).expand(*rows.shape[:2], length))


@contextlib.contextmanager
def exact_norms(model: PreTrainedModel) -> Iterator[None]:
    """Has RMS norms computed in the dtype of the model until the block ends, instead of in float32."""

    def normalize(module, args, out):
        variance = args[0].square().mean(-1, keepdim=True)
        return module.weight * (args[0] * torch.rsqrt(variance + module.variance_epsilon))

    norms = [module for module in model.modules() if hasattr(module, "variance_epsilon")]
    handles = [norm.register_forward_hook(normalize) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def replay_of(layer: RecordedLayer, mask: torch.Tensor) -> Callable:
    """A hook that gives an uncached forward the importances that the cache was given. mask: (B, S)."""
    columns = (mask.cumsum(1) - 1).clamp(min=0).unsqueeze(1)
    importances = layer.importances
    return lambda module, args, out: importances.gather(2, columns.expand(out.shape)).to(out.dtype)


@contextlib.contextmanager
def hooked(model: PreTrainedModel, hooks: list[Callable]) -> Iterator[None]:
    """Forward hooks on the gates until the block ends: one for every layer, or the same for all."""
    gates = [gate for _, _, gate in iter_gates(model)]
    hooks = hooks * len(gates) if len(hooks) == 1 else hooks
    handles = [gate.register_forward_hook(hook) for gate, hook in zip(gates, hooks, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


if __name__ == "__main__":
    main()
