"""A text and a tokenizer of its characters, whose token ids can be read back as they were."""

import json
import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..tiny import VOCAB_SIZE

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
TEXT = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in (json, json.decoder))


def characters() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of VOCAB_SIZE tokens: four special ones, the line break, the space, and what is printed."""
    vocabulary = [*SPECIAL, "\n", " ", *string.printable][: VOCAB_SIZE]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


CHARACTERS = characters()
TOKENS = torch.tensor(CHARACTERS(TEXT)["input_ids"])
"""The text, (N,) int64."""
