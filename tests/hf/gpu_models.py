"""A small Llama for tests on a GPU, whose importances and tokens are spread so widely that rounding decides no tie."""

import copy

import torch
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

from flash_dmattn_hf import dynamic_mask_config, iter_gates

WINDOW = {"keep_window_size": 64, "num_sink_tokens": 2, "local_window_size": 16}
VOCABULARY = 1024
LENGTH = 300
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_model(dtype: torch.dtype = torch.float32, device: str = DEVICE, **attention) -> LlamaForCausalLM:
    """Random weights, the same every time. In eval mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    with dynamic_mask_config(**{**WINDOW, **attention}):
        model = LlamaForCausalLM._from_config(config, attn_implementation="flash_dmattn")
    for _, _, gate in iter_gates(model):
        torch.nn.init.normal_(gate.A, std=1.0)
        torch.nn.init.normal_(gate.dt_proj.weight, std=0.5)
    model.generation_config.pad_token_id = 0
    return model.to(device, dtype).eval()


def make_tokens(batch: int = 1, length: int = LENGTH, device: str = DEVICE) -> torch.Tensor:
    """Token ids (B, length); none is twice in a row of the batch, because equal tokens have equal importances."""
    generator = torch.Generator().manual_seed(1)
    rows = [3 + torch.randperm(VOCABULARY - 3, generator=generator)[:length] for _ in range(batch)]
    return torch.stack(rows).to(device)


def make_batch(kind: str, device: str = DEVICE) -> dict[str, torch.Tensor]:
    """A training batch: "plain", "padded" on the left, or "packed" documents with cu_seqlens."""
    input_ids = make_tokens(2, device=device)
    batch = {"input_ids": input_ids, "labels": input_ids.clone()}
    if kind == "padded":
        batch["attention_mask"] = torch.ones_like(input_ids)
        batch["attention_mask"][0, :70] = 0
        batch["labels"][0, :70] = -100
    elif kind == "packed":
        documents = [row[:end].tolist() for row, end in zip(input_ids.cpu(), (LENGTH, 130), strict=True)]
        features = [{"input_ids": document, "labels": document} for document in documents]
        packed = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(features)
        batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in packed.items()}
    return {**batch, "use_cache": False}


def train(
    model, batch: dict, *, steps: int = 3, run=None, autocast: bool = False
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Trains a copy of the model and returns the losses and the weights after it.

    run: what makes of the copy the function that is called; None: the copy itself. autocast: the forward to bfloat16.
    """
    model = copy.deepcopy(model).train()
    call = model if run is None else run(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            loss = call(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}
