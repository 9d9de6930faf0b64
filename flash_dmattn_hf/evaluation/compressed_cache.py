"""Recall of a dense model whose cache is compressed once, after it has read a prompt: what other methods do."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import nn
from transformers import DynamicCache

from flash_dmattn_hf.evaluation.prompts import Prompt
from flash_dmattn_hf.evaluation.recall import recall
from flash_dmattn_hf.evaluation.scoring import Score, answer_positions, score_guesses

Compression = Callable[[nn.Module, int, int], AbstractContextManager]
"""(model, number of keys, number of them to keep) -> a block in which a forward leaves a compressed cache."""


def measure_compressed(
    label: str,
    model: nn.Module,
    prompts: Sequence[Prompt],
    *,
    compression: Compression,
    keep_window_size: int,
    sees_question: bool = False,
    progress: bool = False,
) -> dict:
    """Returns a row as those of `recall_suite`, of the kind "peer": recall, and None for what was not measured.

    Arguments and errors as of `score_compressed`. model: a dense one.
    """
    options = {"compression": compression, "keep_window_size": keep_window_size, "sees_question": sees_question}
    score = partial(score_compressed, **options)
    cells = recall(model, prompts, score=score, progress=f"{label}, recall" if progress else None)
    missing = ("cache_bytes", "num_rows", "loss", "perplexity", "kld", "top1", "share_of_gap")
    row = {"mask": label, "kind": "peer", "keep_window_size": keep_window_size, **dict.fromkeys(missing)}
    return {**row, "recall": [cell._asdict() for cell in cells]}


def score_compressed(
    model: nn.Module, prompt: Prompt, *, compression: Compression, keep_window_size: int, sees_question: bool = False
) -> Score:
    """Reads a prompt densely, compresses the cache, and scores the rest teacher-forced over what was kept.

    At the last token the cache has `keep_window_size` keys per head, question and answers included, as that of a model
    with a window of that size. While the prompt is read every query sees all keys, which such a model does not.

    compression: makes the block around the first forward; its hooks may need `cache_position`, which they are given.
    sees_question: the question is read before the compression and may choose what is kept; otherwise the text alone is.
    Raises ValueError when question and answers leave no slot, or when the cache was not compressed as asked.
    """
    split = prompt.answer_start - 1 if sees_question else prompt.question_start
    num_kept = keep_window_size - (prompt.context - split)
    if num_kept < 1:
        raise ValueError(
            f"keep_window_size must be above the {prompt.context - split} tokens of question and answers, "
            f"got {keep_window_size}"
        )
    ids = prompt.input_ids[None].to(model.get_input_embeddings().weight.device)
    places = torch.arange(prompt.context, device=ids.device)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        with compression(model, split, num_kept):
            first = places[:split]
            model.base_model(input_ids=ids[:, :split], past_key_values=cache, use_cache=True, cache_position=first)
        sizes = {layer.keys.shape[-2] for layer in cache.layers}
        if sizes != {min(num_kept, split)}:
            raise ValueError(f"compression must leave {num_kept} keys in every layer, got {sorted(sizes)}")
        rest = places[split:]
        logits = model(input_ids=ids[:, split:], past_key_values=cache, position_ids=rest[None], use_cache=True).logits[
            0
        ]
    positions = answer_positions(prompt)
    return score_guesses(prompt, positions, logits[positions - 1 - split].argmax(-1).cpu())
