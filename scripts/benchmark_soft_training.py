"""Times training steps with soft selection against the hard mask, sinks + window, and dense attention.

    python scripts/benchmark_soft_training.py --seqlens 4096 8192 32768 --json docs/benchmarks/soft_training_h200.json

A step is forward and backward of a model of SmolLM2-135M's shape with random parameters, in bfloat16 autocast over
float32 weights, with the chunked cross-entropy, as a distillation trains it (its teacher's forward is no part of it).
The window is an eighth of the sequence, the local window a quarter of that, and the importance reads hidden states and
is not added to the logits. Dense attention is torch's SDPA with the backend it chooses.
"""

import argparse
import contextlib
import functools
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from benchmark_report import environment, header, median_milliseconds, save_json
from flash_dmattn_hf import DynamicMaskConfig, convert_model, iter_gates, soft_selection
from flash_dmattn_hf.training.loss import use_chunked_loss

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
BAND, TEMPERATURE = 1.5, 0.3
KINDS = ("dense", "window", "hard", "soft")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqlens", type=int, nargs="+", default=[4096, 8192, 32768])
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of a step; one sequence at least")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--profile", action="store_true", help="print the kernels of one soft step")
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA GPU is needed")

    where = environment("cuda")
    print(header(where))
    rows, facts = [], {"shape": SHAPE, "band": BAND, "temperature": TEMPERATURE}
    for seqlen in arguments.seqlens:
        batch = max(1, arguments.tokens // seqlen)
        input_ids = torch.randint(SHAPE["vocab_size"], (batch, seqlen), device="cuda")
        for kind in arguments.kinds:
            model = _make_model(kind, seqlen)
            with _selection(model, kind):
                step = functools.partial(_step, model, input_ids)
                milliseconds = median_milliseconds(step, "cuda", runs=arguments.runs, warmup=arguments.warmup)
                if arguments.profile and kind == "soft":
                    print(_profile(step))
            row = {
                "kind": kind,
                "seqlen": seqlen,
                "batch": batch,
                "keep_window_size": None if kind == "dense" else seqlen // 8,
                "median_ms": milliseconds,
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            }
            rows.append(row)
            dense = next((r["median_ms"] for r in rows if (r["kind"], r["seqlen"]) == ("dense", seqlen)), None)
            share = "" if dense is None else f"{milliseconds / dense:6.2f} of dense"
            print(f"{batch} x {seqlen:6} {kind:7}{milliseconds:9.1f} ms {row['peak_gib']:6.1f} GiB {share}", flush=True)
            if arguments.json:
                save_json(arguments.json, {**where, **facts, "rows": rows})
            del model
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _make_model(kind: str, seqlen: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    with torch.device("cuda"):
        config = LlamaConfig(**SHAPE, max_position_embeddings=seqlen, attn_implementation="sdpa")
        model = LlamaForCausalLM(config)
    if kind != "dense":
        window = seqlen // 8
        local = window - 4 if kind == "window" else window // 4
        sizes = {"keep_window_size": window, "num_sink_tokens": 4, "local_window_size": local}
        form = {"importance_input": "hidden", "add_importance_bias": False, "dt_proj_bias": True}
        convert_model(model, DynamicMaskConfig(**sizes, **form))
        with torch.no_grad():
            for _, _, gate in iter_gates(model):
                gate.A.fill_(1.0)  # a random dt_proj ranks at random
    model.train()
    use_chunked_loss(model, engine="torch")
    return model.to("cuda")


def _selection(model: LlamaForCausalLM, kind: str) -> contextlib.AbstractContextManager:
    return soft_selection(model, temperature=TEMPERATURE, band=BAND) if kind == "soft" else contextlib.nullcontext()


def _step(model: LlamaForCausalLM, input_ids: torch.Tensor) -> None:
    with torch.autocast("cuda", torch.bfloat16):
        model(input_ids, labels=input_ids, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def _profile(step: Callable[[], None]) -> str:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    events = found.key_averages()
    launches = sum(event.count for event in events if "LaunchKernel" in event.key)
    return f"{events.table(sort_by='cuda_time_total', row_limit=25, max_name_column_width=60)}\n{launches} launches"


if __name__ == "__main__":
    main()
