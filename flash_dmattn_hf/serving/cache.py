"""The cache of transformers' continuous batching, with one row of slots for a request instead of pages of tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.requests import RequestState

from flash_dmattn_hf.gates.attach import iter_gates, text_config_of
from flash_dmattn_hf.serving.chunks import PaddedBatch, RowTokens
from flash_dmattn_hf.serving.layers import ServedLayer, served_layers
from flash_dmattn_hf.serving.live_requests import LiveRequests
from flash_dmattn_hf.serving.memory import (
    SPARE_ROWS,
    bytes_per_request,
    copied_bytes_per_request,
    count_rows,
    workspace_bytes,
)
from flash_dmattn_hf.serving.prefixes import Prefixes
from flash_dmattn_hf.serving.rows import Rows

DEFAULT_BATCH_TOKENS = 2048
"""Of a forward, unless requests that decode need more: about what one can do while its kernels are launched."""

_PREFIX = "prefix"
_ANY_LENGTH = 2**62


def batch_tokens_of(settings: Any) -> int:
    """Returns how many tokens a forward has at most. settings: a resolved ContinuousBatchingConfig."""
    return settings.max_batch_tokens or max(DEFAULT_BATCH_TOKENS, settings.max_requests_per_batch)


def count_requests(model: PreTrainedModel, layers: Mapping[int, ServedLayer], settings: Any) -> int:
    """Returns for how many requests a model will have slots.

    layers: those of the model. settings: a resolved ContinuousBatchingConfig. Raises what `count_rows` raises.
    """
    num_tokens = batch_tokens_of(settings)
    num_logits = settings.max_requests_per_batch if model._supports_logits_to_keep() else num_tokens
    workspace = workspace_bytes(layers, text_config_of(model), model.dtype, num_tokens, num_logits)
    copied, num_steps = copied_bytes_per_request(layers, model.dtype), min(settings.max_requests_per_batch, num_tokens)
    if any(settings.cuda_graph_booleans):  # they keep memory of their own for what is largest
        most = num_tokens if settings.cuda_graph_booleans[0] else num_steps
        workspace += workspace_bytes(layers, text_config_of(model), model.dtype, most, num_steps)
        copied *= 2
    return count_rows(
        bytes_per_request(layers, model.dtype),
        workspace,
        share=settings.max_memory_percent,
        num_rows=settings.num_blocks,
        most=settings.max_requests_per_batch + SPARE_ROWS,
        copied_bytes=copied,
        most_copied=num_steps,
    )


class RequestAllocator:
    """What transformers' input tensors ask an allocator of pages: there are no pages, so no indices into them."""

    index = read_trash_index = write_trash_index = 0
    layer_type = "full_attention"

    def get_seqlen_k(self, past_length: int, query_length: int) -> int:
        return past_length + query_length


