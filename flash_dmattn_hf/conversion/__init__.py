"""Turning a dense model into one with dynamic masks, and checkpoints into models."""

from flash_dmattn_hf.conversion.calibration import Calibration
from flash_dmattn_hf.conversion.convert import ConversionReport, convert_model

__all__ = ["Calibration", "ConversionReport", "convert_model"]
