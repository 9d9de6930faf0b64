"""Times attention under masks and biases, correctness first.

    python scripts/benchmark_forward_performance.py --test-type all --json performance.json --png performance.png

Masks: "random", half of all pairs, and a bias for each; "blocks", 6 % of 128 x 128 blocks; "topk", the top keys of each
query's own past, written down; "key", the top keys of the whole sequence, a mask and a bias a key. "sdpa" is torch's
own attention with mask and bias written down as one tensor, made outside of the timing; "tiled" is "cuda" with a mask
whose tiles were classified outside of it; "intervals" is the same as "topk" by `dynamic_mask_attention`, its selection
included; "mask" is the time to write the mask of "topk" down. "full" hides nothing: what the others save can be held
against it.
"""

import argparse
import functools
from dataclasses import replace

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmark_masks import MASKS, Inputs, Shape, additive, definition, engines, make_inputs, make_topk_mask, why_not
from benchmark_report import environment, header, median_milliseconds, save_json
from flash_dmattn import flash_dmattn_func
from flash_dmattn.utils.mask import tile_mask

TEST_TYPES = ("all", "sdpa", "cuda", "triton", "flex", "sdpa-vs-cuda", "sdpa-vs-triton", "sdpa-vs-flex")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--test-type", choices=TEST_TYPES, default="all")
    parser.add_argument("--seqlens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--num-heads", type=int, default=32)
    parser.add_argument("--num-kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--keep-window-size", type=int, default=2048)
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS))
    parser.add_argument("--mask-heads", type=int, nargs="+", help="of masks of blocks; default: key heads")
    parser.add_argument("--not-causal", action="store_true")
    parser.add_argument("--backward", action="store_true", help="time the backward too")
    parser.add_argument("--sdpa-limit", type=int, default=8192, help="longest sequence for sdpa")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--png", help="draw the times")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = environment(device)
    print(header(where))
    names = ["sdpa", "cuda", "triton", "flex"] if arguments.test_type == "all" else arguments.test_type.split("-vs-")
    for name in [name for name in names if why_not(name) is not None]:
        print(f"{name}: left out, {why_not(name)}")
        names.remove(name)
    print(f"{'mask':>9} {'N':>7} {'engine':>11} {'work':>9} {'ms':>9} {'peak MiB':>9} {'vs sdpa':>8}")
    rows = []
    for mask in arguments.masks:
        for seqlen in arguments.seqlens:
            for mask_heads in arguments.mask_heads or [None] if mask == "blocks" else [None]:
                rows += measure(arguments, mask, seqlen, mask_heads, names, device)
    settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "png")}
    if arguments.json:
        save_json(arguments.json, {"environment": where, "settings": settings, "rows": rows})
    if arguments.png:
        draw(arguments.png, where, rows)


def measure(arguments, mask: str, seqlen: int, mask_heads: int | None, names: list[str], device: str) -> list[dict]:
    """Checks and times the engines on one mask and length. Returns a row for each kind of work."""
    heads = (arguments.num_heads, arguments.num_kv_heads, arguments.head_dim)
    shape = Shape(1, seqlen, seqlen, *heads, arguments.keep_window_size, not arguments.not_causal, mask)
    shape = replace(shape, mask_heads=mask_heads)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs = make_inputs(shape, device, dtype, arguments.seed)
    share = None if inputs.mask is None else inputs.mask.float().mean().item()
    has_rows = inputs.mask is not None and inputs.mask.shape[2] > 1
    rows = []
    if mask == "topk":
        rows.append(time_one(arguments, rows, "create_mask", "mask", lambda: make_topk_mask(shape, inputs.bias)))
    tiled = ["tiled"] if "cuda" in names and has_rows else []
    for name in [*names, *tiled, *(["intervals"] if mask == "topk" else [])]:
        if name == "sdpa" and seqlen > arguments.sdpa_limit:
            continue
        prepare = {"sdpa": with_written_mask, "tiled": with_tiled_mask}.get(name)
        function = engines(shape)[name] if prepare is None else prepare(shape, inputs)
        check(name, shape, inputs, function)
        with torch.no_grad():
            rows.append(time_one(arguments, rows, name, "forward", functools.partial(function, inputs)))
        if arguments.backward and name != "sdpa" and (name, device) != ("flex", "cpu"):
            fresh = Inputs(*(None if x is None else x.detach() for x in vars(inputs).values()))
            leaves = fresh.leaves()
            out = function(fresh)
            work = functools.partial(torch.autograd.grad, out, leaves, torch.randn_like(out), retain_graph=True)
            rows.append(time_one(arguments, rows, name, "backward", work))
    for row in rows:
        row |= {"mask": mask, "seqlen": seqlen, "mask_heads": mask_heads, "share": share}
        name = mask if mask_heads is None else f"{mask}/{mask_heads}"
        peak, ratio = row["peak_mib"], row["ratio_to_sdpa"]
        print(
            f"{name:>9} {seqlen:>7} {row['engine']:>11} {row['work']:>9} {row['milliseconds']:>9.3f} "
            f"{'' if peak is None else format(peak, '.0f'):>9} "
            f"{'' if ratio is None else format(ratio, '.2f') + 'x':>8}",
            flush=True,
        )
    return rows


