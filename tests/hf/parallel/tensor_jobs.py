"""What ranks do that share a model by tensor parallelism, beside the same model in one process."""

import contextlib
import logging
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from flash_dmattn_hf import (
    context_parallel,
    dynamic_mask_config,
    iter_gates,
    load_importance,
    save_importance,
    soft_selection,
    use_chunked_loss,
)

from .. import gpu_models
from ..tiny import build, tiny_config, tokens
from .jobs import message_of
from .trainer_jobs import Rows, enter_environment, losses_of, train

TP = {"tp_plan": "auto"}
WINDOW = {"keep_window_size": 10, "num_sink_tokens": 1, "local_window_size": 3}
LENGTH = 24


class Case(NamedTuple):
    """A model, the settings of its importance, the soft selection while it trains, and a plan of the user's own."""

    model_type: str = "llama"
    settings: dict[str, Any] = {}
    soft: dict[str, float] | None = None
    plan: dict[str, str] | None = None


def plan_of_attention(inputs: str, outputs: str) -> dict[str, str]:
    """Returns the styles of the projections before and after the attention of a Llama, as transformers names them."""
    styles = {"q_proj": inputs, "k_proj": inputs, "v_proj": inputs, "o_proj": outputs}
    return {f"model.layers.*.self_attn.{name}": style for name, style in styles.items()}


CASES = {
    "kv heads": Case(),
    "bias": Case(settings={"dt_proj_bias": True, "importance": "zoh"}),
    "query heads": Case(settings={"importance_heads": "query", "dt_proj_bias": True}),
    "shared": Case(settings={"importance_heads": "shared", "dt_proj_bias": True}),
    "hidden states": Case(settings={"importance_input": "hidden", "dt_proj_bias": True}),
    "hidden states, query heads": Case(settings={"importance_input": "hidden", "importance_heads": "query"}),
    "hidden states, shared": Case(settings={"importance_input": "hidden", "importance_heads": "shared"}),
    "soft": Case(soft={"temperature": 0.3}),
    "soft, shared": Case(settings={"importance_heads": "shared"}, soft={"temperature": 0.3}),
    "importance not added": Case(settings={"add_importance_bias": False}, soft={"temperature": 0.3}),
    "values gathered": Case("phi3"),
    "plan that splits": Case(plan=plan_of_attention("colwise", "rowwise")),
    "plan that gathers": Case(plan=plan_of_attention("colwise_gather_output", "rowwise_split_input")),
    "latent, shared": Case("deepseek_v2", settings={"importance_heads": "shared"}),
    "softcap and sliding layer": Case("gemma2"),
    "attention sinks": Case("gpt_oss"),
}


def save_model(case: Case, folder: Path, **config: Any) -> None:
    """Writes a model in float64, with importances that differ widely, from the first rank; all of them call it."""
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        with dynamic_mask_config(**{**WINDOW, **case.settings}):
            config = tiny_config(case.model_type, vocab_size=98, initializer_range=0.2, **config)
            model = build(config, attn_implementation="flash_dmattn").double()
        for _, _, gate in iter_gates(model):
            for parameter in gate.parameters():
                nn.init.normal_(parameter)
        model.save_pretrained(folder)
    dist.barrier()


def save_dense(folder: Path) -> None:
    """Writes a dense model in float64 from the first rank; all of them call it."""
    if dist.get_rank() == 0:
        build(tiny_config("llama", vocab_size=98)).double().save_pretrained(folder)
    dist.barrier()


