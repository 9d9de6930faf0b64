"""What a cache holds at the end of a prefix, to start from again: in memory, or as one safetensors file."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flash_dmattn_hf.cache.cache import DynamicMaskCache

FORMAT = "flash_dmattn snapshot 1"


class CacheSnapshot:
    """The slots of a DynamicMaskCache after some tokens. Its size does not depend on how many.

    state: a `DynamicMaskCache.state_dict()`.
    """

    def __init__(self, state: dict[str, Any]):
        self.state = state

    @property
    def num_tokens(self) -> int:
        """Tokens of the prefix, padding included."""
        return max((layer.get("num_rows", 0) for layer in self.state["layers"]), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def restore(self, model: torch.nn.Module, batch_size: int = 1, *, static: bool = False) -> DynamicMaskCache:
        """Returns a new cache that goes on from here, for each of `batch_size` texts that begin with this prefix.

        model: the model that the snapshot is of, or one with the same weights. static: as in `DynamicMaskCache`.
        A snapshot of one row can be repeated. One of slots in 8 bits is restored into slots in 8 bits.
        Raises ValueError as `DynamicMaskCache.load_state_dict` does.
        """
        slot_dtypes = {layer.get("slot_dtype") for layer in self.state["layers"]} - {None}
        cache = DynamicMaskCache(model, static=static, slot_dtype=next(iter(slot_dtypes), None))
        cache.load_state_dict(self.state)
        cache.to(next(model.parameters()).device)
        if batch_size != 1:
            cache.batch_repeat_interleave(batch_size)
        return cache

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {
            f"layers.{number}.{name}": tensor
            for number, layer in enumerate(self.state["layers"])
            for name, tensor in layer["tensors"].items()
        }
        if self.state["padding"] is not None:
            tensors["padding"] = self.state["padding"]
        return tensors

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, counts and windows in its metadata."""
        layers = [
            {name: value for name, value in layer.items() if name != "tensors"} for layer in self.state["layers"]
        ]
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors().items()}
        save_file(tensors, str(path), metadata={"format": FORMAT, "layers": json.dumps(layers)})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "CacheSnapshot":
        """Reads what `save` wrote. Raises ValueError for another file, OSError for none."""
        with safe_open(str(path), "pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} must be a snapshot of a DynamicMaskCache, got {metadata.get('format')!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        padding = tensors.pop("padding", None)
        layers = [{**layer, "tensors": {}} for layer in json.loads(metadata["layers"])]
        for name, tensor in tensors.items():
            _, number, field = name.split(".")
            layers[int(number)]["tensors"][field] = tensor
        return cls({"layers": layers, "padding": padding})
