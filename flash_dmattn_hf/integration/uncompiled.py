"""Running a model's own code where torch.compile has made something of it."""

import threading
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


class _Eagerly:
    """Switches all that is compiled off while any block is open, in whatever order threads open and close theirs."""

    def __init__(self) -> None:
        self._lock, self._num_open = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._num_open:
                self._stance = torch.compiler.set_stance("force_eager")
                self._stance.__enter__()
            self._num_open += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._num_open -= 1
            if not self._num_open:
                self._stance.__exit__(*error)


eagerly = _Eagerly()


def uncompiled(model: nn.Module) -> AbstractContextManager[None]:
    """Returns a context manager inside which what torch.compile has made of a model or its parts runs their own code.

    What was compiled knows nothing of attention and hooks that are there for a while. The compiled module is still the
    one to call: it may be the one that FSDP2 has sharded. All that a process has compiled is switched off with it, so
    nothing is done for a model of which nothing is compiled.
    """
    return eagerly if any(_is_compiled(module) for module in model.modules()) else nullcontext()


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
