"""The commands do what they print, and bad input ends with one sentence, exit code 2 and nothing written."""

import json
import os
import re
import signal
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from flash_dmattn.backends.cuda import library
from flash_dmattn_hf import iter_gates
from flash_dmattn_hf.cli import info, main
from flash_dmattn_hf.cli.info import cuda_library

from ..cli_models import save_dense, save_gguf, tokenizer
from ..tiny import tiny_model, tokens

WINDOW = ["--keep-window-size", "32", "--local-window-size", "16"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(open(json.__file__, encoding="utf-8").read())
    return path


@pytest.fixture(scope="module")
def converted(dense, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "converted"
    assert main(["convert", str(dense), str(out), *WINDOW, "--calibrate", str(text)]) == 0
    return out


def refused(capsys, *argv):
    """The one sentence on stderr with which the command ends."""
    capsys.readouterr()
    try:
        code = main([str(argument) for argument in argv])
    except SystemExit as exit:  # argparse
        code = exit.code
    assert code == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and captured.out == ""
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith(f"flash-dmattn {argv[0]}: error: ")
    return last


def test_convert_writes_an_ordinary_checkpoint(dense, text, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert main(["convert", str(dense), str(out), *WINDOW, "--calibrate", str(text)]) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 attention layers converted" in printed and "mean R2" in printed and f"wrote {out}" in printed
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(out)("abc")["input_ids"] == [15, 16, 17]
    ids = tokens(1, 32)
    expected = AutoModelForCausalLM.from_pretrained(dense)(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0.02)


def test_every_option_of_the_mask_arrives(dense, tmp_path):
    sizes = "--keep-window-size 24 --num-sink-tokens 2 --local-window-size 5".split()
    forms = "--importance-form zoh --importance-heads query --importance-input hidden --dtype bfloat16".split()
    assert main(["convert", str(dense), str(tmp_path / "out"), *sizes, *forms]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    section = model.config.flash_dmattn
    assert [section[key] for key in ("keep_window_size", "num_sink_tokens", "local_window_size")] == [24, 2, 5]
    assert (section["importance"], section["importance_heads"]) == ("zoh", "query")
    assert section["importance_input"] == "hidden"
    assert model.dtype == torch.bfloat16 and next(iter_gates(model))[2].A.shape == (4,)


def test_gguf_file_and_directory(tmp_path):
    model = tiny_model("llama", initializer_range=0.3)
    file = save_gguf(tmp_path / "model.gguf", model)
    ids = tokens(1, 32)
    for number, source in enumerate((file, tmp_path)):
        out = tmp_path / f"out{number}" / "model"
        assert main(["convert", str(source), str(out), *WINDOW]) == 0
        loaded = AutoModelForCausalLM.from_pretrained(out)
        assert not hasattr(loaded.config, "quantization_config")
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-4)
        assert AutoTokenizer.from_pretrained(out)("he")["input_ids"] == [3]


def test_several_gguf_files_are_listed(tmp_path, capsys):
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert "got 2: a.gguf, b.gguf" in refused(capsys, "convert", tmp_path, tmp_path / "out")


class Exploit:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_need_permission_and_run_no_code(name, dense, tmp_path, capsys):
    source, out, trace = tmp_path / "source", tmp_path / "out", tmp_path / "trace"
    model = AutoModelForCausalLM.from_pretrained(dense)
    source.mkdir()
    model.config.save_pretrained(source)
    torch.save(model.state_dict(), source / name)
    assert name in refused(capsys, "convert", source, out, *WINDOW)
    assert main(["convert", str(source), str(out), *WINDOW, "--allow-pickle"]) == 0
    ids = tokens(1, 32)
    converted = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(converted(ids).logits, model(ids).logits, rtol=0, atol=1e-4)

    torch.save({"x": Exploit(trace)}, source / name)
    assert str(source) in refused(capsys, "convert", source, tmp_path / "out2", *WINDOW, "--allow-pickle")
    assert not trace.exists() and not (tmp_path / "out2").exists()


def test_code_of_a_checkpoint_is_never_run(dense, tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    trace = tmp_path / "trace"
    config = json.loads((dense / "config.json").read_text())
    config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (source / "config.json").write_text(json.dumps(config))
    (source / "code.py").write_text(f"import os\nos.mkdir({str(trace)!r})\n")
    (source / "model.safetensors").write_bytes((dense / "model.safetensors").read_bytes())
    assert str(source) in refused(capsys, "convert", source, tmp_path / "out")
    assert not trace.exists()


def damage(source, how):
    file = source / "model.safetensors"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "truncated-header":
        file.write_bytes(file.read_bytes()[:20])
    elif how == "config-not-json":
        (source / "config.json").write_text("{")
    elif how == "config-missing":
        (source / "config.json").unlink()
    elif how == "weights-missing":
        file.unlink()
    elif how == "shard-missing":
        file.unlink()
        index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "other-sizes":
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    elif how == "more-layers":
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    return {
        "truncated": "model.safetensors",
        "truncated-header": "model.safetensors",
        "config-not-json": "config.json",
        "config-missing": "config.json",
        "weights-missing": "weights",
        "shard-missing": "model-00001-of-00001.safetensors",
        "other-sizes": "mlp",
        "more-layers": "model.layers.2",
    }[how]


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "truncated-header",
        "config-not-json",
        "config-missing",
        "weights-missing",
        "shard-missing",
        "other-sizes",
        "more-layers",
    ],
)
def test_damaged_checkpoints_are_named(how, tmp_path, capsys):
    source = save_dense(tmp_path / "source")
    named = damage(source, how)
    sentence = refused(capsys, "convert", source, tmp_path / "out", *WINDOW)
    assert named in sentence and str(source) in sentence
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("size", [0, 3, 40, 3000, 60000])
def test_truncated_gguf_is_named(size, tmp_path, capsys):
    file = save_gguf(tmp_path / "model.gguf", tiny_model("llama"))
    assert file.stat().st_size > size
    file.write_bytes(file.read_bytes()[:size])
    assert str(file) in refused(capsys, "convert", file, tmp_path / "out", *WINDOW)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--keep-window-size", "0"], "--keep-window-size: must be at least 1, got 0"),
        (["--num-sink-tokens", "-1"], "--num-sink-tokens: must be at least 0, got -1"),
        (["--keep-window-size", "8", "--num-sink-tokens", "5", "--local-window-size", "4"], "5 + 4 > 8"),
        (["--importance-form", "other"], "invalid choice: 'other'"),
        (["--importance", "nowhere"], "--importance: must be a directory, got nowhere"),
        (["--importance", "zoh"], "must be a directory, got zoh, a form is chosen with --importance-form"),
        (["--importance", "."], "must contain importance.safetensors and importance.json"),
        (["--importance", ".", "--keep-window-size", "24"], "--importance brings its dynamic mask with it"),
        (["--calibrate", "nowhere.txt"], "must be a file, got nowhere.txt"),
        (["--calibration-tokens", "9"], "--calibration-tokens needs --calibrate"),
        (["--device", "toaster"], "--device must be a device of this machine, got toaster"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_options(options, message, dense, tmp_path, capsys):
    assert message in refused(capsys, "convert", dense, tmp_path / "out", *options)
    assert not any(tmp_path.iterdir())


def test_bad_text(dense, tmp_path, capsys):
    short, binary = tmp_path / "short.txt", tmp_path / "binary.txt"
    short.write_text("too short")
    binary.write_bytes(b"\xff\xfe\xfd" * 100)
    out = tmp_path / "out"
    assert "got 9" in refused(capsys, "convert", dense, out, *WINDOW, "--calibrate", short)
    assert f"{binary} must be UTF-8" in refused(capsys, "convert", dense, out, *WINDOW, "--calibrate", binary)
    assert not out.exists()


def test_missing_model_and_converted_model(converted, tmp_path, capsys):
    assert "MODEL must exist" in refused(capsys, "convert", tmp_path / "nothing", tmp_path / "out")
    assert "already has dynamic masks" in refused(capsys, "convert", converted, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_hub_name_that_is_not_cached_is_refused_by_name_when_offline(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error = refused(capsys, "convert", "nobody/nothing", tmp_path / "out")
    assert "MODEL must be a local path or in the cache of the Hub" in error and error.endswith("got nobody/nothing")


def test_only_checkpoints_are_overwritten_and_only_when_asked(dense, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("data")
    assert "pass --overwrite" in refused(capsys, "convert", dense, out, *WINDOW)
    assert "has no config.json" in refused(capsys, "convert", dense, out, *WINDOW, "--overwrite")
    (out / "config.json").write_text("{}")
    assert main(["convert", str(dense), str(out), *WINDOW, "--overwrite"]) == 0
    assert not (out / "precious").exists() and (out / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    before = (dense / "config.json").read_text()
    assert "OUT must differ from MODEL" in refused(capsys, "convert", dense, dense, "--overwrite")
    assert (dense / "config.json").read_text() == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")], ids=["interrupted", "disk-full"])
def test_a_failing_write_leaves_the_old_checkpoint(error, dense, converted, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert main(["convert", str(dense), str(out), *WINDOW]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    save = PreTrainedModel.save_pretrained

    def fail(self, *args, **kwargs):
        save(self, *args, **kwargs)
        raise error

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    arguments = ["convert", str(dense), str(out), "--keep-window-size", "64", "--overwrite"]
    assert main(arguments) == (130 if error is KeyboardInterrupt else 2)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    assert main([*arguments[:2], str(tmp_path / "new")]) != 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


TERMINATED = """
import sys, time
from transformers import PreTrainedModel
from flash_dmattn_hf.cli import main
save = PreTrainedModel.save_pretrained
def slow(self, *args, **kwargs):
    save(self, *args, **kwargs)
    print("saving", flush=True)
    time.sleep(60)
PreTrainedModel.save_pretrained = slow
sys.exit(main(sys.argv[1:]))
"""


def test_a_terminated_run_leaves_nothing(dense, tmp_path):
    command = [sys.executable, "-c", TERMINATED, "convert", str(dense), str(tmp_path / "out"), *WINDOW]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line == "saving\n":
                break
        siblings = [path.name for path in tmp_path.iterdir()]
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    assert len(siblings) == 1 and siblings[0].startswith(".out.partial-")
    assert process.returncode == 128 + signal.SIGTERM
    assert not any(tmp_path.iterdir())


def test_eval_scores_the_same_tokens_in_every_row(converted, text, tmp_path, capsys):
    file = tmp_path / "numbers.json"
    arguments = ["--windows", "16,128", "--contexts", "64,128", "--stretches", "3", "--json", str(file)]
    assert main(["eval", str(converted), "--text", str(text), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "perplexity of the same 96 tokens" in printed
    numbers = json.loads(file.read_text())
    rows = {row["mask"]: row["perplexity"] for row in numbers["rows"]}
    assert len(rows) == 5 and numbers["num_tokens"] == 96
    for context in ("64", "128"):
        assert rows["sinks + window, w = 128"][context] == pytest.approx(rows["dense"][context], rel=1e-5)
        assert rows["importance, w = 128"][context] == pytest.approx(rows["dense"][context], rel=1e-2)
        assert rows["sinks + window, w = 16"][context] != pytest.approx(rows["dense"][context], rel=1e-5)
    assert f"{rows['dense']['64']:.3f}" in printed


def test_eval_takes_a_dense_model(dense, text, capsys):
    arguments = ["--windows", "16", "--contexts", "64", "--stretches", "1"]
    assert main(["eval", str(dense), "--text", str(text), *arguments]) == 0
    rows = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[2:4]]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--windows", "0"], "must be at least 1, got 0"),
        (["--windows", "a,b"], "integers separated by commas"),
        (["--contexts", "1"], "--contexts must be at least 2, got 1"),
        (["--contexts", "100000000"], "must hold at least 100000000 tokens"),
        (["--json", "/nowhere/at/all.json"], "--json must be in an existing directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_eval_names_what_is_wrong(options, message, converted, text, capsys):
    assert message in refused(capsys, "eval", converted, "--text", text, *options)


def test_generate_streams_and_reports_a_constant_cache(converted, capsys):
    lines = {}
    for count in (40, 80):
        assert main(["generate", str(converted), "--prompt", "hello", "--max-new-tokens", str(count)]) == 0
        captured = capsys.readouterr()
        assert f"{count} new tokens" in captured.err and "tokens/s" in captured.err
        lines[count] = captured.err.splitlines()[-1]
    size = [line.split()[1] for line in lines.values()]
    assert size[0] == size[1]
    assert re.search("at most 3[12] keys per head for 84 tokens", lines[80])


def test_generate_gives_the_text_of_the_model(converted, capsys):
    tokenizer, model = AutoTokenizer.from_pretrained(converted), AutoModelForCausalLM.from_pretrained(converted)
    ids = tokenizer("hello", return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=60, do_sample=False)[0, ids.shape[1] :]
    assert main(["generate", str(converted), "--prompt", "hello", "--max-new-tokens", "60"]) == 0
    assert capsys.readouterr().out.strip() == tokenizer.decode(expected, skip_special_tokens=True).strip()


def test_sampling_follows_the_seed(converted, capsys):
    texts = []
    for seed in (1, 1, 2):
        options = ["--temperature", "1.5", "--seed", str(seed), "--max-new-tokens", "30"]
        assert main(["generate", str(converted), "--prompt", "hello", *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--prompt", ""], "at least one token"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature must be a finite number of at least 0, got -1.0"),
        (["--prompt", "a", "--top-p", "0"], "--top-p must be above 0"),
        (["--prompt", "a", "--max-new-tokens", "0"], "must be at least 1"),
        (["--prompt", "a", "--chat"], "chat template"),
        (["--prompt-file", "nowhere"], "must be a file, got nowhere"),
        ([], "one of the arguments --prompt --prompt-file is required"),
    ],
)
def test_generate_names_what_is_wrong(options, message, converted, capsys):
    assert message in refused(capsys, "generate", converted, *options)


def test_tables_of_position_embeddings_are_not_exceeded(text, tmp_path, capsys):
    tiny_model("gpt2").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    sentence = refused(capsys, "generate", tmp_path, "--prompt", "abc", "--max-new-tokens", "254")
    assert "longer than 256, the model's limit, got 257" in sentence
    assert "got 512" in refused(capsys, "eval", tmp_path, "--text", text, "--contexts", "64,512")


def test_info_says_what_was_built_and_what_builds_the_rest(capsys, monkeypatch):
    monkeypatch.setattr(library, "why_unavailable", lambda: None)
    monkeypatch.setattr(library, "architectures", lambda: ("90",))
    monkeypatch.setattr(info, "_has_compiler", lambda: True)
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "CUDA library   built for sm_90 (H100, H200)\n" in printed
    assert "not for sm_80 (A100, RTX 30, RTX 40), sm_100 (B200), sm_120 (RTX 50)\n" in printed
    assert "this builds the rest:" in printed
    assert "FLASH_DMATTN_CUDA_ARCHS=all python -m pip install --force-reinstall --no-deps " in printed
    monkeypatch.setattr(library, "architectures", lambda: tuple(library.GPUS))
    assert main(["info"]) == 0
    assert "this builds the rest" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("record", "place"),
    [
        ({"url": "file:///a%20b/c", "dir_info": {"editable": True}}, "--editable '/a b/c'"),
        ({"url": "file:///a/c", "dir_info": {}}, "/a/c"),
        (
            {"url": "https://host/a.git", "vcs_info": {"vcs": "git", "commit_id": "0a1b"}},
            "git+https://host/a.git@0a1b",
        ),
        (None, "--no-binary flash-dmattn-hf flash-dmattn-hf"),
    ],
)
def test_the_command_installs_from_where_the_package_came(monkeypatch, record, place):
    installed = SimpleNamespace(read_text=lambda name: record and json.dumps(record))
    monkeypatch.setattr(metadata, "distribution", lambda name: installed)
    monkeypatch.setattr(library, "why_unavailable", lambda: None)
    monkeypatch.setattr(library, "architectures", lambda: ("90",))
    monkeypatch.setattr(info, "_has_compiler", lambda: True)
    assert cuda_library()["command"].endswith(f"--no-deps {place}")


def test_no_command_is_given_where_it_cannot_work(monkeypatch, tmp_path, capsys):
    def find(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(library, "why_unavailable", lambda: None)
    monkeypatch.setattr(library, "architectures", lambda: ("90",))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert cuda_library()["command"] is None and "90" not in cuda_library()["missing"]
    assert main(["info"]) == 0 and "this builds" not in capsys.readouterr().out
    monkeypatch.setattr(info, "_has_compiler", lambda: True)
    assert cuda_library()["command"]
    monkeypatch.setattr(metadata, "distribution", find)
    assert cuda_library()["command"] is None


def test_a_library_that_is_turned_off_is_not_called_unbuilt(monkeypatch, capsys):
    monkeypatch.setenv(library.DISABLING_VARIABLE, "1")
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"CUDA library   unavailable: {library.DISABLING_VARIABLE}=1 turns it off\n" in printed
    assert "not built" not in printed and "this builds" not in printed


def test_info_names_every_engine_and_why_it_is_not_there(capsys):
    import flash_dmattn

    assert main(["info"]) == 0
    lines = capsys.readouterr().out
    assert f"torch          {torch.__version__}" in lines
    for name, reason in flash_dmattn.explain_backends().items():
        assert f"{name:14} {'available' if reason is None else 'unavailable: ' + reason}" in lines
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["engines"] == flash_dmattn.explain_backends()


def test_debug_shows_the_error_itself(tmp_path):
    with pytest.raises(ValueError, match="MODEL must exist"):
        main(["convert", str(tmp_path / "nothing"), str(tmp_path / "out"), "--debug"])


@pytest.mark.parametrize("command", [[], ["convert"], ["info"], ["eval"], ["generate"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*command, "--help"])
    assert exit.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 5
