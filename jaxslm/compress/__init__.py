"""Learned context compression: items as a few embedding tokens."""
