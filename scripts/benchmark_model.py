"""Trains and prefills a Llama-shaped model of 1B random parameters at long context, correctness first.

    python scripts/benchmark_model.py train --seqlens 32768 131072 --json docs/benchmarks/model_training_h100.json
    python scripts/benchmark_model.py prefill --context 1048576 --json docs/benchmarks/model_prefill_h100.json

"train" is forward and backward of one sequence, in bf16 with gradient checkpointing and the chunked loss.
"prefill" reads a long context in chunks into a DynamicMaskCache, then decodes. Peak memory is all of the process's
tensors, the model's 2.5 GB included. The importance is random, so that the selection is not degenerate.
"""

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

from benchmark_report import environment, header, save_json
from flash_dmattn_hf import DynamicMaskCache, dynamic_mask_config, iter_gates
from flash_dmattn_hf.progress import progress_bar
from flash_dmattn_hf.training.loss import use_chunked_loss

DENSE = {"sdpa-cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa-flash": SDPBackend.FLASH_ATTENTION}
CHECK_LAYERS = 4
DENSE_WARMUP = 32768
"""Tokens of the step that warms up dense attention: a whole step of 128K takes long."""
CHECKED_GRADIENTS = ("q_proj", "v_proj", "dma.A", "dma.dt_proj", "embed_tokens")
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    train = parts.add_parser("train", help="forward and backward")
    train.add_argument("--seqlens", type=int, nargs="+", default=[32768, 131072])
    train.add_argument("--engines", nargs="+", default=["flash_dmattn", *DENSE], choices=["flash_dmattn", *DENSE])
    train.add_argument("--dense-limit", type=int, default=131072, help="longest sequence for dense attention")
    train.add_argument("--flash-limit", type=int, default=131072, help="longest sequence for SDPA's flash attention")
    train.add_argument("--runs", type=int, default=2, help="timed steps of flash_dmattn")
    train.add_argument("--dense-runs", type=int, default=1, help="timed steps of dense attention")
    train.add_argument("--loss-engine", default="torch", choices=["auto", "liger", "torch"])
    train.add_argument("--loss-chunk-size", type=int, help="tokens whose logits exist at once")
    prefill = parts.add_parser("prefill", help="a long context in chunks, then decoding")
    prefill.add_argument("--context", type=int, default=2**20)
    prefill.add_argument("--chunk", type=int, default=32768)
    prefill.add_argument("--decode", type=int, default=32, help="tokens to decode after the context")
    for part in (train, prefill):
        part.add_argument("--keep-window-size", type=int, default=2048)
        part.add_argument("--num-layers", type=int, default=16)
        part.add_argument("--seed", type=int, default=0)
        part.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA GPU is needed")

    where = environment("cuda")
    settings = {name: value for name, value in vars(arguments).items() if name != "json"}
    print(header(where))
    print(settings)
    run = {"train": train_rows, "prefill": prefill_rows}[arguments.part]
    rows = list(run(arguments))
    if arguments.json:
        save_json(arguments.json, {"environment": where, "settings": settings, "rows": rows})


