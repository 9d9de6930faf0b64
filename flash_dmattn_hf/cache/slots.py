"""The tensors of one cache layer, w slots per head that stay where they are, and the step of one token over them."""

import torch
from transformers.cache_utils import DynamicLayer

from flash_dmattn.float8 import NUMBERS, as_bits, round_to_float8
from flash_dmattn.slots import Slots, decode_step, make_slots
from flash_dmattn_hf.cache.tail import Tail
from flash_dmattn_hf.config import Windows

STATE = (*Slots._fields, "row_is_real")
SCALES = {"keys": "key_scales", "values": "value_scales"}


class SlotLayer(DynamicLayer):
    """What a cache layer holds, how one token enters it, and how it is moved, reordered and emptied.

    windows: those that the slots are filled by; keep_window_size is the number of slots per head.
    keys, values, importance, positions, victims, lengths, arrivals, key_scales, value_scales: the fields of `slots`,
        None before the first token.
    slot_dtype: torch.float8_e4m3fn rounds keys and values as they enter the slots; None: they stay as they are.
    row_is_real: (B, w) bool, which of the first w tokens were no padding.
    num_rows: tokens processed, padding included.
    is_counted_outside: True while a captured or compiled forward of one token leaves counting it to `count_step`.
    """

    is_counted_outside = False
    slot_dtype: torch.dtype | None = None

    def __init__(self, windows: Windows):
        super().__init__()
        self.windows = windows
        self._release()

    @property
    def slots(self) -> Slots:
        return Slots(*(getattr(self, name) for name in Slots._fields))

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
            new = function(as_bits(state))
            new = new if new.dtype == state.dtype else new.view(state.dtype)
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
        slots = make_slots(batch, num_heads, num_slots, head_dim, dtype, device, value_dim, self.slot_dtype)
        for name, state in slots._asdict().items():
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(state)
            setattr(self, name, state)
        with torch.inference_mode(False):
            self.row_is_real = torch.ones(batch, num_slots, dtype=torch.bool, device=device)
        self.is_initialized = True

    def borrow(self, slots: Slots, dtype: torch.dtype, num_rows: int) -> None:
        """Works on slots that belong to somebody else and hold `num_rows` tokens of `dtype`, none of them padding."""
        self._release()
        for name, state in slots._asdict().items():
            setattr(self, name, state)
        self.dtype, self.device = dtype, slots.keys.device
        self.num_rows, self.is_initialized = num_rows, True

    def _write(self, name: str, start: int, rows: torch.Tensor) -> None:
        """Writes (B, Hc, n, ...) to the slots from `start` on; out of place where gradients flow."""
        if name in SCALES and getattr(self, name).dtype == NUMBERS:
            rows, scales = round_to_float8(rows)
            self._write(SCALES[name], start, scales)
        state, end = getattr(self, name), start + rows.shape[2]
        if state.requires_grad or rows.requires_grad:
            setattr(self, name, torch.cat([state[:, :, :start], rows, state[:, :, end:]], dim=2))
        else:
            state[:, :, start:end] = rows

    def take(self, key: torch.Tensor, value: torch.Tensor, importance: torch.Tensor) -> None:
        """Gives the layer T new tokens.

        key: (B, Hkv, T, D), value: (B, Hkv, T, Dv), in the slots' dtype. importance: (B, Hi, T).
        """
        self._new = (key, value, importance)
        self._num_new = key.shape[2]

    def step(self, query: torch.Tensor, padding_mask: torch.Tensor | None = None, **options):
        """Appends the new token, evicts and attends, in place.

        query: (B, 1, H, D). padding_mask: (B, 1) bool, True for real tokens, or None. options: of `decode_step`.
        Returns out (B, 1, H, Dv), and lse (B, H, 1) if `return_lse` is among the options.
        """
        padding_mask = self._checked(padding_mask)
        key, value, importance = self._new
        num_slots, num_sinks, local_window, sliding_window = self.windows
        out = decode_step(
            query.to(self.dtype),
            key.transpose(1, 2),
            value.transpose(1, 2),
            importance,
            self.slots,
            num_sink_tokens=num_sinks,
            local_window_size=local_window,
            sliding_window=sliding_window,
            padding_mask=padding_mask,
            **options,
        )
        if not self.is_counted_outside:
            self._count_rows(padding_mask)
            self._num_undoable = self._num_undoable + 1 if self.num_rows <= num_slots else 0
        self._new, self._num_new = None, 0
        return out

    def count_step(self) -> None:
        """Counts one token of every batch row, which can then not be undone."""
        self.num_rows += 1
        self._num_undoable = 0

    def _checked(self, padding_mask: torch.Tensor | None) -> torch.Tensor | None:
        if padding_mask is None:
            return None
        expected = (self.keys.shape[0], self._num_new)
        if tuple(padding_mask.shape) != expected:
            raise ValueError(f"padding_mask must have shape {expected}, got {tuple(padding_mask.shape)}")
        return padding_mask.to(device=self.keys.device, dtype=torch.bool)

    def _count_rows(self, padding_mask: torch.Tensor | None) -> None:
        before, self.num_rows = self.num_rows, self.num_rows + self._num_new
        self._new = None
        if padding_mask is not None and before < self.windows.keep_window_size:
            rows = self.row_is_real[:, before : self.num_rows]
            rows.copy_(padding_mask[:, : rows.shape[1]])

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
