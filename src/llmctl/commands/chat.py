"""`llmctl chat`: a conversation in the terminal, or one whose messages come through a pipe.

In: a model with a chat template, and what the user types. Out: replies on stdout as they are
written (rows of jsonl with --json), notices on stderr, and with --out the conversation as a file.
"""

import json
import sys
from typing import Any

from llmctl.config.commands.chat import ChatConfig
from llmctl.console import log, show_recipe
from llmctl.decode.conversation import Conversation, chat_window
from llmctl.decode.loop import config_for_generation, load_for_generation
from llmctl.decode.prefix import conversation_forward
from llmctl.decode.slash_commands import COMMANDS, check_command, run_slash_command
from llmctl.decode.terminal import Pipe, Terminal, UserInput, open_input
from llmctl.decode.text import stop_ids
from llmctl.errors import UserError
from llmctl.files import check_out, json_line
from llmctl.hardware import memory_errors, pick_device
from llmctl.models.loading import load_tokenizer
from llmctl.numbers import short_number
from llmctl.redact import redacted


def run(config: ChatConfig) -> dict[str, Any] | None:
    """Talk until the user leaves; what fails leaves the conversation as it was."""
    check_out(config.out, overwrite=config.overwrite)
    device = pick_device(config.device)
    shape, tokenizer = config_for_generation(config), load_tokenizer(config.model)
    stop_ids(tokenizer, config.stop)  # refused before the model loads
    window = chat_window(tokenizer, shape, config.context, config.system, config.max_new_tokens)
    if config.dry_run:
        log.info("would talk on %s in a context of %s tokens", device, f"{window.context:,}")
        return show_recipe("chat", config)
    model = load_for_generation(config.model, config, shape, device=device, rows=1)
    with memory_errors(batch_size=1):
        forward = conversation_forward(model, window.encode(config.system, [], "Hi"))
    conversation = Conversation(model, forward, window, config, config.seed, config.system)
    with open_input(COMMANDS) as reader:
        conversation.interruptible = reader.interruptible
        if reader.is_terminal:
            size = short_number(model.num_parameters())
            log.info("%s: %s parameters on %s", config.model, size, device)
            log.info("/help lists the commands, Ctrl-D leaves")
        try:
            _talk(conversation, reader, as_json=config.as_json)
        finally:
            if config.out and conversation.turns:
                conversation.save(config.out, overwrite=config.overwrite)
                log.info("conversation saved to %s", config.out)
    return None


def _talk(conversation: Conversation, reader: Terminal | Pipe, *, as_json: bool) -> None:
    """Answer input until the user leaves; an error is shown, and changes nothing."""
    while (user_input := reader.read()) is not None and user_input.command != "/exit":
        try:
            if user_input.command is None and user_input.text.strip():
                _reply(conversation, reader, user_input, as_json=as_json)
            elif user_input.command == "/retry":
                check_command(user_input)
                _reply(conversation, reader, user_input, as_json=as_json)
            elif user_input.command is not None:
                print(run_slash_command(conversation, user_input), file=sys.stderr)
        except UserError as error:
            log.error("%s", error)
            if as_json:
                print(json.dumps({"error": redacted(error.as_json())}), flush=True)


def _reply(
    conversation: Conversation, reader: Terminal | Pipe, user_input: UserInput, *, as_json: bool
) -> None:
    """Answer a message, or the last one anew; between replies there is a blank line."""
    between = "\n" if conversation.replies and not reader.is_terminal else ""

    def show(piece: str) -> None:
        nonlocal between
        if not as_json:
            print(between + reader.visible(piece), end="", flush=True)
            between = ""

    try:
        reply = (
            conversation.retry(show)
            if user_input.command
            else conversation.send(user_input.text, show)
        )
    except KeyboardInterrupt:
        show("\n")
        raise
    if as_json:
        row = {
            "prompt": reply.prompt,
            "response": reply.text,
            "finish_reason": reply.finish_reason,
            "seed": conversation.seed,
        }
        print(json_line(row), flush=True)
        return
    show("\n\n" if reader.is_terminal else "\n")
    if reply.finish_reason == "interrupted" and not reply.text:
        log.info("stopped before the first word: the message was not kept")
    if reply.finish_reason == "length":
        log.info("the reply was cut: --max-new-tokens and the context bound it")
