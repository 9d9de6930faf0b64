"""lm-eval and sentence-transformers: likelihoods, generations and embeddings are those of sdpa."""

import json
import subprocess
import sys

import pytest
import torch

from .conftest import WINDOW, text

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


def test_lm_eval_through_the_launcher(dense, tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"t": text(i, 40)}) + "\n" for i in range(3)))
    (tmp_path / "task.yaml").write_text(
        f"task: words\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{t}}'\n"
        "metric_list: [{metric: word_perplexity}]\n"
    )
    perplexities = []
    for arguments in ARGUMENTS.values():
        command = [sys.executable, "-m", "flash_dmattn_hf.cli", "run", "lm_eval", "--model", "hf", "--device", "cpu"]
        command += ["--model_args", f"pretrained={dense},dtype=float32,max_length=48,{arguments}"]
        command += ["--tasks", "words", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out.json")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        (result,) = tmp_path.glob("out*.json")
        perplexities.append(json.loads(result.read_text())["results"]["words"]["word_perplexity,none"])
        result.unlink()
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-3)


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
