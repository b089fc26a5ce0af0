"""Training: the loop over Accelerate, and what it needs.

Shapes: B sequences, T tokens (the context), V vocabulary.
"""
