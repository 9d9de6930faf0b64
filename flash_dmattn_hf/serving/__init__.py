"""Continuous batching: many requests, each in a row of slots of constant size.

Builds on the cache; `integration` hangs it into transformers, whose scheduler, sampling and server it uses.
"""
