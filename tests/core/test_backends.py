"""Which engine serves a call, and how it says so."""

import subprocess
import sys

import pytest
import torch

from flash_dmattn import dynamic_mask_attention, get_available_backends

from .attention_cases import AttentionCase, window


def test_the_reference_is_always_available_and_last():
    assert get_available_backends()[-1] == "reference"
    assert set(get_available_backends()) <= {"cuda", "triton", "flex", "reference"}


@pytest.mark.parametrize("backend", get_available_backends())
def test_a_backend_asked_for_by_name_gives_what_auto_gives(backend):
    # A GPU engine takes GPU tensors; "auto" serves those of the CPU by the reference.
    device = "cuda" if backend != "reference" and torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if backend == "cuda" else torch.float32
    inputs = [tensor.to(dtype) for tensor in AttentionCase("by-name", head_dim=64).inputs()]
    expected = dynamic_mask_attention(*inputs, **window(7, 1, 2))
    moved = [tensor.to(device) for tensor in inputs]
    out = dynamic_mask_attention(*moved, **window(7, 1, 2), backend=backend)
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if backend == "cuda" else {}
    torch.testing.assert_close(out.cpu(), expected, **tolerance)


def test_the_environment_overrides_auto(monkeypatch):
    inputs = AttentionCase("environment").inputs()
    monkeypatch.setenv("FLASH_DMATTN_BACKEND", "reference")
    dynamic_mask_attention(*inputs, keep_window_size=7)
    monkeypatch.setenv("FLASH_DMATTN_BACKEND", "fast")
    with pytest.raises(ValueError, match="FLASH_DMATTN_BACKEND.*fast"):
        dynamic_mask_attention(*inputs, keep_window_size=7)
    dynamic_mask_attention(*inputs, keep_window_size=7, backend="reference")


def test_auto_says_once_which_backend_it_took():
    script = """
import logging, torch
logging.basicConfig(level=logging.INFO)
from flash_dmattn import dynamic_mask_attention
for _ in range(3):
    dynamic_mask_attention(*torch.randn(3, 1, 8, 1, 4), torch.randn(1, 1, 8), keep_window_size=4)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    said = [line for line in run.stderr.splitlines() if line.startswith("INFO") and "reference" in line]
    assert len(said) == 1, run.stderr
