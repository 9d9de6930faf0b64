"""What the processor of an image-text model makes: pixels, the tokens that stand for them, and the types of tokens."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from checks.families.sizes import LENGTH

FIRST = 6
"""Where the tokens of an image begin: behind those that padding takes away."""
PREFIX = FIRST + 4
"""How many tokens see each other in front of a text, in models with such a prefix; an image is among them."""
BATCH = 2

_TILE = {"pixels": (1, 3, 16, 16)}
_TILES = {"pixels": (2, 3, 16, 16), "image_sizes": [16, 16]}
_SIZED = {"pixels": (3, 32, 32), "image_sizes": [32, 32]}
_QFORMER = {"qformer_input_ids": [5, 6, 7], "qformer_attention_mask": [1, 1, 1]}
_POSITIONS = [[x, y] for y in range(6) for x in range(6)]
_NAVIT = {"flat": (3, 8, 128), "along": 2, "target_sizes": [4, 4]}

IMAGES: dict[str, dict[str, Any]] = {
    "apertus1p5": {"pixels": (3, 16, 16), "image_sizes": [16, 16]},
    "emu3": {"pixels": (3, 16, 16), "image_sizes": [16, 16]},
    "chameleon": {"pixels": (3, 32, 32)},
    "blip-2": {"pixels": (3, 16, 16)},
    "deepseek_ocr2": {"pixels": (3, 32, 32)},
    "deepseek_vl_hybrid": {"pixels": (3, 16, 16), "high_res_pixel_values": (3, 16, 16), "num_tokens": 4},
    "fast_vlm": {"pixels": (3, 32, 32)},
    "fuyu": {"pixels": (4, 192)},
    "gemma3n": {"pixels": (3, 32, 32)},
    "gemma4": {"pixels": (36, 192), "image_position_ids": _POSITIONS},
    "gemma4_unified": {"pixels": (4, 1728), "image_position_ids": [[0, 0], [1, 0], [0, 1], [1, 1]]},
    "granite4_vision": {**_TILES, "num_tokens": 3},
    "granite_docling": {**_TILE, "pixel_attention_mask": [True]},
    "idefics": {**_TILE, "image_attention_mask": [[1]] * 24},
    "idefics2": _TILE,
    "idefics3": _TILE,
    "instructblip": {"pixels": (3, 16, 16), **_QFORMER},
    "instructblipvideo": {"pixels": (4, 3, 16, 16), "num_tokens": 4, **_QFORMER},
    "kimi_k25": {"flat": (16, 3, 8, 8), "image_grid_thw": [1, 4, 4]},
    "lfm2_vl": {"pixels": (16, 192), "spatial_shapes": [4, 4], "pixel_attention_mask": [1] * 16},
    "lighton_ocr": _SIZED,
    "llava_next": _TILES,
    "llava_next_video": _TILES,
    "llava_onevision": _TILES,
    "minicpm_ocr": _NAVIT,
    "minicpmv4_6": _NAVIT,
    "minicpmv4_7": _NAVIT,
    "mistral3": _SIZED,
    "mllama": {
        "pixels": (1, 4, 3, 16, 16),
        "aspect_ratio_ids": [1],
        "aspect_ratio_mask": [[1, 0, 0, 0]],
        "cross_attention_mask": [[[1, 0, 0, 0]]] * 24,
        "num_tokens": 1,
    },
    "kosmos-2": {"pixels": (3, 16, 16), "image_embeds_position_mask": [0] * 6 + [1] * 4 + [0] * 14},
    "kosmos-2.5": {"flattened_patches": (4, 194), "image_embeds_position_mask": [0] * 6 + [1] * 4 + [0] * 14},
    "molmo2": {
        "pixels": (4, 192),
        "image_grids": [1, 1, 1, 1],
        "image_num_crops": 1,
        "together": {"image_token_pooling": [[0, 1], [2, 3], [4, 5], [6, 7]]},
    },
    "nemotron_h_omni": {"flat": (16, 192), "image_grid_hw": [4, 4]},
    "paddleocr_vl": {"flat": (16, 3, 8, 8), "image_grid_thw": [1, 4, 4]},
    "perception_lm": {"pixels": (1, 3, 32, 32)},
    "qwen2_5_omni_thinker": {"start": 95},
    "qwen3_omni_moe_thinker": {"start": 95},
    "smolvlm": _TILE,
    "video_llama_3": {"image_merge_sizes": 2},
}
"""Model type -> what `image_inputs` cannot guess.

