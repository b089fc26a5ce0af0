"""Data in: documents, examples, preferences and prompts, tokenizers and token shards."""
