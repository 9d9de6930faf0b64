"""A call goes through an operator's arguments and comes back as it was."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from flash_dmattn.calls import AttentionCall, DecodeCall
from flash_dmattn.operators import OperatorCall, signature
from flash_dmattn.slots import make_slots
from flash_dmattn.visibility import SoftCut


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Example(OperatorCall):
    query: torch.Tensor
    pair: Pair | None
    number: int | None

    DIFFERENTIABLE = ("query", "pair_second")


def test_a_group_of_tensors_becomes_arguments_of_its_own_also_when_it_is_left_out():
    query, first, second = torch.zeros(3)
    optional = torch.Tensor | None
    assert Example.parameters() == {
        "query": torch.Tensor,
        "pair_first": optional,
        "pair_second": optional,
        "number": int | None,
    }
    assert (Example.num_tensors, Example.differentiable_indices) == (3, [0, 2])
    for pair, flat in ((Pair(first, second), [first, second]), (None, [None, None])):
        call = Example(query=query, pair=pair, number=3)
        assert all(got is given for got, given in zip(call.flatten(), [query, *flat, 3], strict=True))
        again = Example.unflatten([*call.flatten(), "a backend's name"])
        assert again.pair == pair and again.query is query and again.number == 3


def test_the_calls_of_the_package_come_back_as_they_were():
    query, key = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 1, 4)
    slots = make_slots(1, 1, 3, 4, torch.float32, "cpu")
    numbers = {"num_sink_tokens": 1, "local_window_size": 1, "sliding_window": None, "softmax_scale": 0.5}
    decode = DecodeCall(
        query=query,
        key=key,
        value=key,
        importance=torch.zeros(1, 1, 1),
        padding_mask=None,
        rows=None,
        slots=slots,
        **numbers,
        softcap=0.0,
        add_importance_bias=True,
    )
    for call in (decode, AttentionCall.prepare(query, key, key, None, None)):
        again = type(call).unflatten(call.flatten())
        assert type(again) is type(call) and vars(again) == vars(call)
        assert len(call.flatten()) == len(type(call).parameters())


def test_the_tensors_of_a_call_are_the_first_arguments_of_its_operator():
    query, key = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 1, 4)
    soft = SoftCut(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int32))
    for given in (None, soft):
        call = AttentionCall.prepare(query, key, key, torch.zeros(1, 1, 1), None, query_start=3, soft=given)
        assert all(got is at for got, at in zip(call.tensors(), call.flatten()[: call.num_tensors], strict=True))


def test_an_operator_takes_the_arguments_of_a_call_between_its_own():
    parameters = signature(Example, torch.Tensor, {"dout": torch.Tensor}).parameters
    assert list(parameters) == ["dout", "query", "pair_first", "pair_second", "number", "backend"]
