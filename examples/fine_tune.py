"""Fine-tunes a model with dynamic masks by an unmodified Trainer, the importance at a learning rate of its own.

python examples/fine_tune.py MODEL TEXT_FILE OUTPUT_FOLDER
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from flash_dmattn_hf import use_chunked_loss
from flash_dmattn_hf.training import parameter_groups


def main(name: str, text_file: str, output: str, steps: int = 4, length: int = 256) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    options = {"attn_implementation": "flash_dmattn", "flash_dmattn": {"keep_window_size": 128}}
    model = AutoModelForCausalLM.from_pretrained(name, **options)

    ids = tokenizer(Path(text_file).read_text(), return_tensors="pt")["input_ids"][0]
    rows = [{"input_ids": row, "labels": row} for row in ids.split(length) if len(row) == length]

    groups = parameter_groups(model, learning_rate=1e-5, importance_learning_rate=3e-5)
    optimizer = torch.optim.AdamW(groups)
    arguments = TrainingArguments(output, max_steps=int(steps), per_device_train_batch_size=2, report_to=[])
    with use_chunked_loss(model):  # the logits of all tokens never exist at once
        trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
        print(f"loss {trainer.train().training_loss:.3f}")
    model.save_pretrained(output)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
