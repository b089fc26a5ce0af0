"""Quantize a model, and measure the loss."""
