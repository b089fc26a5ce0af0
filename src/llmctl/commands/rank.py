"""`llmctl rank`: prompts and a model's responses in, a person's rankings out, as rows of jsonl.

On a page in the browser or in the terminal. Whatever ends it, every answer that was given is kept,
and the same command goes on.
"""

import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from llmctl.config.commands import RankConfig
from llmctl.config.sections import Sampling
from llmctl.console import log, show_recipes
from llmctl.errors import UserError
from llmctl.feedback.answers import open_answers, open_written, read_answers, read_written
from llmctl.feedback.browser import ask_on_page
from llmctl.feedback.page import Texts, next_command
from llmctl.feedback.questions import Entry, read_entries
from llmctl.feedback.server import listen
from llmctl.feedback.session import Session, user_name
from llmctl.feedback.supply import Supply, writing_ahead
from llmctl.feedback.terminal import ask_in_terminal
from llmctl.files import check_out
from llmctl.signals import Stopped

WRITTEN_BY = ("model", "responses", "chat", "seed", *Sampling.model_fields)
"""Settings that the responses depend on."""


def run(config: RankConfig) -> dict[str, Any] | None:
    """Ask until all is answered or the person leaves."""
    out = config.out
    if out is None:
        raise UserError("--out is required", hint="pass -o FILE: answers are appended to it")
    check_out(out, overwrite=True)
    annotator = config.annotator or user_name()
    entries = read_entries(config.data)
    settings = {k: v for k, v in config.recipe("rank").items() if k in WRITTEN_BY}
    model = _writing_model(config, entries)
    if config.dry_run:
        _tell_plan(config, out, entries, model, annotator, settings)
        return show_recipes([("rank", config)], as_json=config.as_json)
    with ExitStack() as stack:
        listening = None if config.terminal else stack.enter_context(listen(config.port))
        answers = stack.enter_context(open_answers(out, annotator))
        supply = Supply(entries, {})
        if model is not None:
            kept = stack.enter_context(open_written(out, settings))
            supply = Supply(entries, kept.by_prompt())
            if supply.missing():
                from llmctl.feedback.generating import load_writer  # torch: most do without

                write = load_writer(config, model, entries)
                stack.enter_context(writing_ahead(supply, write, kept))
        session = Session(supply, answers, annotator, config.seed)
        try:
            if listening is None:
                ask_in_terminal(session)
            else:
                texts = Texts(str(out), next_command(out, config.model))
                ask_on_page(session, listening, texts, browser=config.browser)
        except Stopped as stopped:
            if stopped.number != signal.SIGINT or session.counts().remaining:
                raise
        finally:
            counts = session.counts()
            log.info("%d of %d in %s", counts.settled, counts.total, out)
    return {
        "stage": "rank",
        "out": str(out),
        "answered": counts.answered,
        "skipped": counts.skipped,
        "identical": counts.identical,
        "remaining": counts.remaining,
    }


def _writing_model(config: RankConfig, entries: list[Entry]) -> str | None:
    """The model that writes responses, None where all rows carry theirs.

    Raises:
        UserError: there is none to write those that are lacking.
    """
    lacking = [entry for entry in entries if entry.responses is None]
    if lacking and config.model is None:
        raise UserError(
            f"--model is required: {lacking[0].ask.name} has no `responses`",
            hint="pass --model, or rows that carry their responses",
        )
    if config.model and not lacking:
        log.info("all rows carry their responses: the model is not needed")
    return config.model if lacking else None


def _tell_plan(
    config: RankConfig,
    out: Path,
    entries: list[Entry],
    model: str | None,
    annotator: str,
    settings: dict[str, Any],
) -> None:
    written = {} if model is None else read_written(out, settings)
    supply = Supply(entries, written)
    mine = read_answers(out, annotator)
    if model is not None:
        from llmctl.feedback.generating import encode_entries

        encode_entries(config, model, entries)
    done = sum(q is not None and q.key in mine for q in supply.questions)
    log.info(
        "would ask %s %d of %d prompts; responses to %d are still to be written",
        *(annotator, len(entries) - done, len(entries), len(supply.missing())),
    )
