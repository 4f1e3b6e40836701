"""Measurements: what the device can do, what scoring reaches of it, and what others reach on the same machine."""
