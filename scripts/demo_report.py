"""The demo's results as a table for the screen and as one picture."""

from pathlib import Path

from benchmark_report import header
from flash_dmattn_hf.evaluation.report import tables


def table(results: dict) -> str:
    """Returns the results of the demo as text."""
    amounts, tuned = results["amounts"], results["fine_tuning"]
    lines = [
        f"{results['model']}, w = {amounts['window']}, {results['dtype']}",
        header(results["environment"]),
        "",
        f"perplexity at a context of {amounts['context']} ({results['perplexity']['num_tokens']:,} held-out tokens)",
    ]
    values = {row["mask"]: row["perplexity"][str(amounts["context"])] for row in results["perplexity"]["rows"]}
    lines.append(f"  {'w':>6} {'sinks + window':>16} {'calibrated':>12} {'dense':>8}")
    for window in amounts["windows"]:
        plain, ours = (values[f"{kind}, w = {window}"] for kind in ("sinks + window", "importance"))
        lines.append(f"  {window:>6} {plain:>16.3f} {ours:>12.3f} {values['dense']:>8.3f}")
    if results["trained_importance"]:
        lines += ["", f"agreement with dense, at a context of {amounts['context']}, on rows beyond w"]
        lines += [f"  {line}" for line in tables(results["trained_importance"]).splitlines()]
    memory, generated = results["cache_bytes"], results["generation"]
    lines += ["", f"cache, MiB{'context':>12} {'dense':>8} {'ours':>8}"]
    for context, dense, ours in zip(memory["contexts"], memory["dense"], memory["flash_dmattn"], strict=True):
        lines.append(f"{context:>22} {dense / 2**20:>8.1f} {ours / 2**20:>8.1f}")
    lines += [
        "",
        f"generated {len(generated['keys'])} tokens after {generated['prompt']}: never more than "
        f"{max(generated['keys'])} keys per head",
        f"importance-only fine-tune, {tuned['steps']} steps: held-out loss {tuned['eval_loss_before']:.4f} before, "
        f"{tuned['eval_loss_after']:.4f} after",
        f"{results['seconds']['total']:.0f} s, peak memory {results['peak_memory_gib']:.1f} GiB"
        + (f", of the GPU {results['peak_gpu_memory_gib']:.1f} GiB" if results["peak_gpu_memory_gib"] else ""),
        "",
    ]
    for claim in results["claims"]:
        verdict = "ok" if claim["passed"] else "FAILED"
        lines.append(f"  {verdict:6} {claim['claim']}: {claim['value']:.4g} (at most {claim['limit']:g})")
    return "\n".join(lines)


def draw(results: dict, path: Path) -> None:
    """Draws perplexity against the window and cache memory against the context."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    amounts, memory = results["amounts"], results["cache_bytes"]
    values = {row["mask"]: row["perplexity"][str(amounts["context"])] for row in results["perplexity"]["rows"]}
    windows = amounts["windows"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    left.axhline(values["dense"], color="black", linestyle="--", label="dense")
    for kind, color in (("sinks + window", "tab:gray"), ("importance", "tab:blue")):
        label = "flash_dmattn, calibrated" if kind == "importance" else kind
        left.plot(windows, [values[f"{kind}, w = {window}"] for window in windows], "o-", color=color, label=label)
    left.set_xscale("log", base=2)
    left.set_xticks(windows, [str(window) for window in windows])
    left.set_xlabel("keep_window_size (keys per head)")
    left.set_ylabel(f"perplexity at a context of {amounts['context']}")
    left.legend()
    for name, color in (("dense", "black"), ("flash_dmattn", "tab:blue")):
        label = name if name == "dense" else f"flash_dmattn, w = {amounts['window']}"
        right.plot(memory["contexts"], [size / 2**20 for size in memory[name]], "o-", color=color, label=label)
    right.set_xlabel("context (tokens)")
    right.set_ylabel("key-value cache (MiB)")
    right.set_ylim(bottom=0)
    right.legend()
    environment = results["environment"]
    figure.suptitle(
        f"{results['model']} on {environment['device']}, torch {environment['torch']}, "
        f"transformers {environment['transformers']}, {environment['date']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
