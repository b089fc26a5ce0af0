"""`llmctl rank`: what is asked and kept, in the terminal and by the page's server; refusals."""

import errno
import http.client
import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from llmctl.data import append_log
from llmctl.data.append_log import open_append_log
from llmctl.data.prompts import PromptExample
from llmctl.errors import OutputError, ResourceError, UserError
from llmctl.feedback import generation, session
from llmctl.feedback.answers import check_answer_row, open_answers
from llmctl.feedback.question_queue import QuestionQueue
from llmctl.feedback.questions import Entry, Question, is_ranking, read_entries
from llmctl.feedback.server import BODY_BYTES, listen, serving
from llmctl.feedback.session import Session
from llmctl.feedback.terminal_session import parse_order
from tests.conftest import pipe
from tests.run_files import read_rows, rows_in, write_rows

ROWS = [
    {"prompt": "Name a fruit.", "responses": ["apple", "stone", "pear", "chair"]},
    {"messages": [{"role": "user", "content": "2+2?"}], "responses": ["4", "5", "four"]},
    {"prompt": "Say hi.", "responses": ["hi", "bye"]},
]
SAMPLED = ("--max-new-tokens", 8, "--threads", 1, "--seed", 5)


@pytest.fixture
def data(tmp_path) -> Path:
    return write_rows(tmp_path / "data.jsonl", ROWS)


@pytest.fixture
def rank(cli, monkeypatch, tmp_path):
    """Rank in the terminal, with lines from a pipe; answers go to out.jsonl."""

    def run(data: Path, *lines: str, options=(), annotator="Ada", out=tmp_path / "out.jsonl"):
        pipe(monkeypatch, *lines)
        named = ("--annotator", annotator) if annotator else ()
        return cli("rank", "--data", data, "-o", out, "--terminal", *named, *options)

    return run


def shown_in(err: str) -> list[list[str]]:
    """The responses of each question that was shown, in order (of one line each)."""
    return [re.findall(r"^\[\d\]\n(.*)$", part, re.M) for part in err.split("\n--- ")[1:]]


# What is kept


def test_ranks_are_those_of_the_texts_picked(rank, data, tmp_path):
    result = rank(data, "2 1=3 4", "3", "1=2")
    assert result.code == 0, result.err
    assert result.out == f"{tmp_path / 'out.jsonl'}\n"
    found = read_rows(tmp_path / "out.jsonl")
    orders = shown_in(result.err)[:3]
    for row, order, ranks in zip(found, orders, [[2, 1, 2, 3], [2, 2, 1], [1, 1]], strict=True):
        assert sorted(order) == sorted(row["responses"])
        assert dict(zip(row["responses"], row["ranks"], strict=True)) == dict(
            zip(order, ranks, strict=True)
        )
        assert list(row) == ["prompt", "responses", "ranks", "annotator", "time"]
        assert row["annotator"] == "Ada"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", row["time"])
    assert [row["prompt"] for row in found] == ["Name a fruit.", ROWS[1]["messages"], "Say hi."]
    assert [row["responses"] for row in found] == [row["responses"] for row in ROWS]


def test_the_result_counts(rank, data):
    result = rank(data, "s", "1", options=["--json"])
    counts = {"answered": 1, "skipped": 1, "identical": 0, "remaining": 1}
    assert json.loads(result.out).items() >= {"stage": "rank", **counts}.items()
    again = rank(data, "q", options=["--json"])
    assert json.loads(again.out).items() >= counts.items()


def test_starting_again_goes_on(rank, data, tmp_path):
    rank(data, "1 2", "q", "2")
    assert len(read_rows(tmp_path / "out.jsonl")) == 1
    second = rank(data, "s")
    assert "Name a fruit." not in second.err
    assert "2 of 3" in second.err
    assert read_rows(tmp_path / "out.jsonl")[1]["ranks"] is None
    third = rank(data, "2")
    assert shown_in(third.err) == [sorted(ROWS[2]["responses"], key=shown_in(third.err)[0].index)]
    assert "2+2?" not in third.err, "what was skipped does not come again"
    assert "all is answered" in rank(data).err


