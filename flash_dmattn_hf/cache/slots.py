"""The tensors of one cache layer: w slots per head that stay where they are, and a tail of tokens behind them."""

import torch
from transformers.cache_utils import DynamicLayer

from flash_dmattn.slots import Slots, make_slots
from flash_dmattn_hf.cache.tail import Tail
from flash_dmattn_hf.config import Windows

STATE = (*Slots._fields, "row_is_real")


class SlotLayer(DynamicLayer):
    """What a cache layer holds, and how it is moved, reordered and emptied; who fills it is another matter.

    windows: those that the slots are filled by; keep_window_size is the number of slots per head.
    keys, values, importance, positions, victims, lengths, arrivals: the fields of `slots`, None before the first token.
    row_is_real: (B, w) bool, which of the first w tokens were no padding.
    num_rows: tokens processed, padding included.
    """

    def __init__(self, windows: Windows):
        super().__init__()
        self.windows = windows
        self._release()

    @property
    def slots(self) -> Slots:
        return Slots(
            self.keys, self.values, self.importance, self.positions, self.victims, self.lengths, self.arrivals
        )

    @property
    def num_kept(self) -> int:
        """Slots per head that may be occupied: the first ones."""
        return min(self.num_rows - len(self._tail), self.windows.keep_window_size)

    @property
    def num_keys(self) -> int:
        """Keys per head that are held, the tail's included."""
        return self.num_kept + len(self._tail)

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in (*self._state().values(), *self._tail.rows.values()))

    def _state(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in STATE} if self.is_initialized else {}

    def _transform(self, function) -> None:
        """Replaces every tensor; one whose shape and device stay the same keeps its address."""
        for name, state in self._state().items():
            new = function(state)
            if (new.shape, new.device) != (state.shape, state.device) or state.requires_grad or new.requires_grad:
                setattr(self, name, new)
            elif new is not state:
                state.copy_(new)
        self._tail.rows = {name: function(rows) for name, rows in self._tail.rows.items()}

    def _forget(self) -> None:
        self.num_rows = 0
        self._tail = Tail()
        self._new = None
        self._num_new = 0
        self._num_undoable = 0

    def _release(self) -> None:
        for name in STATE:
            setattr(self, name, None)
        self.is_initialized = False
        self._forget()

    def _allocate(
        self, batch: int, num_heads: int, head_dims: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        """head_dims: of keys and of values."""
        self.dtype, self.device = dtype, device
        num_slots = self.windows.keep_window_size
        head_dim, value_dim = head_dims
        slots = make_slots(batch, num_heads, num_slots, head_dim, dtype, device, value_dim)
        for name, state in slots._asdict().items():
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(state)
            setattr(self, name, state)
        with torch.inference_mode(False):
            self.row_is_real = torch.ones(batch, num_slots, dtype=torch.bool, device=device)
        self.is_initialized = True

    def _write(self, name: str, start: int, rows: torch.Tensor) -> None:
        """Writes (B, Hc, n, ...) to the slots from `start` on; out of place where gradients flow."""
        state, end = getattr(self, name), start + rows.shape[2]
        if state.requires_grad or rows.requires_grad:
            setattr(self, name, torch.cat([state[:, :, :start], rows, state[:, :, end:]], dim=2))
        else:
            state[:, :, start:end] = rows

    def get_seq_length(self) -> int:
        """Returns the number of tokens processed, padding included."""
        return self.num_rows

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_rows + query_length, 0

    def reset(self) -> None:
        """Empties the slots, which stay where they are."""
        if self.is_initialized and self.keys.requires_grad:
            self._release()
        self._forget()
        for name, state in self._state().items():
            state.fill_({"positions": -1, "row_is_real": True}.get(name, 0))

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "SlotLayer":
        """Moves the layer's tensors; later updates move them to where the model is."""
        if self.is_initialized and self.keys.device != torch.device(device):
            self._transform(lambda state: state.to(device, non_blocking=non_blocking))
            self.device = self.keys.device
        return self

    def offload(self) -> None:
        self._transform(lambda state: state.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._transform(lambda state: state.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._transform(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._transform(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._transform(lambda state: state[indices.to(state.device)])
