"""What a distillation measures before and after each stage, kept on disk so that an interrupted run can go on."""

import argparse
import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from flash_dmattn_hf.evaluation.prompts import Prompt
from flash_dmattn_hf.evaluation.report import tables
from flash_dmattn_hf.evaluation.rows import Row
from flash_dmattn_hf.evaluation.suite import add_shares_of_gap, measure_row, recall_suite
from flash_dmattn_hf.training.held_out import HeldOut
from flash_dmattn_hf.training.recipe import Recipe

START = "calibrated"
LABELS = {"importance": "importance trained", "all": "all weights trained"}
ADAPTER = "adapter trained"
"""Instead of the label of the stage "all"."""


class Results:
    """The rows of the table, and the log of each stage that is over.

    folder: of the unfinished run; it holds run.json, the checkpoints of every stage, and the trained importance.
    """

    def __init__(self, folder: Path, state: dict, recipe: Recipe) -> None:
        self.folder, self._state, self._window = folder, state, recipe.keep_window_size
        self._labels = LABELS if recipe.lora_rank is None else {**LABELS, "all": ADAPTER}

    @classmethod
    def open(cls, folder: Path, recipe: Recipe, args: argparse.Namespace) -> "Results":
        """Starts a run in `folder`, or goes on with the one that is there, if it was asked for.

        Raises ValueError for an unfinished run that should not be resumed, or that has other settings.
        """
        read = {name: getattr(args, name) for name in ("model", "data", "text_column", "data_split")}
        settings = json.loads(json.dumps({**read, **recipe.to_dict()}))
        file = folder / "run.json"
        if not file.is_file():
            return cls(folder, {"settings": settings, "rows": [], "logs": {}}, recipe)
        if not args.resume:
            raise ValueError(f"{folder} holds a run that was interrupted: pass --resume to go on, or delete it")
        state = json.loads(file.read_text(encoding="utf-8"))
        for name in {**state["settings"], **settings}:
            before, value = state["settings"].get(name), settings.get(name)
            if before != value:
                raise ValueError(f"{name} must be that of the run in {folder}, {before!r}, got {value!r}")
        return cls(folder, state, recipe)

    def check_text(self, input_ids: torch.Tensor) -> None:
        """Raises ValueError if the run was started with other token ids (N,) int64 than these, of the same files."""
        found = hashlib.sha256(input_ids.numpy()).hexdigest()
        if self._state.setdefault("text_sha256", found) != found:
            raise ValueError(f"the text of --data must be that of the run in {self.folder}, but it has changed")

    @property
    def importance(self) -> Path:
        """Where the result of the stage "importance" belongs."""
        return self.folder / "trained_importance"

    @property
    def has_importance(self) -> bool:
        """Whether the stage "importance" is over. (The last stage ends with the run.)"""
        return "importance" in self._state["logs"]

    @property
    def table(self) -> str:
        """The rows as text."""
        return tables(self._state["rows"])

    def measure_start(self, model: nn.Module, *, held_out: HeldOut, prompts: Sequence[Prompt], progress: bool) -> None:
        """Adds the rows of dense, sinks + window and the calibrated model, unless they are known."""
        if self._state["rows"]:
            return
        rows = recall_suite(
            model,
            held_out.input_ids,
            prompts,
            windows=[self._window],
            context_length=held_out.context_length,
            leading=held_out.leading,
            max_stretches=held_out.max_stretches,
            progress=progress,
        )
        rows[-1]["mask"] = START
        self._state["rows"] = rows
        self._save()

    def measure_stage(
        self,
        model: nn.Module,
        stage: str,
        log: list[dict[str, float]],
        *,
        held_out: HeldOut,
        prompts: Sequence[Prompt],
        progress: bool,
        reference: nn.Module | None = None,
    ) -> None:
        """Adds the row of a model after a stage, compared with the dense attention of `reference` or of its own."""
        row = measure_row(
            Row(self._labels[stage], "importance", self._window, model, nullcontext()),
            held_out.input_ids,
            prompts,
            context_length=held_out.context_length,
            first_row=self._window,
            reference=reference,
            leading=held_out.leading,
            max_stretches=held_out.max_stretches,
            progress=progress,
        )
        others = [other for other in self._state["rows"] if other["mask"] != row["mask"]]
        self._state["rows"] = [*others, row]
        self._state["logs"][stage] = log
        add_shares_of_gap(self._state["rows"])
        self._save()

    def write(self, folder: Path, facts: dict) -> None:
        """Writes results.json, results.txt and log.jsonl."""
        folder.mkdir()
        logs = self._state["logs"]
        steps = {stage: max(entry["step"] for entry in log) for stage, log in logs.items()}
        results = {**facts, "steps_of_stages": steps, "rows": self._state["rows"]}
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        (folder / "results.txt").write_text(self.table + "\n", encoding="utf-8")
        lines = [{"stage": stage, **entry} for stage, log in logs.items() for entry in log]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def _save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "run.json"
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(self._state), encoding="utf-8")
        partial.replace(file)
