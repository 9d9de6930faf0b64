"""Times Dynamic Mask Attention against dense attention, correctness first.

    python scripts/benchmark_attention.py --seqlens 8192 32768 131072 --json docs/benchmarks/attention_h100.json

Times are what a layer pays: selection, key lists and kernel for the forward; key lists and kernels for the backward.
"kernel" is the forward kernel alone, its lists given. "flex" is FlexAttention, compiled, with our intervals as mask and
our importance as bias, its block mask given. An engine such as "cuda+sinks" has attention sinks, a learned logit per
head; its times are compared with those of "cuda", if that is measured as well. Useful FLOP count visible (query, key)
pairs only: forward 4 D H pairs, backward 2.5 times that.
"""

import argparse
import contextlib
import itertools

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flash_dmattn
from benchmark_report import environment, header, median_milliseconds, save_json
from flash_dmattn.sink_logits import with_sinks

DENSE = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
IMPORTANCE = ("iid", "ar1", "drift", "constant")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqlens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--num-heads", type=int, default=32)
    parser.add_argument("--num-kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--value-dim", type=int, help="head dim of the values, if it is another one")
    parser.add_argument("--dropout", type=float, default=0.0, help="of our attention weights")
    parser.add_argument("--keep-window-size", type=int, default=2048)
    parser.add_argument("--local-window-size", type=int, default=0)
    parser.add_argument("--importance", nargs="+", choices=IMPORTANCE, default=["iid"])
    parser.add_argument("--engines", nargs="+", default=["cuda", "triton", "cudnn", "flash"])
    parser.add_argument("--dense-limit", type=int, default=131072, help="longest sequence for cuDNN")
    parser.add_argument("--flash-limit", type=int, default=32768, help="longest sequence for flash and flex")
    parser.add_argument("--forward-only", action="store_true", help="time no backward")
    parser.add_argument("--deterministic", action="store_true", help="sums of our gradients in a fixed order")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: only to see that it works")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--png", help="draw time and peak memory against the sequence length")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("a CUDA GPU is needed")

    where = environment(arguments.device)
    print(header(where))
    print({name: value for name, value in vars(arguments).items() if name not in ("json", "png")})
    print(
        f"{'N':>8} {'importance':>10} {'engine':>8} {'work':>10} {'ms':>9} {'useful TF/s':>12} {'peak MiB':>9} "
        f"{'vs cudnn':>9}"
    )
    rows = []
    settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "png")}
    try:
        for seqlen in arguments.seqlens:
            rows += measure_length(arguments, seqlen)
            if arguments.device == "cuda":
                torch.cuda.empty_cache()
    finally:  # what was measured before an interruption is kept
        if arguments.json:
            save_json(arguments.json, {"environment": where, "settings": settings, "rows": rows})
        if arguments.png:
            draw(arguments.png, where, settings, rows)


def measure_length(arguments, seqlen: int) -> list[dict]:
    """Returns the rows of all engines at one length. Dense ones do not look at the importance: they are timed once."""
    rows = []
    limits = {"cudnn": arguments.dense_limit, "flash": arguments.flash_limit, "flex": arguments.flash_limit}
    for importance in arguments.importance:
        inputs = make_inputs(arguments, seqlen, importance)
        found = []
        for engine in arguments.engines:
            is_repeated = engine in DENSE and importance != arguments.importance[0]
            if seqlen > limits.get(engine, seqlen) or is_repeated:
                continue
            try:
                found += measure(arguments, engine, seqlen, inputs)
            except RuntimeError as error:
                if engine not in DENSE:
                    raise
                found.append({"engine": engine, "work": "forward", "failed": str(error).splitlines()[0]})
        rows += [{"seqlen": seqlen, "importance": importance, **row} for row in found]
        del inputs
    report(rows)
    return rows


def make_inputs(arguments, seqlen: int, distribution: str) -> list[torch.Tensor]:
    device = arguments.device
    generator = torch.Generator(device).manual_seed(arguments.seed)
    shape = (arguments.batch, seqlen)

    def rand(*sizes):
        return torch.randn(*sizes, generator=generator, device=device, dtype=torch.bfloat16)

    query = rand(*shape, arguments.num_heads, arguments.head_dim)
    key = rand(*shape, arguments.num_kv_heads, arguments.head_dim)
    value = rand(*shape, arguments.num_kv_heads, arguments.value_dim or arguments.head_dim)
    importance = rand(arguments.batch, arguments.num_kv_heads, seqlen).float()
    if distribution == "ar1":
        importance = torch.nn.functional.conv1d(
            torch.nn.functional.pad(importance.flatten(0, 1)[:, None], (63, 0)),
            (0.95 ** torch.arange(64, device=device).flip(0))[None, None],
        ).view_as(importance)
    elif distribution == "drift":
        importance += torch.arange(seqlen, device=device) / 500
    elif distribution == "constant":
        importance.zero_()
    return [tensor.requires_grad_() for tensor in (query, key, value, importance)]


