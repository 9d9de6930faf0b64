"""Decoding against the length of the context: tokens a second and bytes of cache, ours and dense, correctness first.

    python scripts/benchmark_decode.py --json docs/benchmarks/decode_h100.json --png docs/benchmarks/decode_h100.png

A step is the forward of one token of every batch row and the choice of the next, over a cache filled as a context of
that length would leave it, with random keys: what is in a cache changes nothing about the cost of a step. Our steps at
all lengths use one cache and one graph, filled anew for each length, and take turns: between a first and a last row
the clock of a GPU that gets warm drifts by more than they differ. Engines:

    flash_dmattn           DynamicMaskCache, the step in a CUDA graph, as generate(cache_implementation="static") has it
    flash_dmattn-eager     the same step, launched kernel by kernel
    flash_dmattn-compiled  the same step by torch.compile, as generate(..., compile_config=CompileConfig()) has it
    dense-dynamic          SDPA over transformers' DynamicCache, as generate() does by default
    dense-static           SDPA over transformers' StaticCache, the step captured in a CUDA graph

"kernel" rows time the decoding kernel alone, in a CUDA graph of as many layers as do not fit into the L2 cache, and
compare it with reading the slots once at the memory's speed. --slot-dtype float8_e4m3fn measures our engines and the
kernel with keys and values in 8 bits.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from transformers import CompileConfig, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from benchmark_model import cast, reference_engine
from benchmark_report import environment, header, save_json
from decode_picture import draw
from flash_dmattn.float8 import NUMBERS, round_to_float8
from flash_dmattn.slots import Slots, decode_step, make_slots, refresh_victims
from flash_dmattn_hf import DynamicMaskCache, dynamic_mask_config
from flash_dmattn_hf.cache.cuda_graph import CapturedForward, StepForward

SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152,
                     "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64},
}  # fmt: skip
ENGINES = ("flash_dmattn", "flash_dmattn-eager", "dense-dynamic", "dense-static")
COMPILED = "flash_dmattn-compiled"
"""An engine that has to be asked for, because compiling takes a minute."""
DEVICE = "cuda"
CHECK_LAYERS, CHECK_STEPS = 4, 24
TURNS = 4
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--contexts", type=int, nargs="+", default=[2**n for n in range(11, 21)])
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=(*ENGINES, COMPILED))
    parser.add_argument("--keep-window-size", type=int, default=2048)
    parser.add_argument("--slot-dtype", choices=["float8_e4m3fn"], help="of our keys and values (default: bf16)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a row")
    parser.add_argument("--memory-bandwidth", type=float, default=3.35e12, help="of the GPU, in bytes a second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-kernel", action="store_true", help="leave the rows of the kernel alone out")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--png", help="draw tokens a second and bytes of cache against the context")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA GPU is needed")

    where = environment(DEVICE)
    settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "png")}
    print(header(where))
    print(settings)
    torch.manual_seed(arguments.seed)
    report = {"environment": where, "settings": settings, "kernel": [], "rows": []}
    try:
        if not arguments.no_kernel:
            report["kernel"].extend(kernel_rows(arguments))
        for shape in arguments.shapes:
            report["rows"].extend(model_rows(arguments, shape))
    finally:  # what was measured before an interruption is kept
        if arguments.json:
            save_json(arguments.json, report)
        if arguments.png:
            draw(arguments.png, report)


def kernel_rows(arguments) -> Iterator[dict]:
    """The decoding kernel alone, 32 query heads and 8 kv heads of 128, at the shortest and the longest context."""
    print(f"{'batch':>6} {'context':>8} {'us a step':>10} {'us of memory':>13} {'ratio':>6}")
    for batch in arguments.batches:
        for context in (4096, max(arguments.contexts)):
            microseconds, size = time_kernel(arguments, batch, context)
            memory = size / arguments.memory_bandwidth * 1e6
            print(
                f"{batch:>6} {context:>8} {microseconds:>10.2f} {memory:>13.2f} {microseconds / memory:>6.2f}",
                flush=True,
            )
            yield {
                "batch": batch,
                "context": context,
                "microseconds": microseconds,
                "memory_microseconds": memory,
            }


def time_kernel(arguments, batch: int, context: int) -> tuple[float, int]:
    """Returns microseconds of one layer's step in a graph, and the bytes of its slots."""
    heads, kv_heads, head_dim, w = 32, 8, 128, arguments.keep_window_size
    num_layers = 16 if batch < 16 else 2
    competition = {"num_sink_tokens": 4, "local_window_size": 3 * w // 4}
    shape = (batch, kv_heads, w, head_dim, torch.bfloat16, DEVICE)
    layers = [make_slots(*shape, slot_dtype=arguments.slot_dtype) for _ in range(num_layers)]
    for slots in layers:
        fill_slots(slots, context, competition)
    query = torch.randn(batch, 1, heads, head_dim, dtype=torch.bfloat16, device=DEVICE)
    key, value = torch.randn(2, batch, 1, kv_heads, head_dim, dtype=torch.bfloat16, device=DEVICE)
    importance = torch.randn(batch, kv_heads, 1, device=DEVICE)

    def step() -> None:
        for slots in layers:
            decode_step(query, key, value, importance, slots, **competition)

    replay = capture(step)
    milliseconds = statistics.median(timed(replay) for _ in range(10))
    slots = layers[0]
    size = sum(state.nbytes for state in slots)
    return milliseconds * 1e3 / num_layers, size


def fill_slots(slots: Slots, context: int, competition: dict[str, int]) -> None:
    """Random keys where a context leaves them: sinks, the local window, and others anywhere before it."""
    for states, scales in ((slots.keys, slots.key_scales), (slots.values, slots.value_scales)):
        if states.dtype == NUMBERS:
            rounded = round_to_float8(torch.randn(states.shape, dtype=torch.bfloat16, device=states.device))
            for state, new in zip((states, scales), rounded, strict=True):
                state.copy_(new)
        else:
            states.normal_()
    slots.importance.normal_()
    slots.positions.copy_(kept_positions(slots.keys.shape[2], context, **competition))
    slots.lengths.fill_(context)
    refresh_victims(slots, **competition)


def kept_positions(w: int, context: int, num_sink_tokens: int, local_window_size: int) -> torch.Tensor:
    """(w,) positions: all of them for short contexts, else sinks, evenly spread ones, and the last."""
    if context <= w:
        rows = torch.arange(w, device=DEVICE)
        return torch.where(rows < context, rows, -1)
    num_spread = w - num_sink_tokens - local_window_size
    spread = torch.linspace(num_sink_tokens, context - local_window_size - 1, num_spread, device=DEVICE).long()
    recent = torch.arange(context - local_window_size, context, device=DEVICE)
    return torch.cat([torch.arange(num_sink_tokens, device=DEVICE), spread, recent])


def capture(function: Callable[[], object]) -> Callable[[], object]:
    """Returns the replay of a CUDA graph of `function`, whose result stays where it is."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def timed(function: Callable[[], object]) -> float:
    """Milliseconds of one call on the GPU."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@torch.no_grad()
def model_rows(arguments, shape: str) -> Iterator[dict]:
    """A row per batch, context and engine."""
    check(arguments, SHAPES[shape])
    model = make_model(arguments, SHAPES[shape])
    title = f"{'shape':>13} {'batch':>6} {'context':>8} {'engine':>19} {'ms':>8} {'tokens/s':>9} {'cache MiB':>10}"
    print(title + f" {'peak GiB':>9}")
    for batch in arguments.batches:
        for engine in arguments.engines:
            for row in measure(arguments, model, engine, batch):
                row = {"shape": shape, "batch": batch, "engine": engine, **row}
                print_row(row)
                yield row


def print_row(row: dict) -> None:
    name = f"{row['shape']:>13} {row['batch']:>6} {row['context']:>8} {row['engine']:>19}"
    if "failed" in row:
        print(f"{name} {row['failed']}", flush=True)
        return
    print(
        f"{name} {row['milliseconds']:>8.2f} {row['tokens_per_second']:>9.0f} {row['cache_bytes'] / 2**20:>10.1f} "
        f"{row['peak_gib']:>9.2f}",
        flush=True,
    )


def make_model(arguments, shape: dict, num_layers: int | None = None) -> LlamaForCausalLM:
    """Random weights in bf16 on the GPU, with an importance that spreads."""
    longest = max(arguments.contexts) + 4096
    shape = {**shape, "num_hidden_layers": num_layers or shape["num_hidden_layers"]}
    config = LlamaConfig(**shape, max_position_embeddings=longest, tie_word_embeddings=True, pad_token_id=0)
    with torch.device(DEVICE), dynamic_mask_config(keep_window_size=arguments.keep_window_size, initializer_std=1.0):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="flash_dmattn")
    return model.eval()