pixels, flat: the shape of one image; images are stacked, or put one behind another along their first dimension. Tuples
under other names are shapes of further pixels. together: what both images have together. All else is what an image has
under that name.
"""
PIXELS = frozenset({"pixels", "flat", "flattened_patches"})
"""Names in such a line that say that the pixels need no guess."""

NEEDS_IMAGE = ("blip-2", "idefics", "instructblip", "instructblipvideo", "kosmos-2")
"""Model types that take no text without an image."""


def takes_images(cls: type) -> bool:
    """Whether a model class has anything to do with images."""
    return not {"pixel_values", "flattened_patches"}.isdisjoint(inspect.signature(cls.forward).parameters)


def has_prefix(model: PreTrainedModel) -> bool:
    """Whether the first tokens of a text see each other, as those of PaliGemma do, and later ones do not."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return any(getattr(config, "use_bidirectional_attention", None) is True for config in configs)


def token_types(model: PreTrainedModel, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the (B, T) types of tokens that a processor gives a model: 1 for an image, or for all behind a prefix."""
    if has_prefix(model):
        types = (torch.arange(input_ids.shape[1]) >= PREFIX).long().expand_as(input_ids)
    else:
        token = image_token_of(model.config)
        types = (input_ids == (-1 if token is None else token)).long()
    names = ("mm_token_type_ids", "token_type_ids")
    return {name: types for name in names if name in inspect.signature(model.forward).parameters}


def image_inputs(model: PreTrainedModel, text: Callable[[int], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the inputs of a model with an image in every row, in place of some tokens of text.

    text: gives (2, T) tokens for a length T. A longer image makes a longer text: its first half holds the image.
    Raises whatever the model raises, and ValueError if the image changes nothing.
    """
    token, line = image_token_of(model.config), dict(IMAGES.get(model.config.model_type, {}))
    if not line.keys() & PIXELS:
        line |= _guess(model.config, inspect.signature(model.forward).parameters)
    start, num_tokens = line.pop("start", None), line.pop("num_tokens", None)
    image, input_ids = _image(line, seed=0), text(LENGTH)
    if token is not None:
        num_tokens = num_tokens or _count_tokens(model, image) // BATCH
        input_ids = text(LENGTH + max(0, FIRST + num_tokens - LENGTH // 2))
        input_ids[:, FIRST : FIRST + num_tokens] = token
    if start is not None:
        input_ids[:, FIRST - 1] = start
    inputs = {"input_ids": input_ids, **image, **token_types(model, input_ids)}
    with torch.no_grad():
        found, other = (said(model(**{**inputs, **_image(line, seed=seed)}).logits) for seed in (0, 1))
    if not (found - other).abs().max() > 1e-6 * found.abs().max():
        raise ValueError("another image must give other logits, got the same")
    return inputs


def said(logits: torch.Tensor) -> torch.Tensor:
    """Returns logits with 0 for tokens that a model never says, such as those of Chameleon's images."""
    return logits.masked_fill(logits <= torch.finfo(torch.float32).min, 0.0)


def _guess(config: PreTrainedConfig, parameters: Any) -> dict[str, Any]:
    vision = config.vision_config
    if "image_grid_thw" not in parameters:
        size = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
        return {"pixels": (3, size, size)}
    side = 2 * (getattr(vision, "spatial_merge_size", None) or 2)
    channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", None) or 3
    frames = getattr(vision, "temporal_patch_size", None) or getattr(vision, "patch_temporal", None) or 1
    return {"flat": (side**2, channels * frames * vision.patch_size**2), "image_grid_thw": [1, side, side]}


def _image(line: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    along = line.get("along", 0)
    result = {name: torch.tensor(value) for name, value in line.get("together", {}).items()}
    for name, value in line.items():
        if name == "flat":
            parts = [torch.rand(*value, generator=generator) for _ in range(BATCH)]
            result["pixel_values"] = torch.cat(parts, along)[None] if along else torch.cat(parts)
        elif isinstance(value, tuple) and "flat" not in line:
            result["pixel_values" if name == "pixels" else name] = torch.rand(BATCH, *value, generator=generator)
        elif name not in ("along", "pixels", "together"):
            result[name] = torch.tensor([value] * BATCH)
    return result


def image_token_of(config: PreTrainedConfig) -> int | None:
    """The token that stands for a part of an image; None for models that look at images by cross-attention."""
    names = ("image_token_id", "image_token_index", "image_patch_id")
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _count_tokens(model: PreTrainedModel, image: dict[str, torch.Tensor]) -> int:
    owner = next(part for part in (model.base_model, model) if hasattr(part, "get_image_features"))
    with torch.no_grad():
        found = owner.get_image_features(**image)
    features = getattr(found, "pooler_output", None)
    features = found.last_hidden_state if features is None else features
    return sum(part.shape[:-1].numel() for part in (features if isinstance(features, (list, tuple)) else [features]))
