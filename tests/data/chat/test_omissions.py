"""What a chat template leaves out is noticed: parts of a row, and parts that it never writes."""

import pytest

from llmctl.data.bad_rows import BadRows
from llmctl.data.chat.omissions import missing_part, with_text_arguments
from llmctl.data.chat.render import ChatFormat
from llmctl.data.examples import Example
from llmctl.errors import DataError, ModelError
from tests.data.chat.test_render import build

START, END = "<|im_start|>", "<|im_end|>"
USER = {"role": "user", "content": "How warm is it in Oslo?"}
ANSWER = {"role": "assistant", "content": "Nine degrees."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "type": "function",
            "id": "abc123def",
            "function": {"name": "weather", "arguments": {"city": "Oslo"}},
        }
    ],
}
RESULT = {"role": "tool", "content": '{"degrees": "9"}', "tool_call_id": "abc123def"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
THOUGHT = {**ANSWER, "reasoning_content": "The tool says 9."}

# Written for these tests, in the manner of the families that they are named after.
PLAIN = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
WITHOUT_SYSTEM = PLAIN.replace("<s>{{", "{% if m.role != 'system' %}<s>{{").replace(
    "</s>\n", "</s>\n{% endif %}"
)
LLAMA_3 = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}<s>assistant\n\n"
    '{"name": "{{ m.tool_calls[0].function.name }}", '
    '"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}</s>'
    "{% elif m.role == 'tool' %}<s>ipython\n\n"
    "{% if m.content is mapping or m.content is iterable %}{{ m.content | tojson }}"
    "{% else %}{{ m.content }}{% endif %}</s>"
    "{% else %}<s>{{ m.role }}\n\n{{ m.content | trim }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n\n{% endif %}"
)
QWEN_3 = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}<s>{{ m.role }}\n"
    "{% set content = m.content %}{% set thought = m.reasoning_content | default('') %}"
    "{% if m.role == 'assistant' %}{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and thought %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    "{% endif %}{{ content }}"
    "{% for c in m.tool_calls | default([]) %}<call>{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}</call>{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'assistant' and m.tool_calls %}<s>assistant\n"
    "{% for c in m.tool_calls %}{{ c.function.name + '\n' + c.function.arguments }}"
    "{% endfor %}</s>{% elif m.role == 'assistant' %}<s>assistant\n"
    "{{ m.content.split('</think>')[-1] }}</s>"
    "{% else %}<s>{{ m.role }}\n{{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "<s>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>model\n{% endif %}"
)
MISTRAL = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}"
    "{% elif m.role == 'user' %}[INST] {{ ns.system }}{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[RESULT] {{ m.content }}[/RESULT]"
    "{% elif m.tool_calls %}[CALLS]{{ m.tool_calls | tojson }}</s>"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)


LFM_2 = "{% if tools %}{{ tools | tojson }}{% endif %}" + PLAIN
"""Tools are listed, calls are not written."""
GEMMA_4 = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages if m.role != 'tool' %}<s>{{ m.role }}\n"
    "{% for c in m.tool_calls | default([]) %}call:{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}"
    "{% for r in messages if r.role == 'tool' and r.tool_call_id == c.id %}"
    "<response>{{ r.content }}</response>{% endfor %}{% endfor %}{{ m.content }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
