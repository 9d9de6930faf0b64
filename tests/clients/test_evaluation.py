"""lm-eval and sentence-transformers: likelihoods, generations and embeddings are those of sdpa."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from flash_dmattn_hf.cli import main

from .conftest import CHOICES, WINDOW, load, text
from .lm_eval_task import NAME, perplexity, perplexity_of, write_task

SETTINGS = f'{{"keep_window_size":{WINDOW};"num_sink_tokens":4}}'
ARGUMENTS = {
    "sdpa": "attn_implementation=sdpa",
    "flash_dmattn": f"attn_implementation=flash_dmattn,flash_dmattn={SETTINGS}",
}


def test_lm_eval_takes_settings_as_a_string(dense):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    results = {}
    for name, arguments in ARGUMENTS.items():
        model = get_model("hf").create_from_arg_string(
            f"pretrained={dense},dtype=float32,{arguments}", {"device": "cpu", "batch_size": 2}
        )
        assert model.model.config._attn_implementation == name
        pairs = [(text(i, 10 + i), " " + text(2 * i, 5)) for i in range(4)]
        asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        options = {"until": ["w5"], "max_gen_toks": 8, "do_sample": False}
        texts = [Instance("generate_until", {}, (text(i, 12), options), i) for i in range(3)]
        results[name] = [score for score, _ in model.loglikelihood(asked)], model.generate_until(texts)
    assert results["flash_dmattn"][0] == pytest.approx(results["sdpa"][0], abs=1e-3)
    assert results["flash_dmattn"][1] == results["sdpa"][1]


def test_lm_eval_through_the_launcher(dense, tokenizer, tmp_path):
    """Its command line takes braces only where all arguments are one JSON object."""
    pytest.importorskip("lm_eval")
    task, out = write_task(tmp_path), tmp_path / "out.json"
    arguments = {"pretrained": str(dense), "dtype": "float32", **CHOICES["flash_dmattn"]}
    command = [sys.executable, "-m", "flash_dmattn_hf.cli", "run", "lm_eval", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", json.dumps(arguments), "--tasks", NAME, "--include_path", str(task)]
    done = subprocess.run([*command, "--output_path", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = tmp_path.glob("out*.json")
    expected = perplexity(load(dense, "sdpa"), tokenizer)
    assert perplexity_of(json.loads(written.read_text())) == pytest.approx(expected, rel=1e-5)


def test_lm_eval_of_a_distilled_model(dense, tokenizer, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    (tmp_path / "corpus.txt").write_text(text(0, 4000))
    distilled = tmp_path / "distilled"
    command = ["distill", str(dense), str(distilled), "--data", str(tmp_path / "corpus.txt"), "--steps", "2"]
    command += ["--keep-window-size", "16", "--length", "128", "--batch-size", "1", "--tasks", "none"]
    assert main([*command, "--stretches", "1", "--device", "cpu", "--quiet"]) == 0

    def by_the_harness(**options):
        arguments = {"pretrained": str(distilled), "dtype": "float32", **options}
        tasks = TaskManager(include_path=str(write_task(tmp_path)), include_defaults=False)
        return perplexity_of(
            lm_eval.simple_evaluate("hf", arguments, tasks=[NAME], task_manager=tasks, device="cpu", bootstrap_iters=0)
        )

    by_itself = AutoModelForCausalLM.from_pretrained(distilled, dtype=torch.float32)
    assert by_itself.config.flash_dmattn["keep_window_size"] == 16
    beyond_the_window = perplexity(by_itself, tokenizer)
    assert by_the_harness() == pytest.approx(beyond_the_window, rel=1e-5)
    with pytest.warns(UserWarning, match="its attention is dense"):
        native = perplexity(load(distilled, "sdpa"), tokenizer)
    assert by_the_harness(flash_dmattn=CHOICES["flash_dmattn"]["flash_dmattn"]) == pytest.approx(native, rel=1e-5)
    assert native != pytest.approx(beyond_the_window, rel=1e-3)


@pytest.mark.parametrize("pooling", ["lasttoken", "mean"])
def test_sentence_transformers(dense, pooling):
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer, models

    results = {}
    for name in ARGUMENTS:
        options = {"attn_implementation": name}
        if name == "flash_dmattn":
            options["flash_dmattn"] = {"keep_window_size": WINDOW}
        encoder = SentenceTransformer(
            modules=[models.Transformer(str(dense), model_kwargs=options), models.Pooling(32, pooling_mode=pooling)],
            device="cpu",
        )
        results[name] = torch.from_numpy(encoder.encode([text(1, 3), text(2, 30), text(3, 12)]))
    torch.testing.assert_close(results["flash_dmattn"], results["sdpa"], atol=1e-4, rtol=1e-4)
