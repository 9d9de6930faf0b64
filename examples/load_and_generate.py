"""Loads any causal model with dynamic masks and generates with a cache of constant size.

python examples/load_and_generate.py MODEL ["a prompt"]
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from flash_dmattn_hf import DynamicMaskCache


def main(name: str, prompt: str = "import os\n" * 100) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(
        name, attn_implementation="flash_dmattn", flash_dmattn={"keep_window_size": 256}, device_map="auto"
    )
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)

    cache = DynamicMaskCache(model)  # generate() makes one by itself; this one is looked at below
    ids = model.generate(**inputs, past_key_values=cache, max_new_tokens=20, do_sample=False)

    print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :]))
    print(f"{cache.get_seq_length()} tokens seen, {cache.max_keys} keys per head kept, {cache.nbytes:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
