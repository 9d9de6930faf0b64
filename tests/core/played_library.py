"""The CUDA library on a CPU: its passes as they are, its kernels played by the reference.

So everything between the public functions and the kernels runs without a GPU: plans, addresses, scratch and the order
of the parts. A player reads nothing but the struct that its kernel would get, and fills the scratch of that kernel with
garbage.
"""

import contextlib
import ctypes
import math
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flash_dmattn import planned
from flash_dmattn.backends import cuda, reference
from flash_dmattn.backends.cuda import backward_pass, forward_pass, library, lists, selection, target
from flash_dmattn.backends.cuda.parameters import ForwardParameters, Sm80BackwardParameters, Sm90BackwardParameters
from flash_dmattn.calls import AttentionCall
from flash_dmattn.selection import select_visible
from flash_dmattn.visibility import Visibility

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
_STUBS = Path(__file__).resolve().parent / "played_sources"
_STRUCTS = {
    "select": selection.SelectParameters,
    "lists": lists.ListsParameters,
    "forward": ForwardParameters,
    "sm90_backward": Sm90BackwardParameters,
    "sm80_backward": Sm80BackwardParameters,
}
_LISTED = 77  # what a played list holds


def compile_library(folder: Path) -> ctypes.CDLL:
    """Returns the library, compiled in `folder`. Skips the test where there is no compiler."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler to make a library with")
    passes = KERNELS / "csrc" / "passes.cu"
    includes = [f"-I{_STUBS}", f"-I{KERNELS / 'csrc'}"]
    command = [compiler, "-std=c++17", "-Wall", "-Werror", "-shared", "-fPIC", *includes, "-o", folder / "lib.so"]
    subprocess.run([*command, "-x", "c++", passes, _STUBS / "library.cpp"], check=True)
    return ctypes.CDLL(str(folder / "lib.so"))


class PlayedLibrary:
    """Stands for the CUDA library while a test runs. launches: the names of the parts that ran, in their order."""

    def __init__(self, loaded: ctypes.CDLL):
        self.loaded = loaded
        self.launches: list[str] = []
        self._listed: dict[str, object] = {}
        self._players = [self._make_player(name, struct) for name, struct in _STRUCTS.items()]
        for number, player in enumerate(self._players):
            loaded.play(number, player)

    def install(self, monkeypatch: pytest.MonkeyPatch, is_for_sm90a: bool) -> None:
        """Makes CPU tensors pass for those of a GPU with this library."""
        properties = SimpleNamespace(shared_memory_per_block_optin=227 * 1024, multi_processor_count=3)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0) if is_for_sm90a else (8, 0))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of a CPU
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
        monkeypatch.setattr(library, "load", lambda: self.loaded)
        monkeypatch.setattr(library, "head_dims", lambda: (64, 128))
        monkeypatch.setattr(library, "why_not_on", lambda device: None)
        monkeypatch.setattr(cuda, "why_unavailable", lambda: None)
        monkeypatch.setattr(cuda, "AUTOMATIC_ON", None)
        monkeypatch.setattr(planned, "DEVICES", {"cpu"})
        monkeypatch.delenv(target.ARCHITECTURE_VARIABLE, raising=False)
        forget()

    def _make_player(self, name: str, struct: type[ctypes.Structure]):
        def player(address: int) -> int:
            self.launches.append(name)
            return getattr(self, f"_{name}")(struct.from_address(address))

        return ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(player)

    def _select(self, p) -> int:
        shape = p.batch, p.num_heads, p.seqlen
        dtype = (torch.float32, torch.bfloat16, torch.float16)[p.importance_type]
        importance = _read(p.importance, dtype, shape, tuple(p.importance_strides))
        _garbage(p.workspace, p.workspace_bytes)
        intervals = select_visible(
            importance.double(),  # which the library leaves to torch
            keep_window_size=p.num_kept + p.local_window_size,
            num_sink_tokens=p.num_sink_tokens,
            local_window_size=p.local_window_size,
            sliding_window=None if p.sliding_window < 0 else p.sliding_window,
            is_causal=bool(p.is_causal),
            padding_mask=_read(p.padding_mask, torch.bool, (p.batch, p.seqlen)) if p.padding_mask else None,
            cu_seqlens=_read(p.cu_seqlens, torch.int32, (p.num_docs + 1,)) if p.cu_seqlens else None,
        )
        for bound, address in zip(intervals, (p.birth, p.death), strict=True):
            _read(address, torch.int32, shape).copy_(bound)
        return 0

    def _lists(self, p) -> int:
        assert p.num_epochs == -(-p.seqlen_q // p.epoch_size) and p.tiles_per_epoch == -(-p.epoch_size // p.tile_size)
        _garbage(p.workspace, p.workspace_bytes)
        parts = _parts_of_lists(p, p.num_heads)
        for address, size in parts:
            _read(address, torch.int32, (size,)).fill_(_LISTED)
        assert bool(p.biases) == bool(p.importance)
        keys = p.batch, p.num_heads, p.seqlen_k
        importance = None
        if p.importance:
            importance = _read(p.importance, torch.float32, keys, tuple(p.importance_strides)).clone()
        self._listed = {"parts": parts, "importance": importance, "rows": (p.query_start, p.query_positions)}
        return 0

    def _forward(self, p) -> int:
        call = self._read_call(p)
        rows = p.batch, p.num_interval_heads * p.group_size, p.seqlen_q
        out, lse, stats = reference.forward(call)
        _read(p.out, call.query.dtype, out.shape).copy_(out)
        if p.lse:
            _read(p.lse, torch.float32, rows).copy_(lse)
        _read(p.stats, torch.float32, (2, *rows)).copy_(stats)
        self._check_lists(p)
        return 0

    def _sm90_backward(self, p) -> int:
        tile = 64 * p.head_dim
        lists = p.batch * p.num_interval_heads * p.num_epochs
        scratch = {
            "dquery_sums": p.num_slots * p.tiles_per_epoch * tile,
            "counters": 1 + lists * (1 + 2 * p.tiles_per_epoch if p.deterministic else 1),
        }
        return self._backward(p, scratch, {"row_facts": 4 * p.batch * p.num_interval_heads * p.group_size * p.seqlen_q})

    def _sm80_backward(self, p) -> int:
        heads = p.batch * p.num_interval_heads
        sums = heads * p.epochs_at_once * p.tiles_per_epoch * 32 * p.head_dim
        return self._backward(p, {}, {"dquery_sums": sums, "deltas": heads * p.group_size * p.seqlen_q})

    def _backward(self, p, zero: dict[str, int], unset: dict[str, int]) -> int:
        assert p.out % 16 == p.dout % 16 == 0  # the kernels read 16 bytes at once
        call = self._read_call(p)
        rows = p.batch, p.num_interval_heads * p.group_size, p.seqlen_q
        out, dout = (_read(address, call.query.dtype, call.query.shape) for address in (p.out, p.dout))
        dlse = _read(p.dlse, torch.float32, rows).clone()
        stats = _read(p.stats, torch.float32, (2, *rows)).clone()
        gradients = reference.backward(call, out.clone(), stats, dout.clone(), dlse)[:4]
        zero = {**zero, "dkey_sums": call.key.numel(), "dvalue_sums": call.key.numel()}
        if p.dimportance:
            zero["dimportance"] = p.batch * p.num_interval_heads * p.seqlen_k
        for name, size in zero.items():
            sums = _read(getattr(p, name), torch.float32, (size,))
            assert not sums.any(), name
            sums.fill_(torch.nan)
        for name, size in unset.items():
            _read(getattr(p, name), torch.float32, (size,)).fill_(torch.nan)
        names = "dquery", "dkey", "dvalue", "dimportance"
        for name, tensor, gradient in zip(
            names, (call.query, call.key, call.value, call.importance), gradients, strict=True
        ):
            if tensor is not None:
                _read(getattr(p, name), tensor.dtype, tensor.shape).copy_(gradient)
        self._check_lists(p)
        return 0

    def _check_lists(self, p) -> None:
        """The lists that a kernel gets are those that were built for it, and nobody has written over them."""
        if p.entries:
            assert _parts_of_lists(p, p.num_interval_heads) == self._listed["parts"]
            assert (p.query_start, p.query_positions) == self._listed["rows"]
            for address, size in self._listed["parts"]:
                assert (_read(address, torch.int32, (size,)) == _LISTED).all()

    def _read_call(self, p) -> AttentionCall:
        """Returns the call that a struct describes."""
        batch, heads, seqlen_k = p.batch, p.num_interval_heads, p.seqlen_k
        num_kv_heads = heads // p.interval_heads_per_kv_head
        dtype = torch.bfloat16 if p.is_bfloat16 else torch.float16
        heads_of = {"query": heads * p.group_size, "key": num_kv_heads, "value": num_kv_heads}
        inputs = {
            name: _read(
                getattr(p, name),
                dtype,
                (batch, p.seqlen_q if name == "query" else seqlen_k, count, p.head_dim),
                (*getattr(p, f"{name}_strides"), 1),
            )
            for name, count in heads_of.items()
        }
        keys = batch, heads, seqlen_k
        visibility = None
        if p.birth:
            visibility = Visibility(*(_read(address, torch.int32, keys) for address in (p.birth, p.death)))
        knows_rows = not p.entries and getattr(p, "is_for_sm90a", False)
        importance = None
        if p.entries:
            importance = self._listed["importance"]
            assert bool(p.biases) == (importance is not None)
        elif p.biases:
            importance = _read(p.biases, torch.float32, keys)
            importance = importance if knows_rows else importance / math.log2(math.e)
        start = seqlen_k - p.seqlen_q if knows_rows else None
        if p.query_start:
            start = _read(p.query_start, torch.int32, (batch,))
        positions = _read(p.query_positions, torch.int32, (batch, p.seqlen_q)) if p.query_positions else None
        assert start is not None or positions is not None
        return AttentionCall.prepare(
            *inputs.values(),
            importance,
            visibility,
            query_start=start,
            query_positions=positions,
            softmax_scale=p.softmax_scale,
            softcap=p.softcap,
        )


def forget() -> None:
    """Drops all plans."""
    planned._ROUTES.clear()
    forward_pass.plan_forward.cache_clear()
    backward_pass.plan_backward.cache_clear()
    library.function.cache_clear()
    target._find_target.cache_clear()


def _parts_of_lists(p, heads: int) -> list[tuple[int, int]]:
    """Returns the addresses of the lists' tensors, with how many numbers they hold."""
    lists = p.batch * heads * p.num_epochs
    parts = [(p.entries, lists * p.capacity), (p.sections, 3 * lists), (p.stretches, 2 * lists * p.tiles_per_epoch)]
    return parts + [(p.biases, lists * p.capacity)] if p.biases else parts


def _read(address: int, dtype: torch.dtype, shape: tuple, strides: tuple | None = None) -> torch.Tensor:
    """Returns a tensor over memory that somebody else owns."""
    shape = tuple(shape)
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    size = (
        math.prod(shape) if strides is None else 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    )
    memory = (ctypes.c_char * (size * dtype.itemsize)).from_address(address)
    numbers = torch.frombuffer(memory, dtype=dtype)
    return numbers.view(shape) if strides is None else numbers.as_strided(shape, strides)


def _garbage(address: int, size: int) -> None:
    ctypes.memset(address, 0xFF, size)
