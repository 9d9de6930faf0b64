"""Transformers' own OpenAI-compatible server, for one model that runs through flash_dmattn."""

from typing import Any

from transformers import ContinuousBatchingConfig, PreTrainedModel
from transformers.utils.import_utils import is_serve_available

from flash_dmattn_hf.cache.settings import slot_dtype_of
from flash_dmattn_hf.names import NAMES
from flash_dmattn_hf.serving.cache import count_requests
from flash_dmattn_hf.serving.layers import served_layers
from flash_dmattn_hf.serving.manager import make_manager
from flash_dmattn_hf.serving.memory import bytes_per_request


def make_server(
    path: str, settings: ContinuousBatchingConfig, *, device: str = "auto", dtype: str = "auto", host: str, port: int
) -> Any:
    """Loads a checkpoint and returns a `uvicorn.Server` for it, which has not started.

    path: directory or Hub id. settings: of continuous batching, as `SlotBatchingManager` takes them.
    The server's `model` is the model, and its `generation_state` transformers' own.
    Raises ImportError without the packages of a server, ValueError when not one request fits or the model cannot be
    served.
    """
    if not is_serve_available():
        raise ImportError("serving needs fastapi, uvicorn, openai and pydantic: pip install 'transformers[serving]'")
    import uvicorn
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import GenerationState

    class SlotModelManager(ModelManager):
        """Loads models with our implementation, which transformers' own list does not hold."""

        def _validate_args(self) -> None:
            if self.attn_implementation not in NAMES:
                super()._validate_args()

    models = SlotModelManager(
        device=device, dtype=dtype, attn_implementation=NAMES[0], continuous_batching=True, force_model=path
    )
    (loaded,) = models.loaded_models.values()
    check_room(loaded.model, settings)
    state = GenerationState(continuous_batching=True, cb_config=settings)
    handlers = [kind(models, state) for kind in (ChatCompletionHandler, CompletionHandler, ResponseHandler)]
    app = build_server(
        models,
        *handlers,
        transcription_handler=TranscriptionHandler(models, state),
        systemone_handler=SystemOneHandler(models, state),
        generation_state=state,
    )
    server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="warning"))
    server.model, server.generation_state = loaded.model, state
    return server


def check_room(model: PreTrainedModel, settings: ContinuousBatchingConfig) -> tuple[int, int]:
    """Returns for how many requests there will be room and the bytes of each; raises as `SlotBatchingManager` does."""
    manager = make_manager(model, continuous_batching_config=settings)
    layers = served_layers(model, slot_dtype_of(manager.generation_config))
    num_rows = count_requests(model, layers, manager.continuous_batching_config)
    return num_rows, bytes_per_request(layers, model.dtype)
