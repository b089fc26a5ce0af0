"""The audit finds what is planted, counts it exactly, and shows it without harm."""

import io
import json
import re
import sys
from dataclasses import asdict, replace

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from llmctl.config.commands.audit import AuditConfig
from llmctl.config.commands.sft import SftConfig
from llmctl.console import log, set_up
from llmctl.data.audit.audit import audit, log_summary, require_sound
from llmctl.data.audit.show import (
    SCREEN,
    escape_unprintable,
    mark_trained,
    print_report,
    spans_of,
)
from llmctl.data.bad_rows import BadRows
from llmctl.data.chat.render import ChatFormat
from llmctl.data.examples import Example
from llmctl.data.sft import SftData
from llmctl.data.tokenized import EncodedSequence, collect
from llmctl.errors import DataError
from tests.processes import shown_on_a_terminal
from tests.run_files import write_rows

BOS, EOS, UNK, PAD, START, END, OTHER, WORD = range(8)
NAMES = ("<s>", "</s>", "<unk>", "<pad>", "<|start|>", "<|end|>", "<|other|>", "word")
TEMPLATE = (
    "{% for m in messages %}<|start|> {{ m.role }} {{ m.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|start|> assistant{% endif %}"
)


@pytest.fixture
def tokenizer():
    """Words are tokens."""
    backend = Backend(WordLevel({name: k for k, name in enumerate(NAMES)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens=["<|start|>", "<|end|>", "<|other|>"],
    )
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def model(tmp_path):
    """A folder that says where its generation stops, which is all that is asked of it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS]}))
    return folder


def left_out(count):
    """So many rows that were left out for their errors."""
    bad = BadRows(count)
    for number in range(count):
        bad(DataError("not JSON", file="train.jsonl", line=number + 1))
    return bad


@pytest.fixture
def make(tokenizer):
    """Examples as they would come out of `load_sft_data`."""

    def data(train, val=None, max_length=100, **facts):
        def examples(rows, name):
            text = ({"role": "user", "content": "word"},)
            return [Example(text, None, None, None, name, k + 1) for k in range(len(rows))]

        given = SftData(
            train=collect([row] for row in train).truncated(max_length, "cut"),
            val=None if val is None else collect([row] for row in val),
            train_examples=examples(train, "train.jsonl"),
            val_examples=examples(val or [], "val.jsonl"),
            format=ChatFormat(tokenizer),
            max_length=max_length,
            embedding_rows=len(NAMES),
            added_tokens=(),
            has_conversations=True,
            bad=left_out(0),
            duplicates=0,
            overlap=(),
            shared_prompts=0,
            dropped=0,
            inputs=[],
        )
        return replace(given, **facts)

    return data


@pytest.fixture
def look(model, make):
    """Audit sequences."""

    def report(train, val=None, packing=False, asked=None, **facts):
        config = AuditConfig(data=["train.jsonl"], model=str(model), **(asked or {}))
        return audit(make(train, val, **facts), config, packing=packing)

    return report


def chat(words=1, end=END, trained=True, ends=True, bos=1):
    """A question of one word and an answer of `words` and its end: bos + words + 3 tokens."""
    answer = [WORD] * words + [end]
    tokens = [BOS] * bos + [START, WORD, *answer]
    return EncodedSequence(tokens, [False] * (bos + 2) + [trained] * len(answer), ends and trained)


def found(report):
    return {finding.name: finding.level for finding in report.findings}


def test_sound_examples_have_no_findings(look):
    report = look([chat(1), chat(2), chat(3)], [chat(5)], packing=True)
    assert found(report) == {}
    require_sound(report)


def test_figures_are_those_counted_by_hand(look):
    report = look([chat(1), chat(2), chat(2), chat(11)], [chat(5)])
    figures = asdict(report.train)
    assert figures == {
        "rows": 4,
        "sequences": 4,
        "tokens": 5 + 6 + 6 + 15,
        "tokens_min": 5,
        "tokens_median": 6.0,
        "tokens_p95": 15,
        "tokens_max": 15,
        "full_max": 15,
        "trained_tokens": 2 + 3 + 3 + 12,
        "trained_share": 20 / 32,
        "untrained_rows": 0,
        "truncated_rows": 0,
        "truncated": 0.0,
        "ended_rows": 4,
        "ended_share": 1.0,
        "double_bos": 0,
        "unknown_tokens": 0,
        "unknown_share": 0.0,
        "beyond_embedding": 0,
        "short": 0,
    }
    assert (report.rows, report.val.rows, report.val.tokens) == (5, 1, 9)


def test_the_95th_percentile_is_a_length_that_occurs(look):
    report = look([chat(k) for k in range(1, 101)], max_length=200)
    assert report.train.tokens_p95 == 95 + 4


def test_a_row_of_several_sequences_is_one_row(make, model):
    several = collect([[chat(1), chat(2)], [chat(1, trained=False), chat(1)]])
    data = replace(make([chat(1), chat(1)]), train=several)
    report = audit(data, AuditConfig(data=["train.jsonl"], model=str(model)), packing=False)
    assert (report.train.rows, report.train.sequences) == (2, 4)
    assert (report.train.untrained_rows, report.train.ended_rows) == (0, 2)


def test_all_labels_masked_is_an_error(look):
    report = look([chat(trained=False), chat(trained=False)])
    assert found(report) == {"untrained_rows": "error"}
    assert report.train.ended_share is None
    with pytest.raises(DataError, match="none of 2 rows") as caught:
        require_sound(report)
    assert (caught.value.code, caught.value.file, caught.value.line) == (3, "train.jsonl", 1)


@pytest.mark.parametrize(("count", "level"), [(2, "warning"), (3, "error")])
def test_rows_without_a_trained_token(look, count, level):
    report = look([chat()] * (20 - count) + [chat(trained=False)] * count)
    assert found(report) == {"untrained_rows": level}
    assert report.train.untrained_rows == count
    assert report.findings[0].line == 21 - count


def test_prompts_that_fill_the_length_are_told_from_missing_answers(look):
    long = EncodedSequence([BOS, *[WORD] * 30, END], [False] * 31 + [True], True)
    report = look([long] * 3, max_length=20, asked={"truncation": "cut"})
    assert "raise --max-length" in report.errors[0].hint


def test_an_end_that_is_not_trained_on_is_an_error(look):
    """The labels decide, not what the example claims of itself."""
    masked = chat()._replace(trained=[False] * 3 + [True, False])
    report = look([chat()] * 98 + [masked] * 2)
    assert found(report)["no_end"] == "error"
    assert (report.train.ended_rows, report.train.ended_share) == (98, 0.98)
    assert found(look([chat()] * 99 + [masked])) == {}


def test_an_answer_without_an_end_is_an_error(look):
    report = look([chat(end=WORD, ends=False)] * 4)
    assert found(report) == {"no_end": "error"}
    assert report.turns.open == 4


def test_cut_rows_say_nothing_about_ends(look):
    report = look([chat(1), chat(1), chat(40)], max_length=20, asked={"truncation": "cut"})
    assert found(report) == {"truncated": "warning"}
    assert (report.train.ended_rows, report.train.ended_share) == (2, 1.0)
    assert (report.turns.total, report.turns.open) == (2, 0)


def test_prompts_need_no_end(look):
    report = look([chat(end=WORD, ends=False)] * 4, asked={"train_on": "prompt"})
    assert found(report) == {}


def test_a_turn_may_end_where_the_model_stops_of_old(look, model):
    report = look([chat(end=OTHER)] * 3)
    assert found(report) == {"foreign_end": "error"}
    assert (report.turns.foreign, report.turns.foreign_token) == (3, OTHER)
    assert "<|other|>" in report.findings[0].message
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, OTHER]}))
    assert found(look([chat(end=OTHER)] * 3)) == {}


def test_a_single_foreign_end_among_many_is_a_warning(look):
    assert found(look([chat()] * 99 + [chat(end=OTHER)])) == {"foreign_end": "warning"}


def test_turns_in_the_middle_without_an_end_are_a_warning(look):
    tokens = [BOS, START, WORD, WORD, START, WORD, WORD, END]
    trained = [False, False, False, True, False, False, True, True]
    report = look([EncodedSequence(tokens, trained, True)] * 5)
    assert found(report) == {"open_turns": "warning"}
    assert (report.turns.total, report.turns.open) == (10, 5)
    assert "ends 5 of 10 turns: " in report.findings[0].message


def test_double_bos_is_an_error(look):
    report = look([chat(), chat(bos=2)], [chat(bos=2)])
    assert found(report) == {"double_bos": "error"}
    assert (report.train.double_bos, report.val.double_bos) == (1, 1)
    assert report.findings[0].line == 2
    assert report.findings[0].message.endswith(" 2 of 3 sequences")


@pytest.mark.parametrize(
    ("long", "truncation", "level"),
    [(3, "auto", "error"), (2, "auto", "warning"), (3, "cut", "warning")],
)
def test_truncation(look, long, truncation, level):
    rows = [chat(2)] * (10 - long) + [chat(20)] * long
    report = look(rows, max_length=10, asked={"truncation": truncation})
    assert found(report) == {"truncated": level}
    assert (report.train.truncated_rows, report.train.truncated) == (long, long / 10)
    assert "24" in report.findings[0].hint


def test_nothing_left_to_train_on_is_an_error(look):
    assert found(look([], dropped=3)) == {"no_rows": "error", "dropped": "warning"}


def test_ids_without_an_embedding_are_an_error_unless_they_are_added(look):
    strange = chat()._replace(tokens=[BOS, START, 9, WORD, END])
    report = look([chat(), strange])
    assert found(report) == {"beyond_embedding": "error"}
    assert report.train.beyond_embedding == 1
    assert "up to 9" in report.findings[0].message
    added = look([chat(end=OTHER)], embedding_rows=OTHER, added_tokens=("<|other|>",))
    assert added.train.beyond_embedding == 2  # the words, whose id is higher


def test_overlap_is_an_error(look):
    report = look([chat(), chat()], [chat()], overlap=("train.jsonl:2",))
    assert found(report) == {"overlap": "error"}
    assert (report.findings[0].file, report.findings[0].line) == ("train.jsonl", 2)


def test_validation_must_say_something(look):
    assert found(look([chat()], asked={"val_size": 1})) == {"no_validation": "error"}
    assert found(look([chat()], [])) == {"no_validation": "error"}
    assert found(look([chat()], [chat(trained=False)])) == {"untrained_validation": "error"}


@pytest.mark.parametrize(("count", "level"), [(1, None), (2, "warning"), (21, "error")])
def test_unknown_tokens(look, count, level):
    tokens = [BOS, START, *[UNK] * count, *[WORD] * (97 - count), END]
    report = look([EncodedSequence(tokens, [False] * 99 + [True], True)])
    assert found(report) == ({"unknown": level} if level else {})
    assert (report.train.unknown_tokens, report.train.unknown_share) == (count, count / 100)


def test_a_tokenizer_that_calls_its_end_unknown_has_no_unknown_tokens(look, tokenizer):
    tokenizer.unk_token = "</s>"
    assert look([chat(end=EOS)] * 3).train.unknown_tokens == 0


@pytest.mark.parametrize(
    ("words", "rows", "efficiency"),
    [((0, 1, 1, 4), 2, 22 / 24), ((4, 4, 3), 3, 23 / 36), ((8, 8), 2, 1.0)],
)
def test_packing_efficiency(look, words, rows, efficiency):
    report = look([chat(count) for count in words], packing=True, max_length=12)
    assert (report.packed_rows, report.packing_efficiency) == (rows, efficiency)


def test_packing_leaves_out_what_does_not_train(look):
    rows = [chat(8)] * 10 + [chat(8, trained=False)]
    assert look(rows, packing=True, max_length=12).packed_rows == 10


def test_a_padding_token_that_ends_turns_is_a_warning(look, tokenizer):
    tokenizer.pad_token = "<|end|>"
    assert found(look([chat()])) == {"pad_is_eos": "warning"}


def test_it_is_said_once_on_the_way_from_run_to_run(make, tokenizer, model, tmp_path):
    tokenizer.pad_token = "<|end|>"

    def said(folder, config_class=SftConfig):
        config = config_class(data=["train.jsonl"], model=str(folder))
        return found(audit(make([chat()]), config, packing=False))

    assert said(model) == {"pad_is_eos": "warning"}
    (tmp_path / "manifest.json").write_text("{}")  # the folder is now a run's
    assert said(model) == said(tmp_path) == {}
    assert said(model, AuditConfig) == {"pad_is_eos": "warning"}


@pytest.mark.parametrize("name", ["skipped", "dropped", "shared_prompts", "duplicates"])
def test_what_was_counted_while_reading_is_a_warning(look, name):
    facts = {"bad": left_out(1)} if name == "skipped" else {name: 1}
    assert found(look([chat()] * 50, **facts)) == {name: "warning"}


def test_a_few_duplicates_are_none(look):
    assert found(look([chat()] * 100, duplicates=1)) == {}


def test_a_row_of_one_token_is_a_warning(look):
    report = look([chat()] * 20 + [EncodedSequence([BOS], [False], False)])
    assert found(report) == {"untrained_rows": "warning", "short": "warning"}


def test_the_error_says_all_that_is_wrong(look):
    report = look([chat(trained=False), chat(bos=2, trained=False)], overlap=("train.jsonl:1",))
    assert list(found(report)) == ["untrained_rows", "double_bos", "overlap"]
    with pytest.raises(DataError) as caught:
        require_sound(report)
    for words in ("none of 2 rows", "BOS twice", "also validates"):
        assert words in caught.value.message


def test_json_holds_every_figure_and_finite_numbers_only(look):
    for rows in ([chat(), chat(bos=2)], []):
        content = look(rows, [chat()], packing=True).as_json()
        again = json.loads(json.dumps(content, allow_nan=False))
        assert again == content
    assert {"rows", "train_rows", "tokens_p95", "ended_share", "val", "findings"} <= set(content)


def test_a_run_hears_the_summary_and_each_warning_in_a_line(look, capsys):
    set_up()
    log_summary(look([chat()] * 3, bad=left_out(2), packing=True, max_length=5))
    log.handlers = []
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "3 rows to train on, 0 to validate; 15 tokens" in lines[0]
    assert "40.0 % of the tokens trained on" in lines[1]
    assert "100.0 % full" in lines[1]
    assert lines[2].startswith("warning: ")


def test_the_example_has_its_trained_tokens_marked(make):
    data = make([chat(2)])
    assert mark_trained(spans_of(data, 0)) == "<s> <|start|> word« word word <|end|>»"


def test_a_long_example_is_cut_to_a_screen_and_its_answer_stays(make):
    tokens = [BOS, START, *[WORD] * 3000, WORD, END]
    data = make([EncodedSequence(tokens, [False] * 3002 + [True, True], True)], max_length=5000)
    text = mark_trained(spans_of(data, 0))
    assert len(text) < SCREEN
    assert "characters" in text
    assert text.endswith("« word <|end|>»")
    turns = EncodedSequence([START, WORD] * 4000, [False, True] * 4000, True)
    text = mark_trained(spans_of(make([turns], max_length=9000), 0))
    assert len(text) < 2 * SCREEN
    assert text.endswith("[…]")


def test_nothing_that_a_terminal_obeys_is_printed():
    hostile = "a\x1b[31mb\x07\r\x9b2J\u202e\u200b\ud800\n\tz"
    text = escape_unprintable(hostile)
    assert text == "a\\x1b[31mb\\x07\\r\\x9b2J\\u202e\\u200b\\ud800⏎\n\\tz"
    assert all(c.isprintable() or c == "\n" for c in text)


def test_a_pipe_gets_plain_aligned_text(look, make, model, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    data = make([chat(2), chat(bos=2)], [chat()])
    config = AuditConfig(data=["train.jsonl"], model=str(model))
    print_report(audit(data, config, packing=True), data)
    text = out.getvalue()
    assert "\x1b" not in text
    lines = text.splitlines()
    rows = lines[: lines.index("")]
    training = lines[0].index("training") + len("training")
    assert all(line[training - 1] != " " for line in rows)
    assert any(line.startswith("error: train.jsonl:2: BOS twice") for line in lines)
    assert lines[-1] == "<s> <|start|> word« word word <|end|>»"


# From here on by way of the command line, on a model that was really made.


@pytest.fixture
def chats(tmp_path):
    rows = [
        {"prompt": f"What is {k}?", "completion": f"It is {k}, and not {k + 1}."} for k in range(40)
    ]
    return write_rows(tmp_path / "chats.jsonl", rows)


def test_the_command_prints_a_report(cli, base, chats):
    result = cli("audit", chats, "--model", base, "--truncation", "cut")
    assert result.code == 0, result.err
    assert "whole rows whose end is trained on" in result.out
    assert re.search(r"«.*<\|im_end\|>»|warning: .*lose their end", result.out)


def test_the_command_prints_one_object(cli, base, corpus):
    text = ("audit", corpus, "--model", base, "--truncation", "cut", "--val-size", 40, "--json")
    result = cli(*text)
    assert result.code == 0, result.err
    content = json.loads(result.out)
    assert (content["stage"], content["rows"], content["val"]["rows"]) == ("audit", 400, 40)
    result = cli(*text, "--val-data", corpus)
    assert result.code == 2
    result = cli("audit", corpus, "--model", base, "--val-data", corpus, "--json")
    assert result.code == 3
    content = json.loads(result.out)
    assert content["error"]["code"] == 3
    assert {"overlap"} <= {finding["name"] for finding in content["findings"]}
    assert "also validates" in result.err


BAD = {
    "double bos": "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m.content }}"
    "{{ eos_token }}{% endfor %}",
    "trained on and stops": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("command", ["audit", "sft"])
def test_a_template_that_would_break_the_model_is_refused(cli, base, tmp_path, what, command):
    (tmp_path / "bad.jinja").write_text(BAD[what])
    rows = [{"prompt": "Hi", "completion": "Yes."}] * 3
    data = write_rows(tmp_path / "few.jsonl", rows)
    given = (data,) if command == "audit" else ("--data", data, "-o", tmp_path / "run")
    result = cli(command, *given, "--model", base, "--chat-template", tmp_path / "bad.jinja")
    assert result.code == 3, result.err
    assert what in result.err.lower().replace("bos twice", "double bos")
    assert not (tmp_path / "run" / "model").exists()


def test_a_terminal_gets_colour_and_no_orders(base, tmp_path, monkeypatch):
    rows = [{"prompt": "Hi \u001b]0;owned\u0007", "completion": "Yes \u001b[2J."}] * 2
    data = write_rows(tmp_path / "few.jsonl", rows)
    monkeypatch.delenv("NO_COLOR", raising=False)
    command = ("audit", data, "--model", base, "--truncation", "cut")
    text = shown_on_a_terminal(*command, TERM="xterm-256color", COLUMNS="200")
    assert re.search(r"\x1b\[[0-9;]*4[0-9;]*m", text), "nothing underlined"
    assert "\\x1b]0;owned\\x07" in text
    assert not re.search(r"\x1b(?!\[[0-9;]*m)", text), "an escape that is not a colour"


def test_a_recipe_says_what_to_audit(cli, base, tmp_path):
    recipe = tmp_path / "audit.yaml"
    recipe.write_text(f"stage: audit\nmodel: {base}\ndata: ['builtin:tasks']\ntruncation: cut\n")
    result = cli("audit", "-c", recipe, "--json")
    assert json.loads(result.out)["stage"] == "audit", result.err


def test_one_example_of_each_shape_or_the_one_asked_for(cli, roomy, tmp_path):
    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
    system = {"role": "system", "content": "Be kind."}
    rows = [[user, answer], [user, answer], [system, user, answer], [user, answer] * 2]
    file = write_rows(tmp_path / "a.jsonl", [{"messages": messages} for messages in rows])
    run = ("audit", file, "--model", roomy, "--val-size", 0)
    shown = re.findall(r"^example \S+:(\d+),", cli(*run).out, re.MULTILINE)
    assert shown == ["1", "3", "4"]
    shown = re.findall(r"^example \S+:(\d+),", cli(*run, "--example", 2).out, re.MULTILINE)
    assert shown == ["2"]
    result = cli(*run, "--example", 5)
    assert (result.code, "no such example, of the 4 that train" in result.err) == (2, True)
