"""Trains models in the processes of one group, and prints what came out: train_in_processes.py DENSE CONVERTED KIND.

KIND: ddp, fsdp, zero3 or trainer (ZeRO-3 by a Trainer, which also saves the model into the working directory).
"""

import json
import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from flash_dmattn_hf import save_importance, use_chunked_loss
from flash_dmattn_hf.training import ImportanceCallback
from tests.clients.conftest import load, load_frozen

STEPS, LEARNING_RATE = 3, 0.05
SMALL = {"keep_window_size": 16, "local_window_size": 4}
"""Settings for a window that the sequences exceed, in which the importance chooses 8 keys."""
ZERO3 = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,  # 1 by default
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,  # small parameters are divided too
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


def batch(step: int, rank: int) -> torch.Tensor:
    """Returns the ids (2, 40) of a rank in one step."""
    return torch.randint(1, 120, (2, 40), generator=torch.manual_seed(10 * step + rank))


def models(dense: str, converted: str) -> dict[str, Callable[[], nn.Module]]:
    """Name -> how to load it: dense; the same with gates that stay 0; with gates that train, beyond their window."""
    return {
        "sdpa": lambda: load(dense, "sdpa"),
        "flash_dmattn": lambda: load_frozen(dense, "flash_dmattn"),
        "converted": lambda: load(converted, "flash_dmattn", flash_dmattn=SMALL),
    }


def train(model: nn.Module, kind: str, ranks: list[int]) -> dict[str, list]:
    """Trains with the batches of some ranks; returns the losses, and the tokens that the model says afterwards.

    kind: how the processes share the model; "alone" is one process with the batches of all.
    """
    model = model.train()
    inner = model
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    if kind == "ddp":
        from accelerate import Accelerator

        model, optimizer = Accelerator(cpu=True).prepare(model, optimizer)
    if kind == "zero3":
        import deepspeed

        model, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ZERO3)
    backward, step = (model.backward, model.step) if kind == "zero3" else (torch.Tensor.backward, optimizer.step)
    losses = []
    for number in range(STEPS):
        ids = torch.cat([batch(number, rank) for rank in ranks])
        loss = model(input_ids=ids, labels=ids).loss
        backward(loss)
        step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if kind != "alone":
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        losses.append(mean.item())
    tokens = inner.eval().generate(batch(STEPS, 0), max_new_tokens=8, do_sample=False)
    return {"losses": losses, "tokens": tokens.tolist()}


def train_with_trainer(converted: str) -> dict[str, list]:
    """Trains by a Trainer that loads with ZeRO-3; returns the losses and that of the trained model; saves it."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        "trained",
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
        deepspeed=json.loads(json.dumps(ZERO3)),  # it is filled in
    )
    model = load(converted, "flash_dmattn", flash_dmattn=SMALL)
    rows = [{"input_ids": ids, "labels": ids} for step in range(STEPS) for rank in (0, 1) for ids in batch(step, rank)]
    held_out = [{"input_ids": ids, "labels": ids} for rank in (0, 1) for ids in batch(STEPS, rank)]
    callback = ImportanceCallback(batch(STEPS, 0)[0])
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=held_out, callbacks=[callback])
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    trainer.save_model()
    return {
        "losses": [float(entry["loss"]) for entry in logs],
        "norms": [entry["dma/A_norm"] for entry in logs],
        "evaluation": [trainer.evaluate()["eval_loss"]],
    }


def refusals(converted: str) -> list[str]:
    """Returns what a model with divided parameters says of requests that need whole ones, or of other gates."""

    def load_other_layers() -> None:
        load(converted, "flash_dmattn", flash_dmattn={**SMALL, "layers": [0]})

    def chunked_loss() -> None:
        model = load(converted, "flash_dmattn", flash_dmattn=SMALL).train()
        use_chunked_loss(model)
        ids = batch(0, 0)
        deepspeed.initialize(model=model, config=ZERO3)[0](input_ids=ids, labels=ids)

    import deepspeed

    model, sentences = load(converted, "flash_dmattn", flash_dmattn=SMALL), []
    for request in (lambda: save_importance(model, "importance"), load_other_layers, chunked_loss):
        try:
            request()
        except ValueError as error:
            sentences.append(str(error))
    return sentences


def main(dense: str, converted: str, kind: str) -> None:
    """Prints one line of JSON, name of a model -> its results, from the first process."""
    results = {}
    if kind == "trainer":
        results["converted"] = train_with_trainer(converted)
    else:
        dist.init_process_group("gloo")
        if kind == "zero3":
            import deepspeed
            from transformers.integrations import HfDeepSpeedConfig

            deepspeed.init_distributed(dist_backend="gloo")
            living = HfDeepSpeedConfig(ZERO3)  # noqa: F841 - while it lives, from_pretrained divides parameters
        for name, make in models(dense, converted).items():
            torch.manual_seed(0)
            results[name] = train(make(), kind, [dist.get_rank()])
        if kind == "zero3":
            results["refusals"] = refusals(converted)
    if dist.get_rank() == 0:
        print("results", json.dumps(results), flush=True)
    dist.barrier()
    # The groups of gloo sometimes wait for themselves when Python frees them together with a DDP model.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
