"""The `llmctl` command: a table of commands; the chosen one is imported when it runs."""

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING, Any

import typer
from typer.main import get_command

from llmctl import console, launch
from llmctl.errors import UserError
from llmctl.redact import redact, redacted
from llmctl.signals import exit_now, handled_by, raising_on_signals, signal_error

if TYPE_CHECKING:
    from llmctl.config.sections import Reporting

COMMANDS = {
    "demo": "Take a small model through its whole life, on what is built in.",
    "run": "Run a life cycle: the stages of a recipe, each on the results of those before it.",
    "tokenize": "Train a tokenizer and turn a corpus into token shards.",
    "pretrain": "Train a causal language model from scratch, or continue one.",
    "audit": "Check examples as `sft` would see them.",
    "sft": "Fine-tune a model on examples, in full or with adapters.",
    "rank": "Collect rankings of responses from a person.",
    "ppo": "Align a model with rewards by proximal policy optimisation.",
    "reward": "Train a reward model on preferences, or score texts with one.",
    "dpo": "Align a model with preferences directly, without a reward model.",
    "merge": "Merge an adapter into its base model.",
    "plan": "Tell what a run takes before it runs: memory, FLOPs, time, tokens, devices.",
    "evaluate": (
        "Measure a model on texts, on questions with answers or on benchmarks; compare two."
    ),
    "quantize": "Make a model smaller, and measure what that costs.",
    "generate": "Generate text from a model.",
    "chat": "Talk with a model in the terminal.",
    "report": "Write a page on runs: curves, figures, samples, how to repeat them.",
    "runs": "List runs: how they went, how far they are, how to resume them.",
    "doctor": "Check the installation and the machine, with a fix for each flaw.",
}
EXAMPLES = {
    "demo": "llmctl demo",
    "run": "llmctl run recipes/lifecycle/life.yaml -o runs/life",
    "tokenize": "llmctl tokenize --data corpus.txt -o runs/tok",
    "pretrain": "llmctl pretrain --tokens runs/tok -o runs/base",
    "audit": "llmctl audit examples.jsonl --model runs/base",
    "sft": "llmctl sft --model runs/base --data examples.jsonl --lora -o runs/sft",
    "rank": "llmctl rank --model runs/sft --data prompts.jsonl -o feedback.jsonl",
    "ppo": "llmctl ppo --model runs/sft --reward-model runs/rm --data prompts.jsonl -o runs/ppo",
    "reward": "llmctl reward --model runs/sft --data preferences.jsonl -o runs/reward",
    "dpo": "llmctl dpo --model runs/sft --data preferences.jsonl --lora -o runs/dpo",
    "merge": "llmctl merge --model runs/sft -o runs/merged",
    "plan": "llmctl plan recipes/sft/lora.yaml --shape llama-2-7b --device-memory 80GB",
    "evaluate": "llmctl evaluate --model runs/sft --data test.jsonl --metrics rouge -o runs/eval",
    "quantize": "llmctl quantize --model runs/sft --bits 4 -o runs/small",
    "generate": 'llmctl generate --model runs/base --prompt "Once upon a time"',
    "chat": "llmctl chat --model runs/sft",
    "report": "llmctl report runs/ -o report.html",
    "runs": "llmctl runs runs/",
    "doctor": "llmctl doctor",
}
EXIT_CODES = (
    "Exit codes: 0 done; 1 bug; 2 usage or recipe; 3 data or output directory; 4 model or "
    "checkpoint; 5 memory, disk or a lost process; 6 network; 7 diverged; 8 quality gate; "
    "130 interrupted; 141 closed pipe; 143 terminated."
)
LAUNCHED = ("pretrain", "sft", "reward", "dpo", "ppo")
HELP = {"help_option_names": ["-h", "--help"]}


def build_app(chosen: str | None) -> typer.Typer:
    """Build the app, with options for the chosen command only: others need just a summary."""
    app = typer.Typer(
        help="Train, align, shrink and run language models.",
        epilog=EXIT_CODES,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich" if sys.stdout.isatty() else None,
        context_settings=HELP,
    )

    @app.callback()
    def root(
        show_version: bool = typer.Option(
            False,
            "--version",
            help="Print llmctl's version and the stack's.",
            is_eager=True,
            callback=_print_versions,
        ),
    ) -> None:
        pass

    for name, summary in COMMANDS.items():
        if name == chosen:
            _add_command(app, name)
        else:
            app.command(name, help=summary)(_stub)
    return app


def _stub() -> None:
    raise AssertionError("only the chosen command is built")


