"""A task of lm-evaluation-harness on text of our own, and the figure that it should come to."""

import json
import math
from pathlib import Path

import torch

from .conftest import text

TEXTS = [text(start, 40) for start in (0, 31, 62)]
NAME = "words"


def write_task(folder: Path) -> Path:
    """Writes the task, the perplexity per word of `TEXTS`, for the harness's include_path; returns the folder."""
    (folder / "data.jsonl").write_text("".join(json.dumps({"t": words}) + "\n" for words in TEXTS))
    (folder / "task.yaml").write_text(
        f"task: {NAME}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}}}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{t}}'\n"
        "metric_list: [{metric: word_perplexity}]\n"
    )
    return folder


def perplexity_of(results: dict) -> float:
    """Returns the figure out of what the harness returns or writes."""
    return results["results"][NAME]["word_perplexity,none"]


def perplexity(model, tokenizer) -> float:
    """Computes the figure by one forward for each text: every token is predicted, the first one from the BOS token."""
    total = 0.0
    for words in TEXTS:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(words)]])
        with torch.no_grad():
            logits = model.eval()(ids).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits.double(), ids[0, 1:], reduction="sum").item()
    return math.exp(total / sum(len(words.split()) for words in TEXTS))
