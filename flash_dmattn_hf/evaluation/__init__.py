"""Measuring what a model is worth: perplexity on held-out text."""

from flash_dmattn_hf.evaluation.perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "perplexity"]
