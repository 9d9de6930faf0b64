"""Do equal tokens tie with and without a cache? Counted in the first layer of a random model, where they can.

    python scripts/checks/equal_tokens.py --json docs/benchmarks/equal_tokens_cpu.json

Every prompt repeats twenty tokens. It runs once without a cache, and once with one: a third of it at once, then token
by token. For each dtype, and each arithmetic of the importance (`float64`, as in eval mode, or that of training):

    values            share of the tokens whose values are bitwise equal in both runs
    importances       share of the importances that are
    prompts           how many see other keys with the cache than without
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from flash_dmattn import select_visible
from flash_dmattn_hf import DynamicMaskCache, dynamic_mask_config, iter_gates

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the files that all scripts share

from benchmark_report import environment, header, save_json  # noqa: E402

SIZES = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2}
WINDOWS = {"keep_window_size": 16, "num_sink_tokens": 1, "local_window_size": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=25)
    parser.add_argument("--length", type=int, default=120)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32", "float64"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()
    where = environment(arguments.device)
    print(header(where))
    rows = []
    for dtype in arguments.dtypes:
        model = make_model(getattr(torch, dtype), arguments.device)
        for arithmetic in ("float64", "training"):
            row = {"dtype": dtype, "arithmetic": arithmetic}
            rows.append(row | count(model, arguments.prompts, arguments.length, arithmetic == "training"))
            print(rows[-1], flush=True)
    if arguments.json:
        settings = {name: value for name, value in vars(arguments).items() if name != "json"}
        save_json(arguments.json, {"environment": where, "settings": settings, "rows": rows})


def make_model(dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Returns a random Llama of one layer, with random importances."""
    torch.manual_seed(0)
    with dynamic_mask_config(**WINDOWS):
        config = LlamaConfig(**SIZES, **HEADS, initializer_range=0.1)
        model = LlamaForCausalLM._from_config(config, attn_implementation="flash_dmattn", dtype=dtype)
    for _, _, gate in iter_gates(model):
        torch.nn.init.uniform_(gate.A, 0.5, 1.5)
        torch.nn.init.normal_(gate.dt_proj.weight, std=0.5)
    return model.to(device).eval()


@torch.no_grad()
def count(model: PreTrainedModel, num_prompts: int, length: int, as_in_training: bool) -> dict:
    """Returns the figures of one dtype and arithmetic, as the head of this file says."""
    (_, _, gate), seen = next(iter_gates(model)), []
    gate.train(as_in_training)
    hook = gate.register_forward_hook(lambda module, args, importance: seen.append((args[0], importance)))
    equal_values = equal_importances = other_keys = 0
    try:
        for seed in range(num_prompts):
            ids = torch.randint(3, 23, (1, length), generator=torch.Generator().manual_seed(seed)).to(model.device)
            seen.clear()
            model(ids, use_cache=False)
            (values, importance), cache = seen.pop(), DynamicMaskCache(model)
            for piece in (ids[:, : length // 3], *ids[:, length // 3 :].split(1, dim=1)):
                model(piece, past_key_values=cache)
            cached_values, cached_importance = (torch.cat(parts, dim=2) for parts in zip(*seen, strict=True))
            equal_values += (values == cached_values).all(dim=(1, 3)).float().mean().item()
            equal_importances += (importance == cached_importance).float().mean().item()
            visible = (torch.stack(select_visible(each, **WINDOWS)) for each in (importance, cached_importance))
            other_keys += not torch.equal(*visible)
    finally:
        hook.remove()
    return {
        "values": round(equal_values / num_prompts, 4),
        "importances": round(equal_importances / num_prompts, 4),
        "prompts": f"{other_keys} of {num_prompts}",
    }


if __name__ == "__main__":
    main()
