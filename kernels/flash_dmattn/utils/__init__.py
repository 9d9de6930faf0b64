"""Helpers around masks."""
