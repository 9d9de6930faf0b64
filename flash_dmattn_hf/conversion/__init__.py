"""Turning a dense model into one with dynamic masks, and checkpoints into models."""

from flash_dmattn_hf.conversion.calibration import Calibration
from flash_dmattn_hf.conversion.convert import ConversionReport, convert_model
from flash_dmattn_hf.conversion.importance_file import load_importance, save_importance

__all__ = ["Calibration", "ConversionReport", "convert_model", "load_importance", "save_importance"]
