"""scripts/train.py: reads its YAML strictly, trains on text files, resumes, and overwrites nothing."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from flash_dmattn_hf import iter_gates

from .trainer_setup import VOCABULARY, make_model

ROOT = Path(__file__).resolve().parent.parent.parent.parent
OTHERS = {"distill", "accelerate"}  # of `flash-dmattn distill` and of `accelerate launch`
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.stem.split("_")[0] not in OTHERS)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_script", ROOT / "scripts" / "train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def workplace(tmp_path):
    """A folder with a tiny model, its tokenizer of letters, and two documents."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{chr(ord("a") + i): i + 3 for i in range(26)}, "<unk>": 29}
    assert len(vocabulary) <= VOCABULARY
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(tmp_path / "model")
    make_model().save_pretrained(tmp_path / "model")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "one.txt").write_text("thequickbrownfoxjumpsoverthelazydog" * 6)
    (tmp_path / "text" / "two.txt").write_text("packmyboxwithfivedozenliquorjugs" * 4)
    return tmp_path


def arguments(folder: Path, config: str, *more: str) -> list[str]:
    return [
        str(ROOT / "configs" / config),
        f"model={folder / 'model'}",
        f"output_dir={folder / 'out'}",
        f"train_files=['{folder}/text/*.txt']",
        f"eval_files=['{folder}/text/two.txt']",
        "sequence_length=32",
        "training.max_steps=4",
        "training.gradient_accumulation_steps=1",
        "training.per_device_train_batch_size=4",
        "training.save_steps=2",
        "training.use_cpu=true",
        "training.logging_steps=1",
        "training.disable_tqdm=true",
        *more,
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_shipped_configuration_is_valid(script, path):
    config = script.read_config(str(path), ["model=m", "output_dir=o", "train_files=[t]"])
    assert config.importance_learning_rate > 0
    script.TrainingArguments(output_dir="unused", **{**config.training, "use_cpu": True})


@pytest.mark.parametrize("batches", ["packed", "padded"])
@pytest.mark.parametrize("config", ["full.yaml", "importance_only.yaml"])
def test_it_trains_and_saves(script, workplace, config, batches):
    before = AutoModelForCausalLM.from_pretrained(workplace / "model").state_dict()
    metrics = script.main(arguments(workplace, config, f"batches={batches}", "importance_learning_rate=0.1"))
    model, info = AutoModelForCausalLM.from_pretrained(workplace / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    gates = {name for name in before if ".dma." in name}
    assert gates <= changed
    assert (changed == gates) == (config == "importance_only.yaml")
    assert model.config.use_cache
    assert json.loads((workplace / "out" / "metrics.json").read_text()) == metrics
    assert {"eval_loss_before", "eval_loss_after"} <= set(metrics)
    history = json.loads((workplace / "out" / "trainer_state.json").read_text())["log_history"]
    assert all("dma/visible_keys" in entry for entry in history if "loss" in entry)


@pytest.mark.parametrize("config", ["full.yaml", "importance_only.yaml"])
def test_the_chunked_loss_changes_no_result(script, workplace, config):
    plain = script.main(arguments(workplace, config, f"output_dir={workplace / 'plain'}", "training.optim=sgd"))
    chunked = script.main(arguments(workplace, config, "chunked_loss=true", "training.optim=sgd"))
    for name in ("eval_loss_before", "eval_loss_after", "train_loss"):
        assert chunked[name] == pytest.approx(plain[name], rel=1e-5)
    got, expected = (
        AutoModelForCausalLM.from_pretrained(workplace / folder).state_dict() for folder in ("out", "plain")
    )
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)


def test_it_goes_on_from_the_last_checkpoint(script, workplace):
    command = arguments(workplace, "full.yaml")
    script.main(command)
    whole = AutoModelForCausalLM.from_pretrained(workplace / "out").state_dict()
    (workplace / "out" / "checkpoint-4").rename(workplace / "elsewhere")
    script.main([*command, "--resume"])
    resumed = AutoModelForCausalLM.from_pretrained(workplace / "out").state_dict()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_it_overwrites_nothing(script, workplace):
    (workplace / "out").mkdir()
    (workplace / "out" / "precious").write_text("keep")
    with pytest.raises(ValueError, match="output_dir must be empty or new"):
        script.main(arguments(workplace, "full.yaml"))
    assert [path.name for path in (workplace / "out").iterdir()] == ["precious"]


def test_the_attention_can_be_chosen_at_the_start(script, workplace):
    overrides = [*arguments(workplace, "full.yaml")[1:], "attention.keep_window_size=6"]
    config = script.read_config(str(CONFIGS[0]), overrides)
    assert all(gate.config.keep_window_size == 6 for _, _, gate in iter_gates(script.load_model(config)))


BAD = {
    "an unknown key": ("learning_rat=1", r"full.yaml must only have fields of TrainConfig, got \['learning_rat'\]"),
    "an unknown training key": ("training.epochs=1", r"only have fields of TrainingArguments, got \['epochs'\]"),
    "an unknown attention key": ("attention.window=1", r"got \['window'\]"),
    "a file that is not there": ("train_files=['no/such/*.txt']", "which matches none"),
    "files that are no list": ("train_files=a.txt", "train_files must be a list"),
    "batches": ("batches=ragged", "batches must be packed, padded or rows, got 'ragged'"),
    "a length": ("sequence_length=1", "sequence_length must be an integer of at least 2, got 1"),
    "a rate": ("importance_learning_rate=fast", "importance_learning_rate must be a number of at least 0"),
    "a dtype": ("dtype=int8", "dtype must be float32, bfloat16 or float16, got 'int8'"),
    "a switch": ("importance_only=1", "importance_only must be true or false, got 1"),
    "another switch": ("chunked_loss=yes please", "chunked_loss must be true or false, got 'yes please'"),
    "no model": ("model=", "model must be a path or name, got None"),
    "no assignment": ("resume", "must look like key=value, got 'resume'"),
    "training as a list": ("training=[1]", "training must be a mapping"),
}


@pytest.mark.parametrize(("override", "message"), BAD.values(), ids=BAD.keys())
def test_it_refuses(script, workplace, override, message):
    with pytest.raises(ValueError, match=message):
        script.main([*arguments(workplace, "full.yaml"), override])
    assert not (workplace / "out").exists()


def test_label_smoothing_is_refused_with_the_chunked_loss(script, workplace):
    with pytest.raises(ValueError, match="label_smoothing_factor must be 0 with chunked_loss"):
        script.main(arguments(workplace, "full.yaml", "chunked_loss=true", "training.label_smoothing_factor=0.1"))


def test_values_may_be_written_as_everyone_does(script):
    overrides = ["model=m", "output_dir=o", "train_files=[t]"]
    config = script.read_config(
        str(CONFIGS[0]), [*overrides, "importance_learning_rate=1e-2", "training.save_strategy=no"]
    )
    assert (config.importance_learning_rate, config.training["save_strategy"]) == (0.01, "no")


def test_documents_end_with_the_end_of_text_and_are_cut(script, workplace):
    tokenizer = AutoTokenizer.from_pretrained(workplace / "model")
    pieces = script.read_pieces(tokenizer, [f"{workplace}/text/one.txt"], 100)
    assert [len(piece["input_ids"]) for piece in pieces] == [100, 100, 11]
    assert pieces[-1]["input_ids"][-1] == tokenizer.eos_token_id
    assert all(piece["labels"] == piece["input_ids"] for piece in pieces)