def test_everybody_is_asked_everything_in_an_order_of_their_own(rank, tmp_path):
    rows = [{"prompt": f"{i}", "responses": ["a", "b", "c", "d"]} for i in range(12)]
    data = write_rows(tmp_path / "many.jsonl", rows)
    ada, bob = (rank(data, *["1"] * 12, annotator=name) for name in ("Ada", "Bob"))
    again = rank(data, *["1"] * 12, out=tmp_path / "again.jsonl")
    orders = [shown_in(result.err) for result in (ada, bob, again)]
    assert len(orders[0]) == 12
    assert orders[0] == orders[2]
    assert sum(a != b for a, b in zip(orders[0], orders[1], strict=True)) > 6
    assert len({tuple(order) for order in orders[0]}) > 6
    assert {row["annotator"] for row in read_rows(tmp_path / "out.jsonl")} == {"Ada", "Bob"}
    assert len(read_rows(tmp_path / "out.jsonl")) == 24


def test_a_name_is_one_in_every_form_of_unicode(rank, data, tmp_path):
    """Composed or not, with spaces around it or none: the same person, who goes on."""
    composed, apart = "Ren\u00e9", "Rene\u0301"
    rank(data, "1", "q", annotator=f"  {apart} ")
    (row,) = read_rows(tmp_path / "out.jsonl")
    assert row["annotator"] == composed
    (tmp_path / "out.jsonl").write_text(json.dumps({**row, "annotator": apart}) + "\n")
    result = rank(data, "1", "q", annotator=composed)
    assert result.code == 0, result.err
    assert [row["prompt"] for row in read_rows(tmp_path / "out.jsonl")] == [
        row["prompt"],
        ROWS[1]["messages"],
    ]
    (tmp_path / "out.jsonl").write_text(json.dumps({**row, "annotator": apart}) + "\n")
    rank(data, "u", "q", annotator=composed)
    assert read_rows(tmp_path / "out.jsonl") == [], "and takes the own answer back"


def test_undo_leaves_the_file_as_it_was(rank, data, tmp_path):
    out = tmp_path / "out.jsonl"
    rank(data, "1")
    before = out.read_bytes()
    result = rank(data, "2", "u", "q")
    assert out.read_bytes() == before
    assert result.err.count("2+2?") == 2
    assert "2 of 3" in rank(data, "u", "u", "1", "s").err, "also over a restart"
    assert [row["ranks"] is None for row in read_rows(out)] == [False, True]


def test_nobody_takes_back_what_is_not_theirs(rank, data, tmp_path):
    out = tmp_path / "out.jsonl"
    rank(data, "1")
    before = out.read_bytes()
    assert "nothing to take back" in rank(data, "u", annotator="Bob").err
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": "?", "responses": ["x", "y"]}])
    assert "nothing to take back" in rank(other, "u").err, "nor what is not asked here"
    assert out.read_bytes() == before


def test_the_last_answer_can_be_taken_back(rank, data, tmp_path):
    result = rank(data, "1", "1", "1", "u", "2")
    assert result.code == 0
    assert len(read_rows(tmp_path / "out.jsonl")) == 3
    assert result.err.count("Say hi.") == 2


def test_texts_that_look_alike_are_one(rank, tmp_path):
    rows = [
        {"prompt": "all", "responses": ["a", "a ", "\na"]},
        {"prompt": "some", "responses": ["a", "b", " a", "c"]},
    ]
    data = write_rows(tmp_path / "alike.jsonl", rows)
    result = rank(data, "2 1 3", options=["--json"])
    assert json.loads(result.out)["identical"] == 1
    (row,) = read_rows(tmp_path / "out.jsonl")
    assert len(shown_in(result.err)[0]) == 3
    assert row["ranks"][0] == row["ranks"][2]
    assert sorted({*row["ranks"]}) == [1, 2, 3]


def test_answers_can_be_asked_again(rank, data, tmp_path):
    """A file of answers is data for a second opinion, and takes it."""
    rank(data, "1", "s", "2")
    out = tmp_path / "out.jsonl"
    result = rank(out, "1", "1", "1", annotator="Bob")
    assert result.code == 0, result.err
    assert [row["annotator"] for row in read_rows(out)] == ["Ada"] * 3 + ["Bob"] * 3
    assert "all is answered" in rank(out, annotator="Bob").err


