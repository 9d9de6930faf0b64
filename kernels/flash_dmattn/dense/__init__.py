"""Attention under arbitrary masks and biases that differ from query to query, broadcast and never expanded."""
