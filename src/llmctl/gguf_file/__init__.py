"""Write a llama.cpp file (GGUF): a model and its tokenizer in, one file out, and read it back.

`check_gguf` refuses what cannot be written, before anything is done for it; `write_gguf` writes;
`compare` reads the file back with transformers and says what its weights lost. The `gguf` package,
an extra, knows the format and the blocks of its quantized types.
"""

from llmctl.gguf_file.reading import RoundTrip, compare, read_back
from llmctl.gguf_file.writing import KINDS, Kind, Written, check_gguf, write_gguf

__all__ = [
    "KINDS",
    "Kind",
    "RoundTrip",
    "Written",
    "check_gguf",
    "compare",
    "read_back",
    "write_gguf",
]
