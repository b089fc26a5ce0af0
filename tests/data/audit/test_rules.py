"""Every command that reads rows keeps the same rules, as the table of the docs says."""

import re
import shutil

import pytest

from llmctl.cli import COMMANDS
from llmctl.data.audit.rule_table import NO_ROWS, READERS, RULES
from llmctl.data.audit.rules import RowRules, texts_of
from llmctl.data.rendered import frame_of
from tests.conftest import sentences
from tests.run_files import write_rows

COUNT = 40


def test_no_command_is_missing_from_the_table():
    readers = {reader.split()[0] for reader in READERS}
    assert readers | set(NO_ROWS) == set(COMMANDS)
    assert not readers & set(NO_ROWS)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_has_an_answer_or_a_reason_for_each(rule):
    assert set(rule.refused_by) <= set(READERS)
    assert set(rule.warned_by) <= set(READERS) - set(rule.refused_by)
    rest = set(READERS) - set(rule.refused_by) - set(rule.warned_by)
    assert bool(rest) == bool(rule.reason)
    assert [rule.answer(reader) for reader in rule.refused_by] == ["refuse"] * len(rule.refused_by)


@pytest.fixture(scope="module")
def judge(cli, roomy, tmp_path_factory):
    """A reward model of a few steps."""
    out = tmp_path_factory.mktemp("judge") / "run"
    rows = [{"prompt": a, "chosen": a, "rejected": b} for a, b in pairs()]
    file = write_rows(out.parent / "pairs.jsonl", rows)
    result = cli("reward", "--model", roomy, "--data", file, "--max-steps", 1, "-o", out, "-q")
    assert result.code == 0, result.err
    return out


def pairs():
    lines = sentences(2 * COUNT, seed=3)
    return list(zip(lines[::2], lines[1::2], strict=True))


@pytest.fixture
def run(cli, roomy, judge, tmp_path):
    """Run a reader on texts, in the columns that it takes."""

    def read(reader, spoil, share=1.0, more=()):
        rows = [
            {
                "prompt": spoil(a) if number < share * COUNT else a,
                "response": b,
                "chosen": b,
                "rejected": a + " No.",
                "text": spoil(a) if number < share * COUNT else a,
                "label": "xy"[number % 2],
            }
            for number, (a, b) in enumerate(pairs())
        ]
        columns = {
            "sft --task classify": ("text", "label"),
            "tokenize": ("text",),
            "generate": ("prompt",),
            "rank": ("prompt",),
            **dict.fromkeys(("reward", "dpo"), ("prompt", "chosen", "rejected")),
        }.get(reader, ("prompt", "response"))
        file = write_rows(
            tmp_path / "rows.jsonl",
            [{**{key: row[key] for key in columns}, **dict(more)} for row in rows],
        )
        model, out = ("--model", roomy), ("-o", tmp_path / f"out-{share}-{len(rows[0]['prompt'])}")
        quick = (*out, "--dry-run")
        name, *flags = reader.split()
        whole = {
            "tokenize": ("--tokenizer", roomy, "--data", file, "--val-fraction", 0, *out),
            "audit": (file, *model),
            "ppo": (*model, "--data", file, "--reward-rule", "length:5", *quick),
            "evaluate": (*model, "--data", file, "--metrics", "exact", *quick),
            "reward --score": (file, "--model", judge, "--dry-run"),
            "rank": (*model, "--data", file, "--annotator", "a", *quick),
            "generate": (*model, "--prompts-file", file, "--max-new-tokens", 2, "--json"),
            "quantize": (*model, "--data", file, "--dtype", "bf16", *quick),
        }.get(reader, (*model, "--data", file, *quick))
        return cli(name, *flags, *whole)

    return read


UNREAD = next(rule for rule in RULES if rule.name == "unread_columns")
FILE_READERS = [reader for reader in READERS if reader not in ("chat", "quantize")]
RENDERED = next(rule for rule in RULES if rule.name == "rendered")
LOST = next(rule for rule in RULES if rule.name == "lost")


@pytest.mark.parametrize("token", ["<|eos|>", "<|im_start|>", "<s>[INST]"])
@pytest.mark.parametrize("reader", FILE_READERS)
def test_texts_that_were_rendered_before(run, reader, token):
    """Also with the tokens of a template that the model does not have."""
    answer = RENDERED.answer(reader)
    few = run(reader, lambda text: f"{token}{text}", share=0.05)
    assert few.code == 0, few.err
    result = run(reader, lambda text: f"{token}{text}")
    assert result.code == (3 if answer == "refuse" else 0), result.err
    if answer == "refuse":
        assert "special tokens, as letters, begin or end texts" in result.err
    elif answer == "warn":
        assert result.err.count(f"spells special tokens ({token}), which are text here") == 1


@pytest.mark.parametrize("reader", FILE_READERS)
def test_turns_of_llama_2_are_text_but_in_another_template(run, reader):
    """In a vocabulary that has no such token a whole text in that form is what it should be."""
    result = run(reader, lambda text: f"[INST] {text} [/INST]")
    refuses = RENDERED.answer(reader) == "refuse" and reader != "sft --task classify"
    assert result.code == (3 if refuses else 0), result.err
    says = refuses or reader == "rank"  # a prompt is only text to `generate` without --chat
    assert ("special tokens" in result.err) == says, result.err


