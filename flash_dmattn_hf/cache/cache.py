"""DynamicMaskCache: a DynamicCache of constant size that forgets nothing that is still needed.

Its tokens were chosen by what the masks said of them, so the cache remembers that (`SeenPadding`).
"""

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, LinearAttentionLayer

from flash_dmattn.float8 import check_slot_dtype
from flash_dmattn_hf.cache.foreign import linear_states, move_layer, tensors_of
from flash_dmattn_hf.cache.layer import DynamicMaskCacheLayer, OfferingLayer, living
from flash_dmattn_hf.cache.layers import put_layers
from flash_dmattn_hf.cache.owner import model_within
from flash_dmattn_hf.cache.state import load_state, state_of
from flash_dmattn_hf.gates.attach import iter_gates

if TYPE_CHECKING:
    from flash_dmattn_hf.cache.snapshot import CacheSnapshot


class DynamicMaskCache(DynamicCache):
    """A DynamicCache whose attached layers keep at most as many keys per head as their windows, without loss.

    model: a model with flash_dmattn attached, or what holds one, such as PEFT's, compiled, DDP's and FSDP's models. Its
        other layers get transformers' own cache layers. The cache does not keep the model alive.
    static: lets `generate()` on a GPU capture the forward of one token as a CUDA graph, or compile it, as
        `cache_implementation="static"` does. Layers with a native sliding window or chunks then get slots, too.
    slot_dtype: torch.float8_e4m3fn, or its name, rounds keys and values as they enter the slots, to 8 bits a number and
        a power of 2 per key and per value. Several tokens of one forward see each other unrounded. Importances are not
        rounded, so for the same importances the same tokens are kept. None: slots have the model's dtype.

    Raises ValueError when no layer of the model has an importance gate, for another slot_dtype and for latents in 8
    bits, and for a static cache of a model with a layer whose keys grow with the text or are those of an encoder or an
    image, or that keeps something outside the cache.
    """

    def __init__(self, model: nn.Module, *, static: bool = False, slot_dtype: torch.dtype | str | None = None):
        model = model_within(model)
        super().__init__(config=model.config.get_text_config(decoder=True))
        self._model = weakref.ref(model)
        self.slot_dtype = check_slot_dtype(slot_dtype)
        put_layers(model, self.layers, static, self.slot_dtype)
        self._last_updated = None
        self.padding = SeenPadding()
        self.is_static = static
        self._count: torch.Tensor | None = None
        self._is_counted_outside = False

    @property
    def is_compileable(self) -> bool:
        """Whether `generate()` may capture or compile the forward of one token."""
        return self.is_static

    @property
    def takes_captured_steps(self) -> bool:
        """Whether single tokens go into the slots of all layers at once, whatever came before."""
        ready = all(layer.is_initialized and layer.num_rows and not layer.record_past for layer in self.mask_layers)
        return self.is_static and ready and not torch.is_grad_enabled()

    def tensors(self) -> list[torch.Tensor]:
        """Returns what a step reads and writes: slots, states of transformers' own, the number of tokens."""
        states = [] if self._count is None else [self._count]
        for layer in self.layers:
            states += layer.slots if isinstance(layer, OfferingLayer) else []
            states += linear_states(layer) if isinstance(layer, LinearAttentionLayer) else []
        return states

    def addresses(self) -> tuple[int, ...]:
        """Where these tensors are; those without elements are nowhere."""
        return tuple(state.data_ptr() for state in self.tensors() if state.numel())

    @property
    def num_tokens(self) -> int:
        """Tokens processed, padding included, as the host has counted them."""
        return super().get_seq_length()

    def get_seq_length(self, layer_idx: int = 0) -> int | torch.Tensor:
        """Returns the number of tokens processed, padding included; within `counted_outside` a tensor ().

        Models may compute with it in their forward (llama4 does), and a captured forward must do so anew each time.
        """
        return self._count if self._is_counted_outside else super().get_seq_length(layer_idx)

    @contextmanager
    def counted_outside(self, device: torch.device) -> Iterator[None]:
        """One forward of one token on `device`, whose count the host takes here instead of within it."""
        if self._count is None or self._count.device != device:
            with torch.inference_mode(False):
                self._count = torch.zeros((), dtype=torch.long, device=device)
            torch._dynamo.mark_static_address(self._count)
        self._count.fill_(self.num_tokens)
        self._set_counted_outside(True)
        try:
            yield
            for layer in self.mask_layers:
                layer.count_step()
        finally:
            self._set_counted_outside(False)

    def _set_counted_outside(self, value: bool) -> None:
        self._is_counted_outside = value
        for layer in self.mask_layers:
            layer.is_counted_outside = value

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in transformers. RuntimeError when the layer before was updated but not attended to by flash_dmattn.

        Raises ValueError for a layer that the cache was not made for.
        """
        if self._last_updated is not None:
            self._last_updated.check_attended()
        if layer_idx >= len(self.layers):  # a model may run with its first layers alone, as its own assistant does
            raise ValueError(
                f"num_hidden_layers of the model's config must count all layers, got {len(self.layers)} when this "
                f"cache was made, and a layer whose layer_idx is {layer_idx}"
            )
        layer = self.layers[layer_idx]
        self._last_updated = layer if isinstance(layer, OfferingLayer) else None
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens without loss; ValueError for more than can be undone."""
        # Assisted decoding of transformers 5.17 passes a tensor, which would end up in the layers' lengths.
        super().crop(int(tokens_to_remove))

    def reset(self) -> None:
        """Empties the cache."""
        super().reset()
        self.padding = SeenPadding()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Goes on with these rows of the batch, as beam search does."""
        super().reorder_cache(beam_idx)
        self.padding.transform(lambda mask: mask.index_select(0, beam_idx.to(mask.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of the batch."""
        super().batch_repeat_interleave(repeats)
        self.padding.transform(lambda mask: mask.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Goes on with these rows of the batch."""
        super().batch_select_indices(indices)
        self.padding.transform(lambda mask: mask[indices.to(mask.device)])

    @property
    def mask_layers(self) -> list[OfferingLayer]:
        """The layers of slots: those with a gate and, in a static cache, native ones."""
        return [layer for layer in self.layers if isinstance(layer, OfferingLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' tensors, transformers' own layers included."""
        total = 0
        for layer in self.layers:
            is_ours = isinstance(layer, OfferingLayer)
            total += layer.nbytes if is_ours else sum(state.nbytes for state in tensors_of(layer))
        return total

    @property
    def max_keys(self) -> int:
        """The most keys that any head of a layer with a gate holds now; the largest window at most, except while past
        recording is active. What a layer with native windows or chunks holds is not counted."""
        return max((layer.num_keys for layer in self.mask_layers if layer.gate is not None), default=0)

    def belongs_to(self, model: PreTrainedModel) -> bool:
        """Whether the cache was built for this very model."""
        gates = {id(gate) for _, _, gate in iter_gates(model)}
        return all(id(layer._gate()) in gates for layer in self.mask_layers if isinstance(layer, DynamicMaskCacheLayer))

    def to(self, device: torch.device | str | int | None = None, *, non_blocking: bool = False) -> "DynamicMaskCache":
        """Moves all layers that have a device to `device`, in place; None leaves them where they are.

        Libraries such as accelerate call this for whatever they pass to a model.
        """
        if device is None:
            return self
        for layer in self.layers:
            if isinstance(layer, OfferingLayer):
                layer.to(device, non_blocking)
            else:
                move_layer(layer, device, non_blocking)
        return self

    def __iter__(self) -> Any:
        raise TypeError(
            "a DynamicMaskCache cannot be taken apart into keys and values, which leaves out where the keys stand and "
            "how important they are: save its state_dict(), or look at its layers"
        )

    def __reduce_ex__(self, protocol: int) -> Any:
        raise TypeError(
            "a DynamicMaskCache cannot be pickled, it belongs to a model of this process: save its state_dict(), "
            "and load that into a new DynamicMaskCache(model)"
        )

    def __copy__(self) -> "DynamicMaskCache":
        copied = type(self).__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> "DynamicMaskCache":
        copied = memo[id(self)] = type(self).__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def state_dict(self) -> dict[str, Any]:
        """Returns copies of what the cache holds, for `torch.save`: its size does not depend on the number of tokens.

        Raises RuntimeError for tokens that can still be undone, TypeError for layers that are not keys and values.
        """
        return state_of(self)

    def snapshot(self) -> "CacheSnapshot":
        """Returns what the cache holds now, to start from again as often as one likes; raises as `state_dict` does."""
        from flash_dmattn_hf.cache.snapshot import CacheSnapshot

        return CacheSnapshot(self.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from the state of a cache of such a model, on the device of that state.

        Raises ValueError when the layers are others, or have other windows, heads or head dims, when one cache holds
        latents and the other keys and values, or when the tokens have a dtype that the model does not compute; the
        cache is then as it was. A state in 16 bits fits a model in float32, which may run under autocast: if it does
        not, its next forward raises ValueError. RuntimeError when the model is gone.
        """
        load_state(self, state, living(self._model))
        self._last_updated = None

    def stop_past_recording(self) -> None:
        """Undoes `activate_past_recording` for the layers of constant size."""
        for layer in self.mask_layers:
            layer.stop_past_recording()


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
                "DynamicMaskCache chooses its keys by that; use a DynamicCache to hide or show cached tokens"
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
