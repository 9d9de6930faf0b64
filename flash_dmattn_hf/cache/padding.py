"""What the masks said of the tokens of a cache: they were chosen by it, so it must stay so."""

from collections.abc import Callable

import torch


class SeenPadding:
    """Which of the tokens of a cache are padding, according to the masks of the forwards that brought them.

    mask: (B, n) bool, True for real tokens; those from n on are real. None if all are. Left padding never lets n grow.
    """

    def __init__(self) -> None:
        self.mask: torch.Tensor | None = None

    def admit(self, mask: torch.Tensor | None, num_cached: int) -> torch.Tensor | None:
        """Takes the mask of a forward that continues `num_cached` tokens, before it runs; calling it twice is harmless.

        mask: (B, S) bool, S > num_cached, True for real tokens; None if all are. Returns it, None if all are real.
        Raises ValueError if it marks cached tokens otherwise than they came.
        """
        if mask is not None and bool(mask.all()):
            mask = None
        if num_cached and not self._agrees(mask, num_cached):
            raise ValueError(
                f"attention_mask must mark the {num_cached} cached tokens as when they came, got other values: a "
                "DynamicMaskCache has dropped keys since; use a DynamicCache to hide or show cached tokens"
            )
        self.mask = None if mask is None else mask[:, : int((~mask).any(0).nonzero()[-1]) + 1].clone()
        return mask

    def _agrees(self, mask: torch.Tensor | None, num_cached: int) -> bool:
        if mask is None:
            return self.mask is None or bool(self.mask[:, :num_cached].all())
        if self.mask is None:
            return bool(mask[:, :num_cached].all())
        seen = self.mask[:, :num_cached].to(mask.device)
        width = seen.shape[1]
        return torch.equal(seen, mask[:, :width]) and bool(mask[:, width:num_cached].all())

    def transform(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Applies to the mask what is done to the rows of the cache."""
        if self.mask is not None:
            self.mask = function(self.mask)