@pytest.mark.parametrize("reader", FILE_READERS)
def test_characters_that_the_tokenizer_loses(run, reader, judge, monkeypatch):
    from llmctl.data.tokenizer import lost

    monkeypatch.setattr(lost.LostCharacters, "_loses", True)
    monkeypatch.setattr(lost.LostCharacters, "_bytes", b"Z")
    answer = LOST.answer(reader)
    few = run(reader, lambda text: f"{text} Z")
    assert few.code == 0, few.err
    assert few.err.count('characters have no token and are lost, such as "Z"') == (
        0 if reader == "audit" else 1
    )
    result = run(reader, lambda text: "Z" * 2 * len(text) + text)
    assert result.code == (3 if answer == "refuse" else 0), result.err
    assert "characters have no token and are lost" in result.err


RENDERED_BY = {
    "Mistral": ("<s>[INST] Hi? [/INST]", "Ho</s>"),
    "Llama 2": ("<s>Hi?", "Ho </s>"),
    "Llama 3": ("<|begin_of_text|>Hi?", "Ho<|eot_id|>"),
    "DeepSeek": (
        "<\uff5cbegin\u2581of\u2581sentence\uff5c>Hi?<\uff5cAssistant\uff5c>",
        "Ho<\uff5cend\u2581of\u2581sentence\uff5c>",
    ),
    "gpt-oss": ("<|start|>user<|message|>Hi?<|end|>", "<|channel|>final<|message|>Ho<|return|>"),
    "Command R": ("<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi?", "Ho<|END_OF_TURN_TOKEN|>"),
    "Zephyr": ("<|user|>\nHi?</s>\n<|assistant|>", "Ho</s>\n"),
    "GLM": ("[gMASK]<sop><|user|>\nHi?<|assistant|>", "\nHo<|user|>"),
    "Granite": ("<|start_of_role|>user<|end_of_role|>Hi?", "Ho<|end_of_text|>"),
    "GPT": ("Hi?", "Ho<|endoftext|>"),
}
"""A prompt and its response as these families' templates write them."""


@pytest.mark.parametrize("sides", RENDERED_BY.values(), ids=RENDERED_BY)
def test_the_tokens_of_other_families_are_known(roomy, sides):
    from llmctl.models.loading import load_tokenizer

    tokenizer = load_tokenizer(str(roomy))
    for texts, level in ((sides, "error"), (sides[1:], "error"), (["Hi?", "Ho"], None)):
        rules = RowRules(tokenizer)
        rules.see(texts, "a.jsonl", 3)
        found = [(f.level, f.name, f.file, f.line) for f in rules.findings()]
        assert found == ([] if level is None else [(level, "rendered", "a.jsonl", 3)])


@pytest.mark.parametrize(
    ("text", "frame"),
    [
        ("<s>Hi</s>", ["<s>", "</s>"]),
        (" <s> Hi\n", ["<s>"]),
        ("Hi </s>\n", ["</s>"]),
        ("<s>$9</s> now $7", []),
        ("Now <s>$7</s>", []),
        ("<s>$9</s> or <s>$7</s>", []),
        ("A line </s> within", []),
        ("", []),
    ],
)
def test_words_struck_out_in_html_are_no_frame(text, frame):
    assert frame_of(text) == frame


TOLD = ("content", "reasoning_content", "argument", "name of an argument", "schema")


def told(where, text):
    """A row with a text in one place."""
    call = {
        text if where == "name of an argument" else "city": text if where == "argument" else "Oslo",
        "days": [1, True, None],
    }
    turn = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": call}}],
    }
    turn |= {where: text} if where in turn or where == "reasoning_content" else {}
    schema = {"description": text if where == "schema" else "A call."}
    return {"messages": [{"role": "user", "content": "Hi"}, turn], "tools": [schema]}


@pytest.mark.parametrize("where", TOLD)
def test_all_texts_of_a_row_are_looked_at(roomy, where):
    from llmctl.models.loading import load_tokenizer

    row = told(where, "<|im_start|>Hm")
    texts = texts_of(row["messages"], tools=row["tools"])
    assert "<|im_start|>Hm" in texts
    assert {"Hi", "f", "Oslo"} - set(texts) <= ({"Oslo"} if where == "argument" else set())
    rules = RowRules(load_tokenizer(str(roomy)))
    rules.see(texts, "a.jsonl", 1)
    assert [finding.name for finding in rules.findings()] == ["rendered"]


