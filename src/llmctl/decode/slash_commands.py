"""Slash commands of a conversation: a line that begins with a slash in, a notice out."""

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
HELP = "\n".join(
    [
        *(f"{name} {argument}".ljust(16) + text for name, (argument, text) in COMMANDS.items()),
        r"A line that ends in \ goes on in the next; a block of lines stands between",
        f"{QUOTES} and {QUOTES}; // begins a message with /. Ctrl-C stops a reply.",
    ]
)


def run_slash_command(conversation: Conversation, user_input: UserInput) -> str:
    """Run a command that is neither `/retry` nor `/exit`, and return its notice.

    Raises:
        UserError: the command does not exist, or fails.
    """
    check_command(user_input)
    match user_input.command:
        case "/help":
            return HELP
        case "/undo":
            return f"dropped: {conversation.undo().prompt}"
        case "/clear":
            conversation.clear()
            return "the conversation begins anew"
        case "/save":
            path = Path(user_input.text).expanduser()
            conversation.save(path)
            return f"saved to {path}"
        case _:  # /system
            if user_input.text:
                conversation.set_system(None if user_input.text == "off" else user_input.text)
            return f"system message: {conversation.system or 'none'}"


def check_command(user_input: UserInput) -> None:
    """Refuse a command that does not exist, or has a wrong number of arguments.

    Raises:
        UserError: with the nearest command.
    """
    command = str(user_input.command)
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, 1)
        suggestion = f"did you mean {close[0]}? " if close else "/help lists them. "
        raise UserError(
            f"no command {command}", hint=f"{suggestion}To send text that begins with /, type //"
        )
    argument, text = COMMANDS[command][0], user_input.text
    if text and not argument:
        raise UserError(f"{command} takes nothing after it, got `{text}`")
    if not text and argument and not argument.startswith("["):
        raise UserError(f"{command} needs a {argument}", hint=f"{command} {argument}")
