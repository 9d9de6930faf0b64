"""`model.generate_batch` and what else transformers builds on its continuous batching, with slots instead of pages."""

import copy
from types import SimpleNamespace
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
)
from transformers.generation.continuous_batching.initialization import update_cb_config_after_cache_creation

from flash_dmattn_hf.cache.settings import slot_dtype_of
from flash_dmattn_hf.gates.attach import tensor_parallel_size
from flash_dmattn_hf.serving.cache import SlotCache
from flash_dmattn_hf.serving.layers import served_layers
from flash_dmattn_hf.serving.runner import SlotModelRunner
from flash_dmattn_hf.serving.scheduler import SCHEDULERS, child_ids

_OFF = {
    "use_async_batching": "a batch is made when the one before is done",
    "varlen_compile_config": "a forward of several requests is not compiled",
    "decode_compile_config": "a forward of several requests is not compiled",
    "default_compile_level": "a forward of several requests is not compiled",
    "max_blocks_per_request": "a request has one block, whatever its length",
    "cpu_offload_space": "no request is ever moved out of the way of another",
}
"""Settings of transformers that must be left out or off, and why."""


def checked_settings(settings: ContinuousBatchingConfig, device: torch.device) -> ContinuousBatchingConfig:
    """Returns a copy with everything off that slots do not have. ValueError for such a setting that is on.

    device: of the model. `use_cuda_graph` becomes two bools: whether forwards with part of a prompt and steps are
    captured.
    """
    for name, reason in _OFF.items():
        value = getattr(settings, name)
        if value not in (None, False, 0, (False, False)) or (name == "cpu_offload_space" and value is None):
            raise ValueError(f"{name} must be left out with flash_dmattn, got {value!r}: {reason}")
    if settings.scheduler_type not in SCHEDULERS:
        raise ValueError(f"scheduler_type must be one of {list(SCHEDULERS)}, got {settings.scheduler_type!r}")
    prompts, steps = asks_for_graphs(settings)
    if prompts and not steps:
        raise ValueError(
            f"use_cuda_graph must be True, False, (False, True) or (True, True) with flash_dmattn, got "
            f"{settings.use_cuda_graph}: where forwards with part of a prompt are captured, steps are, too"
        )
    settings, is_gpu = copy.deepcopy(settings), device.type == "cuda"
    settings.use_cuda_graph = prompts and is_gpu, steps is not False and is_gpu
    settings.use_async_batching, settings.max_blocks_per_request = False, 0
    return settings


def asks_for_graphs(settings: ContinuousBatchingConfig) -> tuple[bool, bool | None]:
    """Returns what the user says: whether to capture forwards with part of a prompt, and steps, None: if they can be.

    True stands for steps alone: capturing the others changes what is scheduled.
    """
    asked = settings.use_cuda_graph
    return tuple(asked) if isinstance(asked, (tuple, list)) else (False, asked)


class SlotBatchProcessor(ContinuousBatchProcessor):
    """Runs forwards over a `SlotCache`.

    asks_for_graphs: whether the user wants steps in CUDA graphs; None: where the model allows it.
    captures_prompts: whether forwards with part of a prompt shall be padded, and captured on a GPU.
    options: of transformers' ContinuousBatchProcessor.
    """

    def __init__(self, asks_for_graphs: bool | None, captures_prompts: bool, **options: Any):
        super().__init__(**options)
        self.model_runner = SlotModelRunner(
            asks_for_graphs,
            captures_prompts,
            logit_processor=self.logit_processor,
            cb_config=self.cb_config,
            inputs_and_outputs=self.inputs_and_outputs,
            cache=self.cache,
            do_sample=self.do_sample,
            return_logprobs=self.return_logprobs,
        )
        self.scheduler.padded = self.model_runner.padded

    def update_batch(self) -> None:
        """Also forks requests into their children, for each of which a row was kept."""
        forking, self.scheduler._requests_to_fork = self.scheduler._requests_to_fork, []
        super().update_batch()
        for state in forking:
            children, state.num_children = child_ids(state), 0
            for child_id in children:
                self.cache.fork(state.request_id, child_id)
                self.scheduler.active_requests[child_id] = state.fork(child_id)


