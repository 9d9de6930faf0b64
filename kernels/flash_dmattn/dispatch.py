"""Which backend does a job. Every choice of this package is made here, and said once at INFO; others only ask.

This file also says whether a call needs a torch operator around the backend.
"""

import functools
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from flash_dmattn.backends import BACKENDS
from flash_dmattn.dense.backends import DENSE_BACKENDS

logger = logging.getLogger("flash_dmattn")

ENVIRONMENT_VARIABLE = "FLASH_DMATTN_BACKEND"
"""Names the backend that "auto" stands for, when set."""

_VARIABLES = (ENVIRONMENT_VARIABLE, "FLASH_DMATTN_DISABLE_CUDA", "FLASH_DMATTN_CUDA_ARCH")
_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None)}


@dataclass(frozen=True, eq=False)
class Job:
    """A kind of work that backends do.

    reject: name of the function that says why a backend refuses a call.
    serve: names of functions; a backend that does the job has one of them.
    family: the backends that come into question, best first. aliases: names that stand for another of them.
    otherwise: the backend whose code stands beside the caller and serves what the others do not; None: there is none.
    """

    name: str
    reject: str
    serve: tuple[str, ...]
    family: dict[str, ModuleType] = field(default_factory=lambda: BACKENDS)
    aliases: Mapping[str, str] = field(default_factory=dict)
    otherwise: str | None = None

    @functools.cached_property
    def backends(self) -> dict[str, ModuleType]:
        """The backends that do the job, best first."""
        return {
            name: backend
            for name, backend in self.family.items()
            if any(hasattr(backend, function) for function in self.serve)
        }

    def why_not(self, name: str, *call) -> str | None:
        """Returns why the backend of that name cannot serve a call here, or None."""
        backend = self.backends.get(name)
        if backend is None:
            return f"it does no {self.name}"
        return _ask(backend, "why_unavailable") or _ask(backend, self.reject, *call)


ATTENTION = Job("attention", "reject", ("forward", "attend"))
DENSE_ATTENTION = Job(
    "attention under masks and biases", "reject", ("forward", "attend"), DENSE_BACKENDS, aliases={"cuda": "triton"}
)
DECODING = Job("decoding", "reject_decoding", ("decode",))
SELECTION = Job("selection", "reject_selection", ("select_visible",), otherwise="reference")
KEY_LISTS = Job("key lists", "reject_key_lists", ("build_key_lists",), otherwise="triton")
ORDER_STATISTICS = Job(
    "order statistics", "reject_order_statistics", ("kth_smallest_in_ranges",), otherwise="reference"
)
TOKEN_IMPORTANCE = Job("token importance", "reject_token_importance", ("token_importance",), otherwise="reference")
SOFT_CUT = Job("soft cuts", "reject_cut", ("cut",), otherwise="reference")
SINK_LOGITS = Job("sink logits", "reject_sinks", ("with_sinks",), otherwise="reference")
JOBS = (
    ATTENTION,
    DENSE_ATTENTION,
    DECODING,
    SELECTION,
    KEY_LISTS,
    ORDER_STATISTICS,
    TOKEN_IMPORTANCE,
    SOFT_CUT,
    SINK_LOGITS,
)


def explain_backends() -> dict[str, str | None]:
    """Returns, for every backend of this version, best first, why it cannot run here; None when it can."""
    return {name: _ask(backend, "why_unavailable") for name, backend in BACKENDS.items()}


def explain_jobs(device: torch.device | str | None = None) -> dict[str, dict[str, str | None]]:
    """Returns, for every job, the backends that do it, best first, each with why it is not taken here, or None.

    The first with None serves tensors on `device` (None: a GPU if there is one), unless it refuses a call, for its
    dtype for example. The logger "flash_dmattn" says at INFO, once each, which backend does which job, and what the
    better ones refused.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    explained = {}
    for job in JOBS:
        explained[job.name] = {name: _why_not_taken(backend, device) for name, backend in job.backends.items()}
        if job.otherwise is not None:
            explained[job.name][job.otherwise] = _ask(BACKENDS[job.otherwise], "why_unavailable")
    return explained


def get_available_backends() -> list[str]:
    """Returns the names of the backends that can run here, best first."""
    return [name for name, reason in explain_backends().items() if reason is None]


def check_backend_name(name: str, argument: str = "backend") -> None:
    """Raises ValueError, naming `argument`, unless `name` is "auto" or a backend of this version."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {['auto', *BACKENDS]}, got {name!r}")


def differentiates_itself(name: str) -> bool:
    """Whether the backend of that name is called as it is, under torch's autograd."""
    return hasattr(BACKENDS.get(_resolve(name)), "attend")


def choose(job: Job, call, name: str) -> ModuleType:
    """Returns the backend that serves `call`, whose query tells the device.

    name: of a backend; "auto": the first that accepts, unless the environment variable FLASH_DMATTN_BACKEND names one
    that does the job. Raises RuntimeError with the backend's own reason when the named one cannot serve the call.
    """
    asked = _resolve(name)
    resolved = job.aliases.get(asked, asked)
    if resolved == "auto" or (name == "auto" and resolved not in job.backends):
        return find(job, call.query.device, call)
    reason = job.why_not(resolved, call)
    if reason is not None:
        raise RuntimeError(f"backend {asked!r} cannot serve this call: {reason}")
    announce(job, resolved, f"{asked!r} was asked for")
    return job.backends[resolved]


