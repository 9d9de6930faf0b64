"""A CUDA graph without a GPU: the operators of a forward are written down once and run again on the same tensors.

What the host decides while they are written down, and every number that it computes, stays as it was. An operator that
makes the host wait for the GPU cannot be written down.
"""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flash_dmattn_hf.cache import cuda_graph

WAITING = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class RecordedGraph(TorchDispatchMode):
    """Takes the place of `torch.cuda.CUDAGraph`. num_replays: of all graphs, since `record_graphs`."""

    num_replays = 0

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator in WAITING:
            raise RuntimeError("a graph cannot wait for the GPU")
        out = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, out))
        return out

    def replay(self):
        RecordedGraph.num_replays += 1
        for operator, args, kwargs, out in self.calls:
            again = operator(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def record_graphs(monkeypatch, model, cache):
    """Has `model.generate(past_key_values=cache)` run its steps as on a GPU, with recorded graphs."""

    @contextmanager
    def capturing(graph, device):
        before = [(state, state.clone()) for state in cache.tensors()]
        with graph:
            yield
        for state, content in before:  # a capture runs nothing
            state.copy_(content)

    monkeypatch.setattr(cuda_graph, "capturing", capturing)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(RecordedGraph, "num_replays", 0)
    forward = cuda_graph.StepForward(model, cuda_graph.CapturedForward(model))
    monkeypatch.setattr(model, "get_compiled_call", lambda config: forward)
    monkeypatch.setattr(model, "_valid_auto_compile_criteria", lambda *_: True)
