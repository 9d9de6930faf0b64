"""Open-loop serving: requests arrive by chance at a given rate, whether or not the engine keeps up.

    python scripts/benchmark_serving.py --json docs/benchmarks/serving.json --png docs/benchmarks/serving.png

For every length of prompts and every engine, the same requests with the same Poisson arrivals go to transformers'
continuous batching in this process. A row has generated tokens a second, the time to the first token and the time
between tokens (median and 99th percentile, in seconds), the bytes of the cache and the highest memory of the GPU.
Prompts are random tokens and differ from their first token on, so that no engine shares prefixes. Engines:

    flash_dmattn        one row of w slots a request
    sdpa                dense, pages of keys
    flash_attention_2   the same with FlashAttention; needs flash-attn or a hub kernel
"""

import argparse
import gc
import random
import statistics
import time
from pathlib import Path

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmark_decode import SHAPES
from benchmark_report import environment, header, save_json
from flash_dmattn_hf import dynamic_mask_config

ENGINES = ("flash_dmattn", "sdpa", "flash_attention_2")
QUICK = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
COLUMNS = ("tokens_per_s", "first_median", "first_p99", "between_median", "between_p99", "cache_gib", "peak_gib")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1b", choices=SHAPES)
    parser.add_argument("--prompts", type=int, nargs="+", default=[2**11, 2**13, 2**15, 2**17], help="tokens each")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--requests", type=int, default=64, help="of a row")
    parser.add_argument("--rate", type=float, default=4.0, help="arrivals a second, on average")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--keep-window-size", type=int, default=2048)
    parser.add_argument("--memory-share", type=float, default=0.8, help="of the free memory, for the cache")
    parser.add_argument("--max-batch-tokens", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny model and short prompts, which a CPU can do")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--png", help="draw tokens a second and times against the length of prompts")
    args = parser.parse_args()
    if args.quick:
        args.prompts, args.new_tokens, args.requests, args.rate = [32, 128], 8, 6, 20.0
        args.keep_window_size, args.max_batch_tokens, args.memory_share = 32, 256, 0.05
        args.engines = [name for name in args.engines if name != "flash_attention_2"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = {"environment": environment(device), "settings": vars(args), "rows": []}
    print(header(report["environment"]))
    for engine in args.engines:
        model = make_model(args, engine)
        for length in args.prompts:
            row = {"engine": engine, "prompt": length, **measure(args, model, length)}
            report["rows"].append(row)
            print(f"{engine:18} {length:7} " + "  ".join(f"{name} {row[name]:.4g}" for name in COLUMNS), flush=True)
        del model
        gc.collect()
    if args.json:
        save_json(args.json, report)
    if args.png:
        draw(report["rows"], Path(args.png))


def make_model(args: argparse.Namespace, engine: str) -> LlamaForCausalLM:
    """A Llama of random weights that runs through one engine, in bfloat16 on a GPU and float32 on a CPU."""
    torch.manual_seed(args.seed)
    shape = QUICK if args.quick else SHAPES[args.shape]
    longest = max(args.prompts) + args.new_tokens
    config = LlamaConfig(**shape, max_position_embeddings=longest, eos_token_id=None)
    with dynamic_mask_config(keep_window_size=args.keep_window_size):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        with torch.device(device):
            return LlamaForCausalLM._from_config(config, attn_implementation=engine, dtype=dtype).eval()


def measure(args: argparse.Namespace, model: LlamaForCausalLM, length: int) -> dict[str, float]:
    """Returns the figures of one row."""
    choose = random.Random(args.seed)
    arrivals, moment = [], 0.0
    for _ in range(args.requests):
        moment += choose.expovariate(args.rate)
        arrivals.append(moment)
    vocabulary = model.config.vocab_size
    prompts = [[choose.randrange(vocabulary) for _ in range(length)] for _ in arrivals]
    settings = ContinuousBatchingConfig(
        max_memory_percent=args.memory_share,
        max_batch_tokens=args.max_batch_tokens,
        max_requests_per_batch=args.requests,
        allow_block_sharing=False,
        auto_switch_to_flash=False,
    )
    config = GenerationConfig(do_sample=False, max_new_tokens=args.new_tokens, eos_token_id=-1)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with model.continuous_batching_context_manager(config, continuous_batching_config=settings) as manager:
        manager.add_request(prompts[0], request_id="warm", max_new_tokens=2)
        while manager.get_result(timeout=1) is None:
            check_alive(manager)
        start, results = time.perf_counter(), {}
        for number, (arrival, prompt) in enumerate(zip(arrivals, prompts, strict=True)):
            time.sleep(max(0.0, start + arrival - time.perf_counter()))
            manager.add_request(prompt, request_id=str(number), record_timestamps=True)
        while len(results) < args.requests:
            check_alive(manager)
            if (result := manager.get_result(timeout=1)) is not None:
                results[result.request_id] = result
        seconds = time.perf_counter() - start
        cache_bytes = bytes_of_cache(manager.batch_processor.cache)
    if failed := [result.error for result in results.values() if result.error]:
        raise RuntimeError(f"{len(failed)} requests failed: {failed[0]}")
    first = [result.timestamps[0] - result.created_time for result in results.values()]
    between = [
        after - before
        for result in results.values()
        for before, after in zip(result.timestamps, result.timestamps[1:], strict=False)
    ]
    return {
        "tokens_per_s": sum(len(result.generated_tokens) for result in results.values()) / seconds,
        "first_median": statistics.median(first),
        "first_p99": percentile(first, 0.99),
        "between_median": statistics.median(between),
        "between_p99": percentile(between, 0.99),
        "cache_gib": cache_bytes / 2**30,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0,
    }


def check_alive(manager) -> None:
    if not manager.is_running():
        raise RuntimeError("the engine stopped") from manager.background_thread_status.fatal_error


def bytes_of_cache(cache) -> int:
    """Bytes of slots or of pages."""
    if hasattr(cache, "live_requests"):
        return sum(state.nbytes for slots in cache.live_requests.slots.values() for state in slots)
    return cache.cache_tensor.nbytes


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def draw(rows: list[dict], path: Path) -> None:
    """Tokens a second, time to the first token and time between tokens, against the length of the prompts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "tokens_per_s": "generated tokens / s",
        "first_median": "time to first token, median (s)",
        "between_p99": "time per token, p99 (s)",
    }
    figure, axes = pyplot.subplots(1, len(panels), figsize=(12, 3.6), layout="constrained")
    for axis, (name, label) in zip(axes, panels.items(), strict=True):
        for engine in dict.fromkeys(row["engine"] for row in rows):
            of_engine = [row for row in rows if row["engine"] == engine]
            axis.loglog([row["prompt"] for row in of_engine], [row[name] for row in of_engine], "o-", label=engine)
        axis.set(xlabel="tokens of a prompt", ylabel=label)
    axes[0].legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
