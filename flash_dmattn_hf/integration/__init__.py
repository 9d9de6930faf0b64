"""What is hooked into transformers: registration, loading, masks, the attention function, generation.

Builds on the gates and the cache; conversion, evaluation, training and cli build on this room.
"""
