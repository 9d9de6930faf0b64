"""Context parallelism: every rank of a group holds the same number of consecutive rows of the same sequences.

Key and value of a row that was evicted before a rank's first row are never needed there. So a rank needs only the
survivors of the ranks before it, at most keep_window_size keys per head, however long the sequence is.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from flash_dmattn_hf.parallel.exchange import Traffic
from flash_dmattn_hf.parallel.failures import Failures
from flash_dmattn_hf.thread_slot import ThreadSlot

active = ThreadSlot()
"""Its content is what the innermost `context_parallel` block of a thread has entered, None outside of one."""


def context_parallel(group: dist.ProcessGroup | None = None) -> "ContextParallel":
    """Returns a context manager inside which the models of this thread attend to the sequence of all ranks of `group`.

    Rank R of W holds rows R n to (R + 1) n of a sequence of W n tokens, as `ContextParallel.shard` cuts them. A forward
    returns hidden states, logits and loss of its own rows, those of one process with the whole sequence, and a backward
    the gradients of the rank's own loss: their sum over the ranks is the gradient of the whole.

    - position_ids must be given to the model, those of the whole sequence, and shift_labels beside labels.
    - All ranks run the same forwards and backwards, in the same order. Every rank takes part in every exchange.
    - Packed documents, as position_ids say, sliding windows, gradient checkpointing and soft selection work as always.
      Padding and a cache with tokens are refused. In a compiled model the attention runs between the graphs.

    group: a process group; None: all processes. Raises RuntimeError where torch.distributed is not initialized.

    When a rank fails inside the block, the others raise RuntimeError with its reason as soon as the exchange in which
    they wait for it fails: when its process ends, or at the group's timeout.
    """
    return ContextParallel(group)


class ContextParallel:
    """The group of a `context_parallel` block.

    rank, world_size: of this process in the group. traffic: what its exchanges have sent so far.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        if not dist.is_initialized():
            raise RuntimeError("context_parallel needs torch.distributed: call init_process_group before, or torchrun")
        self.group = dist.group.WORLD if group is None else group
        self.rank, self.world_size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError(f"group must hold this process, got one without rank {dist.get_rank()}")
        self.traffic = Traffic()
        self._before: list[ContextParallel | None] = []

    def __enter__(self) -> "ContextParallel":
        if not self._before:
            self._failures = Failures("context_parallel", self.group)
        slot = active.slot
        self._before.append(slot.content)
        slot.content = self
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        active.slot.content = self._before.pop()
        if error is not None:
            self._failures.report(error)

    def shard(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns this rank's rows of a batch that all ranks of the group have, for `model(**shard)`.

        batch: input_ids (B, S), and tensors (B, S) like it, which are cut; everything else stays. position_ids may
            be (1, S), and are added where they are missing; beside labels, shift_labels and num_items_in_batch. With
            these the losses of the ranks add up to the loss of the whole batch.

        Raises ValueError for padding, and if the number of ranks does not divide S.
        """
        input_ids = batch["input_ids"]
        batch = {**batch, **complete(batch, self.world_size)}
        cut = {
            name: value.chunk(self.world_size, 1)[self.rank].contiguous()
            for name, value in batch.items()
            if isinstance(value, torch.Tensor) and value.shape[:2] == input_ids.shape
        }
        return {**batch, **cut}

    def watching(self) -> AbstractContextManager[None]:
        """Around an exchange: raises PeerFailure if it fails because another rank has left the block with an error."""
        return self._failures.watching()


def complete(batch: dict[str, Any], world_size: int) -> dict[str, Any]:
    """Returns what a whole batch lacks to be cut: position_ids (B, S), and beside labels shift_labels and their number.

    A mask of ones is taken away, as None. Raises ValueError as `ContextParallel.shard`.
    """
    check_whole(batch, world_size)
    input_ids, labels = batch["input_ids"], batch.get("labels")
    length = input_ids.shape[1]
    found = {} if batch.get("attention_mask") is None else {"attention_mask": None}
    if batch.get("position_ids") is None:
        found["position_ids"] = torch.arange(length, device=input_ids.device).expand(input_ids.shape)
    elif batch["position_ids"].shape == (1, length):  # one row for all sequences
        found["position_ids"] = batch["position_ids"].expand(input_ids.shape)
    if labels is not None and batch.get("shift_labels") is None:
        found["shift_labels"] = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    if labels is not None and batch.get("num_items_in_batch") is None:
        found["num_items_in_batch"] = ({**batch, **found}["shift_labels"] != -100).sum()
    return found


def check_whole(batch: dict[str, Any], world_size: int) -> None:
    """Raises ValueError for a whole batch with padding, or with a length that the ranks do not divide."""
    length, mask = batch["input_ids"].shape[1], batch.get("attention_mask")
    if length % world_size:
        raise ValueError(f"the length of a sequence must be a multiple of the {world_size} ranks, got {length}")
    if mask is not None and not bool(mask.all()):
        raise ValueError(PADDING)


PADDING = "context parallelism does not support padding: pack the documents, or cut them to one length"


@dataclass(frozen=True)
class Shard:
    """The rows of one forward on this rank: number i is row first_row + i of its sequence.

    context: the block they belong to. begins: (B, n) int64, the row at which the document of every token begins.
    has_documents: whether any sequence of the batch holds more than one, on whatever rank.
    """

    context: ContextParallel
    begins: torch.Tensor
    has_documents: bool

    @property
    def num_rows(self) -> int:
        return self.begins.shape[1]

    @property
    def first_row(self) -> int:
        return self.context.rank * self.num_rows