def time_one(arguments, rows: list[dict], engine: str, work: str, function) -> dict:
    peak = None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    milliseconds = median_milliseconds(function, device, runs=arguments.runs, warmup=arguments.warmup)
    dense = next((row["milliseconds"] for row in rows if (row["engine"], row["work"]) == ("sdpa", work)), None)
    ratio = None if dense is None else dense / milliseconds
    return {"engine": engine, "work": work, "milliseconds": milliseconds, "peak_mib": peak, "ratio_to_sdpa": ratio}


def with_written_mask(shape: Shape, inputs: Inputs):
    written = additive(shape, inputs, inputs.query.dtype)

    def run(inputs: Inputs) -> torch.Tensor:
        query, key, value = (tensor.transpose(1, 2) for tensor in (inputs.query, inputs.key, inputs.value))
        return scaled_dot_product_attention(query, key, value, attn_mask=written, enable_gqa=True).transpose(1, 2)

    return run


def with_tiled_mask(shape: Shape, inputs: Inputs):
    tiled = tile_mask(inputs.query, inputs.key, inputs.mask, is_causal=shape.is_causal)

    def run(inputs: Inputs) -> torch.Tensor:
        return flash_dmattn_func(inputs.query, inputs.key, inputs.value, tiled, inputs.bias, is_causal=shape.is_causal)

    return run


def check(name: str, shape: Shape, inputs: Inputs, function) -> None:
    """Raises unless the last 64 rows of the first kv head's group equal the definition."""
    group, count = shape.num_heads // shape.num_kv_heads, min(64, shape.seqlen_q)
    with torch.no_grad():
        out = function(inputs)[:, -count:, :group].float()

    def part(tensor):
        if tensor is None:
            return None
        tensor = tensor[:, : max(1, tensor.shape[1] // shape.num_kv_heads)]
        return tensor[:, :, -count:] if tensor.shape[2] > 1 else tensor

    small = Inputs(
        inputs.query[:, -count:, :group],
        inputs.key[:, :, :1],
        inputs.value[:, :, :1],
        part(inputs.mask),
        part(inputs.bias),
    )
    few = replace(shape, seqlen_q=count, num_heads=group, num_kv_heads=1)
    with torch.no_grad():
        expected = definition(few, small)
        if name == "sdpa":  # it has no row without keys: such a row is the mean of all values
            seen = expected.any(-1, keepdim=True)
            out, expected = out * seen, expected * seen
    error = ((out - expected).norm() / expected.norm().clamp(min=1e-3)).item()  # nothing may be seen at all
    if not error < 2e-2:
        raise RuntimeError(f"{name} is wrong on {shape}: relative error {error:.2e}")


def draw(path: str, where: dict, rows: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    masks = list(dict.fromkeys(row["mask"] for row in rows))
    figure, axes = plt.subplots(1, len(masks), figsize=(4.5 * len(masks), 4.2), squeeze=False, constrained_layout=True)
    for axis, mask in zip(axes[0], masks, strict=True):
        for engine in dict.fromkeys(row["engine"] for row in rows if row["work"] == "forward"):
            own = [r for r in rows if (r["mask"], r["engine"], r["work"]) == (mask, engine, "forward")]
            if own:
                axis.loglog([r["seqlen"] for r in own], [r["milliseconds"] for r in own], marker="o", label=engine)
        axis.set_title(f"{mask}: forward (ms)")
        axis.set_xlabel("sequence length")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend()
    figure.suptitle(f"Attention under masks and biases, {where['device']} ({where['date']})")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
