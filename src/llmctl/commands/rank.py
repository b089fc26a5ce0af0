"""`llmctl rank`: prompts and a model's responses in, a person's rankings out, as rows of jsonl.

On a page in the browser or in the terminal. Whatever ends it, all answers are kept, and the
same command goes on.
"""

import shlex
import signal
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmctl.config.commands.rank import RankConfig
from llmctl.config.sections import Sampling
from llmctl.console import log, show_recipe
from llmctl.errors import UserError
from llmctl.feedback.answers import open_answers, open_responses, read_answers, read_responses
from llmctl.feedback.question_queue import QuestionQueue, generating_ahead
from llmctl.feedback.questions import Entry, read_entries
from llmctl.feedback.server import listen, rank_on_page
from llmctl.feedback.session import Session, login_name
from llmctl.feedback.terminal_session import rank_in_terminal
from llmctl.files import check_out
from llmctl.numbers import counted
from llmctl.signals import Stopped

GENERATION_SETTINGS = ("model", "responses", "chat", "seed", *Sampling.model_fields)
"""Settings that the responses depend on."""


def run(config: RankConfig) -> dict[str, Any] | None:
    """Ask until all is answered or the person leaves."""
    out = config.out
    if out is None:
        raise UserError("--out is required", hint="pass -o FILE: answers are appended to it")
    check_out(out, overwrite=True)
    annotator = config.annotator or login_name()
    entries = read_entries(config.data)
    settings = {k: v for k, v in config.recipe("rank").items() if k in GENERATION_SETTINGS}
    model = _generating_model(config, entries)
    if config.dry_run:
        _log_plan(config, out, entries, model, annotator, settings)
        return show_recipe("rank", config)
    with ExitStack() as stack:
        listening = None if config.terminal else stack.enter_context(listen(config.port))
        answers = stack.enter_context(open_answers(out, annotator))
        queue = QuestionQueue(entries, {})
        if model is not None:
            responses = stack.enter_context(open_responses(out, settings))
            queue = QuestionQueue(entries, responses.by_prompt())
            if queue.missing():
                from llmctl.feedback.generation import load_generator  # torch: most do without

                generate = load_generator(config, model, entries)
                stack.enter_context(generating_ahead(queue, generate, responses))
        session = Session(queue, answers, annotator, config.seed)
        try:
            if listening is None:
                rank_in_terminal(session)
            else:
                start = shlex.quote(config.model or "MODEL")
                command = f"llmctl reward --model {start} --data {shlex.quote(str(out))}"
                texts = {"out": str(out), "command": f"{command} -o runs/reward"}
                rank_on_page(session, listening, texts, browser=config.browser)
        except Stopped as stopped:
            if stopped.number != signal.SIGINT or session.counts().remaining:
                raise
        finally:
            counts = session.counts()
            log.info("%d of %d in %s", counts.settled, counts.total, out)
    return {"stage": "rank", "out": str(out), **asdict(counts)}


def _generating_model(config: RankConfig, entries: list[Entry]) -> str | None:
    """Return the model that generates responses, None where all rows carry theirs.

    Raises:
        UserError: there is none, and responses are missing.
    """
    lacking = [entry for entry in entries if entry.responses is None]
    if lacking and config.model is None:
        raise UserError(
            f"--model is required: {lacking[0].example.name} has no `responses`",
            hint="pass --model, or rows that carry their responses",
        )
    if config.model and not lacking:
        log.info("all rows carry their responses: the model is not needed")
    return config.model if lacking else None


def _log_plan(
    config: RankConfig,
    out: Path,
    entries: list[Entry],
    model: str | None,
    annotator: str,
    settings: dict[str, Any],
) -> None:
    responses = {} if model is None else read_responses(out, settings)
    queue = QuestionQueue(entries, responses)
    mine = read_answers(out, annotator)
    if model is not None:
        from llmctl.feedback.generation import encode_entries

        encode_entries(config, model, entries)
    done = sum(q is not None and q.key in mine for q in queue.questions)
    log.info(
        "would ask %s %d of %s; responses to %d are still to be written",
        annotator,
        len(entries) - done,
        counted(len(entries), "prompt"),
        len(queue.missing()),
    )
