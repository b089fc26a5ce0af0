"""The commands of a conversation: a turn that begins with a slash in, an answer out."""

import difflib
from pathlib import Path

from llmctl.decode.conversation import Conversation
from llmctl.decode.terminal import QUOTES, UserInput
from llmctl.errors import UserError

COMMANDS = {
    "/help": ("", "show this"),
    "/system": ("[TEXT]", "set the system message; show it without TEXT; `off` removes it"),
    "/undo": ("", "drop the last exchange"),
    "/retry": ("", "answer the last message anew"),
    "/save": ("FILE", "save the conversation as a row of `messages`, which sft reads"),
    "/clear": ("", "forget the conversation, but not the system message"),
    "/exit": ("", "leave; so does Ctrl-D"),
}


def run_slash_command(conversation: Conversation, turn: UserInput) -> str:
    """Carry out a command that is neither `/retry` nor `/exit`; what to tell the user.

    Raises:
        UserError: the command does not exist, or cannot be carried out.
    """
    check_command(turn)
    match turn.command:
        case "/help":
            return command_help()
        case "/undo":
            return f"dropped: {conversation.undo().prompt}"
        case "/clear":
            conversation.clear()
            return "the conversation begins anew"
        case "/save":
            path = Path(turn.text).expanduser()
            conversation.save(path)
            return f"saved to {path}"
        case _:  # /system
            if turn.text:
                conversation.set_system(None if turn.text == "off" else turn.text)
            return f"system message: {conversation.system or 'none'}"


def check_command(turn: UserInput) -> None:
    """Refuse a command that does not exist, or has too much or too little after it.

    Raises:
        UserError: with what was probably meant.
    """
    if turn.command not in COMMANDS:
        near = difflib.get_close_matches(str(turn.command), COMMANDS, 1)
        meant = f"did you mean {near[0]}? " if near else "/help lists them. "
        raise UserError(
            f"no command {turn.command}", hint=f"{meant}To send text that begins with /, type //"
        )
    argument = COMMANDS[turn.command][0]
    if turn.text and not argument:
        raise UserError(f"{turn.command} takes nothing after it, got `{turn.text}`")
    if not turn.text and argument and not argument.startswith("["):
        raise UserError(f"{turn.command} needs a {argument}", hint=f"{turn.command} {argument}")


def command_help() -> str:
    """What `/help` shows."""
    lines = [f"{name} {argument}".ljust(16) + what for name, (argument, what) in COMMANDS.items()]
    return "\n".join(
        [
            *lines,
            r"A line that ends in \ goes on in the next; a block of lines stands between",
            f"{QUOTES} and {QUOTES}; // begins a message with /. Ctrl-C stops a reply.",
        ]
    )
