"""The token-by-token loop that generate, chat, evaluate and PPO rollouts share.

In go a model, prompts as token ids and how to sample; out come responses, each as it finishes.
A text depends on its prompt, the seed and the number of its row, never on what shares its batch.
"""

from llmctl.decode.forward import Forward, HuggingFaceForward
from llmctl.decode.llama import fast_forward
from llmctl.decode.loop import (
    Prompt,
    Response,
    best_threads,
    choose_forward,
    decode,
    eos_tokens,
)
from llmctl.decode.text import TextStream

__all__ = [
    "Forward",
    "HuggingFaceForward",
    "Prompt",
    "Response",
    "TextStream",
    "best_threads",
    "choose_forward",
    "decode",
    "eos_tokens",
    "fast_forward",
]
