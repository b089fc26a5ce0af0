"""Make a model smaller, and measure what that costs."""
