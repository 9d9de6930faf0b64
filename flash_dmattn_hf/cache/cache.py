"""DynamicMaskCache: a DynamicCache of constant size that forgets nothing that is still needed."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from flash_dmattn_hf.cache.layer import DynamicMaskCacheLayer
from flash_dmattn_hf.cache.padding import SeenPadding
from flash_dmattn_hf.cache.state import check_state_of_layer, load_state_of_layer, state_of_layer
from flash_dmattn_hf.gates.attach import iter_gates


class DynamicMaskCache(DynamicCache):
    """A DynamicCache whose attached layers keep at most `keep_window_size` keys per head, without loss.

    model: a model with flash_dmattn attached, or what holds one, such as PEFT's, compiled, DDP's and FSDP's models. Its
        other layers get transformers' own cache layers. The cache does not keep the model alive.
    static: lets `generate()` on a GPU capture the forward of one token as a CUDA graph, or compile it, as
        `cache_implementation="static"` does. All layers of the model must be of constant size then.

    Raises ValueError when no layer of the model has an importance gate, or, for a static cache, one has none.
    """

    def __init__(self, model: nn.Module, *, static: bool = False):
        parts = model.modules() if isinstance(model, nn.Module) else ()
        wrapped, model = model, next((part for part in parts if isinstance(part, PreTrainedModel)), None)
        if model is None:
            raise ValueError(f"model must be a model of transformers, got {type(wrapped).__name__}")
        super().__init__(config=model.config.get_text_config(decoder=True))
        gates = self._gates_by_index(model)
        for index, layer in enumerate(self.layers):
            if index not in gates:
                continue
            if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
                self.layers[index] = DynamicMaskCacheLayer(gates[index])
            elif isinstance(layer, DynamicSlidingWindowLayer):
                raise ValueError(
                    f"layer {index} of model must have a cache of keys and values alone, got a {type(layer).__name__}, "
                    "which drops keys that still compete"
                )

        self._last_updated = None
        self.padding = SeenPadding()
        self.is_static = static
        if static and any(getattr(module, "is_kv_shared_layer", False) for module in model.modules()):
            raise ValueError(
                "a static cache needs layers with keys of their own, got one that shares those of an earlier layer: "
                'use cache_implementation="dynamic"'
            )
        if static and len(self.mask_layers) < len(self.layers):
            plain = next(index for index, layer in enumerate(self.layers) if layer not in self.mask_layers)
            raise ValueError(
                f"a static cache needs an importance gate in every layer of the model, got layer {plain} without one: "
                'its keys grow with the text; use cache_implementation="dynamic"'
            )

    def _gates_by_index(self, model: PreTrainedModel) -> dict[int, Any]:
        """Returns layer_idx -> gate. ValueError if there is none, or a cache cannot tell the layers apart."""
        names, gates = {}, {}
        for name, _, gate in iter_gates(model):
            index = gate.layer_idx
            if index in gates:
                raise ValueError(
                    f"every layer of model must have a layer_idx of its own, got {index} for {names[index]} and "
                    f"{name}: number them anew"
                )
            names[index], gates[index] = name, gate
        if not gates:
            raise ValueError(
                f"model must have flash_dmattn attached, got a {type(model).__name__} without an importance gate"
            )
        for name, layers in model.named_modules():
            if isinstance(layers, nn.ModuleList) and len(set(layers)) < len(layers) and any(iter_gates(layers)):
                raise ValueError(f"{name} of model must not hold a module twice: put in a copy.deepcopy of it")
        return gates

    @property
    def is_compileable(self) -> bool:
        """Whether `generate()` may capture or compile the forward of one token."""
        return self.is_static

    @property
    def takes_captured_steps(self) -> bool:
        """Whether single tokens go into the slots of all layers at once, whatever came before."""
        ready = all(layer.is_initialized and layer.num_rows and not layer.record_past for layer in self.mask_layers)
        return self.is_static and ready and not torch.is_grad_enabled()

    def addresses(self) -> tuple[int, ...]:
        """Where the slots of all layers are."""
        return tuple(state.data_ptr() for layer in self.mask_layers for state in layer.slots)

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
        self._last_updated = layer if isinstance(layer, DynamicMaskCacheLayer) else None
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
    def mask_layers(self) -> list[DynamicMaskCacheLayer]:
        """The layers of constant size."""
        return [layer for layer in self.layers if isinstance(layer, DynamicMaskCacheLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' tensors, transformers' own layers included."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, DynamicMaskCacheLayer):
                total += layer.nbytes
            else:
                total += sum(state.nbytes for state in vars(layer).values() if isinstance(state, torch.Tensor))
        return total

    @property
    def max_keys(self) -> int:
        """The most keys that any head of a constant-size layer holds now; `keep_window_size` at most, except while
        past recording is active."""
        return max((layer.num_keys for layer in self.mask_layers), default=0)

    def belongs_to(self, model: PreTrainedModel) -> bool:
        """Whether the cache was built for this very model."""
        gates = {id(gate) for _, _, gate in iter_gates(model)}
        return all(id(layer._gate()) in gates for layer in self.mask_layers)

    def to(self, device: torch.device | str | int | None = None, *, non_blocking: bool = False) -> "DynamicMaskCache":
        """Moves all layers that have a device to `device`, in place; None leaves them where they are.

        Libraries such as accelerate call this for whatever they pass to a model.
        """
        if device is None:
            return self
        for layer in self.layers:
            if isinstance(layer, DynamicMaskCacheLayer):
                layer.to(device, non_blocking)
            else:
                for name, state in vars(layer).items():
                    if isinstance(state, torch.Tensor):
                        setattr(layer, name, state.to(device, non_blocking=non_blocking))
        return self

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
        padding = None if self.padding.mask is None else self.padding.mask.clone()
        return {"layers": [state_of_layer(layer) for layer in self.layers], "padding": padding}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from the state of a cache of such a model, on the device of that state.

        Raises ValueError when the layers are others, or have other windows; the cache is then as it was.
        """
        if len(state["layers"]) != len(self.layers):
            raise ValueError(f"state must have {len(self.layers)} layers, got {len(state['layers'])}")
        pairs = list(zip(self.layers, state["layers"], strict=True))
        for layer, saved in pairs:
            check_state_of_layer(layer, saved)
        self._last_updated, self.padding.mask = None, state.get("padding")
        for layer, saved in pairs:
            load_state_of_layer(layer, saved)

    def stop_past_recording(self) -> None:
        """Undoes `activate_past_recording` for the layers of constant size."""
        for layer in self.mask_layers:
            layer.stop_past_recording()
