"""Where a run may write, and what stdout and stderr carry: every command, every bad directory."""

import contextlib
import json
import os
import pty
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest

from llmctl import console
from llmctl.cli import COMMANDS
from llmctl.errors import ModelError
from llmctl.runs.lock import locked
from tests.conftest import SMALL
from tests.torture.harness import mounted

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


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


def llmctl(*arguments, seconds=30):
    """Run it in a process of its own: the result, and the seconds of CPU that it took.

    Those hardly depend on what else the machine does.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = subprocess.run(
        [sys.executable, "-m", "llmctl", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=seconds,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ran, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("name", ["tokenize", "pretrain"])
def test_a_directory_in_use_is_refused_at_once(name, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    flags = {"tokenize": ("--data", "x"), "pretrain": ("--tokens", "x", "--processes", 2)}[name]
    with locked(out):
        ran, seconds = llmctl(name, *flags, "-o", out)
    assert ran.returncode == 3
    assert ran.stderr.startswith(f"error: {out}: in use by another run (pid {os.getpid()} on ")
    assert seconds < 2


def test_a_finished_run_is_known_at_once_whatever_the_flags(base):
    before = {p: p.stat().st_mtime_ns for p in base.rglob("*")}
    flags = ("--tokens", "x", "--lr", 0.5, "--max-steps", 999, "--processes", 2, "--json")
    ran, seconds = llmctl("pretrain", *flags, "-o", base, "--resume")
    assert ran.returncode == 0, ran.stderr
    assert "is already complete" in ran.stderr
    assert json.loads(ran.stdout)["out"] == str(base)
    assert seconds < 2, "torch alone takes longer"
    assert {p: p.stat().st_mtime_ns for p in base.rglob("*")} == before


@pytest.mark.parametrize("name", ["späße 中文", "-run", "a" * 200, "two words"])
def test_odd_names_are_fine(cli, corpus, tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = cli("tokenize", "--data", corpus, "--algorithm", "byte", f"--out={name}", "-q")
    assert (result.code, result.out.strip(), result.err) == (0, name, "")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_flag_is_a_usage_error_with_a_suggestion(cli, name):
    result = cli(name, "--quite")
    assert result.code == 2
    assert "No such option: --quite" in result.err
    assert "--quiet" in result.err
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


def test_what_takes_long_is_said_on_a_terminal(monkeypatch, capsys):
    console.set_up()
    monkeypatch.setattr(console, "SLOW_SECONDS", 0.05)
    for terminal, seconds, said in ((True, 0.5, 1), (True, 0, 0), (False, 0.2, 0)):
        monkeypatch.setattr(console, "is_terminal", lambda terminal=terminal: terminal)
        with console.said_if_slow("loading a model"):
            time.sleep(seconds)
        time.sleep(0.2)
        assert capsys.readouterr().err == "loading a model\n" * said


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


def test_plain_progress_prints_now_and_then(monkeypatch, capsys):
    clock = iter(range(0, 100, 3))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(console, "is_terminal", lambda: False)
    console.set_up()
    with console.ProgressBar("work", 10) as progress:
        for done in range(1, 11):
            progress.update(done, f"loss {done}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("work  step 2/10  loss 2  eta ")
    assert len(lines) == 4


SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)]
WORDS = {130: "interrupted", 143: "terminated"}


@pytest.fixture
def heeded():
    """A SIGINT that is not ignored, as it is in a background shell's children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def stopped_after(seconds, number, *arguments, entry=("-m", "llmctl"), path=""):
    """Code, stdout and stderr of a process that got a signal."""
    process = subprocess.Popen(
        [sys.executable, *entry, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**ENVIRONMENT, "PYTHONPATH": f"{path}:{os.environ.get('PYTHONPATH', '')}"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    time.sleep(seconds)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_while_importing_is_one_line_and_its_code(tokens, tmp_path, number, code):
    flags = ("--tokens", tokens, *SMALL, "--json", "-o", tmp_path / "a" / "run")
    found, out, err = stopped_after(0.8, number, "pretrain", *flags)
    assert (found, err) == (code, f"error: {WORDS[code]}\n")
    assert json.loads(out)["error"]["code"] == code
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("entry", [("-m", "llmctl"), ("-c", "from llmctl.cli import main; main()")])
@pytest.mark.parametrize("slow_import", ["typer", "torch"])
def test_a_signal_is_minded_from_the_start(tokens, tmp_path, entry, slow_import):
    (tmp_path / f"{slow_import}.py").write_text("import time\ntime.sleep(20)\n")
    flags = ("pretrain", "--tokens", tokens, "-o", tmp_path / "run")
    found = stopped_after(1.2, signal.SIGTERM, *flags, entry=entry, path=tmp_path)
    if entry[0] == "-c" and slow_import == "typer":
        assert found[0] == -signal.SIGTERM, "llmctl has not been reached yet"
    else:
        assert found == (143, "", "error: terminated\n")


def test_a_late_sigusr1_does_not_spoil_a_result(tmp_path):
    program = (
        "import os, signal, sys; from llmctl.__main__ import start\n"
        "class Last:\n"
        "    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGUSR1):\n"
        "        kill(pid, number)\n"
        "sys.last = Last()  # goes with the interpreter\n"
        "sys.argv = ['llmctl', '--version']\n"
        "start()"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), SIGNALS)
@pytest.mark.parametrize("name", ["tokenize", "pretrain"])
def test_a_signal_at_any_time_ends_in_order(tokens, tmp_path, number, code, name):
    text = tmp_path / "text.txt"
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 9))) for _ in range(20_000)]
    text.write_text(" ".join(draw.choices(words, k=400_000)))
    flags = {
        "tokenize": ("--data", text, "--vocab-size", 4000),
        "pretrain": ("--tokens", tokens, *SMALL, "--max-steps", 3000, "--threads", 1),
    }[name]
    for seconds in (0.4, 1.0, 1.7, 2.4, 3.1, 4.0, 5.0):
        out = tmp_path / "run"
        found, _, err = stopped_after(seconds, number, name, *flags, "-o", out)
        assert "Traceback" not in err
        assert "Exception" not in err
        found = 128 - found if found < 0 else found  # as a shell says it, once Python is ending
        assert found == code or (found == 0 and name == "tokenize"), (seconds, err)
        if out.exists():
            state = json.loads((out / "status.json").read_text())["state"]
            assert state == "completed" or (found, state) == (code, "preempted")
            assert not (out / "model").exists()
            shutil.rmtree(out)


