"""PEFT: an adapter is trained, saved, loaded again and merged, with the logits of sdpa."""

import pytest
import torch

from .conftest import CHOICES, load

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("target", [["q_proj", "v_proj"], "all-linear"], ids=["some", "all linear"])
def test_lora(dense, tmp_path, target):
    ids = torch.randint(1, 120, (2, 40), generator=torch.manual_seed(0))
    results = {}
    for name in CHOICES:
        model = load(dense, name)
        torch.manual_seed(1)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=target, task_type="CAUSAL_LM"))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            trained = model.eval()(ids).logits
            again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / name).eval()
            assert again.config._attn_implementation == name
            torch.testing.assert_close(again(ids).logits, trained)
            merged = again.merge_and_unload()
            torch.testing.assert_close(merged(ids).logits, trained, atol=1e-4, rtol=1e-4)
        results[name] = trained
    torch.testing.assert_close(results["flash_dmattn"], results["sdpa"], atol=1e-4, rtol=1e-4)
