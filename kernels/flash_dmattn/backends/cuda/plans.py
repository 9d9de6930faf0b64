"""Plans: what calls of the same shapes and options share, made once. Then the library takes addresses alone."""

import ctypes
from typing import NamedTuple

import torch

from flash_dmattn.backends.cuda import library
from flash_dmattn.backends.cuda.lists import ListSizes, choose_sizes
from flash_dmattn.backends.cuda.target import Target, find_target
from flash_dmattn.backends.key_lists import is_listed
from flash_dmattn.calls import AttentionCall

MOST_PLANS = 4096
"""Plans that are kept of each kind: a training on unequal lengths meets many shapes."""


class PassShape(NamedTuple):
    """What decides over a plan, and nothing else.

    strides: of query, key and value, each over batch, rows and heads.
    sizes: of the key lists; None: every key is visible from its own row on.
    selection: keep_window_size, num_sink_tokens, local_window_size, sliding_window and is_causal, as in
        `select_visible`, of a forward that selects; None: its intervals are given.
    """

    device: torch.device
    target: Target
    is_bfloat16: bool
    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_kv_heads: int
    num_interval_heads: int
    head_dim: int
    strides: tuple[tuple[int, ...], ...]
    softmax_scale: float
    softcap: float
    deterministic: bool
    has_bias: bool
    is_ordered: bool
    sizes: ListSizes | None
    selection: tuple[int, int, int, int | None, bool] | None

    @classmethod
    def of(cls, call: AttentionCall, selection: tuple | None = None) -> "PassShape":
        """Returns the shape of a call. Waits for the device where `choose_sizes` does."""
        batch, seqlen_q, num_heads, head_dim = call.query.shape
        return cls(
            device=call.query.device,
            target=find_target(call.query.device),
            is_bfloat16=call.query.dtype == torch.bfloat16,
            batch=batch,
            seqlen_q=seqlen_q,
            seqlen_k=call.key.shape[1],
            num_heads=num_heads,
            num_kv_heads=call.key.shape[2],
            num_interval_heads=call.num_interval_heads,
            head_dim=head_dim,
            strides=tuple(tensor.stride()[:3] for tensor in (call.query, call.key, call.value)),
            softmax_scale=call.softmax_scale,
            softcap=call.softcap,
            deterministic=call.deterministic,
            has_bias=call.importance is not None,
            is_ordered=call.is_ordered,
            sizes=choose_sizes(call) if is_listed(call) else None,
            selection=selection,
        )

    @property
    def group_size(self) -> int:
        return self.num_heads // self.num_interval_heads

    @property
    def num_lists(self) -> int:
        """Lists of an epoch."""
        return self.batch * self.num_interval_heads

    def list_fields(self, tiles: dict[str, int]) -> dict[str, object]:
        """Returns the fields of `ListsParameters` that are no addresses; tiles: those that `tile_fields` returns."""
        heads, seqlen_k = self.num_interval_heads, self.seqlen_k
        return {
            "importance_strides": (heads * seqlen_k, seqlen_k, 1),
            "batch": self.batch,
            "num_heads": heads,
            "seqlen_q": self.seqlen_q,
            "seqlen_k": seqlen_k,
            **tiles,
        }

    def attention_fields(self, tiles: dict[str, int]) -> dict[str, object]:
        """Returns the fields that the structs of all attention kernels share and that are no addresses."""
        query_strides, key_strides, value_strides = self.strides
        return {
            "query_strides": query_strides,
            "key_strides": key_strides,
            "value_strides": value_strides,
            "softmax_scale": self.softmax_scale,
            "softcap": self.softcap,
            "batch": self.batch,
            "seqlen_q": self.seqlen_q,
            "seqlen_k": self.seqlen_k,
            "num_interval_heads": self.num_interval_heads,
            "interval_heads_per_kv_head": self.num_interval_heads // self.num_kv_heads,
            "group_size": self.group_size,
            "head_dim": self.head_dim,
            "is_bfloat16": self.is_bfloat16,
            **tiles,
        }

    def tile_fields(self, tile_rows: int, unlisted_epoch_tiles: int | None) -> dict[str, int]:
        """Returns the fields that say how queries are cut into epochs, and into tiles of `tile_rows` rows.

        tile_rows: tokens x group heads.
        unlisted_epoch_tiles: the most tiles of an epoch where keys are not listed; None: one epoch holds all queries.
        """
        tile_size = tile_rows // self.group_size
        if self.sizes is not None:
            epoch_size, capacity = self.sizes
        else:
            capacity = self.seqlen_k
            # As long as the sequence, so that no tile of it is empty, or whole tiles.
            epoch_size = self.seqlen_q
            if unlisted_epoch_tiles is not None:
                epoch_size = min(unlisted_epoch_tiles, -(-self.seqlen_q // tile_size)) * tile_size
        return {
            "num_epochs": -(-self.seqlen_q // epoch_size),
            "epoch_size": epoch_size,
            "tiles_per_epoch": -(-epoch_size // tile_size),
            "tile_size": tile_size,
            "capacity": capacity,
        }

    def flags(self) -> dict[str, bool]:
        """Returns the flags that both plans have."""
        return {"is_listed": self.sizes is not None, "is_ordered": self.is_ordered, "has_bias": self.has_bias}


class Plan:
    """A struct of csrc/passes.h without addresses, for one kind of pass on one device.

    scratch_bytes: what every call allocates besides its results.
    """

    def __init__(self, kind: str, parameters: ctypes.Structure, device: torch.device):
        self._name = f"flash_dmattn_{kind}_pass"
        self._parameters = parameters
        self._device = device
        with torch.cuda.device(device):
            self.scratch_bytes = library.function(f"flash_dmattn_{kind}_scratch")(ctypes.byref(parameters))

    def run(self, tensors: bytes) -> None:
        """Launches the pass on the current stream. tensors: packed addresses, of what must live until the launch."""
        library.launch(self._name, self._parameters, self._device, tensors)
