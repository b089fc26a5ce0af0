"""Shell completion: commands, the options of each, values of fields that have few, else files."""

import os
import shutil
import subprocess
import sys

import pytest

from llmctl.cli import COMMANDS
from llmctl.config import commands
from llmctl.options import literal_choices

SCRIPT = "import sys; sys.argv[0] = 'llmctl'; from llmctl.cli import main; main()"


def asked(monkeypatch, capfd, line, shell):
    """What the shell is told when TAB is pressed at the end of the line."""
    from llmctl.cli import main

    words = line.split(" ")
    variables = {
        "bash": {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)},
        "zsh": {"_TYPER_COMPLETE_ARGS": line},
        "fish": {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }
    for name, value in {"_LLMCTL_COMPLETE": f"complete_{shell}", **variables[shell]}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["llmctl"])
    with pytest.raises(SystemExit):
        main()
    return capfd.readouterr().out


def names(told, shell):
    """The candidates alone, without the help that zsh and fish show beside them."""
    if shell == "zsh":
        told = told.partition("((")[2].rpartition("))")[0]
        return [line.split('"')[1] for line in told.splitlines()]
    return [line.split("\t")[0] for line in told.splitlines()]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("llmctl pre", ["pretrain"]),
        ("llmctl sft --lora-", ["--lora-r", "--lora-alpha", "--lora-dropout", "--lora-targets"]),
        ("llmctl sft --task ", ["chat", "classify"]),
        ("llmctl pretrain --optimizer adam", ["adamw", "adamw-8bit"]),
        ("llmctl ppo --report-to ", ["tensorboard", "trackio", "wandb"]),
        ("llmctl generate --model runs/sft --dtype b", ["bf16"]),
    ],
)
def test_commands_options_and_values_complete(monkeypatch, capfd, shell, line, expected):
    assert names(asked(monkeypatch, capfd, line, shell), shell) == expected


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_every_command_completes(monkeypatch, capfd, command):
    told = names(asked(monkeypatch, capfd, f"llmctl {command} --", "fish"), "fish")
    config = commands.config_of(command)
    flags = {config.flag(name) for name in config.model_fields}
    assert {flag for flag in flags if flag.startswith("--")} <= set(told)


def test_no_help_text_becomes_a_candidate(monkeypatch, capfd):
    told = asked(monkeypatch, capfd, "llmctl sft --lo", "fish")
    assert all(line.startswith("--") for line in told.splitlines()), told
    assert any(len(line) > 100 for line in told.splitlines()), "a text that would be wrapped"


def test_values_are_those_of_the_config():
    field = commands.config_of("sft").model_fields["report_to"]
    assert literal_choices(field.annotation) == ["tensorboard", "trackio", "wandb"]


@pytest.mark.parametrize("line", ["llmctl sft --data ", "llmctl tokenize --data corp"])
def test_paths_are_left_to_the_shell(monkeypatch, capfd, line):
    assert asked(monkeypatch, capfd, line, "bash").strip() == "", "bash then takes file names"
    assert asked(monkeypatch, capfd, line, "zsh").strip() == "_files"
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "is-args")
    assert asked(monkeypatch, capfd, line, "fish").strip() == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_show_completion_prints_a_script_for_the_shell(shell):
    shown = show(shell)
    assert f"_LLMCTL_COMPLETE=complete_{shell}" in shown


def show(shell):
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, "--show-completion", shell],
        env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return ran.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_with_the_script_that_is_shown(tmp_path):
    program = tmp_path / "llmctl"
    program.write_text(f"#!{sys.executable}\n{SCRIPT}\n")
    program.chmod(0o755)
    (tmp_path / "complete.sh").write_text(show("bash"))
    press = (
        "source complete.sh; COMP_WORDS=(llmctl sft --tas); COMP_CWORD=2; "
        '_llmctl_completion llmctl; echo "${COMPREPLY[@]}"'
    )
    ran = subprocess.run(
        ["bash", "-c", press],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == "--task\n", ran.stderr
