"""Measuring what a model is worth: perplexity, agreement with the dense model, and recall."""

from flash_dmattn_hf.evaluation.agreement import Agreement, agreement, share_of_gap
from flash_dmattn_hf.evaluation.perplexity import Perplexity, perplexity
from flash_dmattn_hf.evaluation.prompts import Prompt, leading_tokens, recall_prompts
from flash_dmattn_hf.evaluation.recall import RecallCell, recall
from flash_dmattn_hf.evaluation.suite import recall_suite
from flash_dmattn_hf.evaluation.tasks import TASKS

__all__ = [
    "TASKS",
    "Agreement",
    "Perplexity",
    "Prompt",
    "RecallCell",
    "agreement",
    "leading_tokens",
    "perplexity",
    "recall",
    "recall_prompts",
    "recall_suite",
    "share_of_gap",
]
