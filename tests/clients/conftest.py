"""Libraries that people use with transformers, each compared with sdpa on sequences of at most w tokens.

They need the extra "clients" and are no part of the default tests: scripts/checks/clients.sh runs them.
"""

import os

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flash_dmattn_hf import iter_gates

if os.environ.get("FLASH_DMATTN_CLIENTS") != "1":
    collect_ignore_glob = ["test_*.py"]

WORDS = 120
WINDOW = 64
CHOICES = {
    "sdpa": {"attn_implementation": "sdpa"},
    "flash_dmattn": {"attn_implementation": "flash_dmattn", "flash_dmattn": {"keep_window_size": WINDOW}},
}
"""Name -> what `from_pretrained` is given. Up to `WINDOW` tokens both are the same model."""


def text(start: int, count: int) -> str:
    """Returns `count` words in a row."""
    return " ".join(f"w{(start + i) % 110}" for i in range(count))


def load(path, name: str, **options):
    """Loads the model of a folder with one of `CHOICES`."""
    return AutoModelForCausalLM.from_pretrained(path, **{**CHOICES[name], **options})


def load_frozen(path, name: str):
    """As `load`, with gates that stay 0: training then changes the same numbers, whatever was chosen."""
    model = load(path, name)
    for _, _, gate in iter_gates(model):
        gate.requires_grad_(False)
    return model


@pytest.fixture(scope="session")
def tokenizer():
    words = {"<pad>": 0, **{f"w{i}": i + 1 for i in range(WORDS)}}
    model = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        eos_token="w119",
        bos_token="w118",
        chat_template="{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}",
    )


@pytest.fixture(scope="session")
def dense(tmp_path_factory, tokenizer):
    """A folder with a dense checkpoint and its tokenizer."""
    path = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,  # one block of bitsandbytes
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=119,
        eos_token_id=120,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
