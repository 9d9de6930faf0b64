"""Dynamic Mask Attention in Hugging Face Transformers.

Importing this package registers the attention implementation "flash_dmattn", so that
`AutoModelForCausalLM.from_pretrained(path, attn_implementation="flash_dmattn")` works; `unregister()` undoes it.
"""

from flash_dmattn_hf.cache.cache import DynamicMaskCache
from flash_dmattn_hf.config import DynamicMaskConfig, dynamic_mask_config
from flash_dmattn_hf.conversion.calibration import Calibration
from flash_dmattn_hf.conversion.convert import ConversionReport, convert_model
from flash_dmattn_hf.conversion.importance_file import load_importance, save_importance
from flash_dmattn_hf.gates.attach import AttachReport, iter_gates
from flash_dmattn_hf.gates.importance import ImportanceGate, get_gate
from flash_dmattn_hf.gates.soft_selection import soft_selection
from flash_dmattn_hf.integration.registration import register, unregister
from flash_dmattn_hf.parallel.context import context_parallel
from flash_dmattn_hf.training.loss import use_chunked_loss
from flash_dmattn_hf.versions import warn_if_untested

__all__ = [
    "AttachReport",
    "Calibration",
    "ConversionReport",
    "DynamicMaskCache",
    "DynamicMaskConfig",
    "ImportanceGate",
    "context_parallel",
    "convert_model",
    "dynamic_mask_config",
    "get_gate",
    "iter_gates",
    "load_importance",
    "register",
    "save_importance",
    "soft_selection",
    "unregister",
    "use_chunked_loss",
]

warn_if_untested()
register()
