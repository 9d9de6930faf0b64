"""Which heads read an answer in the dense model, and which of them still hold it where it is asked for.

    python scripts/lost_answers.py --base MODEL --model distilled --tokens tok.pt --json answers.json

Asks recall prompts of both models. Of the dense one it takes the attention that every query head pays to the tokens of
the answer, where the answer is due. Of the converted one it takes the share of these tokens that the cache holds then,
for every head with an importance of its own. A head that reads answers and holds none has lost them. --tokens is a file
of torch.save with `test` token ids of MODEL's tokenizer.
"""

import argparse
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import flash_dmattn_hf  # noqa: F401  registers the attention of converted models
from benchmark_report import environment, header, save_json
from flash_dmattn_hf import DynamicMaskCache
from flash_dmattn_hf.cache.layer import DynamicMaskCacheLayer
from flash_dmattn_hf.conversion.checkpoint import find_source, load_model, load_tokenizer
from flash_dmattn_hf.evaluation import Prompt, recall_prompts


class Asked(NamedTuple):
    """What a model does with one prompt.

    right: share of the answer's tokens that it predicts. heads: layer -> (heads,), of dense attention the mean mass per
    query head, of a cache the share of the answer's tokens that are held per head of its own.
    """

    right: float
    heads: dict[int, torch.Tensor]


def places_of(prompt: Prompt) -> list[int]:
    """Returns the positions of the tokens of the first answer, wherever it stands before the question."""
    start, end = prompt.spans[0]
    ids = prompt.input_ids.tolist()
    answer = ids[start:end]
    found = [at for at in range(prompt.question_start - len(answer) + 1) if ids[at : at + len(answer)] == answer]
    return [at + index for at in found for index in range(len(answer))]


def ask_dense(model: PreTrainedModel, prompt: Prompt) -> Asked:
    start, end = prompt.spans[0]
    ids = prompt.input_ids[None].to(model.device)
    model.set_attn_implementation("sdpa")
    cache = model(ids[:, : start - 1], use_cache=True, logits_to_keep=1).past_key_values
    model.set_attn_implementation("eager")  # which returns its weights
    found = model(ids[:, start - 1 : end - 1], past_key_values=cache, output_attentions=True)
    length = end - start
    masses = {}
    for layer, weights in enumerate(found.attentions):
        places = torch.tensor(places_of(prompt), device=weights.device).view(-1, length)
        row = torch.arange(length, device=weights.device)
        masses[layer] = weights[0][:, row, places].sum(1).mean(-1).float().cpu()
    return Asked(share_right(found.logits, prompt), masses)


def ask_converted(model: PreTrainedModel, prompt: Prompt) -> Asked:
    start, end = prompt.spans[0]
    ids, cache = prompt.input_ids[None].to(model.device), DynamicMaskCache(model)
    first = model(ids[:, :start], past_key_values=cache, logits_to_keep=1).logits
    places = torch.tensor(places_of(prompt), device=ids.device)
    shares = {
        index: (layer.positions[0, :, :, None] == places).any(1).float().mean(-1).cpu()
        for index, layer in enumerate(cache.layers)
        if isinstance(layer, DynamicMaskCacheLayer)
    }
    rest = model(ids[:, start : end - 1], past_key_values=cache).logits if end - 1 > start else first[:, :0]
    return Asked(share_right(torch.cat([first, rest], 1), prompt), shares)


def share_right(logits: torch.Tensor, prompt: Prompt) -> float:
    start, end = prompt.spans[0]
    return (logits[0].argmax(-1).cpu() == prompt.input_ids[start:end]).float().mean().item()


def mean_of(asked: list[Asked]) -> dict[int, torch.Tensor]:
    return {layer: torch.stack([each.heads[layer] for each in asked]).mean(0) for layer in asked[0].heads}


def rows_of(dense: list[Asked], converted: list[Asked]) -> list[dict]:
    """A row for each query head, those that read most first."""
    masses, shares = mean_of(dense), mean_of(converted)
    rows = []
    for layer, held in shares.items():
        group = len(masses[layer]) // len(held)
        for head, mass in enumerate(masses[layer].tolist()):
            own = head // group
            rows.append({"layer": layer, "head": head, "own": own, "read": mass, "held": held[own].item()})
    return sorted(rows, key=lambda row: -row["read"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, metavar="MODEL", help="the dense model")
    parser.add_argument("--model", required=True, metavar="DIR", help="the converted model")
    parser.add_argument("--tokens", required=True, help="token ids, as of quality_table.py")
    parser.add_argument("--task", default="pass_key", choices=["pass_key", "several_keys"])
    parser.add_argument("--context-length", type=int, default=4096)
    parser.add_argument("--depths", type=int, nargs="+", default=[10, 30, 50, 70, 90])
    parser.add_argument("--samples", type=int, default=2, help="prompts for each depth")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()

    where = environment(arguments.device)
    print(header(where))
    source = find_source(arguments.base)
    text = torch.load(arguments.tokens, weights_only=True)["test"].long()
    prompts = recall_prompts(
        load_tokenizer(source),
        text,
        tasks=[arguments.task],
        contexts=[arguments.context_length],
        depths=arguments.depths,
        samples=arguments.samples,
    )
    with torch.no_grad():
        model = load_model(source, dtype=torch.float32).to(arguments.device).eval()
        dense = [ask_dense(model, prompt) for prompt in prompts]
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).to(arguments.device).eval()
        converted = [ask_converted(model, prompt) for prompt in prompts]
    rows = rows_of(dense, converted)
    print("layer  head  own head  read by dense  held when asked")
    for row in rows[:20]:
        print(f"{row['layer']:5}{row['head']:6}{row['own']:10}{row['read']:15.2f}{row['held']:17.2f}")
    by_prompt = [
        {"depth": prompt.depth, "dense": ours.right, "converted": theirs.right}
        for prompt, ours, theirs in zip(prompts, dense, converted, strict=True)
    ]
    total = sum(row["read"] for row in rows)
    kept = sum(row["read"] * row["held"] for row in rows) / total if total else 0.0
    print(f"of the attention that dense pays to answers, {kept:.0%} is paid to tokens that the head still holds")
    if arguments.json:
        options = {name: value for name, value in vars(arguments).items() if name not in ("json", "tokens")}
        save_json(arguments.json, {**where, "options": options, "kept": kept, "rows": rows, "prompts": by_prompt})


if __name__ == "__main__":
    main()
