"""No row of JSON ends a reader with anything but an error of the row: every type at every place.

`FUZZ_SECONDS=600 pytest tests/data/test_fuzz.py` goes on with random rows for so long.
"""

import json
import os
import random
import time
from collections import Counter
from functools import partial

import pytest

from llmctl.data.audit.rules import RowRules, texts_of
from llmctl.data.bad_rows import BadRows
from llmctl.data.chat.render import ChatFormat
from llmctl.data.documents import read_pieces
from llmctl.data.examples import read_examples
from llmctl.data.preferences import parse_preferences
from llmctl.data.prompts import read_prompt_file
from llmctl.data.schemas import choose_layouts
from llmctl.data.sets import read_sets
from llmctl.data.sources import find_sources
from llmctl.decode.prompts import read_shots
from llmctl.errors import DataError, ModelError
from llmctl.feedback.questions import read_entries
from llmctl.reward.score_file import samples_of
from tests.data.chat.test_omissions import LLAMA_3
from tests.data.chat.test_render import build

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": [1]}}}
TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "Ann"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "So."},
    {"role": "tool", "content": "9", "tool_call_id": "c"},
    {"role": "assistant", "content": "Ho", "weight": 1, "train": True},
]
SHARE = [
    {"from": "human", "value": "Hi"},
    {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
    {"from": "observation", "value": "9"},
    {"from": "gpt", "value": "Ho", "loss": True},
]
SEEDS = [
    {"messages": TURNS, "tools": [{"type": "function", "function": {"name": "f"}}]},
    {"conversations": SHARE, "system": "Be kind.", "images": []},
    {"prompt": "Hi", "response": "Ho", "system_prompt": "Be kind.", "finish_reason": "stop"},
    {"prompt": TURNS[:2], "completion": TURNS[-1:]},
    {"instruction": "Hi", "input": "1", "output": "Ho", "history": [["a", "b"]]},
    {"question": "Hi", "answer": "Ho", "context": "x"},
    {"prompt": "Hi", "chosen": "Ho", "rejected": "No", "margin": 0.5},
    {"chosen": TURNS, "rejected": [*TURNS[:-1], {**TURNS[-1], "content": "No"}]},
    {"conversations": SHARE[:1], "chosen": SHARE[-1], "rejected": {**SHARE[-1], "value": "No"}},
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Ho", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
    {"prompt": "Hi", "responses": ["Ho", "No"], "ranks": [1, 2], "annotator": "Ann"},
    {"text": "Once.", "label": "x"},
    {"messages": TURNS[1:2], "functions": [{"name": "f"}]},
]
VALUES = [
    *(None, True, False, 0, 1, -1, 2.5, 1e308, 10**400, "", " ", "Hi", "\ud800", "\x00", "[", "{}"),
    *('[{"role": "user"}]', "[1]", [], {}, [None], [[]], [{}], ["Hi"], [["a"]], {"a": None}),
    *({"role": "user", "content": "Hi"}, [{"role": [], "content": {}}], {"type": "text"}),
]


def places(value, path=()):
    """Every place of a value, as the keys that lead there."""
    yield path
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(part, (*path, key))


def changed(value, path, new):
    """A copy with another value at a place."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(copy[path[0]], path[1:], new)
    return copy


@pytest.fixture(scope="module")
def readers():
    """Every reader of rows, as functions of a file."""
    tokenizer = build("bytes")
    tokenizer.chat_template = LLAMA_3
    chat = ChatFormat(tokenizer)

    def encode(file, task):
        for part in read_examples([str(file)], task=task):
            for example in part.examples:
                rules = RowRules(tokenizer)
                rules.see(texts_of(example.messages, example.text), example.place, example.line)
                list(chat.encode_examples([example], "assistant", BadRows()))

    def preferences(file):
        make = partial(parse_preferences, dropped=Counter())
        read_sets([str(file)], choose_layouts([], "preferences"), make)

    def prompts(file):
        for prompt in read_prompt_file(file):
            prompt.digest()
            chat.encode_prompt(prompt.messages, prompt.tools)

    def documents(file):
        (source,) = find_sources([str(file)], file.parent)
        list(read_pieces(source, "text"))

    def scored(file):
        from llmctl.data.rows import read_rows

        (source,) = find_sources([str(file)], file.parent)
        for record in read_rows(source):
            samples_of(record, has_turns=True)

    return {
        "chat": partial(encode, task="chat"),
        "classify": partial(encode, task="classify"),
        "preferences": preferences,
        "prompts": prompts,
        "shots": read_shots,
        "rank": read_entries,
        "documents": documents,
        "score": scored,
    }


def read_all(readers, row, file):
    """Read a row by every reader; what is no error of the user's ends the test, with the row."""
    file.write_text(json.dumps(row) + "\n")
    for name, read in readers.items():
        try:
            read(file)
        except (DataError, ModelError):
            continue
        except Exception as error:
            raise AssertionError(f"{name}: {row!r}") from error


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: ",".join(seed))
def test_any_type_at_any_place_is_read_or_refused(readers, seed, tmp_path):
    draw = random.Random(",".join(seed))
    for path in places(seed):
        for value in draw.sample(VALUES, 4):
            read_all(readers, changed(seed, path, value), tmp_path / "row.jsonl")


def test_random_rows_are_read_or_refused(readers, tmp_path):
    seconds = float(os.environ.get("FUZZ_SECONDS", "3"))
    draw, end = random.Random(int(seconds)), time.monotonic() + seconds
    while time.monotonic() < end:
        row = draw.choice(SEEDS)
        for _ in range(draw.randint(1, 4)):
            spots = list(places(row))
            row = changed(row, draw.choice(spots), draw.choice(VALUES))
        read_all(readers, row, tmp_path / "row.jsonl")
