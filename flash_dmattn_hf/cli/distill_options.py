"""The options of `flash-dmattn distill`, on the command line or in a YAML file."""

import argparse
from dataclasses import fields
from pathlib import Path

from flash_dmattn_hf.cli import common
from flash_dmattn_hf.config import IMPORTANCE_INPUTS
from flash_dmattn_hf.evaluation.tasks import TASKS
from flash_dmattn_hf.training.recipe import STAGES, Recipe


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options; those of the recipe default to None, because a file may give them."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="DATA",
        help="text files, directories of .txt files, data set files, or names of data sets on the Hub",
    )
    data.add_argument("--text-column", metavar="NAME", default="text", help="of a data set (default: %(default)s)")
    data.add_argument("--data-split", metavar="NAME", default="train", help="of a data set (default: %(default)s)")
    data.add_argument("--length", type=common.positive, metavar="N", help="tokens of a stretch (default: 4096)")
    masks = parser.add_argument_group("dynamic mask")
    masks.add_argument(
        "--keep-window-size", type=common.positive, metavar="W", help="keys that a query sees at most (default: 512)"
    )
    masks.add_argument("--num-sink-tokens", type=common.not_negative, metavar="S", help="(default: 4)")
    masks.add_argument("--local-window-size", type=common.not_negative, metavar="R", help="(default: 1/4 of W)")
    masks.add_argument(
        "--importance-input", choices=IMPORTANCE_INPUTS, help="what the importance is computed from (default: hidden)"
    )
    masks.add_argument(
        "--add-importance-bias", action="store_true", default=None, help="add the importance to the logits, too"
    )
    training = parser.add_argument_group("training")
    training.add_argument("--config", type=common.text_file, metavar="FILE", help="YAML, such as configs/distill.yaml")
    limits = training.add_mutually_exclusive_group()
    limits.add_argument("--minutes", type=float, metavar="M", help="of training, all stages together (default: 20)")
    limits.add_argument("--steps", type=common.positive, metavar="N", help="instead of minutes")
    training.add_argument("--stages", type=_names, metavar="NAME,NAME", help=f"(default: {','.join(STAGES)})")
    training.add_argument(
        "--lora",
        type=common.positive,
        nargs="?",
        const=16,
        metavar="RANK",
        dest="lora_rank",
        help="train an adapter instead of all weights and merge it (default rank: 16)",
    )
    training.add_argument("--batch-size", type=common.positive, metavar="B", help="stretches of a forward (default: 4)")
    training.add_argument(
        "--gradient-accumulation-steps", type=common.positive, metavar="N", help="forwards of a step (default: 1)"
    )
    training.add_argument("--learning-rate", type=float, metavar="X", help="of the backbone (default: 5e-5)")
    training.add_argument(
        "--gradient-checkpointing", action="store_true", default=None, help="less memory, a third more time"
    )
    training.add_argument(
        "--compile", action="store_true", default=None, help="torch.compile the layers; stages take longer to begin"
    )
    training.add_argument("--seed", type=int, help="of data and adapter (default: 0)")
    training.add_argument("--resume", action="store_true", help="go on with an interrupted run, if there is one")
    measurement = parser.add_argument_group("measurement on held-out text")
    measurement.add_argument(
        "--tasks", type=_names, metavar="NAME,NAME", help=f"of {', '.join(TASKS)}, or none (default: all)"
    )
    measurement.add_argument("--samples", type=common.positive, metavar="N", help="prompts at each depth (default: 2)")
    measurement.add_argument(
        "--stretches", type=common.positive, metavar="N", dest="eval_stretches", help="of held-out text (default: 16)"
    )


def read_recipe(args: argparse.Namespace) -> Recipe:
    """Returns the recipe of a file, if one is given, with the options of the command line on top."""
    values = {} if args.config is None else _read_yaml(args.config)
    given = {entry.name: getattr(args, entry.name, None) for entry in fields(Recipe)}
    given = {name: value for name, value in given.items() if value is not None}
    for name, other in (("minutes", "steps"), ("steps", "minutes")):
        if name in given:
            values.pop(other, None)
    values |= given
    if values.get("tasks") in ("none", ["none"]):
        values["tasks"] = []
    recipe = Recipe.from_dict(values, str(args.config))
    if unknown := [name for name in recipe.tasks or () if name not in TASKS]:
        raise ValueError(f"--tasks must be among {list(TASKS)}, got {unknown[0]!r}")
    return recipe


def _read_yaml(path: Path) -> dict:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("--config needs the package PyYAML: pip install PyYAML") from error
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping, got {type(values).__name__}")
    return values


def _names(text: str) -> list[str]:
    return text.split(",")
