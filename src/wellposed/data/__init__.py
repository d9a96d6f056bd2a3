"""Bytes to batches: image sets with a fixed order, a fingerprint and values in [-1, 1]."""
