"""Converts a dense model: adds the importance, calibrates it on a text, and saves an ordinary checkpoint.

python examples/convert.py MODEL TEXT_FILE OUTPUT_FOLDER
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from flash_dmattn_hf import DynamicMaskConfig, convert_model


def main(name: str, text_file: str, output: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name)
    text = tokenizer(Path(text_file).read_text(), return_tensors="pt")["input_ids"][:, :4096]

    config = DynamicMaskConfig(keep_window_size=256)  # 4 sinks and a local window of 192 by default
    model = convert_model(model, config, calibration=text)
    print(model.flash_dmattn_report)

    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    again = AutoModelForCausalLM.from_pretrained(output)  # importing flash_dmattn_hf is all that it takes
    print(again.config.flash_dmattn)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
