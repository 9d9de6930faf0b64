"""Attention functions with the signature that models call."""