class SlotCache(PagedAttentionCache):
    """Slots for requests of any length. One block is one request; a request has its block from its start to its end.

    model: one that runs through flash_dmattn. settings: a resolved ContinuousBatchingConfig, whose `num_blocks` is the
    number of requests, None for as many as fit into `max_memory_percent` of the free memory. slot_dtype: as in
    `DynamicMaskCache`.

    live_requests: the slots. rows: who holds which. prefixes: which prompts begin alike, None without block sharing.
    Raises ValueError when no request fits into memory, or the model has layers that grow with the text.
    """

    max_blocks_per_request = 1  # the block table of a step holds the row of each request
    max_decode_fast_path_length = _ANY_LENGTH
    read_cache_limit = 0
    max_tokens_read = 1  # of pages; the scheduler stops at 0

    def __init__(self, model: PreTrainedModel, settings: Any, slot_dtype: torch.dtype | None = None):
        self.config, self.dtype, self.device = text_config_of(model), model.dtype, model.device
        self.max_batch_tokens = batch_tokens_of(settings)
        layers = served_layers(model, slot_dtype)
        self.bytes_per_sector = bytes_per_request(layers, self.dtype)
        self.num_blocks = self.num_sectors = count_requests(model, layers, settings)
        self.live_requests = LiveRequests(layers, self.num_blocks, self.dtype, self.device)
        self._gates = [gate for _, _, gate in iter_gates(model) if gate.layer_idx in layers]
        self.rows = Rows(self.num_blocks)
        self.allow_block_sharing = self.use_prefix_sharing = settings.allow_block_sharing
        self.prefixes = Prefixes(settings.page_size)
        self.cache_allocators = {RequestAllocator.layer_type: RequestAllocator()}

    def register(self, state: RequestState) -> None:
        """Takes note of a request that arrives. ValueError for one that could never start."""
        num_tokens, count = len(state.initial_tokens), 1 + state.num_children
        if num_tokens < min(count, 2):
            raise ValueError(
                f"the prompt of request {state.request_id} must have at least {min(count, 2)} token(s) to generate "
                f"{count} sequence(s), got {num_tokens}"
            )
        if count > self.num_blocks:
            raise ValueError(
                f"num_return_sequences of request {state.request_id} must be at most {self.num_blocks}, the number of "
                f"requests for which there is memory, got {count}"
            )
        if self.use_prefix_sharing:  # what forks leaves two tokens for after the prefix
            self.prefixes.add(state.request_id, state.initial_tokens[: num_tokens - min(state.num_children, 1)])

    def can_store_request_tokens(self, state: RequestState, request_len: int, dry_run: bool = False) -> bool:
        """Whether a request has its row, or gets it now: then it is never without it before it ends."""
        if state.request_id in self.rows.held:
            return True
        if dry_run or not self.rows.admit(state.request_id, 1 + state.num_children):
            return dry_run and self.rows.num_available > state.num_children
        self.live_requests.clear(self.rows.held[state.request_id][0])
        return True

    def start_from_snapshot(self, state: RequestState) -> int:
        """Gives a request its row with the longest snapshot of its prompt in it, and returns the tokens of that.

        Returns 0 when there is none, or no row.
        """
        found = self.prefixes.longest_of(state.request_id, self.rows.snapshots)
        if found is None:
            return 0
        length, name = found
        source = self.rows.use_snapshot(name)
        if not self.rows.admit(state.request_id, 1 + state.num_children):
            return 0
        row = self.rows.held[state.request_id][0]
        if row != source:  # it may have been given the snapshot's own row
            self.live_requests.copy(source, row)
        return length

    def may_start(self, state: RequestState) -> bool:
        """Whether a waiting request need not wait for a snapshot that another is about to leave."""
        return not self.use_prefix_sharing or self.prefixes.may_start(state.request_id, self.rows.snapshots)

    def count_new_complete_blocks(self, state: RequestState, request_len: int) -> dict[str, int]:
        """Returns the length of the prefix of which the next forward makes a snapshot, if it does."""
        end = state.current_len() + request_len
        return {_PREFIX: end} if end == self.prefixes.end_of(state.request_id, state.current_len()) else {}

    def mark_complete_blocks(self, state: RequestState, complete_blocks: dict[str, int]) -> None:
        """Keeps the snapshot that `count_new_complete_blocks` foresaw, unless requests need all rows."""
        if not complete_blocks:
            return
        row = self.rows.keep_snapshot(self.prefixes.arrive(state.request_id, complete_blocks[_PREFIX]))
        if row is not None:
            self.live_requests.copy(self.rows.held[state.request_id][0], row)

    def fork(self, parent_id: str, child_id: str) -> None:
        """Gives a child the row that its parent holds for it, with what the parent's own row holds."""
        self.live_requests.copy(*self.rows.hand_over(parent_id, child_id))

    def fill_block_table(
        self, request_id: str, past_length: int, query_length: int, block_table: torch.Tensor
    ) -> None:
        """Leaves the table to `begin`, which writes the rows of all requests at once."""

    def begin(self, requests: list[Any], block_table: torch.Tensor | None, padded: PaddedBatch | None = None) -> None:
        """Says which requests the next forward is about.

        requests: FutureRequestStates in the order of their tokens. block_table: where a step reads the rows of requests
        that bring one token each, (1, B, 1) int32, filled with -1; None when some bring more. padded: where a forward
        that `padded_sizes` pads reads who they are, None if it does not. Raises ValueError when the windows of a layer
        have changed.
        """
        for gate in self._gates:
            self.live_requests.check_windows(gate.layer_idx, gate.windows)
        batch = self._tokens_of(requests)
        if block_table is not None:
            rows = [tokens.row for tokens in batch]
            block_table[0, : len(rows), 0] = torch.tensor(rows, dtype=torch.int32, device=self.device)
            self.live_requests.begin_step(block_table[0, :, 0])
        elif padded is not None:
            self.live_requests.begin_padded(*padded.fill(batch, padded.sizes_of(batch)))
        else:
            self.live_requests.begin(batch)

    def padded_sizes(self, requests: list[Any], padded: PaddedBatch) -> tuple[int, int] | None:
        """Returns what `PaddedBatch.sizes_of` does for FutureRequestStates."""
        return padded.sizes_of(self._tokens_of(requests))

    def _tokens_of(self, requests: list[Any]) -> list[RowTokens]:
        batch = []
        for request in requests:
            row = self.rows.held[request.state.request_id][0]
            num_before = request.state.position_offset - request.query_length  # it was counted beforehand
            batch.append(RowTokens(row, num_before, request.query_length))
        return batch

    def free_blocks(self, request_id: str, no_cache: bool = False) -> None:
        """Ends a request."""
        self.rows.release(request_id)
        self.prefixes.drop(request_id)

    def free_all_requests(self, clear_ledgers: bool = False) -> None:
        """Ends all requests, and forgets all prompts and snapshots: the next session may have other weights.

        clear_ledgers: of transformers; there is nothing that it could leave.
        """
        for request_id in list(self.rows.held):
            self.rows.release(request_id)
        self.rows.forget_snapshots()
        self.prefixes.reset()

    def evict_cached_blocks(self) -> bool:
        """Never: a request that needs the row of a snapshot takes it."""
        return False

    def compute_free_capacity(self, relative: bool = True) -> int | float:
        """Returns the bytes that requests can have now, or their share of all."""
        return (
            self.rows.num_available / self.num_blocks if relative else self.rows.num_available * self.bytes_per_sector
        )

    def extend_read_and_write_indices(self, *args: Any) -> None:
        """There are no pages."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Passes this cache on to the attention function, which does the rest; called by transformers from 5.24 on."""
        kwargs["cache"] = self
        return key_states, value_states
