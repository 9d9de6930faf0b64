"""Which backend serves a call. Detection happens here, once; no other file asks which backend runs."""

import functools
import logging
import os

from flash_dmattn.backends import BACKENDS
from flash_dmattn.calls import DecodeCall

logger = logging.getLogger("flash_dmattn")

ENVIRONMENT_VARIABLE = "FLASH_DMATTN_BACKEND"
"""Names the backend that "auto" stands for, when set."""


def explain_backends() -> dict[str, str | None]:
    """Returns, for every backend of this version, best first, why it cannot run here; None when it can."""
    return {name: backend.why_unavailable() for name, backend in BACKENDS.items()}


def get_available_backends() -> list[str]:
    """Returns the names of the backends that can run here, best first."""
    return [name for name, reason in explain_backends().items() if reason is None]


def check_backend_name(name: str, argument: str = "backend") -> None:
    """Raises ValueError, naming `argument`, unless `name` is "auto" or a backend of this version."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {['auto', *BACKENDS]}, got {name!r}")


def resolve_backend_name(name: str) -> str:
    """Returns what "auto" stands for: itself, or the name in the environment variable FLASH_DMATTN_BACKEND."""
    if name == "auto":
        name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
        check_backend_name(name, f"the environment variable {ENVIRONMENT_VARIABLE}")
    return name


def differentiates_itself(name: str) -> bool:
    """Whether the backend of that name is called as it is, under torch's autograd."""
    return hasattr(BACKENDS.get(resolve_backend_name(name)), "attend")


def choose_backend(call, name: str, backends: dict = BACKENDS):
    """Returns the module of `backends` that serves `call`.

    "auto" takes the first that accepts, unless the environment variable FLASH_DMATTN_BACKEND names one. Raises
    RuntimeError with the backend's own reason when the named one cannot serve the call.
    """
    name = resolve_backend_name(name)
    if name != "auto":
        reason = _why_not(backends[name], call)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot serve this call: {reason}")
        return backends[name]
    refusals = []
    for name, backend in backends.items():
        if not backend.is_automatic(call):
            continue
        reason = _why_not(backend, call)
        if reason is None:
            _announce(name, "; ".join(refusals))
            return backend
        refusals.append(f"{name}: {reason}")
    raise RuntimeError("no backend can serve this call: " + "; ".join(refusals))


def choose_decoder(call: DecodeCall, name: str):
    """Returns the backend module that serves a decoding step, in the same way; the CUDA library has no such kernel.

    Where the environment variable asks for the CUDA library, the first of the others that accepts serves.
    """
    if name == "auto":
        name = resolve_backend_name(name)
        name = name if name == "auto" or hasattr(BACKENDS[name], "decode") else "auto"
    candidates = [name] if name != "auto" else [name for name in BACKENDS if hasattr(BACKENDS[name], "decode")]
    refusals = []
    for candidate in candidates:
        backend = BACKENDS[candidate]
        if name == "auto" and not backend.is_automatic(call):
            continue
        if not hasattr(backend, "decode"):
            reason = "it has no decoding step"
        else:
            reason = backend.why_unavailable() or backend.reject_decoding(call)
        if reason is None:
            return backend
        refusals.append(f"{candidate}: {reason}")
    raise RuntimeError("no backend can serve this decoding step: " + "; ".join(refusals))


def _why_not(backend, call) -> str | None:
    return backend.why_unavailable() or backend.reject(call)


@functools.cache
def _announce(name: str, refusals: str) -> None:
    logger.info("flash_dmattn uses the %s backend%s", name, f" ({refusals})" if refusals else "")
