"""What one sees of a distillation while it runs: a bar, and a line for every measurement on held-out text."""

from transformers import TrainerCallback

from flash_dmattn_hf.progress import share_bar

_NAMES = {"kld": "KLD {:.4f}", "top1": "top-1 {:.1%}", "gap": "gap closed {:.1%}"}


class DistillProgress(TrainerCallback):
    """stage: shown in front. quiet: no bar; the lines are printed all the same."""

    def __init__(self, stage: str, *, quiet: bool) -> None:
        self.stage, self.quiet = stage, quiet

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.bar = share_bar(None if self.quiet else f"training ({self.stage})")

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs) -> None:
        self.bar.n = round(100 * lr_scheduler.share, 1)
        self.bar.refresh()

    def on_log(self, args, state, control, logs=None, lr_scheduler=None, **kwargs) -> None:
        if "kld" in logs:
            self.bar.set_postfix_str(
                f"step {state.global_step}, KLD {logs['kld']:.4f}, {logs['tokens_per_second']:,.0f} tokens/s"
            )
        if "held_out/kld" in logs:
            self.bar.write(f"{self.stage} {lr_scheduler.share:4.0%}, step {state.global_step}: {held_out_line(logs)}")

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.bar.close()


def held_out_line(logs: dict[str, float]) -> str:
    """Returns the held-out figures of a log entry as one line, the shares of the recall tasks last."""
    figures = {name.removeprefix("held_out/"): value for name, value in logs.items() if name.startswith("held_out/")}
    shown = [form.format(figures[name]) for name, form in _NAMES.items() if name in figures]
    tasks = [name for name in figures if name not in (*_NAMES, "loss", "dense_loss", "window_loss")]
    return ", ".join(shown + [f"{task} {figures[task]:.2f}" for task in tasks])