def measure(arguments, model: LlamaForCausalLM, engine: str, batch: int) -> Iterator[dict]:
    """A row per context: ours in turns, dense ones one after the other, because their caches grow."""
    model.set_attn_implementation("flash_dmattn" if engine.startswith("flash") else "sdpa")
    if engine.startswith("flash"):
        yield from measure_contexts(arguments, model, engine, batch, arguments.contexts)
        return
    for context in arguments.contexts:
        yield from measure_contexts(arguments, model, engine, batch, [context])


def measure_contexts(arguments, model, engine, batch, contexts: list[int]) -> list[dict]:
    """Times steps after each of the contexts in turns, the first one of every turn not counted."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    times = {context: [] for context in contexts}
    turns = TURNS if len(contexts) > 1 else 1
    try:
        step, cache_bytes, refill = make_step(arguments, model, engine, batch, contexts[0])
        for _ in range(3):
            step()
        for _ in range(turns):
            for context in contexts:
                if turns > 1:
                    refill(context)
                step()
                times[context] += [clocked(step) for _ in range(-(-arguments.steps // turns))]
    except torch.cuda.OutOfMemoryError:
        return [{"context": context, "failed": "out of memory"} for context in contexts]
    except RuntimeError as error:
        return [{"context": context, "failed": str(error).splitlines()[0]} for context in contexts]
    medians = {context: statistics.median(each) for context, each in times.items()}
    return [
        {
            "context": context,
            "milliseconds": milliseconds,
            "tokens_per_second": 1e3 * batch / milliseconds,
            "cache_bytes": cache_bytes,
            "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        }
        for context, milliseconds in medians.items()
    ]


def clocked(step: Callable[[], object]) -> float:
    """Milliseconds of one step on the host's clock, from an idle GPU to an idle GPU."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def make_step(arguments, model, engine, batch, context) -> tuple[Callable, int, Callable | None]:
    """Returns a function that decodes one more token of every row, the bytes of the filled cache, and, for ours, a
    function that fills the cache as another context would have."""
    token = torch.randint(0, model.config.vocab_size, (batch, 1), device=DEVICE)
    position = torch.full((batch, 1), context, device=DEVICE)
    forward, refill = model, None
    if engine.startswith("flash"):
        cache = filled_slots(arguments, model, batch, context, static=engine in ("flash_dmattn", COMPILED))
        size = cache.nbytes
        if engine == COMPILED:
            forward = model.get_compiled_call(CompileConfig())
        elif cache.is_static:
            forward = StepForward(model, CapturedForward(model))

        def refill(context: int) -> None:
            fill(cache, context)
            position.fill_(context)
    else:
        cache = filled_dense(arguments, model, batch, context, static=engine == "dense-static")
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    def step() -> None:
        logits = forward(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True).logits
        token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        position.add_(1)

    return (capture(step) if engine == "dense-static" else step), size, refill


