"""What the ranks of a test do: a tiny model on a shard of the sequence, beside the same model on the whole of it."""

import contextlib
import gc
import threading
import weakref
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

from flash_dmattn_hf import (
    DynamicMaskCache,
    context_parallel,
    dynamic_mask_config,
    iter_gates,
    soft_selection,
    use_chunked_loss,
)
from flash_dmattn_hf.conversion.variants import dense as make_dense
from flash_dmattn_hf.parallel import attention, exchange
from flash_dmattn_hf.parallel.accelerate import cut_buffers

from ..tiny import build, tiny_config, tokens

LENGTH = 48


class Case(NamedTuple):
    """A model, its windows, its batch, and what is on while it trains.

    The chunked loss is in float64, that of transformers in float32.
    """

    windows: tuple[int, int, int]
    model_type: str = "llama"
    model: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    documents: tuple[tuple[int, ...], ...] = ()
    is_checkpointed: bool = False
    has_chunked_loss: bool = True
    soft: dict[str, float] | None = None


PACKED = ((5, 30, 13), (24, 24))
CASES = {
    "sinks and window": Case((10, 1, 3)),
    "no window": Case((10, 0, 0)),
    "window longer than a shard": Case((30, 2, 26)),
    "window alone": Case((7, 0, 7)),
    "all keys": Case((60, 1, 4)),
    "checkpointed": Case((10, 1, 3), is_checkpointed=True),
    "query heads": Case((10, 1, 3), settings={"importance_heads": "query"}),
    "hidden states": Case((10, 1, 3), settings={"importance_input": "hidden"}),
    "softcap and sliding layer": Case((8, 1, 3), "gemma2"),
    "gated sliding layer": Case((6, 1, 2), "gemma2"),
    "sliding layer longer than a shard": Case((40, 1, 3), "gemma2", {"sliding_window": 30}),
    "packed": Case((10, 1, 3), documents=PACKED),
    "packed without window": Case((10, 0, 0), documents=PACKED),
    "packed with long window": Case((30, 2, 26), documents=PACKED),
    "packed, sliding": Case((8, 1, 3), "gemma2", documents=PACKED, is_checkpointed=True),
    "soft": Case((10, 1, 3), soft={"temperature": 0.3}),
    "soft, without window": Case((10, 0, 0), soft={"temperature": 0.3, "band": 1.0}),
    "soft, checkpointed": Case((20, 1, 16), is_checkpointed=True, soft={"temperature": 0.1, "band": 3.0}),
    "soft, importance not added": Case((10, 1, 3), settings={"add_importance_bias": False}, soft={"temperature": 0.3}),
    "whole logits": Case((10, 1, 3), has_chunked_loss=False),
    "attention sinks": Case((8, 1, 3), "granite_swa", {"sliding_window": 10}),
    "shared keys": Case((8, 1, 3), "gemma3n_text"),
    "windows of single layers": Case((10, 1, 3), settings={"window_shares": {0: 0.6, 1: 2}}),
}


def make_model(case: Case) -> torch.nn.Module:
    """In float64, with importances that differ widely; train mode."""
    torch.manual_seed(0)
    w, s, r = case.windows
    windows = {"keep_window_size": w, "num_sink_tokens": s, "local_window_size": r}
    with dynamic_mask_config(**windows, **case.settings):
        model = build(tiny_config(case.model_type, **case.model), attn_implementation="flash_dmattn").double()
    for _, _, gate in iter_gates(model):
        if hasattr(gate, "A"):
            torch.nn.init.normal_(gate.A)
            torch.nn.init.normal_(gate.dt_proj.weight)
    if case.is_checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def make_batch(case: Case) -> dict[str, Any]:
    input_ids = tokens(2, LENGTH)
    batch = {"input_ids": input_ids, "labels": input_ids.clone(), "use_cache": False}
    batch["labels"][0, 3:9] = -100
    if case.documents:
        rows = [torch.cat([torch.arange(length) for length in lengths]) for lengths in case.documents]
        batch["position_ids"] = torch.stack(rows)
    return batch


def positions_of_one_row(rank: int) -> list[list[int]]:
    """Returns the rank's position_ids of two sequences that share them."""
    positions = torch.arange(8)[None]
    return context_parallel().shard({"input_ids": tokens(2, 8), "position_ids": positions})["position_ids"].tolist()


