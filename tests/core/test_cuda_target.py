"""Which kernels of the CUDA library a GPU gets, how others or none are asked for, and what a partial build serves."""

from types import SimpleNamespace

import pytest
import torch

from flash_dmattn.backends import cuda
from flash_dmattn.backends.cuda import library, lists, sm80_backward, target
from flash_dmattn.calls import AttentionCall
from flash_dmattn.dispatch import ATTENTION, choose, explain_backends

GPUS = {
    "A100": ((8, 0), 163),
    "L40": ((8, 9), 99),
    "H100": ((9, 0), 227),
    "B200": ((10, 0), 227),
    "RTX 5090": ((12, 0), 99),
}
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Makes the GPU one of `GPUS`, as far as torch can tell."""

    def become(name):
        capability, shared_kb = GPUS[name]
        properties = SimpleNamespace(shared_memory_per_block_optin=shared_kb * 1024)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
        monkeypatch.delenv(target.ARCHITECTURE_VARIABLE, raising=False)
        target._find_target.cache_clear()

    yield become
    target._find_target.cache_clear()


@pytest.mark.parametrize(("name", "is_for_sm90a"), [(name, name == "H100") for name in GPUS])
def test_hopper_alone_has_kernels_of_its_own(gpu, name, is_for_sm90a):
    gpu(name)
    assert target.find_target(DEVICE) == target.Target(is_for_sm90a, GPUS[name][1] * 1024)
    assert target.reject(DEVICE) is None


@pytest.mark.parametrize(
    ("name", "asked", "is_for_sm90a", "shared_kb"),
    [
        ("H100", "80", False, 163),
        ("H100", "89", False, 99),
        ("H100", "90", True, 227),
        ("A100", "120", False, 99),
        ("L40", "100", False, 99),
    ],
)
def test_a_gpu_stands_for_another_within_its_own_memory(gpu, monkeypatch, name, asked, is_for_sm90a, shared_kb):
    gpu(name)
    monkeypatch.setenv("FLASH_DMATTN_CUDA_ARCH", asked)
    assert target.find_target(DEVICE) == target.Target(is_for_sm90a, shared_kb * 1024)


def test_kernels_for_hopper_are_refused_elsewhere(gpu, monkeypatch):
    gpu("A100")
    monkeypatch.setenv("FLASH_DMATTN_CUDA_ARCH", "90")
    assert "capability 9.0" in target.reject(DEVICE)


def test_an_unknown_architecture_is_named(gpu, monkeypatch):
    gpu("A100")
    monkeypatch.setenv("FLASH_DMATTN_CUDA_ARCH", "sm_80")
    with pytest.raises(ValueError, match="FLASH_DMATTN_CUDA_ARCH must be one of 80, .*'sm_80'"):
        target.find_target(DEVICE)


def test_the_library_can_be_switched_off(monkeypatch):
    monkeypatch.setattr(library, "_why_not_loaded", lambda: None)
    monkeypatch.setattr(library, "why_no_gpu", lambda: None)
    monkeypatch.setattr(library, "_why_not_built_for", lambda device: None)
    for value, is_off in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv("FLASH_DMATTN_DISABLE_CUDA", value)
        for reason in (library.why_unavailable(), library.why_not_on(DEVICE)):
            assert reason == ("FLASH_DMATTN_DISABLE_CUDA=1 turns it off" if is_off else None)
    assert explain_backends()["cuda"] == "FLASH_DMATTN_DISABLE_CUDA=1 turns it off"
    monkeypatch.setenv("FLASH_DMATTN_DISABLE_CUDA", "yes")
    with pytest.raises(ValueError, match="FLASH_DMATTN_DISABLE_CUDA must be 0 or 1, got 'yes'"):
        library.why_unavailable()


@pytest.fixture
def call():
    query = torch.zeros(1, 8, 2, 64, dtype=torch.bfloat16)
    return AttentionCall.prepare(query, query, query, None, None, query_start=torch.zeros(1, dtype=torch.int32))


def test_a_kernel_that_was_not_built_is_left_to_the_next_engine(gpu, monkeypatch, call, caplog):
    gpu("A100")
    partial = SimpleNamespace(
        flash_dmattn_forward_tile_rows=lambda head_dim, is_bfloat16, is_for_sm90a: 128 if head_dim == 128 else 0
    )
    monkeypatch.setattr(library, "load", lambda: partial)
    monkeypatch.setattr(library, "head_dims", lambda: (64, 128))
    monkeypatch.setattr(library, "why_not_on", lambda device: None)
    monkeypatch.setattr(lists, "reject", lambda call: None)
    reason = "the CUDA library was built without the forward for head dim 64 and torch.bfloat16"
    assert cuda.reject(call) == reason

    from flash_dmattn.backends import triton

    for backend in (cuda, triton):
        monkeypatch.setattr(backend, "why_unavailable", lambda: None)
        monkeypatch.setattr(backend, "AUTOMATIC_ON", None)
    monkeypatch.setattr(triton, "reject", lambda call: None)
    monkeypatch.delenv("FLASH_DMATTN_BACKEND", raising=False)
    with caplog.at_level("INFO", logger="flash_dmattn"):
        assert choose(ATTENTION, call, "auto") is triton
    assert f"triton backend (cuda: {reason})" in caplog.text
    with pytest.raises(RuntimeError, match=reason):
        choose(ATTENTION, call, "cuda")


def test_a_quarter_of_the_epochs_has_sums_of_dquery_unless_that_is_little_work():
    assert sm80_backward.count_epochs(64, 8 * 2112, 132) == 16
    assert sm80_backward.count_epochs(64, 2 * 2112, 132) == 32
    assert sm80_backward.count_epochs(8, 100, 132) == 8
