"""A load of requests on transformers' continuous batching in this process, and its figures.

A load ends when all its requests have, or at a deadline: what has not finished by then is stopped, its tokens count.
"""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.utils import get_device_and_memory_breakdown

import benchmark_decode

GIB = 2**30
SHAPES = {
    **benchmark_decode.SHAPES,
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}  # fmt: skip
ENGINES = {
    "flash_dmattn": ("flash_dmattn", None),
    "flash_dmattn-eager": ("flash_dmattn", False),
    "flash_dmattn-prompts": ("flash_dmattn", (True, True)),
    "sdpa": ("sdpa", None),
    "flash_attention_2": ("flash_attention_2", None),
}
"""Name -> attn_implementation and use_cuda_graph, None: as transformers or ours choose."""


@dataclass(frozen=True)
class Load:
    """prompts: token ids. arrivals: seconds after the start. new_tokens: of each request."""

    prompts: list[list[int]]
    arrivals: list[float]
    new_tokens: int


@dataclass(frozen=True)
class Times:
    """Of one request, in seconds of one clock: when it was sent and when each of its tokens came."""

    sent: float
    tokens: list[float]


def number_of_requests(length: int, most: int, most_tokens: int) -> int:
    """Returns how many requests a row has whose prompts have so many tokens."""
    return min(most, max(4, most_tokens // length))


def make_load(count: int, length: int, new_tokens: int, vocabulary: int, rate: float | None, seed: int) -> Load:
    """Random prompts of one length. rate: Poisson arrivals a second, None: all at once."""
    choose, moment, arrivals = random.Random(seed), 0.0, []
    for _ in range(count):
        arrivals.append(moment)
        moment += 0.0 if rate is None else choose.expovariate(rate)
    return Load([[choose.randrange(vocabulary) for _ in range(length)] for _ in arrivals], arrivals, new_tokens)


def make_settings(engine: str, *, memory_gib: float, batch_tokens: int, requests: int, **values: Any):
    """A ContinuousBatchingConfig that gives every engine the same bytes for its cache and what forwards need."""
    _, total, reserved, allocated = get_device_and_memory_breakdown()
    return ContinuousBatchingConfig(
        **{
            "max_memory_percent": min(0.95, memory_gib * GIB / (total - max(reserved, allocated))),
            "max_batch_tokens": batch_tokens,
            "max_requests_per_batch": requests,
            "allow_block_sharing": False,
            "auto_switch_to_flash": False,
            "use_cuda_graph": ENGINES[engine][1],
            **values,
        }
    )


class Session:
    """A manager that runs from the start of a `with` block, warmed up, to its end, where it is stopped hard.

    engine: of `ENGINES`. settings: a ContinuousBatchingConfig. warm_tokens: of a prompt that is served beforehand.
    """

    def __init__(self, model: PreTrainedModel, engine: str, settings, warm_tokens: int):
        model.set_attn_implementation(ENGINES[engine][0])
        config = GenerationConfig(do_sample=False, eos_token_id=-1)
        self.manager = model.init_continuous_batching(config, settings)
        self._warm_prompt = [token % model.config.vocab_size for token in range(warm_tokens)]

    def __enter__(self) -> "Session":
        self.manager.warmup()
        self.manager.start()
        self.send("warm", self._warm_prompt, 3)
        while self.receive(1.0) is None:
            pass
        self.cache_bytes = bytes_of_cache(self.manager.batch_processor.cache)
        return self

    def __exit__(self, *_: object) -> None:
        self.manager.stop(hard_stop=True, timeout=60)
        self.manager.destroy()

    def send(self, name: str, prompt: list[int], new_tokens: int) -> None:
        self.manager.add_request(prompt, request_id=name, max_new_tokens=new_tokens, record_timestamps=True)

    def receive(self, timeout: float):
        """Returns the result of a request that has ended, None if there is none. RuntimeError for one that failed."""
        result = self.manager.get_result(timeout=max(0.0, timeout))
        if result is None:
            if not self.manager.is_running():
                raise RuntimeError("the engine stopped") from self.manager.background_thread_status.fatal_error
        elif result.error:
            raise RuntimeError(f"request {result.request_id} failed: {result.error}")
        return result

    def stop(self) -> list:
        """Stops at once, and returns what unfinished requests have so far."""
        self.manager.stop(hard_stop=True, timeout=60)
        results = []
        while (result := self.manager.get_result(timeout=0)) is not None:
            results.append(result)
        return results


def run_load(session: Session, load: Load, deadline: float) -> dict[str, Any]:
    """Returns the figures of a load. deadline: of `time.perf_counter()`."""
    start, sent, results = time.perf_counter(), 0, []
    while len(results) < len(load.prompts) and (now := time.perf_counter()) < deadline:
        while sent < len(load.prompts) and now >= start + load.arrivals[sent]:
            session.send(str(sent), load.prompts[sent], load.new_tokens)
            sent += 1
        next_arrival = start + load.arrivals[sent] if sent < len(load.prompts) else now + 1.0
        if (result := session.receive(min(next_arrival, deadline, now + 1.0) - now)) is not None:
            results.append(result)
    seconds, finished = time.perf_counter() - start, len(results)
    if finished < len(load.prompts):
        results += session.stop()
    times = [Times(result.created_time, result.timestamps) for result in results]
    cut_off = finished < len(load.prompts)
    return {"finished": finished, "cut_off": cut_off, **figures(times, seconds), "cache_gib": session.cache_bytes / GIB}


def figures(requests: Sequence[Times], seconds: float) -> dict[str, Any]:
    """Throughput, and times in seconds, None where no request has come that far."""
    first = [times.tokens[0] - times.sent for times in requests if times.tokens]
    between = [
        after - before for times in requests for before, after in zip(times.tokens, times.tokens[1:], strict=False)
    ]
    return {
        "requests": len(requests),
        "seconds": seconds,
        "tokens_per_s": sum(len(times.tokens) for times in requests) / seconds,
        "most_live": most_live(requests),
        "first_median": percentile(first, 0.5),
        "first_p99": percentile(first, 0.99),
        "between_median": percentile(between, 0.5),
        "between_p99": percentile(between, 0.99),
        "between_mean": statistics.fmean(between) if between else None,
    }


def most_live(requests: Sequence[Times]) -> int:
    """How many requests were between their first and their last token at the same time."""
    events = [(times.tokens[0], 1) for times in requests if times.tokens]
    events += [(times.tokens[-1], -1) for times in requests if times.tokens]
    live = most = 0
    for _, change in sorted(events, key=lambda event: (event[0], -event[1])):
        live += change
        most = max(most, live)
    return most


def percentile(values: list[float], share: float) -> float | None:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else None


def bytes_of_cache(cache) -> int:
    """Bytes of slots or of pages."""
    if hasattr(cache, "live_requests"):
        return sum(state.nbytes for slots in cache.live_requests.slots.values() for state in slots)
    return cache.cache_tensor.nbytes


def peak_gib() -> float | None:
    """The highest memory of the GPU since this was asked before, None without one."""
    if not torch.cuda.is_available():
        return None
    peak = torch.cuda.max_memory_allocated() / GIB
    torch.cuda.reset_peak_memory_stats()
    return peak
