"""Text in: documents, tokenizers and token shards; nothing here imports torch."""
