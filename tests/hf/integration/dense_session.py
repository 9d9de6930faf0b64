"""What dense models do, as a program: `dense_session.py OUT [import]` saves it, with our import or without it.

Every entry of what is saved is a list of tensors, or the type and the text of an error.
"""

import sys
import warnings

import torch

warnings.simplefilter("ignore")
if "import" in sys.argv[2:]:
    import flash_dmattn_hf  # noqa: F401

from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    StaticCache,
)

_SIZES = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "initializer_range": 0.2}
_LLAMA = {
    **_SIZES,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_GPT2 = {**_SIZES, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_TEXT = {**_LLAMA, "head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_IMAGE = {"mm_tokens_per_image": 4, "image_token_index": 98, "boi_token_index": 97, "eoi_token_index": 96}


def make_model(name: str, implementation: str) -> PreTrainedModel:
    torch.manual_seed(0)
    options = {"attn_implementation": implementation}
    if name == "gemma3":
        config = Gemma3Config(text_config=_TEXT, vision_config=_VISION, **_IMAGE)
        return Gemma3ForConditionalGeneration._from_config(config, **options).eval()
    config = LlamaConfig(**_LLAMA) if name == "llama" else GPT2Config(**_GPT2)
    return AutoModelForCausalLM.from_config(config, **options).eval()


def tensors_of(result) -> list[torch.Tensor]:
    """The tensors of a result, those of its cache included."""
    if isinstance(result, torch.Tensor):
        return [result.detach()]
    if hasattr(result, "layers"):
        return [states for layer in result.layers for states in (layer.keys, layer.values)]
    if isinstance(result, tuple | list):
        return [tensor for part in result for tensor in tensors_of(part)]
    return tensors_of(list(result.values())) if hasattr(result, "values") else []


def over_a_cache(model, cache, mask=None):
    ids = torch.arange(3, 33).reshape(2, 15)
    first = model(ids[:, :10], past_key_values=cache)
    return first.logits, model(ids[:, 10:], attention_mask=mask, past_key_values=cache).logits


def calls(model):
    """Name -> what is asked of a model, errors included."""
    ids = torch.arange(3, 63).reshape(2, 30)
    padded = torch.ones_like(ids)
    padded[0, :7] = 0
    restarting = torch.cat([torch.arange(12), torch.arange(18)])[None].expand(2, -1)
    types = torch.zeros_like(ids)
    text = model.config.get_text_config()
    greedy = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    causal = torch.ones(2, 1, 30, 30).tril()
    return {
        "forward": lambda: model(ids),
        "padded": lambda: model(ids, attention_mask=padded),
        "packed": lambda: model(ids, position_ids=restarting, use_cache=False),
        "four_dimensions": lambda: model(ids, attention_mask=causal.log()),
        "token_types": lambda: model(ids, token_type_ids=types),
        "loss": lambda: model(ids, labels=ids),
        "hidden_states": lambda: model(ids, output_hidden_states=True),
        "attentions": lambda: model(ids, output_attentions=True),
        "cache": lambda: over_a_cache(model, DynamicCache(config=text)),
        "cache_without_config": lambda: over_a_cache(model, DynamicCache()),
        "static_cache": lambda: over_a_cache(model, StaticCache(config=text, max_cache_len=32)),
        "mask_over_a_cache": lambda: over_a_cache(model, DynamicCache(config=text), padded[:, :15]),
        "generate": lambda: model.generate(ids, **greedy),
        "generate_padded": lambda: model.generate(ids, attention_mask=padded, **greedy),
        "generate_static": lambda: model.generate(ids, cache_implementation="static", disable_compile=True, **greedy),
        "generate_beams": lambda: model.generate(ids, num_beams=3, **greedy),
        "generate_lookup": lambda: model.generate(ids[:1], prompt_lookup_num_tokens=3, **greedy),
        "unknown_argument": lambda: model(ids, no_such_argument=1),
        "unknown_cache": lambda: model.generate(ids, cache_implementation="no such cache", **greedy),
        "tuple_as_cache": lambda: model.generate(ids, past_key_values=((ids, ids),), **greedy),
        "short_mask": lambda: model(ids, attention_mask=padded[:, :11]),
        "settings": lambda: type(model).from_pretrained("no such folder", flash_dmattn=None),
        "unknown_implementation": lambda: model.set_attn_implementation("no_such_attention"),
    }


def main() -> None:
    found = {}
    for name in ("llama", "gemma3", "gpt2"):
        for implementation in ("sdpa", "eager"):
            for call, run in calls(make_model(name, implementation)).items():
                key = f"{name}-{implementation}-{call}"
                try:
                    found[key] = [tensor.clone() for tensor in tensors_of(run())]
                except Exception as error:
                    found[key] = f"{type(error).__name__}: {error}"
    torch.save(found, sys.argv[1])


if __name__ == "__main__":
    main()
