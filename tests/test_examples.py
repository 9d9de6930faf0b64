"""Every example runs as written, on a tiny model, without a network."""

import runpy
import sys
import threading
from pathlib import Path
from urllib.request import urlopen

import pytest
from hf.cli_models import tokenizer
from hf.tiny import tiny_model
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
ARGUMENTS = {
    "load_and_generate": ("model",),
    "convert": ("model", "text.txt", "converted"),
    "fine_tune": ("model", "text.txt", "trained"),
    "packed_training": ("model",),
    "functional_api": (),
}
SAID = {
    "load_and_generate": "256 keys per head kept",
    "convert": "'keep_window_size': 256",
    "fine_tune": "loss ",
    "packed_training": "3 documents in a row",
    "functional_api": "row 700 of head 0 sees: 128",
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    (folder / "text.txt").write_text("".join(f"def add_{i}(a, b):\n    return a + {i * i} * b\n\n" for i in range(200)))
    model = tiny_model("llama", initializer_range=0.3, eos_token_id=None, max_position_embeddings=4096)
    model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    return folder


def test_every_example_is_tested_and_short():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {*ARGUMENTS, "streaming_server"}
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 45, path.name


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_example_runs(name, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    path = EXAMPLES / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path), *ARGUMENTS[name]])
    runpy.run_path(str(path), run_name="__main__")
    assert SAID[name] in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted({*ARGUMENTS, "streaming_server"} - {"functional_api"}))
def test_an_example_without_its_arguments_says_how_to_run_it(name, monkeypatch):
    path = EXAMPLES / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path)])
    with pytest.raises(SystemExit, match=rf"python examples/{name}\.py MODEL"):
        runpy.run_path(str(path), run_name="__main__")


def test_the_server_streams_what_generate_gives(workplace):
    server = runpy.run_path(str(EXAMPLES / "streaming_server.py"))["make_server"](
        str(workplace / "model"), port=0, max_new_tokens=5
    )
    assert server.server_address[0] == "127.0.0.1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        texts = []
        for _ in range(2):
            with urlopen(f"http://127.0.0.1:{server.server_port}", b"import os", timeout=60) as answer:
                texts.append(answer.read().decode())
    finally:
        server.shutdown()
        server.server_close()
    model = AutoModelForCausalLM.from_pretrained(workplace / "model", attn_implementation="flash_dmattn")
    inputs = tokenizer()("import os", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert texts == 2 * [tokenizer().decode(ids[0, inputs["input_ids"].shape[1] :])]