"""What is said beside a call stands after the answer to it."""
MISTRAL_LAST = (
    "{% set ns = namespace(system='', last=0) %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}"
    "{% elif m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages if m.role != 'system' %}"
    "{% if m.role == 'user' %}[INST] {% if messages[ns.last] == m %}{{ ns.system }}{% endif %}"
    "{{ m.content }}[/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
"""The system message stands before the last turn of the user."""


@pytest.fixture(scope="module")
def chat_of():
    """A function from a template to the format of a byte-level tokenizer with it."""

    def make(template):
        tokenizer = build("bytes")
        tokenizer.chat_template = template
        return ChatFormat(tokenizer)

    return make


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (LLAMA_3, (SYSTEM, {**USER, "content": " How warm? \n"}, ANSWER)),
        (LLAMA_3, (USER, CALL, RESULT, ANSWER)),
        (QWEN_3, (SYSTEM, USER, THOUGHT, USER, THOUGHT)),
        (QWEN_3, (USER, {**ANSWER, "content": "<think>\nSo.\n</think>\n\nNine."}, USER, ANSWER)),
        (QWEN_3, (USER, {**ANSWER, "content": "<think>So.</think>Nine."})),
        (QWEN_3, (USER, CALL, RESULT, THOUGHT)),
        (QWEN_3, (USER, {**ANSWER, "thinking": "So."})),  # transformers knows both names
        (DEEPSEEK, (SYSTEM, USER, ANSWER, USER, ANSWER)),
        (DEEPSEEK, (USER, {**ANSWER, "content": "<think>So.</think>Nine."}, USER, ANSWER)),
        (DEEPSEEK, (USER, CALL, RESULT, ANSWER)),
        (GEMMA, (USER, ANSWER, USER, ANSWER)),
        (MISTRAL, (SYSTEM, USER, ANSWER, USER, ANSWER)),
        (MISTRAL, (USER, CALL, RESULT, ANSWER)),
        (MISTRAL_LAST, (SYSTEM, {**USER, "content": "Hello?"}, ANSWER, USER, ANSWER)),
        (GEMMA_4, (USER, {**CALL, "content": "I ask."}, RESULT, ANSWER)),
        (GEMMA_4, (USER, {**CALL, "content": "weather"}, RESULT, {**ANSWER, "content": "9"})),
        (QWEN_3, (USER, {**CALL, "content": "Oslo"}, RESULT, {**ANSWER, "content": "Oslo"})),
        (QWEN_3, (USER, {**ANSWER, "reasoning_content": "Nine degrees."})),
        (PLAIN, (USER, ANSWER, USER, ANSWER, USER, ANSWER)),
    ],
)
def test_ordinary_rows_of_known_families_pass(chat_of, template, messages):
    tools = TOOLS if CALL in messages and "tools" in template else None
    (*_, encoded) = chat_of(template).encode_conversation(messages, "assistant", tools)
    assert any(encoded.trained)


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (MISTRAL, (USER, {**CALL, "content": "I ask."}, RESULT, ANSWER), "content of message 2"),
        (LLAMA_3, (USER, {**CALL, "content": "Oslo"}, RESULT, ANSWER), "content of message 2"),
        (
            LLAMA_3,
            (USER, {**CALL, "content": USER["content"]}, RESULT, ANSWER),
            "content of message 2",
        ),
        (LLAMA_3, (USER, {**CALL, "content": "9"}, RESULT, ANSWER), "content of message 2"),
        (LLAMA_3, (USER, {**CALL, "content": '"9" '}, RESULT, ANSWER), "content of message 2"),
        (DEEPSEEK, (USER, {**ANSWER, "content": "<think>So.</think>Nine."}), "content of message"),
        (QWEN_3.replace("loop.index0 > ns.last", "false"), (USER, THOUGHT), None),
    ],
)
def test_a_part_that_is_left_out_is_a_bad_row(chat_of, template, messages, message):
    chat = chat_of(template)
    if message is None:  # the template never writes it
        with pytest.raises(ModelError, match="no place for `reasoning_content`"):
            chat.encode_conversation(messages, "assistant")
        return
    with pytest.raises(DataError, match=f"the chat template leaves out the {message}"):
        chat.encode_conversation(messages, "assistant")


@pytest.mark.parametrize(
    ("template", "messages", "what"),
    [
        (WITHOUT_SYSTEM, (SYSTEM, USER, ANSWER), "messages of the system"),
        (PLAIN, (USER, CALL, RESULT, ANSWER), "calls of tools"),
        (LFM_2, (USER, CALL, RESULT, ANSWER), "calls of tools"),
        (PLAIN, (USER, THOUGHT), "`reasoning_content`"),
    ],
)
def test_a_part_that_is_never_written_is_refused_in_training_and_in_use(
    chat_of, template, messages, what
):
    chat = chat_of(template)
    with pytest.raises(ModelError, match=f"has no place for {what}"):
        chat.encode_conversation(messages, "assistant")
    with pytest.raises(ModelError, match=f"has no place for {what}"):
        chat.encode_prompt([*messages, USER])
    assert chat.encode_prompt([USER])


