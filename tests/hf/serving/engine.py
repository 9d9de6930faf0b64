"""Continuous batching driven by hand, one forward at a time, so that tests decide when requests come and go."""

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.continuous_batching import RequestStatus

from flash_dmattn_hf.versions import can_serve

needs_serving = pytest.mark.skipif(not can_serve(), reason="transformers serves flash_dmattn from 5.23 on")


def greedy_config(**values) -> GenerationConfig:
    return GenerationConfig(**{"do_sample": False, "max_new_tokens": 6, "eos_token_id": -1, **values})


def batching(**values):
    """A config of few tokens and pages, so that small prompts are cut into chunks and share prefixes."""
    from transformers import ContinuousBatchingConfig

    return ContinuousBatchingConfig(**{"max_batch_tokens": 24, "num_blocks": 5, "page_size": 4, **values})


def alone(model, prompt: list[int], max_new_tokens: int) -> list[int]:
    """What generate() makes of one request by itself."""
    ids = torch.tensor([prompt], device=model.device)
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()


class Engine:
    """A manager without its thread.

    batches: what every forward brought its requests, (row, tokens before, tokens new) each. widths: its tokens, padding
    included.
    """

    def __init__(self, model, generation_config=None, **values):
        self.model = model
        self.manager = model.init_continuous_batching(generation_config or greedy_config(), batching(**values))
        self.processor = self.manager.batch_processor = self.manager._create_batch_processor()
        self.results = {}
        self.streamed = {}
        self.batches = []
        self.widths = []
        self._begin, self.cache.begin = self.cache.begin, self._record

    @property
    def cache(self):
        return self.processor.cache

    def add(self, name: str, prompt: list[int], max_new_tokens: int, **options) -> None:
        self.manager.add_request(prompt, request_id=name, max_new_tokens=max_new_tokens, **options)

    def _record(self, requests, *tensors) -> None:
        self.batches.append(
            [
                (self.cache.rows.held[state.request_id][0], state.position_offset - number, number)
                for state, number in ((request.state, request.query_length) for request in requests)
            ]
        )
        self.widths.append(self.processor.inputs_and_outputs.num_q_tokens)
        self._begin(requests, *tensors)

    def step(self) -> bool:
        """One forward; False when there is nothing to do."""
        has_batch = self.processor.prepare_next_batch()
        if has_batch:
            self.processor._generation_step(self.model)
            self.processor.update_batch()
        while (result := self.manager.get_result(timeout=0)) is not None:
            self._take(result)
        return has_batch

    def _take(self, result) -> None:
        self.streamed.setdefault(result.request_id, []).append(result.generated_tokens)
        if result.status in (RequestStatus.FINISHED, RequestStatus.FAILED):
            self.results[result.request_id] = result

    def run(self) -> None:
        while self.step():
            pass
