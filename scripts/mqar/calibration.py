"""Conversion of trained dense models: an importance that predicts, from the values, who will be attended to."""

import torch

from flash_dmattn_hf.conversion.attention_mass import attention_and_mass, far_queries
from flash_dmattn_hf.conversion.ridge import RidgeStatistics
from mqar.models import Models, normalize

MASS_FLOOR = 1e-4
RIDGE = 0.1
"""A multiple of the mean variance. The penalty with the best R2 is smaller by far, but leans on directions in which
values hardly vary, and a few steps of training later its ranking is lost."""


@torch.no_grad()
def calibrate(models: Models, places: list[int], tokens: torch.Tensor) -> dict[str, list[float]]:
    """Sets dt of the models at `places` from their dense attention on tokens (B, S), as checkpoints are converted.

    Ridge regression of the log of the mean attention that a key receives from queries beyond the local window on the
    values of its token; every fifth sequence is held out. Returns R2 on those for each layer, a number for each place.
    """
    models.advance(0.0, tokens.shape[1])  # dense, whatever was evaluated last
    x, found = models.embed(tokens), {}
    for layer in range(2):
        query, key, value = models.project(layer, normalize(x))
        found[f"layer {layer}"] = []
        for place in places:
            last = models.runs[place].attention(1.0, models.keep_window_size, tokens.shape[1])
            distance = last.get("local_window_size", 0)
            train, held_out = _read(query[place], key[place], value[place], distance)
            weight, _ = (train + held_out).solve(RIDGE)
            models.parameters[f"{layer}.dt"][place] = weight.T.to(x.dtype)
            found[f"layer {layer}"].append(held_out.r2(*train.solve(RIDGE)).item())
        x = models.block(layer, x)
    return found


def _read(query, key, value, distance: int) -> tuple[RidgeStatistics, RidgeStatistics]:
    """query, key, value: (B, S, H, D). Returns what the fit and its test need."""
    seqlen, width = query.shape[1], value.shape[2] * value.shape[3]
    both = tuple(RidgeStatistics(width, 1, query.device) for _ in range(2))
    count = far_queries(seqlen, distance, device=query.device)
    usable = count >= count.max() // 4
    for number, (q, k, v) in enumerate(zip(query, key, value, strict=True)):
        heads = (tensor.transpose(0, 1) for tensor in (q, k, v))
        _, mass = attention_and_mass(*heads, distance=distance, softmax_scale=q.shape[-1] ** -0.5)
        log_mass = (mass.mean(0) / count.clamp(min=1) + MASS_FLOOR).log()
        both[number % 5 == 4].add(v.flatten(1)[usable], log_mass[usable, None])
    return both
