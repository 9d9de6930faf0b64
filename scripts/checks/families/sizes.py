"""The sizes of all tiny models."""

VOCAB_SIZE = 99
HEAD_DIM = 16
SLIDING_WINDOW = 10
LENGTH = 24
"""Tokens of a text, if no image makes it longer."""
