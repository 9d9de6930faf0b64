"""Times what a call costs the host, ours and dense, correctness first.

    python scripts/benchmark_host_time.py --json docs/benchmarks/host_time_h200.json

"host us" is how long a call keeps the host, whatever the GPU does meanwhile: calls are issued one after the other, and
only then waited for. "ms" is the time between two calls of a row of them, as layers of a model follow each other; it is
that of the host where the GPU has less to do. Works:

    forward   without gradients
    both      forward and backward
    decode    one token over w slots, kernel by kernel; dense: one query over all keys
    long way  our forward without a plan: what the first call with new shapes costs, and every call that cannot be
              planned

It takes less than a minute.
"""

import argparse
import contextlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flash_dmattn
from benchmark_report import environment, header, median_milliseconds, save_json
from flash_dmattn import planned
from flash_dmattn.slots import decode_step, make_slots

ENGINES = ("flash_dmattn", "cudnn")
ROUNDS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqlens", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--num-heads", type=int, default=32)
    parser.add_argument("--num-kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--keep-window-size", type=int, default=2048)
    parser.add_argument("--backend", default="auto", help="of ours")
    parser.add_argument("--calls", type=int, default=10, help="calls of a round, which all fit into the GPU's queue")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: only to see that it works")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("a CUDA GPU is needed")

    where = environment(arguments.device)
    settings = {name: value for name, value in vars(arguments).items() if name != "json"}
    print(header(where))
    print(settings)
    print(f"{'N':>7} {'engine':>13} {'work':>9} {'host us':>9} {'ms':>8} {'vs dense':>9}")
    rows = []
    for seqlen in arguments.seqlens:
        found = list(measure_length(arguments, seqlen))
        dense = {row["work"]: row["milliseconds"] for row in found if row["engine"] == "cudnn"}
        for row in found:
            if row["work"] in dense:
                row["ratio_to_cudnn"] = dense[row["work"]] / row["milliseconds"]
            ratio = f"{row['ratio_to_cudnn']:.2f}x" if "ratio_to_cudnn" in row else ""
            print(
                f"{seqlen:>7} {row['engine']:>13} {row['work']:>9} {row['host_microseconds']:>9.1f} "
                f"{row['milliseconds']:>8.3f} {ratio:>9}",
                flush=True,
            )
        rows += found
    if arguments.json:
        save_json(arguments.json, {"environment": where, "settings": settings, "rows": rows})


def measure_length(arguments, seqlen: int) -> Iterator[dict]:
    """The rows of all engines and works at one length."""
    query, key, value, importance = inputs = make_inputs(arguments, seqlen)
    dout = torch.randn_like(query)
    options = {"keep_window_size": arguments.keep_window_size, "backend": arguments.backend}

    def ours():
        return flash_dmattn.dynamic_mask_attention(*inputs, **options)

    def dense():
        tensors = (tensor.transpose(1, 2) for tensor in inputs[:3])
        return scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True).transpose(1, 2)

    with torch.no_grad():
        check(inputs, ours(), arguments.keep_window_size)
    for engine, forward, wanted in (("flash_dmattn", ours, inputs), ("cudnn", dense, inputs[:3])):
        with dense_kernel(arguments.device) if engine == "cudnn" else contextlib.nullcontext():
            with torch.no_grad():
                yield {"seqlen": seqlen, "engine": engine, "work": "forward", **measure(arguments, forward)}

            def both(forward=forward, wanted=wanted):
                return torch.autograd.grad(forward(), wanted, dout)

            yield {"seqlen": seqlen, "engine": engine, "work": "both", **measure(arguments, both)}
        with torch.no_grad():  # torch chooses the kernel for one query
            decode = make_decode(arguments, inputs, engine)
            yield {"seqlen": seqlen, "engine": engine, "work": "decode", **measure(arguments, decode)}
    with torch.no_grad(), without_plans():
        yield {"seqlen": seqlen, "engine": "flash_dmattn", "work": "long way", **measure(arguments, ours)}


def make_inputs(arguments, seqlen: int) -> list[torch.Tensor]:
    generator = torch.Generator(arguments.device).manual_seed(arguments.seed)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, device=arguments.device)

    query = rand(1, seqlen, arguments.num_heads, arguments.head_dim).bfloat16()
    key, value = rand(2, 1, seqlen, arguments.num_kv_heads, arguments.head_dim).bfloat16()
    return [tensor.requires_grad_() for tensor in (query, key, value, rand(1, arguments.num_kv_heads, seqlen))]


def make_decode(arguments, inputs: list[torch.Tensor], engine: str) -> Callable[[], torch.Tensor]:
    """Returns one step of a token after those of the inputs."""
    query, key, value, importance = (tensor.detach() for tensor in inputs)
    if engine == "cudnn":
        tensors = [tensor.transpose(1, 2) for tensor in (query[:, -1:], key, value)]
        return lambda: scaled_dot_product_attention(*tensors, enable_gqa=True)
    w = min(arguments.keep_window_size, key.shape[1])
    slots = make_slots(1, arguments.num_kv_heads, w, arguments.head_dim, query.dtype, query.device)
    token = [tensor[:, -1:].contiguous() for tensor in (query, key, value)]
    token.append(importance[..., -1:].contiguous())
    return lambda: decode_step(*token, slots, backend=arguments.backend)


def dense_kernel(device: str) -> contextlib.AbstractContextManager:
    return sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if device == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def without_plans() -> Iterator[None]:
    """Every call goes the long way."""
    devices = planned.DEVICES.copy()
    planned.DEVICES.clear()
    try:
        yield
    finally:
        planned.DEVICES.update(devices)


def measure(arguments, function: Callable[[], object]) -> dict[str, float]:
    """Returns microseconds of the host and milliseconds between calls, medians."""
    wait = torch.cuda.synchronize if arguments.device == "cuda" else lambda: None
    for _ in range(3):
        function()
    times = []
    for _ in range(ROUNDS):
        wait()
        start = time.perf_counter()
        for _ in range(arguments.calls):
            function()
        times.append((time.perf_counter() - start) / arguments.calls)
    wait()
    milliseconds = median_milliseconds(function, arguments.device, runs=3 * arguments.calls)
    return {"host_microseconds": statistics.median(times) * 1e6, "milliseconds": milliseconds}


def check(inputs: list[torch.Tensor], out: torch.Tensor, keep_window_size: int) -> None:
    """Exits unless the last row equals a float64 softmax over the most important keys."""
    query, key, value, importance = (tensor.detach()[0] for tensor in inputs)
    kept = importance.topk(min(keep_window_size, importance.shape[-1])).indices  # random numbers have no ties
    group = query.shape[1] // key.shape[1]
    for head in range(key.shape[1]):
        keys, values = (tensor[kept[head], head].double() for tensor in (key, value))
        queries = query[-1, head * group : (head + 1) * group].double()
        logits = queries @ keys.T / math.sqrt(query.shape[2]) + importance[head, kept[head]].double()
        expected = logits.softmax(-1) @ values
        error = (out[0, -1, head * group : (head + 1) * group].double() - expected).norm() / expected.norm()
        if not error < 1e-2:
            sys.exit(f"head {head} of {len(query)} tokens is wrong: relative error {error:.2e}")


if __name__ == "__main__":
    main()