def measure(arguments, engine: str, seqlen: int, inputs: list[torch.Tensor]) -> list[dict]:
    """Checks one engine, then times its parts. Returns a row per part."""
    options = {
        "keep_window_size": arguments.keep_window_size,
        "local_window_size": arguments.local_window_size,
    }
    is_on_gpu = arguments.device == "cuda"
    dout = torch.randn(*inputs[0].shape[:3], inputs[2].shape[3], dtype=inputs[0].dtype, device=arguments.device)
    context = contextlib.nullcontext()
    backend, _, extra = engine.partition("+")
    sinks = None
    if extra == "sinks":
        sinks = torch.randn(arguments.num_heads, device=arguments.device, requires_grad=True)
    elif extra:
        raise ValueError(f"an engine may have +sinks, got {engine}")
    wanted = inputs if sinks is None else [*inputs, sinks]
    visible = min(arguments.keep_window_size, seqlen)
    pairs = visible * (visible + 1) / 2 + (seqlen - visible) * visible
    if engine in DENSE:
        context = sdpa_kernel(DENSE[engine]) if is_on_gpu else context
        wanted = inputs[:3]
        pairs = seqlen * (seqlen + 1) / 2

        def forward():
            query, key, value = (tensor.transpose(1, 2) for tensor in inputs[:3])
            out = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2)
    else:
        if engine == "flex":
            forward = make_flex(inputs, options)
        else:

            def forward():
                settings = {**options, "backend": backend, "deterministic": arguments.deterministic}
                if sinks is None:
                    return flash_dmattn.dynamic_mask_attention(*inputs, **settings)
                out, lse = flash_dmattn.dynamic_mask_attention(*inputs, **settings, return_lse=True)
                return with_sinks(out, lse, sinks, may_overwrite=True)  # as a layer does

        check(inputs, forward().detach(), options, sinks)
        if engine != "flex" and arguments.dropout > 0:
            options["dropout_p"] = arguments.dropout
    flop = 2 * (arguments.head_dim + inputs[2].shape[3]) * arguments.num_heads * arguments.batch * pairs
    rows = []

    def row(work: str, function, useful: float | None) -> None:
        rows.append({"engine": engine, "work": work})
        try:
            peak = peak_mib(function) if is_on_gpu else None
        except torch.cuda.OutOfMemoryError:
            rows[-1]["failed"] = "out of memory"
            return
        milliseconds = median_milliseconds(function, arguments.device, runs=arguments.runs, warmup=2)
        rate = None if useful is None else useful / milliseconds / 1e9
        rows[-1] |= {"milliseconds": milliseconds, "useful_tflops": rate, "peak_mib": peak}

    with context:
        with torch.no_grad():
            row("forward", forward, flop)
        if not arguments.forward_only:
            out = forward()
            row("backward", lambda out=out: torch.autograd.grad(out, wanted, dout, retain_graph=True), 2.5 * flop)
            del out
            row("both", lambda: torch.autograd.grad(forward(), wanted, dout), 3.5 * flop)
        if engine not in (*DENSE, "flex"):
            row("selection", lambda: flash_dmattn.select_visible(inputs[3], **options), None)
        if engine not in (*DENSE, "flex") and is_on_gpu:
            with torch.no_grad():
                milliseconds = kernel_milliseconds(forward)
            rate = flop / milliseconds / 1e9
            rows.append({"engine": engine, "work": "kernel", "milliseconds": milliseconds})
            rows[-1] |= {"useful_tflops": rate, "peak_mib": None}
    return rows