def _add_command(app: typer.Typer, name: str) -> None:
    from llmctl.config.commands import config_of
    from llmctl.options import command, token_normalizer  # pydantic: only once a command is chosen

    config_class = config_of(name)
    assert config_class is not None
    app.command(
        name,
        help=f"{COMMANDS[name]}\n\nExample: {EXAMPLES[name]}",
        epilog=EXIT_CODES,
        context_settings={**HELP, "token_normalize_func": token_normalizer(config_class)},
    )(command(name, config_class, lambda config: _run(name, config)))


def _run(name: str, config: "Reporting") -> int:
    """Run a command; stdout gets its result and nothing else."""
    settings = dict(config)
    trains = name in LAUNCHED and settings.get("score") is None
    launch.require_placed(name, trains=trains)
    console.set_up(quiet=config.quiet or console.rank() > 0, verbose=config.verbose)
    try:
        result = _finished_already(name, config)
        if result is None:
            processes = settings.get("processes") if trains else None
            if processes and processes > 1 and "RANK" not in os.environ:
                return launch.run(processes)
            result = _run_command(name, config)
        elif trains and launch.is_one_of_several():
            from llmctl.training.meeting import confirm_completed  # torch, which one does without

            confirm_completed()
        if result is not None and console.rank() == 0:
            shown = redacted(result)
            print(_json(shown) if config.as_json else shown["out"])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader went away; Typer would call it a bug
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def _json(result: dict[str, Any]) -> str:
    from llmctl.files import finite  # safetensors, which `--help` does without

    return json.dumps(finite(result), allow_nan=False)


def _finished_already(name: str, config: "Reporting") -> dict[str, Any] | None:
    from llmctl.config.sections import StageConfig  # pydantic, which `--help` does without

    if not isinstance(config, StageConfig):
        return None
    from llmctl.runs.directory import finished_already

    return finished_already(name, config)


def _run_command(name: str, config: "Reporting") -> dict[str, Any] | None:
    """Import the command's module and run it; a signal unwinds it and is one line."""
    package = "pipeline" if name in ("run", "demo") else "commands"
    with console.said_if_slow("loading torch and transformers"):
        run: Callable[[Any], dict[str, Any] | None] = import_module(f"llmctl.{package}.{name}").run
    gc.freeze()
    gc.enable()
    with raising_on_signals():
        return run(config)


def _print_versions(wanted: bool) -> None:
    if wanted:
        from llmctl.runs.provenance import versions

        for package, number in versions().items():
            print(package, number)
        raise typer.Exit


def main() -> None:
    """Entry point: errors of the user become one to three lines and their exit code."""
    arguments = sys.argv[1:]
    words = _words_to_complete() or arguments
    chosen = next((word for word in words if not word.startswith("-")), None)
    sys.excepthook = _print_bug
    with handled_by(exit_now):
        code = _guarded(build_app(chosen), arguments or ["--help"])
    sys.exit(code)


def _words_to_complete() -> list[str]:
    """Return the words of the command line that a shell asks to complete, if one does."""
    if "_LLMCTL_COMPLETE" not in os.environ:
        return []
    os.environ["COLUMNS"] = "10000"  # each line of a wrapped help text would be a candidate
    line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS", "")
    return line.split()[1:]


def _guarded(app: typer.Typer, arguments: list[str]) -> int:
    try:  # not app(): it would put a hook of its own in place of ours
        result = get_command(app).main(arguments, "llmctl", standalone_mode=False)
    except UserError as error:
        if "--debug" in arguments:
            print(redact(traceback.format_exc()), end="", file=sys.stderr)
        return _report(_told_to_all(error, arguments), arguments)
    except typer.TyperException as error:
        command = next((f"{word} " for word in arguments if word in COMMANDS), "")
        hint = f"see: llmctl {command}--help"
        refusal = UserError(error.format_message().rstrip("."), hint=hint)
        return _report(_told_to_all(refusal, arguments), arguments)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    return result if isinstance(result, int) else 0


def _told_to_all(error: UserError, arguments: list[str]) -> UserError:
    """Return the error that all processes of a run end with: others wait for one that is refused.

    What they do not refuse together is told before their group forms, whatever refused it.
    """
    trains = any(word in LAUNCHED for word in arguments)
    if not (trains and launch.is_one_of_several()) or signal_error(error):
        return error
    from llmctl.training.meeting import tell  # torch, which a single process does without

    return tell(error)


def _report(error: UserError, arguments: list[str]) -> int:
    if "--json" in arguments and console.rank() == 0:
        print(_json(redacted({**error.report, "error": error.as_json()})))
    is_ours = console.rank() == 0 or signal_error(error) is None  # a signal reaches all ranks
    if not error.is_reported and is_ours:
        print(redact(f"error: {error}"), file=sys.stderr)
    return error.code


def _print_bug(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print the traceback of an uncaught exception to stderr, without secrets."""
    lines = traceback.format_exception(kind, error, trace)
    print(redact("".join(lines)), end="", file=sys.stderr)
