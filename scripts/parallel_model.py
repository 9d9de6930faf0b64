"""What a step would take on more GPUs and for longer sequences, computed from what `benchmark_parallel.py` measures.

N tokens in all on W GPUs:

    ours    t = c N / W + e (W - 1) b / B + g    c: seconds a token of one GPU, from the longest row on one GPU
    ring    t = (a N + d N^2) / W                a, d: from the two longest dense rows on several GPUs
    memory  m = m0 + m1 N / W                    from two lengths on one GPU, m1 anew from a row with tiled MLPs

b is what a rank sends a layer. e is how often a step sends it: in each forward, and once in the backward, which is more
than any rank sends there. B is the measured bandwidth of an exchange within one host, and an assumed one beyond. g is
the sum of the gradients, 2 (W - 1) / W times their bytes over the bandwidth. Nothing of ours is taken to overlap, but
all of the ring is: its exchange costs nothing here.
"""

from typing import Any, NamedTuple

GPUS_OF_A_HOST = 8
NETWORK_BYTES_PER_SECOND = 5e10
"""Assumed between hosts: 400 Gbit/s for each GPU."""
LENGTHS = [2**power for power in range(17, 25)]
GPUS = (8, 64)


class Model(NamedTuple):
    """The parts, in seconds, bytes and GiB; None where the rows do not say them."""

    seconds_per_token: float
    ring: tuple[float, float] | None
    memory: tuple[float, float] | None
    sends_per_step: float
    bytes_sent: int
    gradient_bytes: int
    host_bytes_per_second: float
    host_gradient_bytes_per_second: float

    def seconds(self, tokens: int, num_gpus: int) -> float:
        """Returns the time of a step of ours."""
        is_one_host = num_gpus <= GPUS_OF_A_HOST
        bandwidth = self.host_bytes_per_second if is_one_host else NETWORK_BYTES_PER_SECOND
        of_sum = self.host_gradient_bytes_per_second if is_one_host else NETWORK_BYTES_PER_SECOND
        exchanges = self.sends_per_step * (num_gpus - 1) * self.bytes_sent / bandwidth
        gradients = 2 * (num_gpus - 1) / num_gpus * self.gradient_bytes / of_sum
        return self.seconds_per_token * tokens / num_gpus + exchanges + gradients

    def ring_seconds(self, tokens: int, num_gpus: int) -> float:
        linear, quadratic = self.ring
        return (linear * tokens + quadratic * tokens**2) / num_gpus

    def peak_gib(self, tokens: int, num_gpus: int) -> float:
        fixed, per_token = self.memory
        return fixed + per_token * tokens / num_gpus


def model_of(report: dict[str, Any]) -> Model | None:
    """Returns the parts that a report of `benchmark_parallel.py` holds, None if a row that they need is missing."""
    rows = [row for row in report["rows"] if "milliseconds" in row]
    ours = [row for row in rows if row["engine"] == "flash_dmattn"]
    one = sorted((row for row in ours if row["num_gpus"] == 1), key=_tokens)
    several = [row for row in ours if row["num_gpus"] > 1 and "exchanges_per_step" in row]
    exchange = next((row for row in report["rows"] if "exchange_milliseconds" in row), None)
    if not one or not several or exchange is None:
        return None
    num_gpus = exchange["num_gpus"]
    received = (num_gpus - 1) * exchange["bytes_per_layer"]
    summed = 2 * (num_gpus - 1) / num_gpus * exchange["gradient_bytes"]
    dense = sorted((row for row in rows if row["engine"] == "sdpa" and row["num_gpus"] > 1), key=_tokens)[-2:]
    ring = None
    if len({_tokens(row) for row in dense}) == 2:
        quadratic, linear = _line([(_tokens(row), _gpu_seconds(row) / _tokens(row)) for row in dense])
        ring = (linear, quadratic)
    memory = None
    if len({_tokens(row) for row in one}) > 1:
        per_token, fixed = _line([(_tokens(row), row["peak_gib"]) for row in (one[0], one[-1])])
        for row in ours:
            if "mlp_tile" in row:
                per_token = (row["peak_gib"] - fixed) * row["num_gpus"] / _tokens(row)
        memory = (fixed, per_token)
    return Model(
        seconds_per_token=_gpu_seconds(one[-1]) / _tokens(one[-1]),
        ring=ring,
        memory=memory,
        sends_per_step=1.5 * several[0]["exchanges_per_step"],  # two forwards with checkpointing, and a backward
        bytes_sent=exchange["bytes_per_layer"],
        gradient_bytes=exchange["gradient_bytes"],
        host_bytes_per_second=received / (exchange["exchange_milliseconds"] / 1e3),
        host_gradient_bytes_per_second=summed / (exchange["gradient_sum_milliseconds"] / 1e3),
    )


def _line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Returns slope and intercept of the line through two points."""
    (x0, y0), (x1, y1) = points
    slope = (y1 - y0) / (x1 - x0)
    return slope, y0 - slope * x0


def _tokens(row: dict[str, Any]) -> int:
    return row["tokens"]


def _gpu_seconds(row: dict[str, Any]) -> float:
    return row["milliseconds"] / 1e3 * row["num_gpus"]
