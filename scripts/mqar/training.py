"""One training step of all models: the loss of each, and on a GPU a step that is captured once and replayed."""

import torch
from torch.nn.functional import cross_entropy

from mqar.models import Models, Optimizer


class Step:
    """Trains on one batch. On a GPU the second step of every shape and set of masks is captured in a CUDA graph, which
    the steps after it replay: hundreds of small kernels take longer to launch than to run."""

    def __init__(self, models: Models, optimizer: Optimizer):
        self.models, self.optimizer = models, optimizer
        self._kind, self._graph = None, None

    def __call__(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Returns the loss (R,) of every model on tokens and targets (B, S) before the step."""
        kind = (tokens.shape, self.models.groups)
        if not tokens.is_cuda or self._kind != kind:
            self._kind, self._graph = kind, None
            return self._step(tokens, targets)
        if self._graph is None:
            self._inputs = tokens.clone(), targets.clone()
            torch.cuda.empty_cache()  # the graph has memory of its own
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._losses = self._step(*self._inputs)
        for held, given in zip(self._inputs, (tokens, targets), strict=True):
            held.copy_(given)
        self._graph.replay()
        return self._losses.clone()

    def _step(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        losses = losses_of(self.models, tokens, targets)
        parameters = list(self.models.parameters.values())
        self.optimizer.step(torch.autograd.grad(losses.sum(), parameters, allow_unused=True, materialize_grads=True))
        return losses.detach()


def losses_of(models: Models, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns the mean cross entropy (R,) over what is asked in tokens and targets (B, S)."""
    logits = models.logits(tokens)
    targets = targets[:, -logits.shape[2] :]
    flat = targets.flatten().expand(len(logits), -1)
    losses = cross_entropy(logits.flatten(1, 2).transpose(1, 2), flat, ignore_index=-1, reduction="none")
    return losses.sum(1) / (targets >= 0).sum()
