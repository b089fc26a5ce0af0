"""llmctl takes a language model through its whole life from one command line."""

__version__ = "0.1.0"
