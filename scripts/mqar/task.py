"""Multi-query associative recall: the task, and how the models that are compared attend as training goes on.

A sequence starts with key-value pairs; after a long stretch of filler the keys come again, and each asks for its value.
"""

from dataclasses import dataclass

import torch

VARIANTS = ("dense", "sliding-window", "sinks+window", "dma", "dma+window")
SCHEDULES = ("scratch", "converted")


@dataclass(frozen=True)
class Task:
    """num_pairs pairs in the first 2 * num_pairs tokens, asked for as often as the last quarter has room."""

    seqlen: int = 256
    num_pairs: int = 32
    num_keys: int = 64
    num_values: int = 64
    num_fillers: int = 64

    @property
    def vocabulary(self) -> int:
        return self.num_keys + self.num_values + self.num_fillers

    def sample(self, count: int, generator: torch.Generator, mixed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns tokens and targets (count, seqlen), targets -1 where nothing is asked.

        mixed: each sequence has any number of pairs up to num_pairs, so that there are easy ones to learn from.
        """
        device = generator.device

        def rand(*shape):
            return torch.rand(*shape, generator=generator, device=device)

        first_filler = self.num_keys + self.num_values
        tokens = first_filler + (rand(count, self.seqlen) * self.num_fillers).long()
        targets = torch.full_like(tokens, -1)
        keys = rand(count, self.num_keys).argsort(-1)[:, : self.num_pairs]
        values = (rand(count, self.num_pairs) * self.num_values).long()
        used = torch.arange(self.num_pairs, device=device) < (
            1 + (rand(count, 1) * self.num_pairs).long() if mixed else self.num_pairs
        )
        places = torch.arange(self.num_pairs, device=device)
        tokens[:, 2 * places] = torch.where(used, keys, tokens[:, 2 * places])
        tokens[:, 2 * places + 1] = torch.where(used, self.num_keys + values, tokens[:, 2 * places + 1])
        start = self.seqlen - self.seqlen // 4
        times = self.seqlen // 4 // self.num_pairs
        keys, values, used = (x.expand(count, -1).repeat(1, times) for x in (keys, values, used))
        asked = start + rand(count, self.seqlen // 4).argsort(-1)[:, : keys.shape[1]]
        tokens.scatter_(1, asked, torch.where(used, keys, tokens.gather(1, asked)))
        targets.scatter_(1, asked, torch.where(used, values, -1))
        return tokens, targets


@dataclass(frozen=True)
class Run:
    """One model: what it attends to in the end, how it gets there, its seed and its learning rate.

    schedule: "scratch": so from the first step. "converted": dense attention for the first half of the steps, then so;
        the importance is calibrated on the dense model's attention in between.
    """

    variant: str
    schedule: str
    seed: int
    learning_rate: float

    @property
    def has_importance(self) -> bool:
        return self.variant.startswith("dma")

    @property
    def name(self) -> str:
        return self.variant if self.schedule == "scratch" else f"{self.variant} {self.schedule}"

    def attention(self, progress: float, keep_window_size: int, seqlen: int) -> dict:
        """Returns the options of `dynamic_mask_attention` at this point of the training."""
        w = keep_window_size
        if self.variant == "dense" or (self.schedule == "converted" and progress < 0.5):
            return {"keep_window_size": seqlen, "add_importance_bias": False}
        options = {
            "sliding-window": {"local_window_size": w},
            "sinks+window": {"num_sink_tokens": 4, "local_window_size": w - 4},
            "dma": {},
            "dma+window": {"local_window_size": w // 4},
        }[self.variant]
        return {"keep_window_size": w, "add_importance_bias": self.has_importance, **options}


def make_runs(variants, schedules, seeds: int, learning_rates) -> list[Run]:
    """Returns a run for every variant, schedule, seed and learning rate; dense attention has one schedule."""
    return [
        Run(variant, schedule, seed, rate)
        for schedule in schedules
        for variant in variants
        if variant != "dense" or schedule == schedules[0]
        for seed in range(seeds)
        for rate in learning_rates
    ]