def make_flex(inputs: list[torch.Tensor], options: dict):
    """Returns a function of no arguments that runs FlexAttention over our intervals."""
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._functorch.config.donated_buffer = False  # the backward is timed again and again after one forward
    query, key, value, importance = inputs
    birth, death = flash_dmattn.select_visible(importance, **options)
    group = query.shape[2] // key.shape[2]

    def is_visible(batch, head, row, column):
        return (birth[batch, head // group, column] <= row) & (row < death[batch, head // group, column])

    def add_importance(score, batch, head, row, column):
        return score + importance[batch, head // group, column]

    size = query.shape[1]
    mask = create_block_mask(is_visible, query.shape[0], query.shape[2], size, size, device="cuda", _compile=True)
    compiled = torch.compile(flex_attention)

    def forward():
        tensors = (tensor.transpose(1, 2) for tensor in (query, key, value))
        # One stage in the backward: with the gradient of a bias more do not fit into shared memory at head dim 128.
        options = {"bwd_num_stages": 1}
        return compiled(
            *tensors, score_mod=add_importance, block_mask=mask, enable_gqa=True, kernel_options=options
        ).transpose(1, 2)

    return forward


def peak_mib(function) -> float:
    """Returns the peak of memory in one call, above what there was before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def kernel_milliseconds(forward, runs: int = 5) -> float:
    """Returns the time of the forward kernel alone, as the profiler sees it."""
    forward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(runs):
            forward()
        torch.cuda.synchronize()
    names = ("_forward", "forward_kernel")  # of the Triton and of the CUDA backend
    kernels = [event for event in profile.key_averages() if any(name in event.key for name in names)]
    return sum(event.self_device_time_total for event in kernels) / 1e3 / runs


def check(inputs: list[torch.Tensor], out: torch.Tensor, options: dict, sinks: torch.Tensor | None = None) -> None:
    """Raises unless 64 rows spread over the sequence equal a float64 softmax over the sorted top keys.

    sinks: (num_heads,) logit of each head's attention sink, or None.
    """
    query, key, value, importance = (tensor.detach()[0] for tensor in inputs)
    seqlen, num_heads, head_dim = query.shape
    group = num_heads // key.shape[1]
    contested = options["keep_window_size"] - options["local_window_size"]
    for row in torch.linspace(0, seqlen - 1, 64).long().tolist():
        old = max(0, row + 1 - options["local_window_size"])
        seen = torch.zeros(key.shape[1], row + 1, dtype=torch.bool, device=out.device)
        seen[:, old:] = True
        # Stable and newest first, because the newer key wins a tie.
        order = importance[:, :old].flip(-1).argsort(dim=-1, descending=True, stable=True)[:, :contested]
        seen.scatter_(-1, old - 1 - order, True)
        seen_keys = seen.any(0).nonzero().flatten()
        seen = seen[:, seen_keys]
        logits = torch.einsum("hgd,nhd->hgn", query[row].view(-1, group, head_dim).double(), key[seen_keys].double())
        logits = logits * head_dim**-0.5 + importance[:, None, seen_keys].double()
        logits = logits.masked_fill(~seen[:, None], -torch.inf)
        if sinks is not None:
            logits = torch.cat([logits, sinks.detach().double().view(-1, group, 1)], -1)
        weights = logits.softmax(-1)[..., : seen_keys.shape[0]]
        expected = torch.einsum("hgn,nhd->hgd", weights, value[seen_keys].double()).flatten(0, 1)
        error = (out[0, row].double() - expected).norm() / expected.norm()
        if not error < 1e-2:
            raise RuntimeError(f"row {row} of {seqlen} is wrong: relative error {error:.2e}")


def report(rows: list[dict]) -> None:
    """Prints the rows of one length, and adds to each its ratio to the dense time of the same work.

    Rows with sinks also get how their time compares with the same engine's without them.
    """
    times = {(row["engine"], row["importance"], row["work"]): row.get("milliseconds") for row in rows}
    dense = {row["work"]: row["milliseconds"] for row in rows if row["engine"] == "cudnn" and "failed" not in row}
    for row in rows:
        if "failed" in row:
            print(f"{row['seqlen']:>8} {row['importance']:>10} {row['engine']:>8} {row['work']:>10} {row['failed']}")
            continue
        if row["work"] in dense:
            row["ratio_to_cudnn"] = dense[row["work"]] / row["milliseconds"]
        rate = "" if row["useful_tflops"] is None else f"{row['useful_tflops']:.0f}"
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        ratio = f"{row['ratio_to_cudnn']:.2f}x" if "ratio_to_cudnn" in row else ""
        plain, has_extra, _ = row["engine"].partition("+")
        if has_extra and (without := times.get((plain, row["importance"], row["work"]))):
            row["time_against_plain"] = row["milliseconds"] / without
            ratio += f" {row['time_against_plain']:.2f} of {plain}"
        print(
            f"{row['seqlen']:>8} {row['importance']:>10} {row['engine']:>8} {row['work']:>10} "
            f"{row['milliseconds']:>9.3f} {rate:>12} {peak:>9} {ratio:>9}"
        )


def draw(path: str, where: dict, settings: dict, rows: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), constrained_layout=True)
    panels = (("forward", "milliseconds"), ("backward", "milliseconds"), ("both", "peak_mib"))
    for axis, (work, quantity) in zip(axes, panels, strict=True):
        for engine, importance in itertools.product(settings["engines"], settings["importance"]):
            name = {"engine": engine, "importance": importance, "work": work}
            points = [(row["seqlen"], row[quantity]) for row in rows if name.items() <= row.items() and quantity in row]
            if points:
                label = engine if len(settings["importance"]) == 1 or engine in DENSE else f"{engine}, {importance}"
                axis.loglog(*zip(*points, strict=True), marker="o", label=label)
        axis.set_title(f"{work}: {'time (ms)' if quantity == 'milliseconds' else 'peak extra memory (MiB)'}")
        axis.set_xlabel("sequence length")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend()
    figure.suptitle(
        f"{where['device']}, w = {settings['keep_window_size']}, {settings['num_heads']}:{settings['num_kv_heads']} "
        f"heads of {settings['head_dim']}, bf16, importance {', '.join(settings['importance'])} ({where['date']})"
    )
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