@pytest.mark.parametrize(
    ("line", "ranks"),
    [
        ("2 1=3 4", [2, 1, 2, 3]),
        ("21=34", [2, 1, 2, 3]),
        ("2 > 1 = 3 > 4", [2, 1, 2, 3]),
        ("2,1=3", [2, 1, 2, 3]),
        ("3", [2, 2, 1, 2]),
        ("1=2=3=4", [1, 1, 1, 1]),
        ("4321", [4, 3, 2, 1]),
    ],
)
def test_a_line_is_an_order(line, ranks):
    assert parse_order(line, 4) == ranks
    assert is_ranking(ranks, 4)


@pytest.mark.parametrize("line", ["5", "0", "11", "1=", "=1", "1==2", "a", "1 b", "1=1", ">", "²"])
def test_a_line_that_is_none_is_refused(line):
    with pytest.raises(UserError):
        parse_order(line, 4)


@pytest.mark.parametrize("ranks", [[1, 3], [0, 1], [2, 2], [1], [1, 2, 3], [True, 2], ["1", 2], 1])
def test_what_are_no_ranks(ranks):
    assert not is_ranking(ranks, 2)


@pytest.mark.parametrize("name", ["p.csv", "p.tsv", "p.ndjson", "p.json", "p.JSONL", "p"])
def test_prompts_are_read_as_what_the_file_holds(tmp_path, name):
    rows = [{"prompt": "First, then?", "id": "1"}, {"prompt": "[Second]", "id": "2"}]
    table = {"csv": ",", "tsv": "\t"}.get(name[2:])
    if table:
        lines = [table.join(cells) for cells in (("prompt", "id"), ('"First, then?"', "1"))]
        (tmp_path / name).write_text("\n".join([*lines, table.join(("[Second]", "2"))]))
    elif name == "p.json":
        (tmp_path / name).write_text(json.dumps(rows, indent=1))
    else:
        write_rows(tmp_path / name, rows)
    prompts = [entry.example.prompt for entry in read_entries(tmp_path / name)]
    assert prompts == ["First, then?", "[Second]"]
    (tmp_path / "lines").write_text("prompt, or not\n\n{second}\n")
    prompts = [entry.example.prompt for entry in read_entries(tmp_path / "lines")]
    assert prompts == ["prompt, or not", "{second}"]


def test_a_wrong_line_is_said_and_asked_again(rank, data, tmp_path):
    result = rank(data, "7", "?", "1")
    assert "there is no response 7" in result.err
    assert "tie" in result.err
    assert len(read_rows(tmp_path / "out.jsonl")) == 1


def test_nothing_that_a_terminal_obeys_is_shown(rank, tmp_path):
    rows = [{"prompt": "\x1b]0;pwned\x07", "responses": ["\x1b[2Jgone", "\x9b31mred"]}]
    data = write_rows(tmp_path / "hostile.jsonl", rows)
    result = rank(data, "1")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", result.err)
    assert "gone" in result.err
    assert read_rows(tmp_path / "out.jsonl")[0]["responses"] == rows[0]["responses"]


# Safe


def test_an_answer_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    events = []

    def spy(name):
        real = getattr(os, name)
        monkeypatch.setattr(
            append_log.os, name, lambda fd, *rest: (events.append(name), real(fd, *rest))[1]
        )

    with open_answers(tmp_path / "a.jsonl", "Ada") as answers:
        for name in ("write", "fsync", "ftruncate"):
            spy(name)
        answers.add(Question("p", ("a", "b")), [1, 2])
        assert events == ["write", "fsync"]
        answers.remove_last()
        assert events[2:] == ["ftruncate", "fsync"]
    assert (tmp_path / "a.jsonl").read_bytes() == b""


def test_a_row_that_was_cut_off_goes(rank, data, tmp_path):
    out = tmp_path / "out.jsonl"
    rank(data, "1", "2")
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(1, len(lines[1]) - 1, 23):
        out.write_bytes(lines[0] + lines[1][:cut])
        with open_append_log(out, check_answer_row) as found:
            assert len(found.rows) == 1
        assert out.read_bytes() == lines[0]
    out.write_bytes(whole[:-1])  # all but the newline
    assert "3 of 3" in rank(data, "1").err
    assert len(read_rows(out)) == 3


