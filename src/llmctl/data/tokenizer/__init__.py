"""Train, load and apply tokenizers."""
