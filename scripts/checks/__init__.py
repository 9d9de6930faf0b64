"""Checks that take too long, or need too much, for the tests: agreement, loss curves, profiles, compute-sanitizer."""
