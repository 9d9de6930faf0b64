"""What trains a model takes whatever holds it: PEFT's wrapper, a compiled model, DDP, FSDP2, and two at once."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from flash_dmattn_hf import DynamicMaskConfig, convert_model, iter_gates, use_chunked_loss
from flash_dmattn_hf.training import freeze_all_but_importance, importance_parameters, parameter_groups, probe
from flash_dmattn_hf.training.teacher import make_teacher

from ..tiny import tiny_model, tokens

GATE = 2 * (2 + 2 * 2 * 8)
"""Numbers in the gates of both layers: A (2,) and dt_proj.weight (2, 2 * 8)."""


def peft(model):
    library = pytest.importorskip("peft")
    config = library.LoraConfig(r=2, target_modules="all-linear", modules_to_save=["dma"], task_type="CAUSAL_LM")
    return library.get_peft_model(model, config)


def compiled(model):
    torch.compiler.reset()
    return torch.compile(model, backend="eager")


def sharded(model):
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def ddp(model):
    return nn.parallel.DistributedDataParallel(model)


WRAPS = {
    "plain": lambda model: model,
    "peft": peft,
    "compiled": compiled,
    "ddp": ddp,
    "fsdp": sharded,
    "ddp of peft": lambda model: ddp(peft(model)),
}


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    """A group of one process."""
    path = tmp_path_factory.mktemp("group")
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(params=WRAPS)
def wrapped(request):
    model = convert_model(tiny_model("llama"), DynamicMaskConfig(keep_window_size=8)).train()
    return WRAPS[request.param](model)


def test_gates_and_their_parameters_are_found(wrapped):
    assert len(list(iter_gates(wrapped))) == 2
    parameters = dict(importance_parameters(wrapped))
    assert sum(parameter.numel() for parameter in parameters.values()) == GATE
    assert all(parameter.requires_grad for parameter in parameters.values())


def test_the_importance_has_a_group_of_its_own(wrapped):
    groups = parameter_groups(wrapped, learning_rate=1.0, importance_learning_rate=2.0)
    assert sum(p.numel() for group in groups for p in group["params"] if group["name"] == "importance") == GATE
    trained = [p for group in groups for p in group["params"]]
    assert {*map(id, trained)} == {id(p) for p in wrapped.parameters() if p.requires_grad}
    assert len(trained) == len(set(map(id, trained)))


def test_the_importance_alone_may_be_trained(wrapped):
    assert freeze_all_but_importance(wrapped) == GATE
    assert sum(p.numel() for p in wrapped.parameters() if p.requires_grad) == GATE


def test_the_chunked_loss_is_the_loss_and_can_be_removed(wrapped):
    ids = tokens(2, 20)
    eager = getattr(wrapped, "_orig_mod", wrapped)
    before = eager(input_ids=ids, labels=ids)
    chunked = use_chunked_loss(wrapped)
    output = wrapped(input_ids=ids, labels=ids)
    assert output.logits is None
    torch.testing.assert_close(output.loss, before.loss)
    output.loss.backward()
    assert all(parameter.grad is not None for _, parameter in importance_parameters(wrapped))
    chunked.remove()
    assert eager(input_ids=ids, labels=ids).logits is not None


def test_a_module_without_a_model_is_refused():
    with pytest.raises(ValueError, match="model must be a model of transformers, got Linear"):
        use_chunked_loss(nn.Linear(2, 2))


def test_a_probe_sees_the_layers(wrapped):
    assert len(probe(wrapped, tokens(1, 20)[0]).importance) == 2


def test_a_teacher_runs_what_it_was_compiled_to_unless_it_is_the_student():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    student = convert_model(tiny_model("llama"), DynamicMaskConfig(keep_window_size=8))
    other = torch.compile(tiny_model("llama"), backend=count)
    make_teacher(student, other, trains_backbone=True, dtype=None).logits({"input_ids": tokens(1, 12)})
    assert graphs
    graphs.clear()
    itself = make_teacher(student, None, trains_backbone=False, dtype=None)
    itself.follow(torch.compile(student, backend=count))
    itself.logits({"input_ids": tokens(1, 12)})
    assert not graphs
