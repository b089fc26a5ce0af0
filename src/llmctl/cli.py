"""The `llmctl` command: a table of commands, and the only lazy import in the project."""

import json
import os
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

import typer

from llmctl import console
from llmctl.errors import Terminated, UserError

if TYPE_CHECKING:
    from llmctl.config.sections import StageConfig

COMMANDS = {
    "demo": ("DemoConfig", "Tokenize, pretrain and generate on text that every Python carries."),
    "tokenize": ("TokenizeConfig", "Train a tokenizer and turn a corpus into token shards."),
    "pretrain": ("PretrainConfig", "Train a causal language model from scratch, or continue one."),
    "generate": ("GenerateConfig", "Generate text from a model."),
}
EXAMPLES = {
    "demo": "llmctl demo",
    "tokenize": "llmctl tokenize --data corpus.txt -o runs/tok",
    "pretrain": "llmctl pretrain --tokens runs/tok -o runs/base",
    "generate": 'llmctl generate --model runs/base --prompt "Once upon a time"',
}
EXIT_CODES = (
    "Exit codes: 0 done; 1 bug; 2 usage or recipe; 3 data or output directory; 4 model or "
    "checkpoint; 5 memory or disk; 6 network; 7 diverged; 8 quality gate; 130 interrupted; "
    "141 closed pipe; 143 terminated."
)
LAUNCHED = ("pretrain",)
HELP = {"help_option_names": ["-h", "--help"]}


def build_app(chosen: str | None) -> typer.Typer:
    """The app, with full options for the chosen command only: the others need just a summary.

    Shell completion needs them all: pass "*".
    """
    app = typer.Typer(
        help="Train, align, shrink and run language models.",
        epilog=EXIT_CODES,
        pretty_exceptions_enable=False,
        rich_markup_mode=None if _is_piped() else "rich",
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

    for name, (config, summary) in COMMANDS.items():
        if chosen in (name, "*"):
            _add_command(app, name, config, summary)
        else:
            app.command(name, help=summary)(_stub)
    return app


def _stub() -> None:
    raise AssertionError("only the chosen command is built")


def _add_command(app: typer.Typer, name: str, config: str, summary: str) -> None:
    from llmctl.options import command, token_normalizer  # pydantic: only once a command is chosen

    config_class = getattr(import_module("llmctl.config.stages"), config)
    app.command(
        name,
        help=f"{summary}\n\nExample: {EXAMPLES[name]}",
        epilog=EXIT_CODES,
        context_settings={**HELP, "token_normalize_func": token_normalizer(config_class)},
    )(command(name, config_class, lambda config: _run(name, config)))


def _run(name: str, config: "StageConfig") -> int:
    """Run a command; stdout gets its result and nothing else."""
    console.set_up(quiet=config.quiet or console.rank() > 0, verbose=config.verbose)
    processes = dict(config).get("processes") if name in LAUNCHED else None
    if processes and processes > 1 and "RANK" not in os.environ:
        return int(import_module("llmctl.launch").run(processes))
    stage = "pipeline" if name == "demo" else f"stages.{name}"
    run: Callable[[Any], dict[str, Any] | None] = import_module(f"llmctl.{stage}").run
    try:
        result = run(config)
        if result is not None and console.rank() == 0:
            print(json.dumps(result) if config.as_json else result["out"])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader went away; Typer would call it a bug
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def _print_versions(wanted: bool) -> None:
    if wanted:
        from llmctl.provenance import versions

        for package, number in versions().items():
            print(package, number)
        raise typer.Exit


def _is_piped() -> bool:
    return not sys.stdout.isatty()


def main() -> None:
    """Entry point: errors of the user become one to three lines and their exit code."""
    arguments = sys.argv[1:]
    completing = any(name.endswith("_COMPLETE") for name in os.environ)
    chosen = "*" if completing else next((a for a in arguments if not a.startswith("-")), None)
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(_guarded(build_app(chosen), arguments or ["--help"]))


def _terminate(number: int, frame: object) -> None:
    raise Terminated("terminated")


def _guarded(app: typer.Typer, arguments: list[str]) -> int:
    try:
        result = app(arguments, standalone_mode=False)
    except UserError as error:
        if "--debug" in arguments:
            raise
        return _report(error, arguments)
    except typer.TyperException as error:
        usage = UserError(error.format_message().rstrip("."), hint=_help_hint(arguments))
        return _report(usage, arguments)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    return result if isinstance(result, int) else 0


def _help_hint(arguments: list[str]) -> str:
    command = next((a for a in arguments if a in COMMANDS), None)
    return f"see: llmctl {command + ' ' if command else ''}--help"


def _report(error: UserError, arguments: list[str]) -> int:
    if "--json" in arguments and console.rank() == 0:
        print(json.dumps({"error": error.as_json()}))
    print(f"error: {error}", file=sys.stderr)
    return error.code
