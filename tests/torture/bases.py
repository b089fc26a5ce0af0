"""What `llmctl sft` is tried on: a small model with the tokenizer of a tokenize run, and chats."""

import json
from functools import cache
from pathlib import Path

HIDDEN = {"large": 256, "small": 32}
WHO = ["cat", "dog", "friend", "teacher", "bird"]
WHAT = ["the river", "a red ball", "the house", "many stars", "a song", "the garden", "us"]


@cache
def make_base(tokens: Path, size: str) -> Path:
    """A model folder that has learned nothing; large ones take a while to save."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tokens.with_name(f"base-{size}")
    tokenizer = AutoTokenizer.from_pretrained(tokens / "tokenizer")
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN[size],
        intermediate_size=2 * HIDDEN[size],
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        attention_dropout=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@cache
def make_chats(tokens: Path) -> Path:
    """Conversations of unequal length."""
    file = tokens.with_name("chats.jsonl")
    with file.open("w") as out:
        for number in range(70):
            who, what = WHO[number % 5], WHAT[number // 5 % 7]
            question = f"What does the {who} see?" + " Say it." * (number % 3)
            answer = f"The {who} sees {what}."
            turns = [("user", question), ("assistant", answer)]
            messages = [{"role": role, "content": content} for role, content in turns]
            print(json.dumps({"messages": messages}), file=out)
    return file
