"""How forwards run: in one CUDA graph for each padded number of tokens, or as they are."""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.utils import (
    get_device_and_memory_breakdown,
    memory_pool_context,
    stream_context,
)

from flash_dmattn_hf.cache.cuda_graph import capturing
from flash_dmattn_hf.serving.chunks import PaddedBatch
from flash_dmattn_hf.serving.experts import StepExperts

logger = logging.getLogger(__name__)


class SlotModelRunner(ModelRunner):
    """Runs forwards over a `SlotCache`.

    A step is a forward in which every request brings one token. It is padded to a power of 2, at most to the number of
    requests that a batch can have; what is added has no row, so no slot changes for it. On a GPU a step is captured
    when its number comes the first time, and replayed from then on. Experts that cannot be captured are others in
    captured steps.

    A forward with part of a prompt runs as it is, unless `captures_prompts`: then single tokens and part of one prompt
    are padded and captured, too, as `PaddedBatch` says.

    asks_for_graphs: True: RuntimeError when a step cannot be captured; None: then steps run without; False: no padding.
    captures_prompts: RuntimeError when a forward with part of a prompt cannot be captured.
    options: of transformers' ModelRunner.
    """

    def __init__(self, asks_for_graphs: bool | None, captures_prompts: bool, **options: Any):
        super().__init__(**options)
        self.asks_for_graphs = asks_for_graphs
        self.pads_steps = self.use_cuda_graph_decode or bool(asks_for_graphs)
        self.experts = StepExperts()
        self.padded, self._sizes = None, None
        if captures_prompts:
            sizes = self.cb_config.max_requests_per_batch, self.cache.max_batch_tokens
            self.padded = PaddedBatch(*sizes, self.cache.device)
        # Ready-made, so that no model looks for documents in the positions: the cache knows whose tokens these are.
        self._attention_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.cache.device)

    def maybe_pad_inputs(self, num_q_tokens: int, max_kv_read: int, use_decode_fast_path: bool) -> tuple[int, int]:
        """Returns the number of tokens of the next forward, padded if it is a step, and that no pages are read."""
        self.pad_inputs = self.pads_steps and use_decode_fast_path
        return super().maybe_pad_inputs(num_q_tokens, max_kv_read, use_decode_fast_path)

    def compute_batch(self, model: nn.Module, batch_data: dict[str, Any]) -> None:
        """Runs the forward of the batch that was prepared, and chooses its tokens.

        batch_data: what the model is called with, as the inputs of transformers give it.
        """
        self._choose_experts(model)
        requests, self._sizes = self.inputs_and_outputs.requests_in_batch, None
        if self.padded is not None and batch_data["block_table"] is None:
            self._sizes = self.cache.padded_sizes(requests, self.padded)
        if self._sizes is not None:
            batch_data = self._pad(self._sizes)
        self.cache.begin(requests, batch_data["block_table"], None if self._sizes is None else self.padded)
        self._compute(model, batch_data)

    def _choose_experts(self, model: nn.Module) -> None:
        if self.use_cuda_graph_decode and self.experts.switched is None:
            self.experts.choose(model, _free_bytes())

    def _pad(self, sizes: tuple[int, int]) -> dict[str, Any]:
        """Returns what the model is called with, of so many single tokens and so many of a prompt."""
        inputs, (num_singles, _) = self.inputs_and_outputs, sizes
        inputs.num_q_tokens, inputs.max_kv_read = sum(sizes), num_singles  # both tell graphs apart
        inputs.max_length_k = dict.fromkeys(inputs.max_length_k, 1)
        batch_data, num_logits = inputs.get_model_kwargs(use_padding=True), num_singles + 1
        batch_data["logits_indices"] = inputs.logits_indices[:num_logits]
        batch_data["logits_processor_args"] = batch_data["logits_processor_args"][:, :num_logits]
        return batch_data

    def _compute(self, model: nn.Module, batch_data: dict[str, Any]) -> None:
        batch_data["attention_mask"], batch_data["block_table"] = self._attention_mask, None
        stream = self.inputs_and_outputs.compute_stream
        if stream is not None:  # rows are emptied and copied on the other one
            stream.wait_stream(torch.cuda.current_stream(self.cache.device))
        super().compute_batch(model, batch_data)

    def _get_forward_fn(self, use_block_table: bool) -> tuple[Callable[..., None], bool]:
        """Returns what forwards run through, and whether in a graph.

        So does a step with room for its experts, and a forward with part of a prompt that is padded.
        """
        forward_fn, uses_graph = super()._get_forward_fn(use_block_table)
        if not use_block_table:
            return forward_fn, uses_graph and self._sizes is not None
        most = self.experts.most_tokens
        return forward_fn, uses_graph and (most is None or self.inputs_and_outputs.num_q_tokens <= most)

    @torch.no_grad()
    def warmup(self, model: nn.Module) -> None:
        """Captures a forward for every padded number, the largest first: the others share its memory."""
        self._choose_experts(model)
        if self.padded is not None and self.use_cuda_graph_varlen:
            for sizes in self.padded.all_sizes():
                self._warm_up_padded(model, sizes)
        num_requests = self.cb_config.max_requests_per_batch
        while num_requests and self.use_cuda_graph_decode:
            switched = self.experts.switched
            self.run_one_warmup(model=model, num_q_tokens=num_requests, max_kv_read=None)
            self.inputs_and_outputs.retrieve_device_outputs()
            if self.experts.switched == switched:  # else this number has not been captured yet
                num_requests = 1 << (num_requests - 1).bit_length() >> 1

    def _warm_up_padded(self, model: nn.Module, sizes: tuple[int, int]) -> None:
        """Captures a forward of these sizes, in which all is padding."""
        self.inputs_and_outputs.reset()
        self.inputs_and_outputs.use_block_table, self._sizes = False, sizes
        batch_data = self._pad(sizes)
        self.cache.live_requests.begin_padded(*self.padded.fill([], sizes))
        self._compute(model, batch_data)
        self.inputs_and_outputs.retrieve_device_outputs()

    def _capture_graph(self, forward_fn: Callable[..., None], compute_stream: torch.cuda.Stream, *args: Any) -> None:
        """Runs the forward, and captures it for later ones. args: those of `forward_fn`, the model first."""
        model, graph, is_step = args[0], torch.cuda.CUDAGraph(), self._sizes is None
        with self.experts.in_place(model) if is_step else nullcontext():
            with stream_context(compute_stream), memory_pool_context(self.mem_pool):
                forward_fn(*args)
            try:
                with capturing(graph, self.cache.device, self.graph_pool_id, compute_stream):
                    forward_fn(*args)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                refusal = error.with_traceback(None)  # whose frames hold the graph and, by way of this one, themselves
            else:
                self.inputs_and_outputs.set_graph(graph)
                return
        if not is_step:
            raise RuntimeError(
                f"the forward of {type(model).__name__} with part of a prompt cannot be captured in a CUDA graph: "
                "use_cuda_graph=(False, True) captures steps alone"
            ) from refusal
        self._do_without(model, refusal)

    def _do_without(self, model: nn.Module, refusal: RuntimeError) -> None:
        """Has later steps captured with other experts, or launched kernel by kernel if it is not for the experts."""
        message = f"the forward of {type(model).__name__} cannot be captured in a CUDA graph"
        if self.experts.switch(model, _free_bytes()):
            logger.info("%s with its own experts, so later steps have others: %s", message, refusal)
            return
        if self.asks_for_graphs:
            raise RuntimeError(f"{message}: leave use_cuda_graph out") from refusal
        logger.warning("%s, so its steps are launched kernel by kernel: %s", message, refusal)
        self.use_cuda_graph_decode = self.pads_steps = False


def _free_bytes() -> int:
    _, total, reserved, allocated = get_device_and_memory_breakdown()
    return total - max(reserved, allocated)