def load(folder: Path | str, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Passing `tp_plan` directly")
        return AutoModelForCausalLM.from_pretrained(
            folder, **{"dtype": torch.float64, "experts_implementation": "eager", **options}
        )


def enter(rank: int) -> None:
    """Sets what torchrun would, on a machine without an accelerator: transformers puts a model on the one it finds."""
    enter_environment(rank)
    torch._C._get_accelerator = lambda *_: torch.device("cpu")


def train_step(case: Case, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Returns logits, loss and the whole gradients of the parameters, all in float64 where the model is."""
    input_ids = tokens(2, LENGTH)
    with soft_selection(model, **case.soft) if case.soft else contextlib.nullcontext():
        logits = model.train()(input_ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), loss.detach(), {name: whole(gradient) for name, gradient in gradients.items()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def generate(model: nn.Module, **options: Any) -> list[list[int]]:
    """Returns the tokens after a padded batch, with a cache that evicts."""
    input_ids = tokens(2, LENGTH)
    mask = torch.ones_like(input_ids)
    mask[1, :5] = 0
    return model.eval().generate(input_ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **options).tolist()


def compare(rank: int, folder: str, names: list[str]) -> dict[str, dict[str, float]]:
    """Returns, for every case, the largest differences of two ranks from one process, and of the ranks, on each.

    Gradients are compared before a step of SGD, tokens and the saved model after it.
    """
    enter(rank)
    return {name: _differences(CASES[name], Path(folder) / str(number)) for number, name in enumerate(names)}


def _differences(case: Case, folder: Path) -> dict[str, float]:
    save_model(case, folder)
    options = {"distributed_config": DistributedConfig(tp_size=2, tp_plan=case.plan)} if case.plan else TP
    split, one = load(folder, **options), load(folder)
    logits, loss, gradients = train_step(case, split)
    others = {name: gradient.clone() for name, gradient in gradients.items()}
    for other in others.values():
        dist.broadcast(other, 0)
    found = {f"{name} of the ranks": distance(gradients[name], other) for name, other in others.items()}
    torch.optim.SGD(split.parameters(), lr=1e-2).step()
    generated = {"generated": generate(split)}
    if case.model_type == "llama" and case.soft is None:
        generated["generated, static"] = generate(split, cache_implementation="static")
    split.save_pretrained(folder / "again")
    if dist.get_rank() == 0:
        expected_logits, expected_loss, expected = train_step(case, one)
        assert gradients.keys() == expected.keys() and any("dma.A" in name for name in gradients)
        found |= {"logits": distance(logits, expected_logits), "loss": distance(loss, expected_loss)}
        found |= {name: distance(gradients[name], gradient) for name, gradient in expected.items()}
        torch.optim.SGD(one.parameters(), lr=1e-2).step()
        expected_ids = generate(one)
        found |= {name: float(ids != expected_ids) for name, ids in generated.items()}
        reloaded = load(folder / "again").state_dict()
        found |= {f"{name} saved": distance(reloaded[name], tensor) for name, tensor in one.state_dict().items()}
    return found


def distance(tensor: torch.Tensor, other: torch.Tensor) -> float:
    return float((tensor - other).detach().abs().max())


def start_dense(rank: int, folder: str) -> dict[str, tuple[float, float]]:
    """Loads a dense model, whose gates the ranks have to agree on, with one importance per kv head and a shared one.

    Returns the largest difference from one process of their parameters, and that of the logits.
    """
    enter(rank)
    save_dense(Path(folder))
    return {heads: _start_dense(rank, folder, heads) for heads in ("kv", "shared")}


def _start_dense(rank: int, folder: str, heads: str, **distributed: Any) -> tuple[float, float]:
    settings = {**WINDOW, "importance_heads": heads, "initializer_std": 1.0, "dt_proj_bias": True}
    options = {"attn_implementation": "flash_dmattn", "flash_dmattn": settings}
    torch.manual_seed(rank)
    split = load(folder, **(distributed or TP), **options)
    torch.manual_seed(0)
    one = load(folder, **options)
    found = {name: whole(parameter) for name, parameter in split.named_parameters() if ".dma." in name}
    worst = max(distance(found[name], parameter) for name, parameter in one.named_parameters() if name in found)
    assert len(found) == 6 and all(found[name].any() for name in found if "bias" not in name)
    return worst, distance(split(tokens()).logits, one(tokens()).logits)


def share_sequence(rank: int, folder: str) -> dict[str, float] | str:
    """Four ranks share layers (tensor parallelism), sequences and parameters (FSDP2); returns their differences.

    Those of a dense model at its start are among them.
    """
    enter(rank)
    input_ids = tokens(2, 48)
    save_model(Case(), Path(folder))
    save_dense(Path(folder) / "dense")
    both = DistributedConfig(tp_size=2, fsdp_size=2)
    if said := message_of(lambda: load(folder, distributed_config=both)):
        return said
    split, one = load(folder, distributed_config=both).train(), load(folder).train()
    with context_parallel(split._device_mesh["fsdp"].get_group()) as context:
        own = context.shard({"input_ids": input_ids, "labels": input_ids})
        out = split(**own, use_cache=False)
        (2 * out.loss).backward()  # FSDP takes the mean over its two ranks
    expected = one(input_ids, labels=input_ids, use_cache=False)
    expected.loss.backward()
    rows = expected.logits.chunk(2, 1)[context.rank]
    gradients = {name: whole(parameter.grad) for name, parameter in split.named_parameters()}
    found = {name: distance(gradients[name], parameter.grad) for name, parameter in one.named_parameters()}
    weights, logits = _start_dense(rank, f"{folder}/dense", "kv", distributed_config=both)
    found |= {"weights at the start": weights, "logits at the start": logits}
    return {"logits": distance(out.logits, rows), "generated": float(generate(split) != generate(one)), **found}


def fail_on_one_rank(rank: int, folder: str) -> None:
    """Rank 1 fails in its second layer, while the other waits for its part of a sum."""
    enter(rank)
    save_model(Case(), Path(folder))
    model = load(folder, **TP)
    if rank == 1:
        model.model.layers[1].register_forward_pre_hook(_fail)
    model(tokens())


def _fail(module: nn.Module, inputs: tuple) -> None:
    raise ArithmeticError("the second layer is tired")


def refusals(rank: int, folder: str) -> dict[str, str]:
    """Returns what is said to everything that cannot be split."""
    enter(rank)
    places = {name: Path(folder) / name for name in ("model", "uneven", "doge", "dense", "importance")}
    save_model(Case(), places["model"])
    save_model(Case(), places["uneven"], num_attention_heads=6, num_key_value_heads=3, hidden_size=48)
    save_dense(places["dense"])
    if rank == 0:
        build(tiny_config("doge", vocab_size=98)).save_pretrained(places["doge"])
        save_importance(load(places["model"]), places["importance"])
    dist.barrier()
    split, dense = load(places["model"], **TP), load(places["dense"], **TP)
    calls = {
        "kv heads": lambda: load(places["uneven"], **TP),
        "doge": lambda: load(places["doge"], **TP, attn_implementation="flash_dmattn"),
        "pipeline": lambda: load(places["model"], distributed_config=DistributedConfig(pp_size=2)),
        "gates afterwards": lambda: dense.set_attn_implementation("flash_dmattn"),
        "importance file": lambda: load_importance(split, places["importance"]),
        "to an importance file": lambda: save_importance(split, places["importance"]),
        "chunked loss": lambda: use_chunked_loss(split),
        "continuous batching": lambda: split.generate_batch([[5, 6, 7]]),
    }
    return {name: message_of(call) for name, call in calls.items()}


def generate_on_gpus(rank: int, folder: str) -> dict[str, Any]:
    """Returns how far float32 logits are from those of one GPU, the tokens of both, and the number of captures."""
    enter_environment(rank)
    if rank == 0:
        gpu_models.make_model(device="cpu").save_pretrained(folder)
    dist.barrier()
    split = load(folder, dtype=torch.float32, **TP)
    one = load(folder, dtype=torch.float32, device_map=f"cuda:{rank}")
    input_ids = gpu_models.make_tokens(2).to(f"cuda:{rank}")
    found: dict[str, Any] = {"logits": distance(split(input_ids).logits, one(input_ids).logits)}
    captured = []
    logger, handler = logging.getLogger("flash_dmattn_hf.cache.cuda_graph"), logging.Handler()
    handler.emit = captured.append
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    for implementation in ("dynamic", "static"):
        options = {"max_new_tokens": 40, "do_sample": False, "cache_implementation": implementation}
        found[implementation] = [model.generate(input_ids, **options).tolist() for model in (split, one)]
    return {**found, "captured": len(captured)}


def train_on_gpus(rank: int, folder: str) -> list[float]:
    """Returns the losses of a Trainer in float32, whose model as many GPUs share as there are ranks."""
    enter_environment(rank)
    if rank == 0:
        gpu_models.make_model(device="cpu").save_pretrained(f"{folder}/model")
    dist.barrier()
    model = load(f"{folder}/model", dtype=torch.float32, **TP)
    return losses_of(train(folder, 1, model.train(), Rows(128, gpu_models.VOCABULARY), use_cpu=False))
