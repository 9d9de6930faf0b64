"""One training step on documents of different lengths, packed into one row without padding.

python examples/packed_training.py MODEL
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening

import flash_dmattn_hf  # noqa: F401 - registers "flash_dmattn"

DOCUMENTS = ["def add(a, b):\n    return a + b\n", "import os\n" * 20, "x = 1\n" * 7]


def main(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    options = {"attn_implementation": "flash_dmattn", "flash_dmattn": {"keep_window_size": 64}}
    model = AutoModelForCausalLM.from_pretrained(name, **options).train()

    # The collator lets position_ids restart at every document. Each one is then a sequence of its own: it has its own
    # sinks and its own competition, and sees nothing of the others.
    batch = DataCollatorWithFlattening()([{"input_ids": tokenizer(text)["input_ids"]} for text in DOCUMENTS])
    print(f"{len(DOCUMENTS)} documents in a row of {batch['input_ids'].shape[1]} tokens")

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    optimizer.step()
    print(f"loss {loss.item():.3f}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
