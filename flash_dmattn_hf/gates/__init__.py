"""The gates: which attention modules get one, and how it computes the importance of keys.

Imports nothing from the rooms above it (cache, integration, conversion, evaluation, training, cli).
"""