def test_a_full_disk_leaves_no_half_row(tmp_path, monkeypatch):
    path, real = tmp_path / "a.jsonl", os.write
    with open_answers(path, "Ada") as answers:
        answers.add(Question("p", ("a", "b")), [1, 2])
        before = path.read_bytes()

        def half(fd, content):
            if len(content) < 20:
                raise OSError(errno.ENOSPC, "full")
            return real(fd, content[: len(content) // 2])

        monkeypatch.setattr(append_log.os, "write", half)
        with pytest.raises(ResourceError):
            answers.add(Question("q", ("a", "b")), [1, 2])
        monkeypatch.undo()
        assert path.read_bytes() == before
        answers.add(Question("q", ("a", "b")), [2, 1])
    assert [row["ranks"] for row in read_rows(path)] == [[1, 2], [2, 1]]


@pytest.mark.parametrize("change", ["append", "replace", "remove"])
def test_a_file_that_another_program_changed_is_left_alone(tmp_path, change):
    path = tmp_path / "a.jsonl"
    with open_answers(path, "Ada") as answers:
        answers.add(Question("p", ("a", "b")), [1, 2])
        if change == "append":
            path.write_bytes(path.read_bytes() * 2)
        elif change == "replace":
            path.rename(tmp_path / "b.jsonl")
            path.write_bytes((tmp_path / "b.jsonl").read_bytes())
        else:
            path.unlink()
        for act in (answers.remove_last, lambda: answers.add(Question("q", ("a", "b")), None)):
            with pytest.raises(OutputError, match="another program"):
                act()


@contextmanager
def running(data: Path, out: Path, *options: object):
    """`llmctl rank` in a process of its own; its output is binary, stderr unbuffered."""
    command = [sys.executable, "-m", "llmctl", "rank", "--data", data, "-o", out, *options]
    with subprocess.Popen(
        [*map(str, command), "--annotator", "Ada"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process, text: str) -> str:
    read = b""
    while text.encode() not in read:
        piece = process.stderr.read(1)
        assert piece, read.decode()
        read += piece
    return read.decode()


def test_a_kill_loses_no_answer_and_a_second_process_is_refused(rank, data, tmp_path):
    out = tmp_path / "out.jsonl"
    with running(data, out, "--terminal") as process:
        read_until(process, "helps): ")
        process.stdin.write(b"2 1\n")
        read_until(process, "2+2?")
        second = rank(data, "1")
        assert second.code == 3
        assert f"in use by another run (pid {process.pid} on " in second.err
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(read_rows(out)) == 1
    result = rank(data, "1")
    assert result.code == 0
    assert "2 of 3" in result.err
    assert "Name a fruit." not in result.err


def test_ctrl_c_keeps_what_was_answered(data, tmp_path):
    with running(data, tmp_path / "out.jsonl", "--terminal") as process:
        read_until(process, "helps): ")
        process.stdin.write(b"1\n")
        read_until(process, "2+2?")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert out == b""
    assert b"1 of 3 in" in err
    assert b"Traceback" not in err
    assert len(read_rows(tmp_path / "out.jsonl")) == 1


# The model's responses


@pytest.fixture
def prompts(tmp_path) -> Path:
    return write_rows(
        tmp_path / "p.jsonl", [{"prompt": "The cat"}, {"prompt": "A dog"}, {"prompt": "My"}]
    )


def test_responses_are_what_generate_writes_and_stay(rank, cli, roomy, prompts, tmp_path):
    options = ("--model", roomy, "--responses", 3, *SAMPLED)
    result = rank(prompts, "1 2 3", "2", options=options)
    assert result.code == 0, result.err
    generated = cli(
        *("generate", "--model", roomy, "--prompts-file", prompts, "--num-samples", 3, "--chat"),
        *("--json", *SAMPLED),
    )
    texts = [row["response"] for row in rows_in(generated.out)]
    sidecar = tmp_path / "out.responses.jsonl"
    written = read_rows(sidecar)
    assert [text for row in written for text in row["responses"]] == texts[: 3 * len(written)]
    found = read_rows(tmp_path / "out.jsonl")
    assert [row["responses"] for row in found] == [texts[:3], texts[3:6]]
    again = rank(prompts, "1", options=options)
    assert again.code == 0
    assert "The cat" not in again.err
    assert "A dog" not in again.err
    assert read_rows(sidecar)[: len(written)] == written
    assert read_rows(sidecar)[2]["responses"] == texts[6:]
    assert read_rows(tmp_path / "out.jsonl")[2]["responses"] == texts[6:]


def test_what_was_written_is_not_written_again(rank, roomy, prompts, tmp_path, monkeypatch):
    options = ("--model", roomy, "--responses", 2, *SAMPLED)
    assert rank(prompts, "1", "1", "1", options=options).code == 0
    before = (tmp_path / "out.responses.jsonl").read_bytes()
    monkeypatch.setattr(generation, "load_for_generation", None)
    bob = rank(prompts, "1", "1", "1", options=options, annotator="Bob")
    assert bob.code == 0, bob.err
    assert (tmp_path / "out.responses.jsonl").read_bytes() == before
    kept = rank(tmp_path / "out.responses.jsonl", "1", out=tmp_path / "third.jsonl")
    assert kept.code == 0, "the responses are data without a model, too"


def test_responses_of_other_settings_are_refused(rank, roomy, prompts, tmp_path):
    options = ("--model", roomy, "--responses", 2, *SAMPLED)
    assert rank(prompts, "1", "1", "1", options=options).code == 0
    result = rank(prompts, "1", options=(*options, "--temperature", 0.5))
    assert result.code == 3
    assert "another `temperature`: 0.8, not 0.5" in result.err


def test_messages_and_texts_are_put_in_the_template(rank, roomy, tmp_path):
    """Both ask the same, with the noise of the same place; --no-chat asks something else."""
    data = write_rows(tmp_path / "p.jsonl", [{"prompt": "Hi"}])
    messages = write_rows(tmp_path / "m.jsonl", [{"messages": [{"role": "user", "content": "Hi"}]}])
    options = ("--model", roomy, "--responses", 2, *SAMPLED)
    found = []
    for name, file, more in (("a", data, ()), ("b", messages, ()), ("c", data, ["--no-chat"])):
        result = rank(file, "1", options=(*options, *more), out=tmp_path / f"{name}.jsonl")
        assert result.code == 0, result.err
        found.append(read_rows(tmp_path / f"{name}.responses.jsonl")[0]["responses"])
    assert found[0] == found[1] != found[2]


def test_a_model_that_fails_ends_it_in_order(rank, roomy, prompts, tmp_path, monkeypatch):
    real, calls = generation.decode, []

    def fail(*arguments, **options):
        calls.append(None)
        if len(calls) == 2:
            raise MemoryError
        return real(*arguments, **options)

    monkeypatch.setattr(generation, "decode", fail)
    options = ("--model", roomy, "--responses", 2, *SAMPLED)
    result = rank(prompts, "1", "1", "1", options=options)
    assert result.code == 5
    assert "out of memory" in result.err
    assert len(read_rows(tmp_path / "out.jsonl")) == 1
    monkeypatch.undo()


def test_what_a_model_wrote_before_it_failed_is_still_asked(data, tmp_path):
    entries = [*read_entries(data), Entry(PromptExample("unwritten", "p:1"), None)]
    supply = QuestionQueue(entries, {})
    failed = Future()
    failed.set_exception(ResourceError("out of memory"))
    supply.end(failed)
    with open_answers(tmp_path / "a.jsonl", "Ada") as answers, ThreadPoolExecutor(1) as pool:
        ranking = Session(supply, answers, "Ada", 0)
        waiting = pool.submit(ranking.wait_until_finished)
        for _ in range(3):
            assert not waiting.done()
            assert ranking.answer(ranking.current().key, None)
        with pytest.raises(ResourceError):
            waiting.result(timeout=10)


def test_a_person_who_leaves_does_not_wait_for_the_model(rank, roomy, tmp_path, monkeypatch):
    rows = [{"prompt": f"The {i}"} for i in range(300)]
    data = write_rows(tmp_path / "many.jsonl", rows)
    options = ("--model", roomy, "--responses", 2, *SAMPLED)
    assert rank(data, "1", "q", options=options).code == 0
    assert 1 <= len(read_rows(tmp_path / "out.responses.jsonl")) < 250


def test_dry_run_writes_nothing(rank, roomy, prompts, tmp_path):
    result = rank(prompts, options=("--model", roomy, "--dry-run"))
    assert result.code == 0, result.err
    assert result.out.startswith("stage: rank\n")
    assert "would ask Ada 3 of 3 prompts; responses to 3 are still to be written" in result.err
    assert [p.name for p in tmp_path.iterdir()] == ["p.jsonl"]


def test_asking_about_given_responses_loads_nothing_heavy():
    program = "import sys, llmctl.commands.rank; print(*sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert not {"torch", "transformers"} & set(ran.stdout.split())


# Refusals


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"responses": ["a", "b"]}, "data.jsonl:1: no prompt in these columns: `responses`"),
        ({"prompt": "p", "responses": ["a"]}, "data.jsonl:1: one response: nothing to rank"),
        ({"prompt": "p", "responses": []}, "data.jsonl:1: no responses: nothing to rank"),
        ({"prompt": "p", "responses": "ab"}, "`responses` needs a list of texts"),
        ({"prompt": "p", "responses": ["a", 1]}, "`responses` needs a list of texts"),
        ({"prompt": "p", "responses": list("abcdefghij")}, "10 responses; at most 9"),
        ({"prompt": "\ud800", "responses": ["a", "b"]}, "half a surrogate pair"),
    ],
)
def test_rows_that_cannot_be_asked(rank, tmp_path, row, message):
    result = rank(write_rows(tmp_path / "data.jsonl", [row]), "1")
    assert result.code == 3
    assert message in result.err
    assert [p.name for p in tmp_path.iterdir()] == ["data.jsonl"]


