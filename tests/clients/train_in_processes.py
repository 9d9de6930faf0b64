"""Trains a model in the processes of one group and prints the losses: train_in_processes.py PATH NAME ddp|fsdp."""

import sys

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard

from tests.clients.conftest import load


def main(path: str, name: str, kind: str) -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = load(path, name).train()
    if kind == "ddp":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        model, optimizer = accelerator.prepare(model, optimizer)
    else:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(accelerator.process_index)
    for _ in range(3):
        ids = torch.randint(1, 120, (2, 40), generator=generator)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = accelerator.reduce(loss.detach(), "mean")
        if accelerator.is_main_process:
            print(f"loss {mean.item():.6f}", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
