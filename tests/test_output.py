"""Where a run may write, and what stdout and stderr carry: every command, every bad directory."""

import contextlib
import json
import os
import pty
import subprocess
import sys

import pytest
from conftest import SMALL

from llmctl import console
from llmctl.cli import COMMANDS

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@contextlib.contextmanager
def mounted(folder, options):
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this needs the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(params=["tokenize", "pretrain"])
def command(request, corpus, tokens):
    return {
        "tokenize": ("tokenize", "--data", corpus),
        "pretrain": ("pretrain", "--tokens", tokens, *SMALL, "--max-steps", 4, "--threads", 1),
    }[request.param]


def refused(result, code, message):
    assert result.code == code, result.err
    assert message in result.err
    text = result.err[result.err.index("error:") :]
    assert len(text.strip().splitlines()) <= 3
    assert "Traceback" not in result.err


def test_a_read_only_file_system(cli, command, tmp_path):
    with mounted(tmp_path / "disk", "ro") as disk:
        refused(cli(*command, "-o", disk / "run"), 3, "Read-only file system")


def test_a_file_system_with_no_space_left(cli, command, tmp_path):
    with mounted(tmp_path / "disk", "size=64k") as disk:
        refused(cli(*command, "-o", disk / "run"), 5, "no space left on the disk")
        assert not (disk / "run").exists()


def test_a_file_a_foreign_folder_and_a_finished_run(cli, command, base, tmp_path):
    (tmp_path / "file").write_text("x")
    refused(cli(*command, "-o", tmp_path / "file"), 3, "a file is in the way")
    refused(cli(*command, "-o", tmp_path), 3, "not a run of llmctl's")
    refused(cli(*command, "-o", base), 3, "holds a run that is completed")
    assert (tmp_path / "file").read_text() == "x"


def test_out_is_required(cli, command):
    refused(cli(*command), 2, "--out is required")


def test_a_directory_in_use(cli, command, tmp_path):
    from filelock import FileLock

    out = tmp_path / "run"
    out.mkdir()
    with FileLock(out / ".llmctl.lock"):
        refused(cli(*command, "-o", out), 3, "in use by another run")


@pytest.mark.parametrize("name", ["späße 中文", "-run", "a" * 200, "two words"])
def test_odd_names_are_fine(cli, corpus, tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = cli("tokenize", "--data", corpus, "--algorithm", "byte", f"--out={name}", "-q")
    assert (result.code, result.out.strip(), result.err) == (0, name, "")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_flag_is_a_usage_error_with_a_suggestion(cli, name):
    result = cli(name, "--sede", 1)
    assert result.code == 2
    assert "No such option: --sede" in result.err
    assert "--seed" in result.err
    assert f"llmctl {name} --help" in result.err
    assert not result.out


def test_an_unknown_command(cli):
    result = cli("pretrian")
    assert result.code == 2
    assert "No such command 'pretrian'" in result.err


def test_errors_are_objects_with_json(cli, tmp_path):
    result = cli("pretrain", "--tokens", tmp_path, "-o", tmp_path / "run", "--json")
    error = json.loads(result.out)["error"]
    assert set(error) == {"code", "type", "message", "file", "line", "hint"}
    assert (error["code"], error["type"]) == (result.code, "DataError") == (3, "DataError")
    assert json.loads(cli("pretrain", "--sede", 1, "--json").out)["error"]["code"] == 2


def test_snake_case_and_other_tools_spellings(cli, tokens):
    flags = (
        "--learning_rate",
        "1e-3",
        "--per-device-train-batch-size",
        4,
        "--output-dir",
        "x",
        "--gradient_accumulation_steps",
        2,
        "--save-total-limit",
        3,
    )
    result = cli("pretrain", "--tokens", tokens, *SMALL[:-2], *flags, "--dry-run")
    assert result.code == 0, result.err
    for line in ("lr: 0.001", "batch_size: 4", "grad_accum: 2", "keep: 3"):
        assert line in result.out.splitlines()


def test_a_recipe_is_read_and_flags_win(cli, tokens, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"stage: pretrain\ntokens: {tokens}\nlr: 0.5\nseed: 4\n")
    result = cli("pretrain", "-c", recipe, "--lr", 0.25, "--dry-run")
    assert "lr: 0.25" in result.out
    assert "seed: 4" in result.out


@pytest.mark.parametrize("arguments", [("--help",), ("pretrain", "--help"), ("-h",), ()])
@pytest.mark.parametrize(
    "extra", [{}, {"GITHUB_ACTIONS": "true"}, {"FORCE_COLOR": "1"}, {"TERM": "dumb"}]
)
def test_help_has_no_escape_codes_in_a_pipe(arguments, extra):
    ran = subprocess.run(
        [sys.executable, "-m", "llmctl", *arguments],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, **extra},
    )
    assert ran.returncode in (0, 2)
    assert "Usage: " in ran.stdout + ran.stderr
    assert "\x1b" not in ran.stdout + ran.stderr


def test_without_arguments_there_is_help(cli):
    result = cli()
    assert result.code == 0
    assert "Usage: " in result.out


def test_on_a_terminal_help_shows_defaults():
    ran = subprocess.run(
        ["script", "-qc", f"{sys.executable} -m llmctl generate --help", "/dev/null"],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, "TERM": "xterm", "COLUMNS": "120"},
    )
    assert "(default: 0.95)" in ran.stdout
    assert "(required)" in ran.stdout


def test_version_names_the_stack(cli):
    result = cli("--version")
    assert result.code == 0
    names = [line.split()[0] for line in result.out.splitlines()]
    assert names[:3] == ["llmctl", "python", "torch"]


def test_in_a_pipe_there_are_plain_lines(corpus, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-m", "llmctl", "tokenize", "--data", corpus, "-o", tmp_path / "run"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert ran.stdout == f"{tmp_path / 'run'}\n"
    assert "bytes per token" in ran.stderr
    assert not {"\r", "\x1b"} & set(ran.stderr)


def test_on_a_terminal_there_is_a_bar(corpus, tmp_path):
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "llmctl",
            "tokenize",
            "--data",
            str(corpus),
            "-o",
            str(tmp_path / "run"),
        ],
        stdout=subprocess.PIPE,
        stderr=slave,
        env={**ENVIRONMENT, "TERM": "xterm"},
    )
    os.close(slave)
    seen = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(master, 4096):
            seen += chunk
    assert process.wait() == 0
    assert process.stdout.read().decode().strip() == str(tmp_path / "run")
    process.stdout.close()
    os.close(master)
    assert b"\x1b[" in seen
    assert "━".encode() in seen


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59, "59s"), (61, "1m01s"), (3600, "1h00m"), (7503, "2h05m")]
)
def test_durations(seconds, text):
    assert console.duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(7, "7"), (1234, "1.23k"), (35_200, "35.2k"), (1.24e9, "1.24B")]
)
def test_short_counts(number, text):
    assert console.short(number) == text


def test_plain_progress_prints_now_and_then(monkeypatch, capsys):
    clock = iter(range(0, 100, 3))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(console, "is_terminal", lambda: False)
    console.set_up()
    with console.Progress("work", 10) as progress:
        for done in range(1, 11):
            progress.update(done, f"loss {done}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("work  step 2/10  loss 2  eta ")
    assert len(lines) == 4
