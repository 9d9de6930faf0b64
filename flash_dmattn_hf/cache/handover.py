"""The hand-over of new tokens from a cache layer to the attention function, which transformers does not give the cache.

`OfferingLayer.update` offers its tokens, the attention function takes them. Both happen in one forward of one
attention module, which nothing suspends in between, so an offer is kept per thread and not on a module.
"""

from typing import Any

import torch

from flash_dmattn_hf.thread_slot import ThreadSlot


class HandOver(ThreadSlot):
    """Holds at most one offer per thread, (layer, key, value); other threads neither see nor take it.

    An offer is good for the tensors it was made with, and for the gate of its layer. What a forward that was
    interrupted left behind is dropped when the next forward of the thread makes its mask.
    """

    def offer(self, layer: Any, key: torch.Tensor, value: torch.Tensor) -> None:
        """Offers the new tokens of a cache layer; key, value: (B, Hkv, T, D), as the model goes on with them."""
        self.slot.content = (layer, key, value)

    @property
    def has_offer(self) -> bool:
        """Whether this thread offers something that nobody has taken."""
        return self.slot.content is not None

    def withdraw(self) -> None:
        """Drops what this thread offers, if anything."""
        self.slot.content = None

    def take(self, gate: Any | None, key: torch.Tensor, value: torch.Tensor) -> Any | None:
        """Returns the cache layer that offers its new tokens to an attention module, None if none does.

        gate: the module's, None if it has none. key, value: (B, Hkv, S, D), as the attention function got them.
        Nothing is offered afterwards, whatever happens. Raises RuntimeError when the offer was made for another
        gate, or with other tensors.
        """
        slot = self.slot
        offer = slot.content
        if offer is None:
            return None
        slot.content = None
        layer, *offered = offer
        if layer.gate is not gate:
            raise RuntimeError(
                f"tokens for layer {layer.layer_idx} of a DynamicMaskCache reached another attention module: the "
                "model is not the one the cache was made for, or its layers have changed since; make a new "
                "DynamicMaskCache(model)"
            )
        makes_keys_afterwards = gate is not None and gate.is_latent  # of what was offered
        if not (torch.compiler.is_compiling() or makes_keys_afterwards):
            for given, expected, name in zip((key, value), offered, ("key", "value"), strict=True):
                if given is not expected and not _is_same(given, expected):
                    raise RuntimeError(
                        f"layer {layer.layer_idx} changed its {name} between the cache and the attention function, "
                        "which a DynamicMaskCache cannot follow"
                    )
        return layer


def _is_same(given: torch.Tensor, expected: torch.Tensor) -> bool:
    return given.data_ptr() == expected.data_ptr() and given.shape == expected.shape


hand_over = HandOver()
