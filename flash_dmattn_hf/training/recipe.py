"""The recipe of a distillation from a dense checkpoint: mask, data, stages and schedules, validated."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from flash_dmattn_hf.config import IMPORTANCE_INPUTS, DynamicMaskConfig, read_shares
from flash_dmattn_hf.training.distillation_arguments import ATTENTION_WEIGHTS, GATE_LEARNING_RATES, TEMPERATURES
from flash_dmattn_hf.training.far_reuse import ANSWER_WEIGHT

STAGES = ("importance", "all")
"""The importance with a frozen backbone; then all weights, or an adapter."""

_COUNTS = {
    "keep_window_size": 1,
    "num_sink_tokens": 0,
    "local_window_size": 0,
    "length": 64,
    "batch_size": 1,
    "gradient_accumulation_steps": 1,
    "steps": 1,
    "lora_rank": 1,
    "max_tokens": 1,
    "save_steps": 1,
    "evaluations": 0,
    "eval_stretches": 1,
    "samples": 1,
}
_OPTIONAL = ("local_window_size", "minutes", "steps", "lora_rank")


@dataclass(frozen=True)
class Recipe:
    """What `flash-dmattn distill` does; a YAML file of it has these names.

    keep_window_size, num_sink_tokens, local_window_size, importance_input, add_importance_bias: of the mask; a
        local_window_size of None is a quarter of the window. dt_proj always has a bias (`training.gate_preparation`).
    window_shares: layer index -> the multiple of keep_window_size that this layer keeps, as in `DynamicMaskConfig`.
    length: tokens of a stretch. batch_size: stretches of a forward. gradient_accumulation_steps: forwards of a step.
    answer_weight: of the tokens of answers to planted facts, as in `FarReuse`.
    minutes, steps: how long all stages together train; one of them is None.
    stages: of `STAGES`, in their order. importance_share: share of the run for the first where there are both.
    lora_rank: train an adapter of this rank in the second stage instead of all weights, and merge it.
    learning_rate: of the backbone or adapter. gate_learning_rates, temperatures: for each stage.
    attention_weights: for each stage, of the error of the layers' attention outputs in its loss.
    selection_band, hard_share: as in `DistillationArguments`; hard_share is that of the last stage.
    gradient_checkpointing: less memory for a third more time. compile: let torch.compile join the many small
        operations of a layer, for which every stage takes longer to begin. seed: of data and adapter.
    max_tokens: of the data to read. save_steps: steps between checkpoints of a run that can be resumed.
    evaluations: on held-out text in each stage. eval_stretches: of it. tasks, samples: of its recall prompts.

    Raises ValueError for values outside of these.
    """

    keep_window_size: int = 512
    num_sink_tokens: int = 4
    local_window_size: int | None = None
    importance_input: str = "hidden"
    add_importance_bias: bool = False
    length: int = 4096
    batch_size: int = 4
    gradient_accumulation_steps: int = 1
    minutes: float | None = None
    steps: int | None = None
    stages: tuple[str, ...] = STAGES
    importance_share: float = 0.1
    lora_rank: int | None = None
    learning_rate: float = 5e-5
    gate_learning_rates: dict[str, float] = field(default_factory=lambda: dict(GATE_LEARNING_RATES))
    temperatures: dict[str, tuple[float, float]] = field(default_factory=lambda: dict(TEMPERATURES))
    attention_weights: dict[str, float] = field(default_factory=lambda: dict(ATTENTION_WEIGHTS))
    selection_band: float | None = 1.5
    hard_share: float = 0.0
    gradient_checkpointing: bool = False
    compile: bool = False
    answer_weight: float = ANSWER_WEIGHT
    seed: int = 0
    max_tokens: int = 2**26
    save_steps: int = 200
    evaluations: int = 4
    eval_stretches: int = 16
    tasks: tuple[str, ...] | None = None
    samples: int = 2
    window_shares: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        for name, smallest in _COUNTS.items():
            number = getattr(self, name)
            if number is None and name in _OPTIONAL:
                continue
            if type(number) is not int or number < smallest:
                raise ValueError(f"{name} must be an integer of at least {smallest}, got {number!r}")
        if self.minutes is None and self.steps is None:
            object.__setattr__(self, "minutes", 20.0)
        if self.minutes is not None and self.steps is not None:
            raise ValueError(f"minutes or steps must be given, got both: {self.minutes} and {self.steps}")
        for name in ("minutes", "learning_rate", "answer_weight"):
            number = getattr(self, name)
            if not _is_positive(number) and not (name in _OPTIONAL and number is None):
                raise ValueError(f"{name} must be a number above 0, got {number!r}")
        if type(self.seed) is not int or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be an integer from 0 to 2**32 - 1, got {self.seed!r}")
        if self.tasks is not None and not _are_names(self.tasks):
            raise ValueError(f"tasks must be a list of names, got {self.tasks!r}")
        self._check_stages()
        if self.selection_band is not None and not (_is_positive(self.selection_band) and self.selection_band >= 1):
            raise ValueError(f"selection_band must be None or at least 1, got {self.selection_band!r}")
        if self.importance_input not in IMPORTANCE_INPUTS:
            choices = list(IMPORTANCE_INPUTS)
            raise ValueError(f"importance_input must be one of {choices}, got {self.importance_input!r}")
        for name in ("add_importance_bias", "gradient_checkpointing", "compile"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        object.__setattr__(self, "window_shares", read_shares(self.window_shares))
        mask = self.mask()
        if self.length < self.keep_window_size + 2:
            raise ValueError(
                f"length must be at least keep_window_size + 2 = {self.keep_window_size + 2}, so that there are rows "
                f"beyond the window, got {self.length}"
            )
        if self.length < mask.largest_window + 2:
            raise ValueError(
                f"length must be at least {mask.largest_window + 2}, so that there are rows beyond the largest window "
                f"of window_shares, {mask.largest_window} keys, got {self.length}"
            )
        self._check_gradients(mask)

    def _check_stages(self) -> None:
        stages = tuple(stage for stage in STAGES if stage in self.stages) if _are_names(self.stages) else ()
        if not stages or list(stages) != list(self.stages):
            raise ValueError(f"stages must be one or both of {list(STAGES)}, in this order, got {self.stages!r}")
        object.__setattr__(self, "stages", stages)
        if self.steps is not None and self.steps < len(stages):
            raise ValueError(f"steps must be at least {len(stages)}, one for each stage, got {self.steps}")
        for name in ("importance_share", "hard_share"):
            share = getattr(self, name)
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {share!r}")
        if len(stages) == 2 and self.importance_share == 0:
            raise ValueError("importance_share must be above 0 with the stage importance, got 0")
        if self.lora_rank is not None and "all" not in stages:
            raise ValueError(f"lora_rank needs the stage all, got the stages {list(stages)}")
        for name, default in (
            ("gate_learning_rates", GATE_LEARNING_RATES),
            ("temperatures", TEMPERATURES),
            ("attention_weights", ATTENTION_WEIGHTS),
        ):
            values = getattr(self, name)
            if not isinstance(values, dict) or not set(values) <= set(STAGES):
                raise ValueError(f"{name} must be a mapping from {list(STAGES)}, got {values!r}")
            object.__setattr__(self, name, {**default, **values})
        for stage in STAGES:
            if not _is_positive(rate := self.gate_learning_rates[stage]):
                raise ValueError(f"gate_learning_rates must be numbers above 0, got {rate!r}")
            pair = self.temperatures[stage]
            if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(map(_is_positive, pair)):
                raise ValueError(f"temperatures must be a first and a last one above 0 for each stage, got {pair!r}")
            self.temperatures[stage] = tuple(pair)
            weight = self.attention_weights[stage]
            if not (_is_positive(weight) or (weight == 0 and not isinstance(weight, bool))):
                raise ValueError(f"attention_weights must be numbers of at least 0, got {weight!r}")

    def _check_gradients(self, mask: DynamicMaskConfig) -> None:
        """Refuses a stage in which nothing would have a gradient, before the stages that come before it run."""
        is_full = mask.num_sink_tokens + mask.local_window_size == mask.largest_window
        if "importance" in self.stages and is_full and not self.add_importance_bias:
            raise ValueError(
                f"num_sink_tokens + local_window_size must be below keep_window_size = {mask.keep_window_size} with "
                "the stage importance: no key is kept for its importance, so nothing would have a gradient where the "
                "importance is not added to the logits"
            )
        if self.hard_share and "all" not in self.stages and not self.add_importance_bias:
            raise ValueError(
                f"hard_share must be 0 with the stage importance alone, got {self.hard_share}: under the hard mask "
                "nothing has a gradient where the importance is not added to the logits"
            )

    def mask(self) -> DynamicMaskConfig:
        """Returns the settings of the conversion. Raises ValueError for sizes that do not fit."""
        local = self.keep_window_size // 4 if self.local_window_size is None else self.local_window_size
        return DynamicMaskConfig(
            keep_window_size=self.keep_window_size,
            num_sink_tokens=self.num_sink_tokens,
            local_window_size=local,
            importance_input=self.importance_input,
            add_importance_bias=self.add_importance_bias,
            dt_proj_bias=True,
            window_shares=self.window_shares,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns all settings by name, as values that JSON can hold; window_shares only if they are set."""
        values = asdict(self)
        values["window_shares"] = self.mask().to_values()["window_shares"]
        return values if self.window_shares else {name: values[name] for name in values if name != "window_shares"}

    def limit_of(self, stage: str) -> dict[str, float | int]:
        """Returns the minutes or steps of a stage, under the name of its training argument."""
        name, whole = ("max_minutes", self.minutes) if self.steps is None else ("max_steps", self.steps)
        if len(self.stages) == 1:
            return {name: whole}
        first = whole * self.importance_share
        if self.steps is not None:
            first = min(max(1, round(first)), whole - 1)  # together the stages take all steps, and each takes one
        return {name: first if stage == "importance" else whole - first}

    @classmethod
    def from_dict(cls, values: Any, where: str) -> "Recipe":
        """Reads what a YAML file holds. Raises ValueError naming `where` for unknown names."""
        if not isinstance(values, dict):
            raise ValueError(f"{where} must hold a mapping, got {type(values).__name__}")
        known = [entry.name for entry in fields(cls)]
        if unknown := sorted(str(name) for name in values if name not in known):
            raise ValueError(f"{where} must only have the names {known}, got {unknown}")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _is_positive(number: Any) -> bool:
    return not isinstance(number, bool) and isinstance(number, int | float) and 0 < number < math.inf


def _are_names(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, str) for value in values)
