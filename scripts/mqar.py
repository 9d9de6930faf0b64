"""Multi-query associative recall: the task, and many two-layer models that train side by side on one device.

A sequence starts with key-value pairs; after a long stretch of filler the keys come again, and each asks for its value.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import softplus

import flash_dmattn

VARIANTS = ("dense", "sliding-window", "sinks+window", "dma", "dma+window")


@dataclass(frozen=True)
class Task:
    """num_pairs pairs in the first 2 * num_pairs tokens, all asked for in the last quarter of `seqlen`."""

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
        asked = start + rand(count, self.seqlen // 4).argsort(-1)[:, : self.num_pairs]
        tokens.scatter_(1, asked, torch.where(used, keys, tokens.gather(1, asked)))
        targets.scatter_(1, asked, torch.where(used, values, -1))
        return tokens, targets


@dataclass(frozen=True)
class Run:
    """One model: how it attends, its seed and its learning rate."""

    variant: str
    seed: int
    learning_rate: float


def attention_options(variant: str, keep_window_size: int, seqlen: int) -> dict:
    """Returns the options of `dynamic_mask_attention` that make a variant."""
    w = keep_window_size
    return {
        "dense": {"keep_window_size": seqlen, "add_importance_bias": False},
        "sliding-window": {"keep_window_size": w, "local_window_size": w, "add_importance_bias": False},
        "sinks+window": {
            "keep_window_size": w,
            "num_sink_tokens": 4,
            "local_window_size": w - 4,
            "add_importance_bias": False,
        },
        "dma": {"keep_window_size": w},
        "dma+window": {"keep_window_size": w, "local_window_size": w // 4},
    }[variant]


class Models:
    """R two-layer transformers whose parameters stand one behind another, each (R, ...).

    Pre-norm blocks of attention and a perceptron; rotary positions on half of each head, the other half knows content
    only. Importance as in log_zoh, one for all heads.
    """

    def __init__(self, runs: list[Run], task: Task, width: int, num_heads: int, keep_window_size: int, device: str):
        self.runs, self.task, self.width, self.num_heads = runs, task, width, num_heads
        self.options = [attention_options(run.variant, keep_window_size, task.seqlen) for run in runs]
        self.parameters = {}

        def add(name, *shape, scale):
            draws = [
                torch.randn(*shape, generator=torch.Generator().manual_seed(hash_seed(run.seed, name))) for run in runs
            ]
            self.parameters[name] = (torch.stack(draws) * scale).to(device).requires_grad_()

        add("embedding", task.vocabulary, width, scale=1.0)
        for layer in range(2):
            for name, shape in (
                ("qkv", (width, 3 * width)),
                ("out", (width, width)),
                ("up", (width, 2 * width)),
                ("down", (2 * width, width)),
            ):
                add(f"{layer}.{name}", *shape, scale=shape[0] ** -0.5)
            add(f"{layer}.dt", width, 1, scale=width**-0.5)
            add(f"{layer}.a", 1, scale=0.5)
        add("head", width, task.num_values, scale=width**-0.5)
        angles = 10000 ** (-torch.arange(width // num_heads // 4, device=device) / (width // num_heads // 4))
        angles = torch.arange(task.seqlen, device=device)[:, None] * angles
        self.rotation = angles.cos()[:, None], angles.sin()[:, None]

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns (R, B, S, num_values) for tokens (B, S)."""
        p = self.parameters
        x = p["embedding"][:, tokens]
        for layer in range(2):
            x = x + self.attend(layer, normalize(x))
            hidden = torch.einsum("rbsw,rwv->rbsv", normalize(x), p[f"{layer}.up"])
            x = x + torch.einsum("rbsv,rvw->rbsw", hidden.relu().square(), p[f"{layer}.down"])
        return torch.einsum("rbsw,rwv->rbsv", normalize(x), p["head"])

    def attend(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        p = self.parameters
        dtype = torch.bfloat16 if x.is_cuda else x.dtype
        qkv = torch.einsum("rbsw,rwv->rbsv", x, p[f"{layer}.qkv"])
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        query, key = self.rotate(normalize(query)), self.rotate(normalize(key))
        dt = torch.einsum("rbsw,rwo->rbos", value.flatten(-2), p[f"{layer}.dt"])
        importance = p[f"{layer}.a"][:, None, :, None] * softplus(dt)
        outs = []
        for first, last, options in self.groups():
            parts = (tensor[first:last].flatten(0, 1) for tensor in (query, key, value))
            weights = importance[first:last].flatten(0, 1).expand(-1, self.num_heads, -1)
            out = flash_dmattn.dynamic_mask_attention(
                *(part.to(dtype) for part in parts), weights, softmax_scale=1.0, **options
            )
            outs.append(out.unflatten(0, (last - first, -1)).to(x.dtype))
        return torch.einsum("rbsw,rwv->rbsv", torch.cat(outs).flatten(-2), p[f"{layer}.out"])

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Turns the first half of each head (R, B, S, H, D) by its position."""
        cos, sin = self.rotation
        one, two, rest = x.split([cos.shape[-1], cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
        return torch.cat([one * cos - two * sin, one * sin + two * cos, rest], dim=-1)

    def groups(self):
        """Yields the stretches of runs that attend alike."""
        first = 0
        for last in range(1, len(self.runs) + 1):
            if last == len(self.runs) or self.options[last] != self.options[first]:
                yield first, last, self.options[first]
                first = last


class Optimizer:
    """AdamW with a learning rate for each run, warmed up and decayed along a cosine; decay on matrices only."""

    def __init__(self, models: Models, steps: int, weight_decay: float = 0.05, warmup: float = 0.05):
        self.parameters = list(models.parameters.values())
        rates = torch.tensor([run.learning_rate for run in models.runs], device=self.parameters[0].device)
        self.rates, self.steps, self.weight_decay, self.warmup = rates, steps, weight_decay, warmup
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]
        self.step_number = 0

    @torch.no_grad()
    def step(self, gradients: tuple[torch.Tensor, ...]) -> None:
        self.step_number += 1
        t, progress = self.step_number, self.step_number / self.steps
        scale = min(progress / self.warmup, 0.5 * (1 + math.cos(math.pi * progress)) + 0.01)
        norm = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
        for parameter, gradient, (mean, square) in zip(self.parameters, gradients, self.moments, strict=True):
            shape = (-1, *[1] * (parameter.dim() - 1))
            gradient = gradient / norm.clamp(min=1.0).view(shape)
            mean.lerp_(gradient, 0.1)
            square.lerp_(gradient.square(), 0.02)
            rate = (self.rates * scale).view(shape)
            update = (mean / (1 - 0.9**t)) / ((square / (1 - 0.98**t)).sqrt() + 1e-8)
            if parameter.dim() > 2:
                update = update + self.weight_decay * parameter
            parameter.sub_(rate * update)


def normalize(x: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def hash_seed(seed: int, name: str) -> int:
    return seed * 1_000_003 + sum(ord(letter) * 31**place for place, letter in enumerate(name)) % 1_000_003
