"""How the experts of a model run in steps that are captured: without a loop that waits for the GPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

_WAITING = ("eager", "grouped_mm")
"""Loops over experts on the host; the second only where torch has no kernel for it, as for all but bfloat16."""

_CAPTURED = "batched_mm"
_NUM_CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts")
"""How configs may call the number of experts of a token."""


class StepExperts:
    """Which implementation of experts the steps of a model have while they are captured.

    It is that of the model if it can be captured, else "batched_mm", as `generate()` has it on a GPU. The model keeps
    its own for everything else.

    switched: whether it is "batched_mm"; None before `choose`. most_tokens: how many tokens a captured step may then
    have at most, because their experts' weights are copied; None: any number.
    """

    def __init__(self) -> None:
        self.switched, self.most_tokens = None, None

    def choose(self, model: PreTrainedModel, free: int) -> None:
        """Chooses by what is known beforehand. free: bytes of memory, of which copies of weights may take half."""
        self._set(any(kind == "eager" or part.dtype != torch.bfloat16 for part, kind in _waiting(model)), model, free)

    def switch(self, model: PreTrainedModel, free: int) -> bool:
        """Has later steps captured with other experts; False, and back to those of the model, if none are left to try.

        For what could not be captured. free: as in `choose`.
        """
        self._set(not self.switched and any(_waiting(model)), model, free)
        return self.switched

    def _set(self, switched: bool, model: PreTrainedModel, free: int) -> None:
        self.switched = switched
        self.most_tokens = free // 2 // max(1, copied_bytes_per_token(model)) if switched else None

    @contextmanager
    def in_place(self, model: PreTrainedModel) -> Iterator[None]:
        """What runs inside has the experts of steps. Those of the model are put back, after an error, too."""
        if not self.switched:
            yield
            return
        own = model.get_experts_implementation()
        model.set_experts_implementation({name: _CAPTURED if kind in _WAITING else kind for name, kind in own.items()})
        try:
            yield
        finally:
            model.set_experts_implementation(own)


def copied_bytes_per_token(model: PreTrainedModel) -> int:
    """Returns the bytes of weights that "batched_mm" copies for a token at a time: those of one product of a layer.

    A config that does not say how many experts a token has is taken to choose all.
    """
    most = 0
    for module in model.modules():
        if hasattr(module, "_is_expert_parallel"):
            counts = [getattr(module.config, name, None) for name in _NUM_CHOSEN]
            for weight in module.parameters(recurse=False):
                if weight.dim() == 3:
                    chosen = next((count for count in counts if isinstance(count, int)), len(weight))
                    most = max(most, chosen * weight[0].nbytes)
    return most


def _waiting(model: PreTrainedModel) -> Iterator[tuple[PreTrainedModel, str]]:
    """Yields the parts with experts whose implementation can be chosen and may wait for the GPU, and which it is."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part._can_set_experts_implementation():
            if (kind := part.config._experts_implementation) in _WAITING:
                yield part, kind
