"""The sizes of all tiny models."""

VOCAB_SIZE = 99
HEAD_DIM = 16
SLIDING_WINDOW = 10
IMAGE_SIZE = 16
PATCH_SIZE = 8
