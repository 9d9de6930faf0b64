"""What the walk over all model families is made of: tiny configs, what is tried, and the table."""
