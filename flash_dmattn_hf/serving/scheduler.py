"""Which requests a forward is about: transformers' schedulers, with admission by rows of slots.

A request that has started has all the memory that it will ever need. So none is preempted or computed again; one for
which there is no row waits.
"""

from typing import Any

from transformers.generation.continuous_batching.requests import RequestState, RequestStatus
from transformers.generation.continuous_batching.scheduler import FIFOScheduler, PrefillFirstScheduler

from flash_dmattn_hf.serving.chunks import SMALLEST, PaddedBatch

_MOST_TOKENS = 2**62
_CHILD = "__child#"


def child_ids(state: RequestState) -> list[str]:
    """Returns the ids of the children that a request will fork into, as transformers names them."""
    return [f"{state.request_id}{_CHILD}{number}" for number in range(state.num_children)]


class RowScheduler:
    """What both schedulers do differently with a `SlotCache`.

    padded: set it where forwards with part of a prompt are padded; then there is one prompt in each, after all requests
    that decode, with as many tokens as fit, if these are not too few.
    """

    padded: PaddedBatch | None = None
    _most_new = _MOST_TOKENS

    def add_waiting_request(self, state: RequestState) -> None:
        """Raises ValueError for a request that could never start, and for ids that others have or will have."""
        for name in (state.request_id, *child_ids(state)):
            if self._is_taken(name):
                raise ValueError(f"request_id must be new, got {name!r}, whose request has not ended")
        self.cache.register(state)
        super().add_waiting_request(state)

    def _is_taken(self, name: str) -> bool:
        """Whether a request has this id, or one that has not forked yet will give it to a child."""
        if name in self.active_requests or name in self.waiting_requests:
            return True
        parent = str(name).rpartition(_CHILD)[0]
        state = self.active_requests.get(parent) or self.waiting_requests.get(parent)
        return state is not None and name in child_ids(state)

    def _get_waiting_candidates(self) -> list[RequestState]:
        return [state for state in super()._get_waiting_candidates() if self.cache.may_start(state)]

    def _process_candidates(self, candidates: list[RequestState], *budgets: Any) -> tuple[Any, ...]:
        if self.padded is not None:
            decoding = [state for state in candidates if state.status == RequestStatus.DECODING]
            others = [state for state in candidates if state.status != RequestStatus.DECODING]
            most = self.padded.most_new(min(len(decoding), self.max_requests_per_batch))
            self._most_new = most if most >= SMALLEST else _MOST_TOKENS  # too few to be worth a forward
            candidates = decoding + others[:1]
        return super()._process_candidates(candidates, *budgets)

    def _try_to_meet_safety_margin(self) -> bool:
        return True  # nothing that has started can run out of memory

    def _infer_request_tokens(self, state: RequestState, request_ids_to_remove_from_waiting: set[str]) -> list[int]:
        """Returns the tokens of a request that are to be processed, without those that a snapshot holds."""
        if state.status == RequestStatus.PENDING and self.cache.use_prefix_sharing:
            if num_held := self.cache.start_from_snapshot(state):
                self.active_requests[state.request_id] = state
                self.waiting_requests.pop(state.request_id, None)
                request_ids_to_remove_from_waiting.add(state.request_id)
                state.status = RequestStatus.PREFILLING
                state.remaining_prefill_tokens = state.remaining_prefill_tokens[num_held:]
                state.position_offset = num_held
        return state.tokens_to_process if state.status == RequestStatus.DECODING else state.remaining_prefill_tokens

    def _schedule_request(
        self,
        state: RequestState,
        request_tokens: list[int],
        token_budget: int,
        request_ids_to_remove_from_waiting: set[str],
    ) -> None:
        """A chunk ends where its request leaves a snapshot, and has no more tokens than a padded forward."""
        token_budget = min(token_budget, self._most_new)
        end = self.cache.prefixes.end_of(state.request_id, state.current_len())
        if end is not None:
            token_budget = min(token_budget, end - state.current_len())
        super()._schedule_request(state, request_tokens, token_budget, request_ids_to_remove_from_waiting)


class FIFORowScheduler(RowScheduler, FIFOScheduler):
    """Decoding before prefill, in the order of arrival."""


class PrefillFirstRowScheduler(RowScheduler, PrefillFirstScheduler):
    """Prompts that have begun before decoding."""


SCHEDULERS = {"fifo": FIFORowScheduler, "prefill_first": PrefillFirstRowScheduler}
