"""The forward of one token as a CUDA graph, or compiled: the cost of launching its kernels one by one is gone.

A `DynamicMaskCache` changes in place and its step has fixed shapes, so what was captured once holds for every later
token. What a replay cannot do, counting tokens on the host, is done beside it.
"""

import gc
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from transformers import PreTrainedModel

from flash_dmattn_hf.arguments import get_cache, name_of_cache
from flash_dmattn_hf.cache.cache import DynamicMaskCache

logger = logging.getLogger(__name__)


class StepForward:
    """Calls `model(**inputs)`; for single tokens over a static cache, by way of `run`.

    model: a model that runs through flash_dmattn. run: takes the same inputs and may leave the counting of tokens out.
    """

    def __init__(self, model: PreTrainedModel, run: Callable[..., Any]):
        self.model, self.run = model, run

    def __call__(self, **inputs: Any) -> Any:
        cache = get_cache(inputs)
        if not (isinstance(cache, DynamicMaskCache) and cache.takes_captured_steps and _is_one_token(inputs)):
            return self.model(**inputs)
        _refuse_several_gpus(cache)
        device = inputs["input_ids"].device
        cache.to(device)
        with cache.counted_outside(device):
            return self.run(**inputs)


class CapturedForward:
    """The model's forward, captured when it is called the second time with inputs of the same kind.

    The first call runs as usual, which compiles and loads every kernel. Results are copies, which later calls leave as
    they are. Inputs of another kind, or a cache whose tensors have moved, are captured anew.

    Raises RuntimeError when the forward cannot be captured, because it waits for the GPU or copies numbers to it.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self._kind, self._graph = None, None

    def __call__(self, **inputs: Any) -> Any:
        name = name_of_cache(inputs)
        cache = inputs.pop(name)
        leaves, spec = tree_flatten(inputs)
        kind = (spec, tuple(map(_kind_of, leaves)), name, cache.addresses())
        if kind != self._kind:
            self._kind, self._graph = kind, None
            return self.model(**inputs, **{name: cache})
        if self._graph is None:
            self._capture(leaves, spec, name, cache)
        else:
            for held, leaf in zip(self._inputs, leaves, strict=True):
                if isinstance(leaf, torch.Tensor):
                    held.copy_(leaf)
        self._graph.replay()
        return tree_map_only(torch.Tensor, torch.clone, self._output)

    def _capture(self, leaves: list[Any], spec: Any, name: str, cache: DynamicMaskCache) -> None:
        self._inputs = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        graph = torch.cuda.CUDAGraph()
        try:
            with capturing(graph, cache.mask_layers[0].keys.device):
                self._output = self.model(**tree_unflatten(self._inputs, spec), **{name: cache})
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"the forward of {type(self.model).__name__} cannot be captured in a CUDA graph, so "
                'cache_implementation="static" cannot be used with it; leave it out, or pass '
                "compile_config=CompileConfig() as well, or if the model loops over its experts, call "
                'model.set_experts_implementation("batched_mm")'
            ) from error
        self._graph = graph
        logger.info("captured the step of one token of %s", type(self.model).__name__)


@contextmanager
def capturing(
    graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any = None, stream: torch.cuda.Stream | None = None
) -> Iterator[None]:
    """Captures what runs on `device`, whichever is current; what a capture that fails leaves behind is put right.

    pool: memory that several graphs share. stream: of the capture. None: one of its own, for both.

    torch then stays on the stream of the capture, takes memory for its pool, counts the pool as used by a graph, which
    whatever destroys the pool may check, and keeps the generator of random numbers waiting for its end, so that every
    later random number would raise.
    """
    with torch.cuda.device(device):
        before, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle() if pool is None else pool
        stream = torch.cuda.Stream() if stream is None else stream
        options = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
        try:
            with _without_collection(), torch.cuda.graph(graph, **options):
                yield
        except RuntimeError:
            torch.cuda.set_stream(before)
            with suppress(RuntimeError):  # the pool is no longer filled
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
                torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
            raise


_collection = threading.Lock()
_captures, _was_enabled = 0, False


@contextmanager
def _without_collection() -> Iterator[None]:
    """Collects no garbage, in any thread, until the last of these blocks ends.

    Garbage may own memory of the GPU, and giving that back is not allowed during a capture. It would end the process,
    because it is a destructor that fails.
    """
    global _captures, _was_enabled
    with _collection:
        if _captures == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _captures += 1
    try:
        yield
    finally:
        with _collection:
            _captures -= 1
            if _captures == 0 and _was_enabled:
                gc.enable()


def _refuse_several_gpus(cache: DynamicMaskCache) -> None:
    gpus = sorted({str(state.device) for state in cache.tensors()} - {"cpu"})
    if len(gpus) > 1:
        raise RuntimeError(
            f'cache_implementation="static" needs all layers on one GPU, got {", ".join(gpus)}: leave '
            "cache_implementation out"
        )


def _is_one_token(inputs: dict[str, Any]) -> bool:
    ids = inputs.get("input_ids")
    return ids is not None and ids.shape[1] == 1 and inputs.get("position_ids") is not None


def _kind_of(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else leaf
