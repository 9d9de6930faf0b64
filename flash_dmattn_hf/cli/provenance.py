"""Where the figures of a result file come from."""

import argparse
import datetime

import torch
from transformers import PreTrainedModel

from flash_dmattn_hf.cli.info import versions


def provenance(model: PreTrainedModel, args: argparse.Namespace) -> dict:
    """Returns command, date, device, dtype and versions, as values that JSON can hold."""
    device = model.device
    return {
        "command": args.command_line,
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": versions(),
    }
