"""Quantized weights: what checkpoints hold, and what is made of plain ones on load."""
