"""Distils a tiny model, in one process or in several: `-m torch.distributed.run ... FOLDER BATCH_SIZE [MINUTES]`."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hf.training.distillation_setup import held_out, make_model, make_trainer  # noqa: E402


def main(folder: str, batch_size: int, minutes: float | None = None) -> None:
    model = make_model()
    options = {} if minutes is None else {"max_minutes": minutes, "max_steps": 10**6}
    trainer = make_trainer(
        model,
        Path(folder) / "run",
        per_device_train_batch_size=batch_size,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        held_out=held_out(),
        num_evaluations=1,
        **{"max_steps": 4, **options},
    )
    trainer.train()
    torch.save(
        {"weights": model.state_dict(), "steps": trainer.state.global_step, "log": trainer.state.log_history},
        Path(folder) / f"rank{trainer.args.process_index}.pt",
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *map(float, sys.argv[3:]))
    torch.distributed.barrier()
    # DDP keeps the group, whose threads would otherwise release tensors while Python ends, which can abort the process.
    os._exit(0)