READS_CHATS = tuple(r for r in READERS if r not in ("tokenize", "sft --task classify", "chat"))
HAS_TEMPLATE_FLAG = ("audit", "sft", "reward", "dpo", "ppo")
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
WITHOUT_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def chats(cli, roomy, judge, tmp_path):
    """Run a reader on conversations, of which one, or each, has these messages first."""

    def read(reader, template, first, *flags, only=None):
        folder = tmp_path / f"model-{reader.replace(' ', '')}"
        shutil.copytree((judge if "--score" in reader else roomy) / "model", folder)
        (folder / "chat_template.jinja").unlink()
        if template:
            (folder / "chat_template.jinja").write_text(template)
        rows = []
        for number, (asked, answer) in enumerate(pairs(), start=1):
            turns = [*(first if only in (None, number) else ()), {"role": "user", "content": asked}]
            sides = {"chosen": answer, "rejected": answer + " No."}
            said = {"messages": [*turns, {"role": "assistant", "content": answer}]}
            rows.append({"prompt": turns, **sides} if reader in ("reward", "dpo") else said)
        file = write_rows(tmp_path / "rows.jsonl", rows)
        name, *more = reader.split()
        out = ("-o", tmp_path / f"out-{name}", "--dry-run")
        data = {
            "audit": (file,),
            "ppo": ("--data", file, "--reward-rule", "length:5", *out),
            "evaluate": ("--data", file, "--metrics", "exact", *out),
            "reward --score": (file, "--dry-run"),
            "rank": ("--data", file, "--annotator", "a", *out),
            "generate": ("--prompts-file", file, "--max-new-tokens", 2, "--json"),
            "quantize": ("--data", file, "--dtype", "bf16", *out),
        }.get(reader, ("--data", file, *out))
        result = cli(name, *more, *data, "--model", folder, *flags)
        return result, file

    return read


@pytest.mark.parametrize("reader", READS_CHATS)
def test_a_row_that_the_template_refuses_has_a_place(chats, reader):
    result, file = chats(reader, ALTERNATING, [{"role": "user", "content": "Hm."}], only=9)
    assert result.code == 3, result.err
    assert f"{file}:9: the chat template refuses these messages: roles must" in result.err
    assert ("--chat-template" in result.err) == (reader in HAS_TEMPLATE_FLAG), result.err


@pytest.mark.parametrize("reader", ["audit", "sft", "reward", "dpo", "ppo", "evaluate"])
def test_such_rows_are_counted_and_left_out(chats, reader):
    first = [{"role": "user", "content": "Hm."}]
    result, file = chats(reader, ALTERNATING, first, "--skip-bad-rows", 1, only=9)
    assert result.code == 0, result.err
    if reader != "audit":
        assert f"left out 1 row that cannot be used, the first: {file}:9: " in result.err


@pytest.mark.parametrize("reader", READS_CHATS)
def test_what_the_template_has_no_place_for_has_a_place_in_the_data(chats, reader):
    result, file = chats(reader, WITHOUT_SYSTEM, [{"role": "system", "content": "Be brief."}])
    assert result.code == 4, result.err
    assert f"{file}:1: the chat template has no place for messages of the system" in result.err
    assert ("--chat-template" in result.err) == (reader in HAS_TEMPLATE_FLAG), result.err
    assert "at the head of the user's turn" in result.err


@pytest.mark.parametrize("reader", ["generate", "rank", "evaluate", "quantize", "ppo"])
def test_a_conversation_without_a_template_is_called_one(chats, reader):
    first = [{"role": "user", "content": "Hm."}, {"role": "assistant", "content": "Yes?"}]
    result, file = chats(reader, None, first)
    assert result.code == (3 if reader == "ppo" else 4), result.err
    what = "a conversation, and this model has no chat template"
    assert re.search(rf"{re.escape(str(file))}:\d+: {what}", result.err), result.err
    assert "drop --chat" not in result.err


@pytest.mark.parametrize("has_template", [True, False])
def test_a_hint_at_chat_is_given_where_there_is_a_template(cli, roomy, tmp_path, has_template):
    shutil.copytree(roomy / "model", tmp_path / "model")
    if not has_template:
        (tmp_path / "model" / "chat_template.jinja").unlink()
    prompt = ("--prompt", "<|eos|>Hi", "--dry-run")
    result = cli("generate", "--model", tmp_path / "model", *prompt)
    assert "the prompt spells special tokens (<|eos|>), which are text here" in result.err
    assert ("--chat puts a prompt into the template" in result.err) == has_template


def test_no_template_is_named_that_does_not_write_the_part():
    """None of llmctl's own writes tools, calls or reasoning."""
    from llmctl.data.chat.remedies import BOTH_FLAGS, Remedies

    remedies = Remedies(frozenset(BOTH_FLAGS))
    for kind in ("tools", "tool_calls", "tool", "reasoning_content"):
        assert "chatml" not in remedies.no_place(kind)
        assert "--chat-template FILE" in remedies.no_place(kind)
    assert "chatml" in remedies.no_place("system")


@pytest.mark.parametrize("reader", UNREAD.warned_by)
def test_columns_that_nothing_reads_are_named_once(run, reader):
    result = run(reader, str, more={"topic": "x", "notes": "y", "empty": ""})
    assert result.code == 0, result.err
    assert result.err.count("columns not read: `notes`, `topic`\n") == 1, result.err