def make_model(arguments, num_layers: int | None = None) -> LlamaForCausalLM:
    """The shape of Llama 3.2 1B with random weights, in bf16 on the GPU."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=num_layers or arguments.num_layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=2**20,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
    )
    torch.manual_seed(arguments.seed)
    settings = {"keep_window_size": arguments.keep_window_size, "initializer_std": 1.0}
    with torch.device("cuda"), dynamic_mask_config(**settings):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="flash_dmattn")
    assert all(gate.A.abs().min() > 0 for _, _, gate in iter_gates(model))
    return model


def make_tokens(arguments, length: int) -> torch.Tensor:
    """Random token ids (1, length)."""
    generator = torch.Generator("cuda").manual_seed(arguments.seed)
    return torch.randint(0, 128256, (1, length), generator=generator, device="cuda")


def train_rows(arguments) -> Iterator[dict]:
    """A row per sequence length and engine; its losses have to agree with those of the whole logits first."""
    check_training(arguments)
    model = make_model(arguments).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    use_chunked_loss(model, chunk_size=arguments.loss_chunk_size, engine=arguments.loss_engine)
    print(f"{'tokens':>8} {'engine':>14} {'ms':>9} {'tokens/s':>9} {'peak GiB':>9} {'speed-up':>9} {'loss':>8}")
    for seqlen in arguments.seqlens:
        rows = []
        for engine in arguments.engines:
            limits = {name: arguments.dense_limit for name in DENSE}
            limits["sdpa-flash"] = min(arguments.dense_limit, arguments.flash_limit)
            if seqlen > limits.get(engine, seqlen):
                continue
            rows.append(measure_training(arguments, model, engine, make_tokens(arguments, seqlen)))
        for row in rows:
            for dense in rows:
                if row["engine"] == "flash_dmattn" and dense["engine"] in DENSE and "milliseconds" in dense:
                    row[f"speedup_over_{dense['engine']}"] = dense["milliseconds"] / row["milliseconds"]
            print_training(row)
        yield from rows


def measure_training(arguments, model: LlamaForCausalLM, engine: str, tokens: torch.Tensor) -> dict:
    """Times forward plus backward of one sequence, after one step to warm up."""
    is_dense = engine in DENSE
    runs = arguments.dense_runs if is_dense else arguments.runs
    model.set_attn_implementation("sdpa" if is_dense else engine)
    row = {"seqlen": tokens.shape[1], "engine": engine, "runs": runs}
    with sdpa_kernel(DENSE[engine]) if is_dense else contextlib.nullcontext():
        try:
            step(model, tokens[:, :DENSE_WARMUP] if is_dense else tokens)
            torch.cuda.reset_peak_memory_stats()
            times = []
            for _ in range(runs):
                torch.cuda.synchronize()
                start = time.perf_counter()
                loss = step(model, tokens)
                torch.cuda.synchronize()
                times.append((time.perf_counter() - start) * 1e3)
        except torch.cuda.OutOfMemoryError:
            row["out_of_memory"] = True
        else:
            row["milliseconds"] = statistics.median(times)
            row["tokens_per_second"] = 1e3 * tokens.shape[1] / row["milliseconds"]
            row["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
            row["loss"] = loss.item()
    model.zero_grad(set_to_none=True)
    return row


def step(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return loss.detach()


def print_training(row: dict) -> None:
    name = f"{row['seqlen']:>8} {row['engine']:>14}"
    if "out_of_memory" in row:
        print(f"{name} out of memory", flush=True)
        return
    ratio = row.get("speedup_over_sdpa-cudnn")
    print(
        f"{name} {row['milliseconds']:>9.0f} {row['tokens_per_second']:>9.0f} {row['peak_gib']:>9.1f} "
        f"{'' if ratio is None else f'{ratio:.2f}x':>9} {row['loss']:>8.4f}",
        flush=True,
    )


def check_training(arguments) -> None:
    """Raises unless model and chunked loss are as near to float32 as the reference backend with whole logits."""
    model = make_model(arguments, CHECK_LAYERS).train()
    tokens = make_tokens(arguments, arguments.keep_window_size + 1024)
    with reference_engine():
        rounded = loss_and_gradients(model, tokens)
        cast(model, torch.float32)
        exact = loss_and_gradients(model, tokens)
    cast(model, torch.bfloat16)
    with use_chunked_loss(model, chunk_size=500, engine=arguments.loss_engine):
        got = loss_and_gradients(model, tokens)
    for name, expected in exact.items():
        allowed, error = ((each[name] - expected).norm() / expected.norm() for each in (rounded, got))
        if not error <= 1.5 * allowed + 1e-3:
            raise RuntimeError(f"{name} is wrong: relative error {error:.2e}, of the reference backend {allowed:.2e}")
    print(f"checked loss and {len(exact) - 1} gradients of {CHECK_LAYERS} layers at {tokens.shape[1]} tokens")


def cast(model: LlamaForCausalLM, dtype: torch.dtype) -> None:
    """Changes the parameters alone: the frequencies of the rotary embedding have to stay in float32."""
    for parameter in model.parameters():
        parameter.data, parameter.grad = parameter.data.to(dtype), None


def loss_and_gradients(model: LlamaForCausalLM, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {"loss": step(model, tokens).float()}
    for name, parameter in model.named_parameters():
        if any(part in name for part in CHECKED_GRADIENTS):
            found[name] = parameter.grad.float()
    return found


@contextlib.contextmanager
def reference_engine() -> Iterator[None]:
    before = os.environ.get("FLASH_DMATTN_BACKEND")
    os.environ["FLASH_DMATTN_BACKEND"] = "reference"
    try:
        yield
    finally:
        del os.environ["FLASH_DMATTN_BACKEND"]
        if before is not None:
            os.environ["FLASH_DMATTN_BACKEND"] = before


@torch.no_grad()
def prefill_rows(arguments) -> Iterator[dict]:
    """A row per context length that is a power of two, and one for decoding after the last."""
    check_prefill(arguments)
    model = make_model(arguments).eval()
    read(model, DynamicMaskCache(model), make_tokens(arguments, 2 * arguments.chunk), arguments.chunk)  # warms up
    tokens, cache = make_tokens(arguments, arguments.context), DynamicMaskCache(model)
    per_token = 2 * 2 * model.config.num_hidden_layers * model.config.num_key_value_heads * model.config.head_dim
    print(
        f"{'context':>8} {'seconds':>8} {'tokens/s':>9} {'peak GiB':>9} {'cache MiB':>10} {'keys':>6} {'dense MiB':>10}"
    )
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = last = time.perf_counter()
    done = measured = 0
    for piece in progress_bar(tokens.split(arguments.chunk, dim=1), "prefill", unit="chunk"):
        model.model(input_ids=piece, past_key_values=cache)
        done += piece.shape[1]
        if done < arguments.context and done & (done - 1):
            continue
        torch.cuda.synchronize()
        now = time.perf_counter()
        row = {
            "context": done,
            "seconds": now - start,
            "tokens_per_second": (done - measured) / (now - last),
            "peak_gib": torch.cuda.max_memory_allocated() / GIB,
            "cache_bytes": cache.nbytes,
            "max_keys": cache.max_keys,
            "dense_cache_bytes": done * per_token,
        }
        last, measured = now, done
        print(
            f"{done:>8} {row['seconds']:>8.2f} {row['tokens_per_second']:>9.0f} {row['peak_gib']:>9.2f} "
            f"{row['cache_bytes'] / 2**20:>10.1f} {row['max_keys']:>6} {row['dense_cache_bytes'] / 2**20:>10.0f}",
            flush=True,
        )
        yield row
    if arguments.decode:
        yield decode_row(arguments, model, cache)


def decode_row(arguments, model: LlamaForCausalLM, cache: DynamicMaskCache) -> dict:
    """Times greedy decoding after the context."""
    before, token = cache.get_seq_length(), make_tokens(arguments, 1)
    for i in range(arguments.decode + 3):
        if i == 3:
            torch.cuda.synchronize()
            start = time.perf_counter()
        token = model(input_ids=token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
    torch.cuda.synchronize()
    milliseconds = (time.perf_counter() - start) * 1e3 / arguments.decode
    print(f"decoding after {before} tokens: {milliseconds:.1f} ms a token, {cache.max_keys} keys per head")
    return {"decoded_after": before, "milliseconds_per_token": milliseconds, "cache_bytes": cache.nbytes}


def read(model: LlamaForCausalLM, cache: DynamicMaskCache, tokens: torch.Tensor, chunk: int) -> torch.Tensor:
    """Reads tokens (1, S) in chunks and returns the last hidden states (1, S, hidden size)."""
    pieces = tokens.split(chunk, dim=1)
    return torch.cat([model.model(input_ids=p, past_key_values=cache).last_hidden_state for p in pieces], dim=1)


def check_prefill(arguments) -> None:
    """Raises unless reading in chunks is as near to float32 as one pass of the reference backend."""
    model = make_model(arguments, CHECK_LAYERS).eval()
    tokens = make_tokens(arguments, arguments.keep_window_size + 1024)
    with reference_engine():
        rounded = model.model(input_ids=tokens, use_cache=False).last_hidden_state.float()
        cast(model, torch.float32)
        exact = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    cast(model, torch.bfloat16)
    got = read(model, DynamicMaskCache(model), tokens, 700).float()
    allowed, error = ((each - exact).norm() / exact.norm() for each in (rounded, got))
    if not error <= 1.5 * allowed + 1e-3:
        raise RuntimeError(f"chunks are wrong: relative error {error:.2e}, of the reference backend {allowed:.2e}")
    print(f"checked reading in chunks: error {error:.1e}, of the reference backend in one pass {allowed:.1e}")


if __name__ == "__main__":
    main()
