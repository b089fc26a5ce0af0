"""Rows to score are read as those to train on are, told by transformers' own rendering."""

import pytest
from transformers import LlamaConfig, LlamaForSequenceClassification

from llmctl.data.audit.rules import RowRules
from llmctl.data.bad_rows import BadRows
from llmctl.data.preference_pairs import encode_pairs
from llmctl.data.preferences import parse_preferences
from llmctl.data.rows import SourceRow
from llmctl.data.schemas import PAIR_LAYOUTS, match_layout
from llmctl.errors import DataError
from llmctl.reward.model import PromptResponse, load_reward_model
from llmctl.reward.score_file import samples_of
from tests.data.chat.test_responses import byte_tokenizer

TEMPLATE = (
    "{% if tools %}[{{ tools | tojson }}]{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.reasoning_content }}|{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FUNCTION = {"name": "look", "parameters": {}}
TOOLS = [{"type": "function", "function": FUNCTION}]
ASKED = {"role": "user", "content": "Hi"}
KIND = {"role": "system", "content": "Be kind."}
CALL = {
    "role": "assistant",
    "content": "So.",
    "reasoning_content": "Hm.",
    "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {}}}],
}
CURT = {"role": "assistant", "content": "No."}


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scorer")
    found = byte_tokenizer("<|im_start|>", "<|im_end|>")
    found.chat_template = TEMPLATE
    found.save_pretrained(folder)
    shape = LlamaConfig(
        vocab_size=len(found),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=512,
        num_labels=1,
        pad_token_id=0,
    )
    LlamaForSequenceClassification(shape).save_pretrained(folder)
    return load_reward_model(str(folder))


def tokens_of(scorer, row):
    samples = samples_of(SourceRow(row, "a.jsonl", 1), has_turns=scorer.has_turns)
    return {name: scorer.encode(sample).tokens for name, sample in samples.items()}


@pytest.mark.parametrize(
    ("row", "messages", "tools"),
    [
        ({"prompt": "Hi", "response": "No.", "system": "Be kind."}, [KIND, ASKED, CURT], None),
        ({"prompt": [ASKED], "response": "No.", "tools": TOOLS}, [ASKED, CURT], TOOLS),
        ({"messages": [ASKED, CALL], "tools": TOOLS}, [ASKED, CALL], TOOLS),
        ({"messages": [ASKED, CURT], "system": "Be kind."}, [KIND, ASKED, CURT], None),
        (
            {"prompt": "Hi", "response": "No.", "system_prompt": "Be kind."},
            [KIND, ASKED, CURT],
            None,
        ),
        ({"messages": [ASKED, CURT], "functions": [FUNCTION]}, [ASKED, CURT], TOOLS),
    ],
)
def test_system_tools_calls_and_reasoning_are_scored(scorer, row, messages, tools):
    text = scorer.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    wanted = scorer.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokens_of(scorer, row) == {"score": wanted}


def test_a_pair_is_scored_as_it_is_trained_on(scorer):
    row = {
        "prompt": [ASKED],
        "chosen": [CALL],
        "rejected": [CURT],
        "system": "Be kind.",
        "tools": TOOLS,
    }
    found = tokens_of(scorer, row)
    record = SourceRow(row, "a.jsonl", 1)
    pairs = parse_preferences(record, match_layout(row, PAIR_LAYOUTS, None, None), {})
    trained = encode_pairs(
        scorer.response_format, pairs, 512, "auto", BadRows(), RowRules(scorer.tokenizer)
    )
    for side, last in (("chosen", CALL), ("rejected", CURT)):
        assert found[f"score_{side}"] == getattr(trained, side).sequence(0)[0].tolist()
        text = scorer.tokenizer.apply_chat_template(
            [KIND, ASKED, last], tools=TOOLS, tokenize=False
        )
        assert found[f"score_{side}"] == scorer.tokenizer(text)["input_ids"]


DIALOGUE = "Human: Hi\n\nAssistant: Ho.\n\nHuman: And?\n\nAssistant:"
SPOKEN = [ASKED, {"role": "assistant", "content": "Ho."}, {"role": "user", "content": "And?"}]
ADD = {"role": "user", "content": "Add.\n\n1 2"}


@pytest.mark.parametrize(
    ("row", "other", "messages"),
    [
        (
            {"prompt": DIALOGUE, "response": "No."},
            {"prompt": DIALOGUE, "chosen": "No.", "rejected": "No."},
            SPOKEN,
        ),
        (
            {"prompt": "Hi", "response": '[{"role": "assistant", "content": "No."}]'},
            {"prompt": "Hi", "chosen": [CURT], "rejected": "No."},
            [ASKED],
        ),
        (
            {"instruction": "Add.", "input": "1 2", "output": "No."},
            {"instruction": "Add.", "input": "1 2", "chosen": "No.", "rejected": "No."},
            [ADD],
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, CURT]},
            {"conversations": [{"from": "human", "value": "Hi"}], "chosen": CURT, "rejected": CURT},
            [ASKED],
        ),
        (
            {"prompt": '[{"name": "x"}]', "response": "No."},
            {"prompt": '[{"name": "x"}]', "chosen": "No.", "rejected": "No."},
            [{"role": "user", "content": '[{"name": "x"}]'}],
        ),
    ],
    ids=range(5),
)
def test_a_text_has_one_score_in_whatever_columns(scorer, row, other, messages):
    text = scorer.tokenizer.apply_chat_template([*messages, CURT], tokenize=False)
    wanted = scorer.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokens_of(scorer, row)["score"] == wanted
    assert tokens_of(scorer, other)["score_chosen"] == wanted
    if "response" in row and row["response"] == "No.":
        cut = tokens_of(scorer, {**row, "finish_reason": "length"})["score"]
        assert cut == wanted[: len(cut)]
        assert len(cut) == len(wanted) - 1, "without the end of the turn"


def test_an_empty_response_after_a_dialogue_is_scored(scorer):
    tokens = tokens_of(scorer, {"prompt": DIALOGUE, "response": ""})["score"]
    said = [*SPOKEN, {"role": "assistant", "content": ""}]
    text = scorer.tokenizer.apply_chat_template(said, tokenize=False)
    assert tokens == scorer.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_system_message_that_has_no_place_is_refused(scorer):
    row = {"prompt": [KIND, ASKED], "response": "No.", "system": "Be kind."}
    with pytest.raises(DataError, match="which counts"):
        tokens_of(scorer, row)
    with pytest.raises(DataError, match="reads plain texts"):
        samples_of(SourceRow({**row, "prompt": "Hi"}, "a", 1), has_turns=False)
    plain = {"instruction": "Hi", "output": "No.", "history": [["a", "b"]]}
    with pytest.raises(DataError, match="`history` goes with turns"):
        samples_of(SourceRow(plain, "a", 1), has_turns=False)


def test_without_turns_a_prompt_is_the_beginning_of_a_text():
    row = {"prompt": DIALOGUE, "response": " No.", "finish_reason": "length"}
    found = samples_of(SourceRow(row, "a", 1), has_turns=False)
    assert found == {"score": PromptResponse(DIALOGUE, " No.", ended=False)}
