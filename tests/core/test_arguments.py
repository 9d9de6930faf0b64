"""A bad argument raises a ValueError that names it, says what came and what is needed."""

import re

import pytest
import torch

from flash_dmattn import (
    Visibility,
    dynamic_mask_attention,
    interval_attention,
    select_visible,
)

BATCH, SEQLEN, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 2, 6, 4, 2, 8


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def selection(**changes):
    return {"importance": torch.randn(BATCH, NUM_KV_HEADS, SEQLEN), "keep_window_size": 4} | changes


def attention(**changes):
    return {
        "query": torch.randn(BATCH, SEQLEN, NUM_HEADS, HEAD_DIM),
        "key": torch.randn(BATCH, SEQLEN, NUM_KV_HEADS, HEAD_DIM),
        "value": torch.randn(BATCH, SEQLEN, NUM_KV_HEADS, HEAD_DIM),
        **selection(),
    } | changes


def intervals(**changes):
    arguments = attention(visibility=Visibility(*torch.zeros(2, BATCH, NUM_KV_HEADS, SEQLEN, dtype=torch.int32)))
    del arguments["keep_window_size"]
    return arguments | changes


def packed(bounds, **changes):
    shapes = {"query": NUM_HEADS, "key": NUM_KV_HEADS, "value": NUM_KV_HEADS}
    tensors = {name: torch.randn(1, SEQLEN, heads, HEAD_DIM) for name, heads in shapes.items()}
    return attention(**tensors, importance=torch.randn(1, NUM_KV_HEADS, SEQLEN), cu_seqlens=bounds) | changes


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


KV = (BATCH, SEQLEN, NUM_KV_HEADS, HEAD_DIM)
LANES = (BATCH, NUM_KV_HEADS, SEQLEN)
BOTH = "selection-and-attention"  # options that both functions take

