"""Check examples as training would see them."""
