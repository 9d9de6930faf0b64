"""Many two-layer transformers that train side by side on one device, and their optimizer."""

import math
from itertools import groupby

import torch
from torch.nn.functional import pad, rms_norm, softplus

import flash_dmattn
from mqar.task import Run, Task

SMALL = 0.02
"""Deviation of what embeddings and dt start with, the `initializer_range` of transformers. What all values have in
common is then learned before what tells them apart. An importance that begins with an order of tokens evicts some of
the values for good: what is evicted has no gradient."""

INITIAL_A = 1.0
"""Large enough for the importance to learn as fast as queries and keys do. Where those are faster, they hide fillers
from attention, and no gradient is left that would rank fillers below values."""


class Models:
    """R two-layer transformers whose parameters stand one behind another, each (R, ...).

    Pre-norm blocks of attention and a perceptron; rotary positions on half of each head, the other half knows content
    only. Half of the channels that attention reads hold a share of the token before as well, learned for each channel:
    a short convolution, as all models of this task have, so that a value knows its key. Importance as in log_zoh,
    exp(log_a) * softplus(dt), one for all heads: A keeps its sign.
    """

    def __init__(self, runs: list[Run], task: Task, width: int, num_heads: int, keep_window_size: int, device: str):
        self.runs, self.task, self.width, self.num_heads = runs, task, width, num_heads
        self.keep_window_size = keep_window_size
        self.parameters = {}

        def add(name, *shape, scale):
            draws = [
                torch.randn(*shape, generator=torch.Generator().manual_seed(hash_seed(run.seed, name))) for run in runs
            ]
            self.parameters[name] = (torch.stack(draws) * scale).to(device).requires_grad_()

        add("embedding", task.vocabulary, width, scale=SMALL)
        for layer in range(2):
            for name, shape in (
                ("qkv", (width, 3 * width)),
                ("out", (width, width)),
                ("up", (width, 2 * width)),
                ("down", (2 * width, width)),
            ):
                add(f"{layer}.{name}", *shape, scale=shape[0] ** -0.5)
            add(f"{layer}.dt", width, 1, scale=SMALL)
            shift = torch.full((len(runs), width // 2), 0.5, device=device)
            self.parameters[f"{layer}.shift"] = shift.requires_grad_()
            log_a = torch.full((len(runs), 1), math.log(INITIAL_A), device=device)
            self.parameters[f"{layer}.log_a"] = log_a.requires_grad_()
        add("head", width, task.num_values, scale=width**-0.5)
        pairs = width // num_heads // 2
        angles = torch.zeros(task.seqlen, pairs, device=device)
        speeds = 10000 ** (-torch.arange(pairs // 2, device=device) / (pairs // 2))
        angles[:, : pairs // 2] = torch.arange(task.seqlen, device=device)[:, None] * speeds
        self.rotation = torch.polar(torch.ones_like(angles), angles)
        self.advance(1.0, task.seqlen)

    def advance(self, progress: float, seqlen: int) -> None:
        """Sets what every model attends to when a share `progress` of its training is done, on sequences of `seqlen`.

        The same share of all keys, whatever the length.
        """
        window = self.keep_window_size * seqlen // self.task.seqlen
        options = [run.attention(progress, window, seqlen) for run in self.runs]
        self.groups = [(one, len(list(alike))) for one, alike in groupby(options)]

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns (R, B, S // 4, num_values) for the last quarter of tokens (B, S), where values are asked for."""
        x = self.block(0, self.embed(tokens))
        x = self.block(1, x, tokens.shape[1] // 4)
        return torch.einsum("rbsw,rwv->rbsv", normalize(x), self.parameters["head"])

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns (R, B, S, width). As a product, whose gradient needs no sorting of tokens."""
        embedding = self.parameters["embedding"]
        is_token = tokens[..., None] == torch.arange(self.task.vocabulary, device=tokens.device)
        return torch.einsum("bsv,rvw->rbsw", is_token.to(embedding.dtype), embedding).contiguous()

    def block(self, layer: int, x: torch.Tensor, num_rows: int | None = None) -> torch.Tensor:
        """Returns the last num_rows of x (R, B, S, width), all by default, after this layer."""
        p = self.parameters
        num_rows = num_rows or x.shape[2]
        x = x[:, :, -num_rows:] + self.attend(layer, normalize(x), num_rows)
        hidden = torch.einsum("rbsw,rwv->rbsv", normalize(x), p[f"{layer}.up"])
        return x + torch.einsum("rbsv,rvw->rbsw", hidden.relu().square(), p[f"{layer}.down"])

    def attend(self, layer: int, x: torch.Tensor, num_rows: int) -> torch.Tensor:
        p = self.parameters
        dtype = torch.bfloat16 if x.is_cuda else x.dtype
        query, key, value = self.project(layer, x)
        dt = torch.einsum("rbsw,rwo->rbos", value.flatten(-2), p[f"{layer}.dt"])
        importance = p[f"{layer}.log_a"].exp()[:, None, :, None] * softplus(dt)
        parts = (query[:, :, -num_rows:].to(dtype), key.to(dtype), value.to(dtype))
        parts = (*parts, importance.expand(-1, -1, self.num_heads, -1))
        counts = [count * x.shape[1] for _, count in self.groups]
        outs = [
            flash_dmattn.dynamic_mask_attention(*part, **options)
            for (options, _), *part in zip(self.groups, *(t.flatten(0, 1).split(counts) for t in parts), strict=True)
        ]
        out = torch.cat(outs).unflatten(0, x.shape[:2]).to(x.dtype)
        return torch.einsum("rbsw,rwv->rbsv", out.flatten(-2), p[f"{layer}.out"])

    def project(self, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns query, key and value (R, B, S, H, D)."""
        shift = self.parameters[f"{layer}.shift"][:, None, None]
        shifted, rest = x.chunk(2, dim=-1)
        x = torch.cat([shifted + shift * pad(shifted[:, :, :-1], (0, 0, 1, 0)), rest], dim=-1)
        qkv = torch.einsum("rbsw,rwv->rbsv", x, self.parameters[f"{layer}.qkv"])
        turned, value = qkv.unflatten(-1, (3, self.num_heads, -1)).split([2, 1], dim=-3)
        query, key = self.rotate(turned).unbind(-3)
        return query, key, value.squeeze(-3)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Turns the first half of each head (R, B, S, 2, H, D) by its position."""
        rotation = self.rotation[: x.shape[2], None, None]
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * rotation).flatten(-2)


class Optimizer:
    """AdamW with a learning rate for each run, warmed up and decayed along a cosine; decay on matrices only.

    It counts its steps on the device, so that a captured step goes on counting when it is replayed.
    """

    def __init__(self, models: Models, steps: int, weight_decay: float = 0.05, warmup: float = 0.05):
        self.parameters = list(models.parameters.values())
        device = self.parameters[0].device
        self.rates = torch.tensor([run.learning_rate for run in models.runs], device=device)
        self.steps, self.weight_decay, self.warmup = steps, weight_decay, warmup
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]
        self.step_number = torch.zeros((), device=device)

    @torch.no_grad()
    def step(self, gradients: tuple[torch.Tensor, ...]) -> None:
        self.step_number += 1
        progress = self.step_number / self.steps
        scale = torch.minimum(progress / self.warmup, 0.5 * (1 + (math.pi * progress).cos()) + 0.01)
        of_mean, of_square = 1 - 0.9**self.step_number, 1 - 0.98**self.step_number
        norm = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
        for parameter, gradient, (mean, square) in zip(self.parameters, gradients, self.moments, strict=True):
            shape = (-1, *[1] * (parameter.dim() - 1))
            gradient = gradient / norm.clamp(min=1.0).view(shape)
            mean.lerp_(gradient, 0.1)
            square.lerp_(gradient.square(), 0.02)
            rate = (self.rates * scale).view(shape)
            update = (mean / of_mean) / ((square / of_square).sqrt() + 1e-8)
            if parameter.dim() > 2:
                update = update + self.weight_decay * parameter
            parameter.sub_(rate * update)


def normalize(x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, x.shape[-1:], eps=1e-6)


def hash_seed(seed: int, name: str) -> int:
    return seed * 1_000_003 + sum(ord(letter) * 31**place for place, letter in enumerate(name)) % 1_000_003