def filled_slots(arguments, model, batch: int, context: int, static: bool) -> DynamicMaskCache:
    """Our cache after a context of random keys."""
    cache, config = DynamicMaskCache(model, static=static, slot_dtype=arguments.slot_dtype), model.config
    empty = torch.empty(batch, config.num_key_value_heads, 0, config.head_dim, dtype=model.dtype, device=DEVICE)
    for layer in cache.mask_layers:
        layer.lazy_initialization(empty, empty)
    fill(cache, context)
    return cache


def fill(cache: DynamicMaskCache, context: int) -> None:
    """Slots as a context of random keys leaves them, where they are."""
    for layer in cache.mask_layers:
        _, sinks, local, _ = layer.windows
        fill_slots(layer.slots, context, {"num_sink_tokens": sinks, "local_window_size": local})
        layer.num_rows = context


def filled_dense(arguments, model, batch: int, context: int, static: bool) -> DynamicCache | StaticCache:
    """A dense cache with random keys, with room for the timed steps."""
    config = model.config
    shape = (batch, config.num_key_value_heads, context, config.head_dim)
    if not static:
        cache = DynamicCache(config=config)
        for index in range(config.num_hidden_layers):
            cache.update(*(torch.randn(shape, dtype=model.dtype, device=DEVICE) for _ in range(2)), index)
        return cache
    cache = StaticCache(config=config, max_cache_len=context + arguments.steps + 8)
    cache.early_initialization(batch, shape[1], shape[3], model.dtype, torch.device(DEVICE))
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(context)
    return cache


@torch.no_grad()
def check(arguments, shape: dict) -> None:
    """Raises unless captured steps after a prefill are as near to float32 as one pass of the reference in bf16.

    With slots in 8 bits, unless they are as near to steps of the reference over such slots.
    """
    model = make_model(arguments, shape, CHECK_LAYERS)
    prompt = arguments.keep_window_size + 256
    tokens = torch.randint(0, shape["vocab_size"], (1, prompt + CHECK_STEPS), device=DEVICE)
    with reference_engine():
        if arguments.slot_dtype is None:
            rounded = model(tokens, use_cache=False).logits[:, prompt:].float()
        else:
            rounded = step_logits(arguments, model, model, tokens, prompt)
        cast(model, torch.float32)
        exact = model(tokens, use_cache=False).logits[:, prompt:]
    cast(model, torch.bfloat16)
    got = step_logits(arguments, model, StepForward(model, CapturedForward(model)), tokens, prompt)
    allowed, error = ((each - exact).norm() / exact.norm() for each in (rounded, got))
    if not error <= 1.5 * allowed + 1e-3:
        raise RuntimeError(f"steps are wrong: relative error {error:.2e}, of the reference backend {allowed:.2e}")
    print(f"checked {CHECK_STEPS} captured steps: error {error:.1e}, of the reference {allowed:.1e}")


def step_logits(arguments, model, forward: Callable, tokens: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits (1, n, vocabulary) in float32 of the tokens after the prompt, one by one over our cache."""
    cache = DynamicMaskCache(model, static=True, slot_dtype=arguments.slot_dtype)
    model(tokens[:, :prompt], past_key_values=cache)
    logits = []
    for row in range(prompt, tokens.shape[1]):
        position = torch.full((1, 1), row, device=DEVICE)
        logits.append(forward(input_ids=tokens[:, row : row + 1], position_ids=position, past_key_values=cache).logits)
    return torch.cat(logits, dim=1).float()


if __name__ == "__main__":
    main()
