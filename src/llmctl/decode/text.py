"""Tokens in, text out as they come: whole characters only, and nothing past a stop string."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from llmctl.data.chat.render import special_token_ids
from llmctl.errors import UserError

CONTEXT = 8
"""Tokens that are decoded again before new ones."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def stop_ids(tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> frozenset[int]:
    """Ids of the stop strings that are special tokens, which no decoded text shows.

    White space after such a token would follow the end, and is left out.

    Raises:
        UserError: a stop string that holds a special token within other text.
    """
    if not stops:
        return frozenset()
    special = {str(tokenizer.convert_ids_to_tokens(i)): i for i in special_token_ids(tokenizer)}
    for stop in stops:
        held = max((name for name in special if name in stop), key=len, default=None)
        if held is not None and stop.rstrip() not in special:
            raise UserError(
                f"--stop {stop!r} would never be found: {held} is a special token, which is no "
                "part of the text",
                hint=f"pass --stop '{held}', which ends a response at that token",
            )
    return frozenset(special[name] for stop in stops if (name := stop.rstrip()) in special)


class TextStream:
    """The text of one response, piece by piece; joined, the pieces are what follows the prompt.

    Text is held back while it may be the beginning of a stop string, or of a character whose last
    bytes are still to come.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stops: Sequence[str] = ()
    ) -> None:
        """Continue after the prompt's tokens: whether a word begins depends on what is before."""
        self.tokenizer = tokenizer
        self.stops = tuple(stops)
        self.stopped = False
        self._window = list(prompt[-CONTEXT:])
        self._sent = len(self._decode(self._window))
        self._held = ""

    def feed(self, tokens: Sequence[int]) -> str:
        """Append tokens, return the text that they complete; sets `stopped` at a stop string."""
        if self.stopped:
            return ""
        self._window += tokens
        text = self._decode(self._window)
        whole = text.rstrip(REPLACEMENT)
        self._held += whole[self._sent :]
        self._sent = max(self._sent, len(whole))
        if len(self._window) > 3 * CONTEXT and whole == text:
            self._shorten()
        return self._release()

    def finish(self) -> str:
        """Return the text held back for a stop string that did not come."""
        text, self._held = "" if self.stopped else self._held, ""
        return text

    def _shorten(self) -> None:
        """Forget old tokens; some stay, for the first word of a text may lose its space."""
        tail = self._window[-CONTEXT:]
        if sent := len(self._decode(tail)):
            self._window, self._sent = tail, sent

    def _decode(self, tokens: list[int]) -> str:
        text = self.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    def _release(self) -> str:
        stops = [index for stop in self.stops if (index := self._held.find(stop)) >= 0]
        if stops:
            self.stopped = True
            text, self._held = self._held[: min(stops)], ""
            return text
        keep = max((_overlap(self._held, stop) for stop in self.stops), default=0)
        ready = len(self._held) - keep
        text, self._held = self._held[:ready], self._held[ready:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text that begin the stop string."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)