def test_usage_is_checked(cli, rank, data, prompts, roomy, tmp_path):
    out = ("-o", tmp_path / "o.jsonl")
    for options, code, message in [
        (("--data", data), 2, "--out is required"),
        (out, 2, "--data is required"),
        (("--data", tmp_path / "none.jsonl", *out), 3, "no such file"),
        (("--data", prompts, *out), 2, "--model is required"),
        (("--data", data, *out, "--responses", 1), 2, "--responses"),
        (("--data", data, *out, "--responses", 10), 2, "--responses"),
        (("--data", data, *out, "--overwrite"), 2, "not replaced"),
        (("--data", data, *out, "--port", 80), 2, "--port does not go with --terminal"),
        (("--data", data, *out, "--annotator", "a\nb"), 2, "expected a name"),
        (("--data", data, "-o", tmp_path), 3, "a directory is in the way"),
        (("--data", data, "-o", tmp_path / "no" / "o.jsonl"), 3, "no such directory"),
        (("--data", prompts, *out, "--model", tmp_path / "no"), 4, "no"),
    ]:
        result = cli("rank", "--terminal", *options)
        assert (result.code, message in result.err) == (code, True), result.err
        assert result.out == ""
    (tmp_path / "empty.txt").write_text("\n\n")
    assert "no prompts" in rank(tmp_path / "empty.txt").err
    long = write_rows(tmp_path / "long.jsonl", [{"prompt": "The cat sees " * 100}])
    result = rank(long, options=("--model", roomy))
    assert result.code == 3
    assert "no room to write" in result.err
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    "content",
    [
        '{"prompt": "p", "chosen": "a", "rejected": "b"}\n',
        '{"prompt": "p", "responses": ["a", "b"], "ranks": [1, 3], "annotator": "x"}\n',
        '{"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]}\n',
        "a note",
        '{"prompts": ',
        "[1]\n",
        '{"prompt": "p"}',
    ],
)
def test_a_file_of_something_else_is_left_alone(rank, data, tmp_path, content):
    out = tmp_path / "out.jsonl"
    out.write_text(content)
    result = rank(data, "1")
    assert result.code == 3
    assert "out.jsonl:1: " in result.err
    assert out.read_text() == content


