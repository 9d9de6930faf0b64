"""torchao and bitsandbytes on a CPU: a quantized model has the logits that it has with sdpa."""

import pytest
import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

from flash_dmattn_hf import iter_gates

from .conftest import CHOICES, load


def torchao():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def bitsandbytes(**options):
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(**options)


QUANTIZATIONS = {
    "torchao int8": torchao,
    "bitsandbytes 8 bit": lambda: bitsandbytes(load_in_8bit=True),
    "bitsandbytes 4 bit": lambda: bitsandbytes(load_in_4bit=True),
}


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_quantized_model(dense, kind):
    ids = torch.randint(1, 120, (2, 40), generator=torch.manual_seed(0))
    results = {}
    for name in CHOICES:
        options = {"quantization_config": QUANTIZATIONS[kind](), "dtype": torch.float32, "device_map": "cpu"}
        model = load(dense, name, **options).eval()
        assert all(gate.A.is_floating_point() for _, _, gate in iter_gates(model))
        with torch.no_grad():
            logits = model(ids).logits
        tokens = model.generate(ids, max_new_tokens=8, do_sample=False)
        results[name] = logits, tokens
    torch.testing.assert_close(results["flash_dmattn"][0], results["sdpa"][0], atol=1e-3, rtol=1e-3)
    assert torch.equal(results["flash_dmattn"][1], results["sdpa"][1])
