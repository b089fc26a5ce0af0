"""Where a scored response ends: templates that stop there, and pairs of texts for encoders."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, LlamaConfig, PreTrainedTokenizerFast

from llmctl.data.chat.render import ChatFormat
from llmctl.data.chat.responses import ResponseFormat, end_at_turn
from llmctl.data.chat.templates import TEMPLATES, TRUSTED, ending_at_turn, set_chat_template

ASKED = {"role": "user", "content": "Hi"}
ANSWERED = {"role": "assistant", "content": "Well.\nHello"}
AGAIN = {"role": "assistant", "content": "Yes"}
ODD = """\

{%- if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- macro turn(message) %}<{{ message.role }}>{{ inner(message.content) }}
  {% endmacro %}
{%- macro inner(text) %}{{ text | trim }}|{{ first }}{% endmacro %}
{%- set counted = namespace(turns=0) %}
{%- for message in messages %}
{% set counted.turns = counted.turns + 1 %}
{{ turn(message) }}{%- generation -%} {{ counted.turns }} {% endgeneration -%}
  {% endfor %}
{% if add_generation_prompt %}<assistant>{% endif %}

"""
"""All that may go wrong in another block: scopes, macros, markers, white space."""


def byte_tokenizer(*specials: str) -> PreTrainedTokenizerFast:
    """A token for each byte, so that a line break is one."""
    names = ["<pad>", "<s>", "</s>", *specials]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: n for n, c in enumerate([*names, *alphabet])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=list(specials),
    )


def rendered(tokenizer, messages, **how):
    """As transformers has it."""
    return tokenizer.apply_chat_template(messages, tokenize=False, **how)


@pytest.mark.parametrize("name", [*TEMPLATES, "odd"])
def test_a_template_is_made_to_end_with_the_turn_and_changes_no_other_text(tmp_path, name):
    """By transformers: what was at the end of the text is gone, and prompts are as they were."""
    Path(tmp_path / "odd.jinja").write_text(ODD)
    before, after = byte_tokenizer(), byte_tokenizer()
    for tokenizer in (before, after):
        set_chat_template(tokenizer, str(tmp_path / "odd.jinja") if name == "odd" else name)
    end_at_turn(after, LlamaConfig())
    for messages in (
        [ASKED, ANSWERED],
        [{"role": "system", "content": "Be\nkind."}, ASKED, ANSWERED, ASKED, AGAIN],
    ):
        assert rendered(after, messages) == rendered(before, messages).rstrip("\n ")
        prompt = {"add_generation_prompt": True}
        assert rendered(after, messages[:-1], **prompt) == rendered(before, messages[:-1], **prompt)
    if name != "odd":
        assert after.chat_template in TRUSTED, "ours stays ours, and is rendered here"
    once = after.chat_template
    end_at_turn(after, LlamaConfig())
    assert after.chat_template == once


def test_a_text_that_ends_otherwise_loses_nothing():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = ending_at_turn("{{ messages[0].content }}", "é\"'\n")
    for text, wanted in (("aé\"'\n", "a"), ("a'\n", "a'\n"), ("a\\n", "a\\n")):
        assert rendered(tokenizer, [{"role": "user", "content": text}]) == wanted


@pytest.mark.parametrize("name", ["chatml", "alpaca", "llama-3"])
def test_the_last_token_is_the_end_of_the_turn_or_the_last_of_the_template(name):
    tokenizer = byte_tokenizer()
    set_chat_template(tokenizer, name)
    messages = [ASKED, ANSWERED, ASKED, AGAIN]
    whole = tokenizer(rendered(tokenizer, messages), add_special_tokens=False)["input_ids"]
    breaks = {"chatml": 1, "alpaca": 2, "llama-3": 0}[name]
    for score_at, wanted in (
        ("end-of-turn", whole[: len(whole) - breaks]),
        ("last-token", whole),
    ):
        form = ResponseFormat(tokenizer, LlamaConfig(), score_at=score_at)
        assert form.encode_conversation(messages, 3).tokens == wanted
        assert form.encode_conversation(messages, 3, ended=False).tokens[-3:] == [
            tokenizer.convert_tokens_to_ids(letter) for letter in "Yes"
        ]
    assert ChatFormat(tokenizer).after_turn == "\n" * breaks


def test_an_encoder_splits_a_conversation_at_its_last_message():
    """Whatever it is compared with: the split of a text is its own."""
    tokenizer = byte_tokenizer()
    form = ResponseFormat(tokenizer, BertConfig())
    messages = [ASKED, ANSWERED, ASKED, AGAIN]
    assert form.is_pair
    assert form.encode_conversation(messages, 1) == form.encode_conversation(messages, 3)
    prompt = "user: Hi\n\nassistant: Well.\nHello\n\nuser: Hi"
    assert form.encode_conversation(messages, 1).tokens == tokenizer(prompt, "Yes")["input_ids"]
