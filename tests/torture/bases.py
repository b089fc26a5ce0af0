"""What training commands are tried on: small models with the tokenizer of a tokenize run, and data.

Each is made once, beside the tokenize run, and the same on every machine.
"""

from functools import cache
from pathlib import Path

from tests.run_files import write_rows

HIDDEN = {"large": 256, "small": 32}
WHO = ["cat", "dog", "friend", "teacher", "bird"]
WHAT = ["the river", "a red ball", "the house", "many stars", "a song", "the garden", "us"]


@cache
def make_base(tokens: Path, size: str) -> Path:
    """A model folder that has learned nothing; large ones take a while to save."""
    from transformers import LlamaForCausalLM

    return _save(LlamaForCausalLM, tokens, size, "base")


@cache
def make_scorer(tokens: Path, size: str) -> Path:
    """A reward model of the same size that has learned nothing."""
    from transformers import LlamaForSequenceClassification

    return _save(LlamaForSequenceClassification, tokens, size, "scorer", num_labels=1)


def _save(kind: type, tokens: Path, size: str, name: str, **settings: int) -> Path:
    import torch
    from transformers import AutoTokenizer, LlamaConfig

    folder = tokens.with_name(f"{name}-{size}")
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
        **settings,
    )
    kind(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@cache
def make_chats(tokens: Path) -> Path:
    """Conversations of unequal length."""
    rows = []
    for number in range(70):
        turns = [("user", question(number)), ("assistant", answer(number))]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    return write_rows(tokens.with_name("chats.jsonl"), rows)


@cache
def make_texts(tokens: Path) -> Path:
    """Texts of unequal length, each labelled with who sees something."""
    rows = (
        {"text": f"{question(number)} {answer(number)}", "label": WHO[number % 5]}
        for number in range(70)
    )
    return write_rows(tokens.with_name("texts.jsonl"), rows)


@cache
def make_pairs(tokens: Path) -> Path:
    """Preferences of unequal length, which take a while to learn."""
    rows = (
        {
            "prompt": question(number),
            "chosen": answer(number),
            "rejected": answer(number + 1 + number % 3) + " Perhaps." * (number % 4),
        }
        for number in range(40)
    )
    return write_rows(tokens.with_name("pairs.jsonl"), rows)


@cache
def make_prompts(tokens: Path) -> Path:
    """Prompts of unequal length."""
    rows = ({"prompt": question(number)} for number in range(35))
    return write_rows(tokens.with_name("prompts.jsonl"), rows)


def question(number: int) -> str:
    """What is asked in a row."""
    return f"What does the {WHO[number % 5]} see?" + " Say it." * (number % 3)


def answer(number: int) -> str:
    """What is right."""
    return f"The {WHO[number % 5]} sees {WHAT[number // 5 % 7]}."
