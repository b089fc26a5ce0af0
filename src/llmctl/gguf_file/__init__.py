"""Write a llama.cpp file (GGUF): a model and its tokenizer in, one file out, and read it back.

`check_gguf` refuses what cannot be written, before anything is done for it; `write_gguf` writes;
`read_back` opens the file with transformers. The `gguf` package, an extra, knows the format and the
blocks of its quantized types.
"""

from llmctl.gguf_file.writing import check_gguf, read_back, write_gguf

__all__ = ["check_gguf", "read_back", "write_gguf"]