def test_a_row_that_the_template_refuses_is_left_out_and_counted(chat_of):
    rows = [
        Example((USER, ANSWER), None, None, None, "a.jsonl", 1),
        Example((SYSTEM, USER, ANSWER), None, None, None, "a.jsonl", 2),
        Example((USER, USER, ANSWER), None, None, None, "a.jsonl", 3),
    ]
    chat, bad = chat_of(GEMMA), BadRows(2)
    sequences = list(chat.encode_examples(rows, "assistant", bad))
    assert [len(found) for found in sequences] == [1, 0, 0]
    assert bad.count == 2
    for row, hint in ((rows[1], "take the system message out"), (rows[2], "merge messages")):
        with pytest.raises(DataError) as refused:
            list(chat.encode_examples([row], "assistant", BadRows()))
        assert (refused.value.line, refused.value.file) == (row.line, "a.jsonl")
        assert refused.value.hint.startswith(hint)


def test_a_template_that_renders_nothing_is_to_blame_itself(chat_of):
    chat = chat_of("{{ raise_exception('never') }}")
    with pytest.raises(ModelError, match="refuses these messages: never"):
        list(
            chat.encode_examples(
                [Example((USER, ANSWER), None, None, None, "a", 1)], "all", BadRows(9)
            )
        )


def test_a_template_that_writes_nothing_that_is_said_is_to_blame_itself(chat_of):
    with pytest.raises(ModelError, match="does not write what is said"):
        chat_of("{% for m in messages %}<s>{{ m.role }}</s>{% endfor %}").encode_prompt([USER])


def test_a_long_conversation_is_rendered_in_shares(chat_of, monkeypatch):
    """800 exchanges took more than the limit of one request; the limit is of a share."""
    from llmctl.data.chat import sandbox

    sent = []
    request = sandbox._request
    monkeypatch.setattr(sandbox, "_request", lambda text: sent.append(1) or request(text))
    turns = [
        message
        for number in range(800)
        for message in (
            {**USER, "content": f"Number {number}?"},
            {**ANSWER, "content": "Fine. " * 9},
        )
    ]
    (encoded,) = chat_of(PLAIN).encode_conversation(turns, "assistant")
    starts = sum(b and not a for a, b in zip(encoded.trained, encoded.trained[1:], strict=False))
    assert starts == 800
    assert len(sent) > 10


@pytest.mark.parametrize(
    ("said", "missing"),
    [
        (("Oslo?", "Oslo", "It is Oslo."), None),
        (("Is Oslo Oslo?", "Oslo", "Oslo"), 2),
        (("Oslo", "Oslo", "Oslo Oslo Oslo"), None),
    ],
)
def test_words_that_another_part_has_do_not_count_twice(said, missing):
    """The second message is left out of the text, or not."""
    roles = ("user", "assistant", "tool")
    messages = [{"role": r, "content": c} for r, c in zip(roles, said, strict=True)]
    kept = [m["content"] for k, m in enumerate(messages, 1) if k != missing]
    named = missing and f"the content of message {missing}, of the {roles[missing - 1]}"
    for between in ("|", "\n\n"):
        assert missing_part(between.join(kept), messages) == named


def test_reasoning_goes_by_the_name_that_the_template_knows(chat_of):
    """OpenRouter and vLLM call it `reasoning`, Qwen3's template `reasoning_content`."""
    chat = chat_of(QWEN_3)
    (expected,) = chat.encode_conversation((USER, THOUGHT), "assistant")
    named = {**ANSWER, "reasoning": THOUGHT["reasoning_content"]}
    for turn in (named, {**THOUGHT, **named}):
        assert chat.encode_conversation((USER, turn), "assistant") == [expected]
    with pytest.raises(DataError, match="leaves out `reasoning` of message 2"):
        chat.encode_conversation((USER, {**THOUGHT, "reasoning": "Another."}), "assistant")
    with pytest.raises(ModelError, match="no place for `reasoning`"):
        chat_of(PLAIN).encode_conversation((USER, named), "assistant")


def test_json_and_white_space_make_no_difference():
    said = {"role": "tool", "content": '{"a": "é \\n"}\n'}
    escaped = '"{\\"a\\": \\"\\u00e9 \\\\n\\"}"'
    assert missing_part(escaped, [said]) is None
    assert missing_part('{ "a":\n"é \\n" }', [said]) is None
    assert missing_part('{"b": "é"}', [said]) == "the content of message 1, of the tool"


def test_arguments_become_text():
    (call,) = with_text_arguments([CALL])
    assert call["tool_calls"][0]["function"]["arguments"] == '{"city": "Oslo"}'
    assert CALL["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
