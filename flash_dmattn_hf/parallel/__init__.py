"""One sequence on several devices: contiguous shards, and one exchange of what outlives them per layer."""