def train_step(case: Case, model: torch.nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns loss and hidden states of the last layer, after the backward."""
    seen = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    with contextlib.ExitStack() as stack:
        stack.callback(handle.remove)
        if case.soft is not None:
            stack.enter_context(soft_selection(model, **case.soft))
        if case.has_chunked_loss:
            stack.enter_context(use_chunked_loss(model, chunk_size=7, engine="torch"))
        loss = model(**batch).loss
        loss.backward()
    return loss.detach(), seen[0]


def compare(rank: int, names: list[str]) -> dict[str, dict[str, float]]:
    """Returns, for every case, the largest differences from one process in outputs, loss and gradients, on rank 0."""
    return {name: _differences(rank, CASES[name]) for name in names}


def _differences(rank: int, case: Case) -> dict[str, float]:
    model, batch = make_model(case), make_batch(case)
    with context_parallel() as context:
        loss, out = train_step(case, model, context.shard(batch))
    got = gradients_of(model)
    for tensor in (loss, *got.values()):
        dist.all_reduce(tensor)
    outs = [torch.empty_like(out) for _ in range(context.world_size)]
    dist.all_gather(outs, out)
    if rank:
        return {}
    whole = make_model(case)
    expected_loss, expected_out = train_step(case, whole, {**batch, "num_items_in_batch": _num_labels(context, batch)})
    expected = gradients_of(whole)
    assert got.keys() == expected.keys() and any("dma.A" in name and got[name].any() for name in got)
    return {
        "loss": float(abs(loss - expected_loss)),
        "out": float((torch.cat(outs, 1) - expected_out).abs().max()),
        **{name: float((got[name] - gradient).abs().max()) for name, gradient in expected.items()},
    }


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def _num_labels(context, batch: dict[str, Any]) -> torch.Tensor:
    return context.shard(batch)["num_items_in_batch"]


def message_of(call: Any) -> str:
    """Returns the type and text of the error that a call raises, "" if it raises none."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refusals(rank: int) -> dict[str, str]:
    """Returns what is said to everything that ranks cannot do."""
    case = Case((10, 1, 3))
    model, batch, said = make_model(case), make_batch(case), {}
    with context_parallel() as context:
        own = context.shard(batch)
        padded = {**batch, "attention_mask": torch.ones_like(batch["input_ids"]).index_fill(1, torch.tensor(0), 0)}
        mask = torch.ones_like(own["input_ids"])
        mask[0, 0] = rank
        longer = {name: value[:, : 24 - rank] if torch.is_tensor(value) and value.dim() else value
                  for name, value in own.items()}  # fmt: skip
        dense = make_model(case)
        dense.set_attn_implementation("sdpa")
        cached = {**own, "past_key_values": DynamicMaskCache(model)}
        calls = {
            "padding": lambda: context.shard(padded),
            "padding on one rank": lambda: model(**{**own, "attention_mask": mask}),
            "length": lambda: context.shard({"input_ids": batch["input_ids"][:, :-1]}),
            "unequal shards": lambda: model(**longer),
            "uneven buffers": lambda: _cut_unevenly(batch["input_ids"]),
            "no positions": lambda: model(own["input_ids"]),
            "constant cache": lambda: model(**cached),
            "dense model": lambda: dense(**own),
            "dense with gradient": lambda: _run_densely(model, own),
            "dense and packed": lambda: _run_densely(model, context.shard(make_batch(CASES["packed"])), grad=False),
            "dense layer": lambda: make_model(Case((10, 1, 3), settings={"layers": [0]}))(**own),
            "chunks": lambda: make_model(Case((10, 1, 3), "llama4_text"))(**own),
            "no shift_labels": lambda: model(**_without_shift_labels(own)),
            "no shift_labels, chunked": lambda: _with_chunks(model, own),
            "band": lambda: train_step(case._replace(soft={"temperature": 1.0, "band": None}), model, own),
            "soft packed": lambda: train_step(
                case._replace(soft={"temperature": 1.0}), model, context.shard(make_batch(CASES["packed"]))
            ),
        }
        for name, call in calls.items():
            said[name] = message_of(call)
    return said


def _run_densely(model: torch.nn.Module, own: dict[str, Any], grad: bool = True) -> None:
    with make_dense(model), torch.set_grad_enabled(grad):
        model(**own)


def _without_shift_labels(own: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in own.items() if name != "shift_labels"}


def _cut_unevenly(tensor: torch.Tensor) -> None:
    buffers = [tensor, tensor[:, 1:].clone()]
    try:
        with cut_buffers(dist.group.WORLD, buffers=buffers, buffer_seq_dims=[1, 1]):
            pass
    finally:
        assert tensor.shape[1] == LENGTH, tensor.shape  # it is not left as a shard


def _with_chunks(model: torch.nn.Module, own: dict[str, Any]) -> None:
    with use_chunked_loss(model, engine="torch"):
        model(**_without_shift_labels(own))


def traffic(rank: int, lengths: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Returns exchanges, bytes and gradient bytes of a step with each length, in float32."""
    case, found = Case((10, 1, 3)), []
    model = make_model(case).float()
    for length in lengths:
        input_ids = tokens(1, length)
        with context_parallel() as context:
            model(**context.shard({"input_ids": input_ids, "labels": input_ids})).loss.backward()
        found.append((context.traffic.num_exchanges, context.traffic.num_bytes, context.traffic.gradient_bytes))
    return found


def compiled(rank: int) -> dict[str, float]:
    """Returns how far the gradients of a compiled model on the ranks are from those of the model, and its graphs.

    Its layers are computed again in the thread of the backward, as on a GPU, which has not entered the block.
    """
    model = make_model(CASES["checkpointed"])
    with context_parallel() as context:
        own = context.shard(make_batch(CASES["checkpointed"]))
        model(**own).loss.backward()
        expected = {name: gradient.clone() for name, gradient in gradients_of(model).items()}
        model.zero_grad()
        loss = torch.compile(model, backend="aot_eager")(**own).loss
        backward = threading.Thread(target=loss.backward)
        backward.start()
        backward.join()
    got = gradients_of(model)
    differences = {name: float((got[name] - gradient).abs().max()) for name, gradient in expected.items()}
    return {**differences, "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}


def is_freed(rank: int, name: str) -> bool:
    """Whether a step leaves nothing that holds its context, and so the group, without a collection of garbage."""
    model, batch = make_model(CASES[name]), make_batch(CASES[name])
    gc.disable()
    with context_parallel() as context:
        train_step(CASES[name], model, context.shard(batch))
    still = weakref.ref(context)
    del context
    return still() is None


def order_of_events(rank: int) -> list[str]:
    """Returns what the layers of a forward do about their exchange, in its order."""
    case, events = Case((10, 1, 3)), []
    model = make_model(case)
    all_gather, visible = exchange.all_gather, attention.visible_in_shard

    def record_gather(*arguments, async_op=False, **options):
        work = all_gather(*arguments, async_op=async_op, **options)
        events.append("gather in the background" if async_op else "gather")
        return _Recorded(work, events) if async_op else work

    def record_selection(*arguments):
        events.append("select")
        return visible(*arguments)

    with context_parallel() as context:
        own = context.shard(make_batch(case))
        with mock.patch.object(exchange, "all_gather", record_gather):
            with mock.patch.object(attention, "visible_in_shard", record_selection):
                model(**own)
    return events[2:]  # without those of the mask


def births_of_seen_keys(rank: int, name: str) -> bool:
    """Returns whether every key that a rank sees is born at its own number, which takes key lists one pass."""
    found, visible = [], attention.visible_in_shard

    def record(*arguments):
        birth, death = visible(*arguments)
        number = torch.arange(birth.shape[-1], dtype=birth.dtype)
        found.append(bool(((birth == number) | (birth >= death)).all()))
        return birth, death

    model, batch = make_model(CASES[name]), make_batch(CASES[name])
    with context_parallel() as context, mock.patch.object(attention, "visible_in_shard", record):
        model(**context.shard(batch))
    return bool(found) and all(found)


class _Recorded(NamedTuple):
    work: Any
    events: list[str]

    def wait(self) -> None:
        self.events.append("wait")
        self.work.wait()


def fail_on_one_rank(rank: int) -> str:
    """Rank 1 fails in its second layer, while the others wait for its keys; returns what rank 0 says."""
    case = Case((10, 1, 3))
    model, batch = make_model(case), make_batch(case)
    if rank == 1:
        model.model.layers[1].register_forward_pre_hook(_fail)
    with context_parallel() as context:
        model(**context.shard(batch))
    return "nothing failed"


def _fail(module, inputs) -> None:
    raise ArithmeticError("the second layer is tired")


def half_precision(rank: int) -> float:
    """Returns how far the loss under bf16 autocast on the ranks is from that in one process, relative to it."""
    case = Case((10, 1, 3))
    batch, losses = make_batch(case), {}
    for name in ("ranks", "one"):
        model = make_model(case).float()
        with torch.autocast("cpu", torch.bfloat16):
            if name == "ranks":
                with context_parallel() as context:
                    losses[name] = model(**context.shard(batch)).loss.detach()
                dist.all_reduce(losses[name])
            else:
                losses[name] = model(**{**batch, "num_items_in_batch": _num_labels(context, batch)}).loss.detach()
    return float(abs(losses["ranks"] - losses["one"]) / losses["one"])
