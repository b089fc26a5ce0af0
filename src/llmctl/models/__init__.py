"""Open, check and save models: plain Hugging Face folders."""