def test_a_sidecar_of_something_else_is_left_alone(rank, prompts, roomy, tmp_path):
    sidecar = write_rows(tmp_path / "out.responses.jsonl", [{"prompt": "mine"}])
    result = rank(prompts, "1", options=("--model", roomy))
    assert result.code == 3
    assert sidecar.read_text() == '{"prompt": "mine"}\n'
    assert not (tmp_path / "out.jsonl").exists()


def test_a_name_is_needed_where_the_system_has_none(rank, data, monkeypatch):
    def nobody():
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(session.getpass, "getuser", nobody)
    result = rank(data, annotator=None)
    assert result.code == 2
    assert "--annotator is required" in result.err


# The page's server


@pytest.fixture
def served(data, tmp_path):
    """A session and its server: `ask(method, path, body, **headers)` -> status, headers, text."""
    out = tmp_path / "out.jsonl"
    with open_answers(out, "Ada") as answers:
        ranking = Session(QuestionQueue(read_entries(data), {}), answers, "Ada", 0)
        with serving(listen(0), ranking, {"out": str(out), "command": "llmctl reward"}) as url:
            yield Client(url, ranking, out)


class Client:
    def __init__(self, url: str, ranking: Session, out: Path) -> None:
        self.ranking, self.out, self.url = ranking, out, url
        found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/\?token=([\w-]{43})", url)
        self.port, self.token = int(found[1]), found[2]
        self.host = f"127.0.0.1:{self.port}"
        self.cookie = ""

    def ask(self, method: str, path: str, body: object = None, **headers: str | None):
        sent = {"Host": self.host, "Cookie": self.cookie, "Content-Type": "application/json"}
        if method == "POST":
            sent["Origin"] = f"http://{self.host}"
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        if method == "POST":
            sent.setdefault("Content-Length", str(len(content)))
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.putrequest(method, path, skip_host=True)
        for name, value in sent.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders()
        if method == "POST":
            connection.send(content)
        answer = connection.getresponse()
        with closing(connection):
            return answer.status, answer.headers, answer.read().decode()

    def enter(self) -> None:
        status, headers, _ = self.ask("GET", f"/?token={self.token}")
        assert status == 200
        self.cookie = headers["Set-Cookie"].split(";")[0]

    def state(self) -> dict:
        return json.loads(self.ask("GET", "/state")[2])