@pytest.mark.parametrize(("number", "code"), SIGNALS)
@pytest.mark.parametrize("wrap", [None, "chained", RuntimeError, ModelError])
def test_a_signal_while_tokenizing_leaves_nothing(
    cli, corpus, tmp_path, monkeypatch, heeded, number, code, wrap
):
    from llmctl.commands import tokenize

    def write(*_):
        (tmp_path / "run" / "tokens").mkdir()
        (tmp_path / "run" / "tokens" / "half").touch()
        try:
            signal.raise_signal(number)
        except Exception as error:
            raise AssertionError("what every library swallows") from error
        except KeyboardInterrupt as error:
            if wrap == "chained":
                raise RuntimeError("a library's own words") from error
            if wrap is None:
                raise
        raise wrap("what native code makes of it, without a cause")

    monkeypatch.setattr(tokenize.CheckedCorpus, "write", write)
    handlers = [signal.getsignal(number) for number, _ in SIGNALS]
    result = cli("tokenize", "--data", corpus, "--algorithm", "byte", "-o", tmp_path / "run")
    assert result.code == code
    assert result.err.splitlines()[-1] == f"error: {WORDS[code]}"
    assert "Traceback" not in result.err
    assert not list(tmp_path.iterdir())
    assert [signal.getsignal(number) for number, _ in SIGNALS] == handlers


def test_debug_keeps_the_traceback_and_the_code(cli, tmp_path):
    result = cli("pretrain", "--tokens", tmp_path, "-o", tmp_path / "run", "--debug")
    assert result.code == 3
    assert "Traceback" in result.err
    assert result.err.splitlines()[-2].startswith("error: ")
