"""What the definition of a result computes in float32, an autocast around it must not compute in less."""

import functools
from collections.abc import Callable

import torch


def in_full_precision(function: Callable) -> Callable:
    """Wraps a function of a call, and of more, so that autocast is off while it runs."""

    @functools.wraps(function)
    def run(call, *rest):
        with torch.autocast(call.query.device.type, enabled=False):
            return function(call, *rest)

    return run