class SlotBatchingManager(ContinuousBatchingManager):
    """A ContinuousBatchingManager for a model that runs through flash_dmattn.

    The `cache_config` of the generation config may say `slot_dtype`, as for `model.generate`.
    Raises ValueError for settings that slots do not have, a model whose layers `served_layers` refuses or are split
    over ranks and, when it starts or warms up, for memory into which not one request fits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        generation_config: GenerationConfig,
        continuous_batching_config: ContinuousBatchingConfig,
        workload_hints: Any = None,
    ):
        if (num_ranks := tensor_parallel_size(model)) > 1:
            raise ValueError(
                f"continuous batching needs a whole model with flash_dmattn, got one split over {num_ranks} ranks: "
                "call model.generate() on a padded batch"
            )
        served_layers(model, slot_dtype_of(generation_config))
        settings = checked_settings(continuous_batching_config, model.device)
        self._captures_prompts, self._asks_for_graphs = asks_for_graphs(continuous_batching_config)
        super().__init__(model, generation_config, settings, workload_hints)
        self.continuous_batching_config.varlen_compile_config = None
        self.continuous_batching_config.decode_compile_config = None

    def switch_to_cb_friendly_attn(self, model: PreTrainedModel, auto_switch_to_flash: bool = True) -> None:
        """The implementation stays."""

    def start(self) -> None:
        """Starts the thread that generates; what cannot work fails here, not there."""
        if self.batch_processor is None:
            self.batch_processor = self._create_batch_processor()
        super().start()

    def _create_batch_processor(self) -> SlotBatchProcessor:
        if self.batch_processor is not None:
            self.batch_processor.reset()
            return self.batch_processor
        # What is found for this cache is for this cache: the next one, after a stop, may have other memory.
        settings, config = copy.deepcopy(self.continuous_batching_config), self.model.config.get_text_config()
        cache = SlotCache(self.model, settings, slot_dtype_of(self.generation_config))
        self._use_prefix_sharing = cache.use_prefix_sharing
        settings.max_requests_per_batch = min(settings.max_requests_per_batch, cache.num_blocks)
        update_cb_config_after_cache_creation(
            cb_config=settings, num_blocks=cache.num_blocks, max_batch_tokens=cache.max_batch_tokens
        )
        scheduler = SCHEDULERS[settings.scheduler_type](
            cache=cache, safety_margin=0.0, max_requests_per_batch=settings.max_requests_per_batch
        )
        # What the input tensors ask of a config: FlashAttention is the implementation without masks.
        without_masks = SimpleNamespace(
            sliding_window=getattr(config, "sliding_window", None), _attn_implementation="flash_attention_2"
        )
        return SlotBatchProcessor(
            self._asks_for_graphs,
            self._captures_prompts,
            cache=cache,
            config=without_masks,
            generation_config=self.generation_config,
            continuous_batching_config=settings,
            logit_processor=self.logit_processor,
            input_queue=self.input_queue if self.is_tp_driver else None,
            cancel_queue=self.cancel_queue if self.is_tp_driver else None,
            output_router=self.output_router,
            background_thread_status=self.background_thread_status,
            model_device=self.model.device,
            model_dtype=self.model.dtype,
            scheduler=scheduler,
            distributed_helper=self.distributed_helper,
        )


def make_manager(
    model: PreTrainedModel,
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    workload_hints: Any = None,
) -> SlotBatchingManager:
    """As `model.init_continuous_batching` of transformers, and raises what `SlotBatchingManager` raises."""
    generation_config = copy.deepcopy(model.generation_config if generation_config is None else generation_config)
    if generation_config.eos_token_id is None:
        generation_config.eos_token_id = -1
    if continuous_batching_config is None:
        continuous_batching_config = getattr(generation_config, "continuous_batching_config", None)
    if not isinstance(continuous_batching_config, ContinuousBatchingConfig):
        continuous_batching_config = ContinuousBatchingConfig()
    return SlotBatchingManager(model, generation_config, continuous_batching_config, workload_hints)
