"""Which backend serves a call, and how it says so."""

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flash_dmattn import dispatch, dynamic_mask_attention, explain_jobs, get_available_backends

from .attention_cases import AttentionCase, window


def test_the_reference_is_always_available_and_last():
    assert get_available_backends()[-1] == "reference"
    assert set(get_available_backends()) <= {"cuda", "triton", "flex", "reference"}


@pytest.mark.parametrize("backend", get_available_backends())
def test_a_backend_asked_for_by_name_gives_what_auto_gives(backend):
    # A backend for GPUs takes GPU tensors; "auto" serves those of the CPU by the reference.
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


def test_what_ran_is_said_once_for_every_job():
    script = """
import logging, torch
logging.basicConfig(level=logging.INFO)
from flash_dmattn import dynamic_mask_attention
inputs = [x.requires_grad_() for x in torch.randn(3, 1, 8, 1, 4)]
for backend in 3 * ["auto"] + 2 * ["reference"]:
    dynamic_mask_attention(*inputs, torch.randn(1, 1, 8), keep_window_size=4, backend=backend).sum().backward()
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert [line for line in run.stderr.splitlines() if line.startswith("INFO")] == [
        f"INFO:flash_dmattn:flash_dmattn takes {said}"
        for said in (
            "selection from the reference backend",
            "order statistics from the reference backend",
            "attention from the reference backend",
            "attention from the reference backend ('reference' was asked for)",
        )
    ], run.stderr


def test_every_job_has_backends_and_a_reason_for_each_that_is_not_taken():
    explained = explain_jobs("cpu")
    assert list(explained) == [job.name for job in dispatch.JOBS]
    for job in dispatch.JOBS:
        assert explained[job.name].keys() == job.backends.keys() | {job.otherwise} - {None}
    assert {name: [b for b, reason in jobs.items() if reason is None] for name, jobs in explained.items()} == {
        **{job.name: ["reference"] for job in dispatch.JOBS},
        "key lists": ["triton"] if "triton" in get_available_backends() else [],
    }
    assert explained["attention"]["flex"] == "it is not taken for tensors on cpu unless asked for by name"


def test_every_backend_but_the_reference_can_refuse_what_it_does():
    for job in dispatch.JOBS:
        refusing = {name for name, backend in job.backends.items() if hasattr(backend, job.reject)}
        assert job.backends and refusing == job.backends.keys() - {"reference"}


def fake_backend(**functions):
    return SimpleNamespace(AUTOMATIC_ON=None, **functions)


def test_the_next_backend_takes_over_a_backward_that_the_forward_s_refuses(monkeypatch, caplog):
    call = SimpleNamespace(query=torch.zeros(1))
    first = fake_backend(reject=lambda call: None, backward=None, reject_backward=lambda call: "no fixed order")
    second = fake_backend(reject=lambda call: "too wide", backward=None)
    third = fake_backend(reject=lambda call: None, backward=None)
    job = dispatch.Job("attention", "reject", ("backward",), {"first": first, "second": second, "third": third})
    monkeypatch.setattr(dispatch, "ATTENTION", job)
    monkeypatch.delenv("FLASH_DMATTN_BACKEND", raising=False)
    dispatch._announce.cache_clear()
    with caplog.at_level("INFO", logger="flash_dmattn"):
        assert dispatch.choose_backward(call, "auto") is third
    reason = "first: no fixed order; second: too wide"
    assert f"takes the backward of attention from the third backend ({reason})" in caplog.text
    first.reject_backward = lambda call: None
    assert dispatch.choose_backward(call, "auto") is first
    first.reject_backward, third.reject = (lambda call: "no fixed order"), (lambda call: "too narrow")
    with pytest.raises(RuntimeError, match=f"{reason}; third: too narrow"):
        dispatch.choose_backward(call, "auto")


def test_a_name_that_stands_for_another_backend_of_a_job_is_that_backend(caplog):
    call = SimpleNamespace(query=torch.zeros(1))
    backend = fake_backend(reject=lambda call: None, forward=None)
    job = dispatch.Job("attention", "reject", ("forward",), {"triton": backend}, aliases={"cuda": "triton"})
    with caplog.at_level("INFO", logger="flash_dmattn"):
        assert dispatch.choose(job, call, "cuda") is backend
    assert "triton backend ('cuda' was asked for)" in caplog.text


def test_no_other_file_of_the_package_asks_a_backend_what_it_can_serve():
    package = Path(dispatch.__file__).parent
    backends = {"dense/gpu.py", "dense/reference.py", "dispatch.py"}
    for path in package.rglob("*.py"):
        name = path.relative_to(package).as_posix()
        if name in backends or name.startswith("backends/"):
            continue
        asked = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        found = {name for name in asked if name.startswith("reject") or name in ("why_unavailable", "AUTOMATIC_ON")}
        assert not found, (name, found)
