"""Structured pruning: masks over neurons, KV groups, layers and vocabulary, their choice, and the smaller model."""