# (id, function, arguments, names of which the message has one)
CASES = [
    ("importance-2d", "select", selection(importance=zeros(2, 6)), "importance"),
    ("importance-integer", "select", selection(importance=zeros(*LANES, dtype=torch.int64)), "importance"),
    ("importance-not-a-tensor", "select", selection(importance=[[[1.0]]]), "importance"),
    ("window-0", BOTH, {"keep_window_size": 0}, "keep_window_size"),
    ("window-negative", BOTH, {"keep_window_size": -5}, "keep_window_size"),
    ("sinks-negative", BOTH, {"num_sink_tokens": -1}, "num_sink_tokens"),
    ("local-negative", BOTH, {"local_window_size": -1}, "local_window_size"),
    ("sinks-above-w", BOTH, {"num_sink_tokens": 5}, "num_sink_tokens"),
    ("local-above-w", BOTH, {"local_window_size": 5}, "local_window_size"),
    (
        "sum-above-w",
        BOTH,
        {"num_sink_tokens": 2, "local_window_size": 3},
        "num_sink_tokens|local_window_size",
    ),
    ("local-not-causal", BOTH, {"local_window_size": 1, "is_causal": False}, "local_window_size"),
    ("sliding-not-causal", BOTH, {"sliding_window": 4, "is_causal": False}, "sliding_window"),
    ("sliding-0", BOTH, {"sliding_window": 0}, "sliding_window"),
    (
        "padding-shape",
        BOTH,
        {"padding_mask": torch.ones(BATCH, SEQLEN + 1, dtype=torch.bool)},
        "padding_mask",
    ),
    ("padding-4d", BOTH, {"padding_mask": torch.ones(BATCH, 1, SEQLEN, SEQLEN).bool()}, "padding_mask"),
    ("padding-float", BOTH, {"padding_mask": torch.ones(BATCH, SEQLEN)}, "padding_mask"),
    (
        "padding-device",
        BOTH,
        {"padding_mask": zeros(BATCH, SEQLEN, dtype=torch.bool, device="meta")},
        "padding_mask",
    ),
    ("cu_seqlens-batch", BOTH, {"cu_seqlens": int32(0, SEQLEN)}, "cu_seqlens"),
    ("positions-shape", "select", selection(positions=zeros(2, 6, dtype=torch.int32)), "positions"),
    ("positions-float", "select", selection(positions=zeros(*LANES)), "positions"),
    (
        "positions-device",
        "select",
        selection(positions=zeros(*LANES, dtype=torch.int32, device="meta")),
        "positions",
    ),
    (
        "positions-and-cu_seqlens",
        "select",
        selection(
            importance=zeros(1, 2, SEQLEN),
            positions=torch.arange(SEQLEN, dtype=torch.int32).expand(1, 2, SEQLEN),
            cu_seqlens=int32(0, SEQLEN),
        ),
        "positions|cu_seqlens",
    ),
    *(
        (f"cu_seqlens-{name}", "attend", packed(bounds), "cu_seqlens")
        for name, bounds in {
            "first": int32(1, SEQLEN),
            "last": int32(0, SEQLEN - 1),
            "beyond": int32(0, SEQLEN + 1),
            "not-monotone": int32(0, 4, 2, SEQLEN),
            "negative": int32(0, -1, SEQLEN),
            "empty": int32(),
            "2d": int32(0, SEQLEN)[None],
            "float": torch.tensor([0.0, SEQLEN]),
            "meta": zeros(2, dtype=torch.int32, device="meta"),
        }.items()
    ),
    (
        "packed-fewer-queries",
        "attend",
        packed(int32(0, SEQLEN), query=torch.randn(1, 3, 4, 8)),
        "cu_seqlens|query",
    ),
    ("query-3d", "attend", attention(query=zeros(2, 6, 32)), "query"),
    ("query-integer", "attend", attention(query=zeros(2, 6, 4, 8, dtype=torch.int64)), "query"),
    (
        "query-longer-than-key",
        "attend",
        attention(query=zeros(BATCH, SEQLEN + 1, NUM_HEADS, HEAD_DIM)),
        "query",
    ),
    ("key-batch", "attend", attention(key=zeros(1, *KV[1:])), "key"),
    ("key-length", "attend", attention(key=zeros(2, 7, 2, 8)), "key|value"),
    ("key-heads", "attend", attention(key=zeros(2, 6, 4, 8)), "key|value"),
    ("key-head-dim", "attend", attention(key=zeros(2, 6, 2, 9)), "key"),
    ("key-dtype", "attend", attention(key=zeros(*KV, dtype=torch.bfloat16)), "key"),
    ("key-device", "attend", attention(key=zeros(*KV, device="meta")), "key"),
    ("value-length", "attend", attention(value=zeros(2, 5, 2, 8)), "value"),
    ("value-heads", "attend", attention(value=zeros(2, 6, 1, 8)), "value"),
    ("value-dtype", "attend", attention(value=zeros(*KV, dtype=torch.float64)), "value"),
    ("value-device", "attend", attention(value=zeros(*KV, device="meta")), "value"),
    (
        "heads-do-not-divide",
        "attend",
        attention(query=zeros(BATCH, SEQLEN, 3, HEAD_DIM)),
        "query|key|num_heads",
    ),
    ("importance-heads", "attend", attention(importance=zeros(2, 3, 6)), "importance"),
    ("importance-length", "attend", attention(importance=zeros(2, 2, 5)), "importance"),
    ("importance-batch", "attend", attention(importance=zeros(1, 2, 6)), "importance"),
    ("importance-device", "attend", attention(importance=zeros(*LANES, device="meta")), "importance"),
    ("backend-unknown", "attend", attention(backend="fast"), "backend"),
    ("softcap-negative", "attend", attention(softcap=-1.0), "softcap"),
    ("softcap-nan", "attend", attention(softcap=float("nan")), "softcap"),
    ("softcap-infinite", "attend", attention(softcap=float("inf")), "softcap"),
    ("max-seqlen-half", "attend", attention(max_seqlen=7.5), "max_seqlen"),
    ("interval-backend-unknown", "intervals", intervals(backend="fast"), "backend"),
    (
        "visibility-shape",
        "intervals",
        intervals(visibility=Visibility(*zeros(2, BATCH, NUM_KV_HEADS, SEQLEN - 1, dtype=torch.int32))),
        "visibility|birth",
    ),
    (
        "visibility-heads",
        "intervals",
        intervals(visibility=Visibility(*zeros(2, BATCH, NUM_HEADS, SEQLEN, dtype=torch.int32))),
        "visibility|birth",
    ),
    (
        "visibility-dtype",
        "intervals",
        intervals(visibility=Visibility(*zeros(2, *LANES))),
        "visibility|birth",
    ),
    ("start-shape", "intervals", intervals(query_start=int32(0, 1, 2)), "query_start"),
    ("start-half", "intervals", intervals(query_start=1.5), "query_start"),
    ("start-64-bits", "intervals", intervals(query_start=2**31), "query_start"),
    ("max-visible-half", "intervals", intervals(max_visible=2.5), "max_visible"),
    ("start-float", "intervals", intervals(query_start=torch.zeros(BATCH)), "query_start"),
    ("query_positions-shape", "intervals", intervals(query_positions=int32(0, 1)), "query_positions"),
    (
        "query_positions-float",
        "intervals",
        intervals(query_positions=zeros(BATCH, SEQLEN)),
        "query_positions",
    ),
]
FUNCTIONS = {"select": select_visible, "attend": dynamic_mask_attention, "intervals": interval_attention}


def all_calls():
    """The cases as pytest parameters; an option that both functions take makes two."""
    calls = []
    for name, function, arguments, expected in CASES:
        if function == BOTH:
            calls.append(pytest.param(select_visible, selection(**arguments), expected, id=f"select-{name}"))
            calls.append(pytest.param(dynamic_mask_attention, attention(**arguments), expected, id=f"attend-{name}"))
        else:
            calls.append(pytest.param(FUNCTIONS[function], arguments, expected, id=name))
    return calls


@pytest.mark.parametrize(("function", "arguments", "names"), all_calls())
def test_a_bad_argument_is_named(function, arguments, names):
    with pytest.raises(ValueError) as caught:
        function(**arguments)
    message = str(caught.value)
    assert re.search(rf"\b({names})\b", message), message
    assert re.search(r"\b(must|needs?|has to|cannot)\b", message), message  # what is needed
    assert "got" in message, message  # what came


def test_the_unchanged_arguments_are_fine():
    select_visible(**selection())
    dynamic_mask_attention(**attention())
    dynamic_mask_attention(**packed(int32(0, 2, 2, SEQLEN)))
    interval_attention(**intervals())
