"""Training with an unmodified Trainer: an own learning rate for the importance, and a log of what it does."""

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import TrainerCallback

from flash_dmattn import Visibility, interval_attention, select_visible
from flash_dmattn_hf.gates.attach import iter_gates
from flash_dmattn_hf.gates.divided import gather
from flash_dmattn_hf.gates.eligibility import is_native_doge
from flash_dmattn_hf.gates.importance import Gate, get_gate, importance_of
from flash_dmattn_hf.integration.observed_attention import observed_attention

IMPORTANCE_GROUP = "importance"
"""Name of the optimizer's parameter group that holds the importance."""


def importance_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields name and parameter of everything that the importance is computed from, in the model's order.

    They are the gates' parameters, or `A` and `dt_proj` of a native Doge layer. With `modules_to_save=["dma"]` of PEFT
    they are those of the active copy.

    model: a model of transformers, or what holds one, such as PEFT's, compiled, DDP's and FSDP's models.
    Raises ValueError for a model without gates.
    """
    found = False
    for name, module, gate in iter_gates(model):
        found = True
        owner, place = (module, name) if is_native_doge(module) else (gate, f"{name}.dma")
        yield f"{place}.A", owner.A
        yield from owner.dt_proj.named_parameters(f"{place}.dt_proj")
    if not found:
        raise ValueError(
            f"model must have dynamic masks, got {type(model).__name__} without any: convert it, or load it with "
            'attn_implementation="flash_dmattn"'
        )


def parameter_groups(
    model: nn.Module, *, learning_rate: float, importance_learning_rate: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Returns the trainable parameters as groups for a torch optimizer, the importance in a group of its own.

    An unmodified Trainer takes them as
    `optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": parameter_groups(...)})`, or as an optimizer in
    `optimizers=(torch.optim.AdamW(parameter_groups(...)), None)` if the model is on its device already. It makes its
    scheduler, which scales both rates alike, and saves and resumes the optimizer. Make the groups after PEFT and
    after freezing.

    learning_rate: of all other parameters. importance_learning_rate: of A and dt_proj.
    weight_decay: of parameters with two or more dimensions outside of the importance.

    With add_importance_bias=False the importance is frozen outside of a soft selection, and so left out there, which
    is warned of. Raises ValueError if the model has no gates or nothing to train.
    """
    for name, rate in (("learning_rate", learning_rate), ("importance_learning_rate", importance_learning_rate)):
        if not rate >= 0:
            raise ValueError(f"{name} must be at least 0, got {rate}")
    importance = [parameter for _, parameter in importance_parameters(model) if parameter.requires_grad]
    if not importance and not any(map(_can_have_gradient, iter_gates(model))):
        warnings.warn(
            "the importance is frozen, so it is in no parameter group: with add_importance_bias=False it is only "
            "trainable inside soft_selection, so make the groups there",
            stacklevel=2,
        )
    known = set(map(id, importance))
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [
        {"name": "decayed", "params": [p for p in others if p.dim() >= 2], "weight_decay": weight_decay},
        {"name": "not decayed", "params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
        {"name": IMPORTANCE_GROUP, "params": importance, "weight_decay": 0.0},
    ]
    for group in groups:
        group["lr"] = importance_learning_rate if group["name"] == IMPORTANCE_GROUP else learning_rate
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("model must have parameters that require a gradient, got none")
    return groups


def freeze_all_but_importance(model: nn.Module) -> int:
    """Leaves only the importance trainable and returns how many numbers that are.

    Raises ValueError if the model has no gates, or if add_importance_bias is False and no soft selection is active:
    the loss then does not depend on the importance, so nothing could be learned. Nothing is frozen in that case.
    """
    importance = [parameter for _, parameter in importance_parameters(model)]
    for entry in iter_gates(model):
        if not _can_have_gradient(entry):
            raise ValueError(
                f"add_importance_bias must be True to train the importance alone, got False at {entry[0]}: "
                "the loss would have no gradient outside of soft_selection"
            )
    model.requires_grad_(False)
    for parameter in importance:
        parameter.requires_grad_(True)
    return sum(parameter.numel() for parameter in importance)


def _can_have_gradient(entry: tuple[str, nn.Module, Gate]) -> bool:
    _, _, gate = entry
    return gate.config.add_importance_bias or bool(gate.soft_selections)


class Probe(NamedTuple):
    """What the layers did with one sequence: per layer importance (Hi, S) and visibility (Hi, S), on the CPU."""

    importance: list[torch.Tensor]
    visibility: list[Visibility]


@torch.no_grad()
def probe(model: nn.Module, input_ids: torch.Tensor) -> Probe:
    """Runs one sequence of token ids (S,) through `model` and returns what its layers select."""
    seen = Probe([], [])

    def attend(module, query, key, value, softmax_scale, softcap):
        gate = get_gate(module)
        importance = importance_of(gate, value)
        visibility = select_visible(importance, **gate.windows._asdict())
        seen.importance.append(importance[0].float().cpu())
        seen.visibility.append(Visibility(*(bound[0].cpu() for bound in visibility)))
        out = interval_attention(
            *(tensor.transpose(1, 2) for tensor in (query, key, value)),
            importance,
            visibility,
            softmax_scale=softmax_scale,
            softcap=softcap or 0.0,
            add_importance_bias=gate.config.add_importance_bias,
        )
        return out.transpose(1, 2)

    was_training = model.training
    model.eval()
    modules = {module for _, module, _ in iter_gates(model)}
    try:
        with observed_attention(modules, attend):
            model(input_ids=input_ids[None].to(next(model.parameters()).device), use_cache=False)
    finally:
        model.train(was_training)
    return seen


class ImportanceCallback(TrainerCallback):
    """Adds to every log entry how many keys are visible and how far the importance has moved.

    `dma/visible_keys`: keys that a query sees, mean over queries, heads and layers. `dma/visible_fraction`:
    that over the keys before it. `dma/changed_fraction`: share of the keys seen at the start that are no longer.
    `dma/importance_spread`: standard deviation over the keys. `dma/importance_moved`: mean distance from the
    start. `dma/A_norm`, `dma/A_moved`: Euclidean norm of all A, and of their difference from the start.
    `dma/learning_rate`: of the importance's parameter group, where there is one.

    All of it is measured on one probe sequence, with one forward pass per log entry; the start is that of this
    run, so a resumed run measures from where it resumed.

    probe_input_ids: (S,) token ids; None: the real tokens of the first training example, at most
        `max_probe_tokens`. A dataset that cannot be indexed needs them given.
    """

    def __init__(self, probe_input_ids: torch.Tensor | None = None, *, max_probe_tokens: int = 2048) -> None:
        self.probe_input_ids = probe_input_ids
        self.max_probe_tokens = max_probe_tokens

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs) -> None:
        if self.probe_input_ids is None:
            self.probe_input_ids = _first_example(train_dataloader.dataset)[: self.max_probe_tokens]
        self.start, self.start_A = probe(model, self.probe_input_ids), _all_A(model)

    def on_log(self, args, state, control, logs=None, model=None, optimizer=None, **kwargs) -> None:
        if "loss" not in logs:
            return
        metrics = self.measure(model)
        for group in optimizer.param_groups if optimizer is not None else ():
            if group.get("name") == IMPORTANCE_GROUP:
                metrics["dma/learning_rate"] = group["lr"]
        logs.update(metrics)
        state.log_history[-1].update(metrics)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Returns the metrics of `model` as it is now."""
        now, A = probe(model, self.probe_input_ids), _all_A(model)
        length = len(self.probe_input_ids)
        kept, visible, shown = 0, 0, 0
        for start, end in zip(self.start.visibility, now.visibility, strict=True):
            births, deaths = end.birth.long(), end.death.long().clamp(max=length)
            deaths_at_start = start.death.long().clamp(max=length)
            visible += (deaths - births).sum().item()
            shown += (deaths_at_start - births).sum().item()
            kept += (torch.minimum(deaths, deaths_at_start) - births).sum().item()
        heads = sum(importance.shape[0] for importance in now.importance)
        moved = [(a - b).abs().mean() for a, b in zip(now.importance, self.start.importance, strict=True)]
        return {
            "dma/visible_keys": visible / (heads * length),
            "dma/visible_fraction": visible / (heads * length * (length + 1) / 2),
            "dma/changed_fraction": 1 - kept / max(shown, 1),
            "dma/importance_spread": torch.stack([x.std(-1).mean() for x in now.importance]).mean().item(),
            "dma/importance_moved": torch.stack(moved).mean().item(),
            "dma/A_norm": A.norm().item(),
            "dma/A_moved": (A - self.start_A).norm().item(),
        }


def _all_A(model: nn.Module) -> torch.Tensor:
    parameters = [(module if is_native_doge(module) else gate).A for _, module, gate in iter_gates(model)]
    return torch.cat([gather(A).float().cpu() for A in parameters])


def _first_example(dataset: Any) -> torch.Tensor:
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise ValueError(
            f"probe_input_ids must be given for a dataset that cannot be indexed, got None for {type(dataset).__name__}"
        )
    example = dataset[0]
    input_ids = torch.as_tensor(example["input_ids"])
    if "attention_mask" in example:
        input_ids = input_ids[torch.as_tensor(example["attention_mask"]).bool()]
    return input_ids