def test_the_token_works_once_and_becomes_a_cookie(served):
    wrong = served.token[:-1] + ("A" if served.token[-1] != "A" else "B")
    assert served.ask("GET", f"/?token={wrong}")[0] == 403
    assert served.ask("GET", "/")[0] == 403
    assert served.ask("GET", "/state")[0] == 403
    status, headers, text = served.ask("GET", f"/?token={served.token}")
    assert status == 200
    assert headers["Set-Cookie"].endswith("; Path=/; HttpOnly; SameSite=Strict")
    nonce = re.search(r"script-src 'nonce-([\w-]+)'", headers["Content-Security-Policy"])[1]
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; ")
    assert text.count(f'nonce="{nonce}"') == 2
    assert "Name a fruit." not in text
    status, _, text = served.ask("GET", f"/?token={served.token}")
    assert status == 403, "used before"
    assert "once" in text
    served.cookie = headers["Set-Cookie"].split(";")[0]
    assert served.ask("GET", "/")[0] == 200
    assert served.state()["prompt"] == [["prompt", "Name a fruit."]]
    served.cookie = f"{served.cookie.split('=')[0]}=wrong"
    assert served.ask("GET", "/state")[0] == 403
    assert served.ask("POST", "/skip", {})[0] == 403


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80", None, "", "[::1"])
def test_another_name_is_refused(served, host):
    """A site whose name leads to 127.0.0.1 is not this page, whatever it knows."""
    served.enter()
    assert served.ask("GET", "/state", Host=host)[0] == 421
    assert served.ask("POST", "/skip", {"key": served.state()["key"]}, Host=host)[0] == 421
    assert served.out.read_bytes() == b""


@pytest.mark.parametrize(
    "origin", [None, "null", "http://evil.example", "http://127.0.0.1:1", "https://{host}"]
)
def test_another_origin_is_refused(served, origin):
    served.enter()
    key = served.state()["key"]
    sent = origin and origin.format(host=served.host)
    assert served.ask("POST", "/skip", {"key": key}, Origin=sent)[0] == 403
    assert served.out.read_bytes() == b""
    assert served.ask("POST", "/skip", {"key": key})[0] == 200


def test_a_tunnel_may_use_another_port_and_localhost(served):
    served.enter()
    host = "localhost:9999"
    assert served.ask("POST", "/skip", {"key": served.state()["key"]}, Host=host)[0] == 403
    sent = {"Host": host, "Origin": f"http://{host}"}
    assert served.ask("POST", "/skip", {"key": served.state()["key"]}, **sent)[0] == 200


def test_only_this_machine_is_served(served):
    with listen(0) as other:
        assert other.getsockname()[0] == "127.0.0.1"
    with pytest.raises(UserError, match="--port"):
        listen(served.port)


def test_bodies_are_checked(served):
    served.enter()
    key = served.state()["key"]
    for body, headers, status in [
        (b"{", {}, 400),
        (b"[]", {}, 400),
        (b"[" * 2000, {}, 400),
        (b"\xff", {}, 400),
        (b"{}", {"Content_Type": "text/plain"}, 415),
        (b"{}", {"Content_Length": None}, 411),
        (b"{}", {"Content_Length": "-1"}, 411),
        (b"{}", {"Content_Length": str(BODY_BYTES + 1)}, 413),
        (b"{}", {"Content_Length": "9" * 5000}, 413),
        ({"key": key}, {}, 400),
        ({"key": key, "ranks": [1, 2]}, {}, 400),
        ({"key": key, "ranks": [1, 2, 3, 5]}, {}, 400),
        ({"key": key, "ranks": "1234"}, {}, 400),
        ({"key": key, "ranks": [1, 2, 3, "4"]}, {}, 400),
        ({"key": "other", "ranks": [1, 2, 3, 4]}, {}, 409),
        ({"ranks": [1, 2, 3, 4]}, {}, 409),
    ]:
        assert served.ask("POST", "/answer", body, **headers)[0] == status, (body, headers)
    assert served.ask("POST", "/undo", {})[0] == 409
    assert served.ask("POST", "/other", {})[0] == 404
    assert served.ask("GET", "/../etc/passwd")[0] == 404
    assert served.ask("PUT", "/answer", {})[0] == 501
    assert served.out.read_bytes() == b""


def test_a_page_that_is_late_changes_nothing(served):
    """Two windows: the answer of the second, to a question that is past, is not kept."""
    served.enter()
    key = served.state()["key"]
    assert served.ask("POST", "/answer", {"key": key, "ranks": [1, 2, 3, 4]})[0] == 200
    status, _, text = served.ask("POST", "/answer", {"key": key, "ranks": [4, 3, 2, 1]})
    assert status == 409
    assert json.loads(text)["prompt"] == [["user", "2+2?"]], "and it learns what is asked now"
    assert len(read_rows(served.out)) == 1
    assert served.ask("POST", "/undo", {})[0] == 200
    assert served.state()["key"] == key
    assert served.out.read_bytes() == b""


def test_what_cannot_be_kept_is_said(served):
    served.enter()
    key = served.state()["key"]
    served.out.unlink()
    status, _, text = served.ask("POST", "/answer", {"key": key, "ranks": [1, 2, 3, 4]})
    assert status == 507
    assert "another program" in text
    assert served.state()["key"] == key


def test_texts_are_data_only(served, tmp_path):
    """No text of anybody's stands in the page itself, and no cookie or token in the state."""
    served.enter()
    page, state = served.ask("GET", "/")[2], served.ask("GET", "/state")[2]
    assert "chair" in state
    assert "chair" not in page
    for secret in (served.token, served.cookie.split("=")[1]):
        assert secret not in page + state
    for place in ("innerHTML", "insertAdjacentHTML", "document.write", "eval(", "https://"):
        assert place not in page, place


def test_the_page_ends_in_order(data, tmp_path):
    out = tmp_path / "out.jsonl"
    with running(data, out, "--no-browser", "-q") as process:
        url = re.search(r"http://\S+", read_until(process, "\n"))[0]
        client = Client(url, None, out)
        client.enter()
        for _ in range(2):
            assert client.ask("POST", "/skip", {"key": client.state()["key"]})[0] == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stdout.read() == b""
    with running(data, out, "--no-browser", "--json") as process:
        url = re.search(r"http://\S+", read_until(process, "\n"))[0]
        client = Client(url, None, out)
        client.enter()
        state = json.loads(client.ask("POST", "/skip", {"key": client.state()["key"]})[2])
        assert state["phase"] == "done"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0, "nothing was left to do"
        assert json.loads(process.stdout.read())["skipped"] == 3