def choose_backward(call, name: str) -> ModuleType:
    """Returns the backend that serves the backward: that of the forward, or the next one where that refuses."""
    forward = choose(ATTENTION, call, name)
    reason = _ask(forward, "reject_backward", call)
    if reason is None:
        return forward
    refusals = []
    for name, backend in ATTENTION.backends.items():
        if backend is forward:
            refusals.append(f"{name}: {reason}")
        elif refusals and hasattr(backend, "backward"):
            reason = ATTENTION.why_not(name, call) or _ask(backend, "reject_backward", call)
            if reason is None:
                _announce("the backward of attention", name, "; ".join(refusals))
                return backend
            refusals.append(f"{name}: {reason}")
    raise RuntimeError("no backend can serve this backward: " + "; ".join(refusals))


def choose_planner(call, importance: torch.Tensor, name: str) -> ModuleType | None:
    """Returns the backend that selects by this importance, attends and differentiates by a plan, or None.

    call: of attention, whose intervals are selected if it has some. name: as in `choose`. Calls whose keys and values
    have different head dims have no plan, because backends are given them filled up.
    """
    if call.key.shape[3] != call.value.shape[3]:
        return None
    backend = choose(ATTENTION, call, name)
    if not hasattr(backend, "plan_attention") or _ask(backend, "reject_plan", call, importance) is not None:
        return None
    selects = call.birth is not None
    if selects and find(SELECTION, call.query.device, importance, None) is not backend:
        return None
    return backend


def find(job: Job, device: torch.device, *call) -> ModuleType | None:
    """Returns the first backend that accepts a call by itself; None where the code beside the caller is to serve.

    Raises RuntimeError where there is no such code.
    """
    refusals = []
    for name, backend in job.backends.items():
        if not _is_automatic(backend, device):
            continue
        reason = job.why_not(name, *call)
        if reason is None:
            announce(job, name, "; ".join(refusals))
            return backend
        refusals.append(f"{name}: {reason}")
    if job.otherwise is None:
        raise RuntimeError("no backend can serve this call: " + "; ".join(refusals))
    announce(job, job.otherwise, "; ".join(refusals))
    return None


def environment() -> tuple[str | None, ...]:
    """Returns the environment variables that a choice depends on, for those who remember one."""
    return tuple([os.environ.get(name) for name in _VARIABLES])


def prefer(job: Job, name: str, device: torch.device, *call) -> ModuleType | None:
    """Returns the backend of that name if it accepts a call, else the one that `find` returns."""
    asked = _resolve(name)
    if asked == job.otherwise or (asked in job.backends and job.why_not(asked, *call) is None):
        announce(job, asked, f"{asked!r} was asked for")
        return job.backends.get(asked)
    return find(job, device, *call)


def can_call_directly(*tensors: torch.Tensor | None) -> bool:
    """Whether nobody would see the operator around a kernel, whose machinery costs the host more than a launch.

    So it is for plain tensors without gradients when nothing traces, maps, profiles or intercepts.
    """
    return not torch.is_grad_enabled() and is_eager(*tensors)


def is_eager(*tensors: torch.Tensor | None) -> bool:
    """Whether these are plain tensors, and nothing traces, maps, profiles or intercepts what is done with them."""
    return not is_watched(*tensors) and not torch._C._autograd._profiler_enabled()


def is_watched(*tensors: torch.Tensor | None) -> bool:
    """Whether something needs to see single operations: it traces, maps or intercepts them, or a tensor does."""
    return is_transformed(*tensors) or is_in_torch_dispatch_mode()


def is_transformed(*tensors: torch.Tensor | None) -> bool:
    """Whether something needs the operations of torch that make up a job; a mode that intercepts is content with ours.

    It compiles, traces or maps them, or carries tangents, or a tensor is no plain one.
    """
    if torch.compiler.is_compiling():
        return True
    if torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level >= 0:  # a kernel would leave tangents behind
        return True
    return tensors[0].is_meta or not _PLAIN.issuperset(map(type, tensors))


def announce(job: Job, name: str, reason: str) -> None:
    """Says at INFO, once, that a backend does a job, and why it and no better one."""
    if not torch.compiler.is_compiling():
        _announce(job.name, name, reason)


def _resolve(name: str) -> str:
    """Returns what "auto" stands for: itself, or the name in the environment variable FLASH_DMATTN_BACKEND."""
    if name == "auto":
        name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
        check_backend_name(name, f"the environment variable {ENVIRONMENT_VARIABLE}")
    return name


def _ask(backend: ModuleType, question: str, *call) -> str | None:
    """Returns the reason that a backend's function gives, None where it has no such function."""
    function = getattr(backend, question, None)
    return None if function is None else function(*call)


def _is_automatic(backend: ModuleType, device: torch.device) -> bool:
    return backend.AUTOMATIC_ON is None or device.type in backend.AUTOMATIC_ON


def _why_not_taken(backend: ModuleType, device: torch.device) -> str | None:
    reason = _ask(backend, "why_unavailable")
    if reason is None and not _is_automatic(backend, device):
        return f"it is not taken for tensors on {device.type} unless asked for by name"
    return reason


@functools.cache
def _announce(job: str, name: str, reason: str) -> None:
    logger.info("flash_dmattn takes %s from the %s backend%s", job, name, f" ({reason})" if reason else "")
