"""Render untrusted chat templates: the process that `sandbox.py` starts.

In: on stdin, a line of JSON for each conversation. Out: on stdout, a line of JSON with its texts,
or with the template's error. Runs as a script and imports nothing of llmctl. It ends with its
stdin, and so also when the process that started it is killed.
"""

import importlib.util
import json
import resource
import signal
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any

SECONDS = 3.0
"""Time of a processor that a request may take, however busy the machine is; a template takes
milliseconds."""
MEMORY = 512 * 2**20
"""Bytes of this process at most, of which Python and its libraries take a fifth."""
TEXT = 1_000_000
"""Characters that a template may write beside four times its input for each text."""
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""Errors that Python raises for a wrong template, beside jinja's own."""


def main() -> None:
    """Answer each line of stdin."""
    render = import_renderer()
    from jinja2 import TemplateError

    _bound_memory()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    for line in sys.stdin.buffer:
        # The kernel ends this process, wherever it is: no Python code has to get its turn for it.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            answer = _answer(render, line)
        except (TemplateError, *FAILURES) as error:
            answer = {"refusal": f"refuses these messages: {_one_line(error)}"}
        except MemoryError:
            answer = {"refusal": f"takes too much memory: more than {MEMORY >> 20} MB"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def import_renderer() -> Callable[..., tuple[list[str], Any]]:
    """Import the function of transformers that renders a template.

    Importing transformers takes a second, of which this function needs a tenth. So its packages are
    left empty here, and imported only if a later version needs more of them.
    """
    spec = importlib.util.find_spec("transformers")
    if spec is not None and spec.submodule_search_locations:
        root = spec.submodule_search_locations[0]
        for name, path in (("transformers", root), ("transformers.utils", f"{root}/utils")):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [path]
    try:
        from transformers.utils.chat_template_utils import render_jinja_template
    except (ImportError, AttributeError):
        for name in [n for n in sys.modules if n.partition(".")[0] == "transformers"]:
            del sys.modules[name]
        from transformers.utils.chat_template_utils import render_jinja_template
    return render_jinja_template  # type: ignore[no-any-return]


def _bound_memory() -> None:
    """Cap the address space; where a system cannot (macOS), the time alone is the bound."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except ValueError:
        if sys.platform != "darwin":
            raise


def _answer(render: Callable[..., tuple[list[str], Any]], line: bytes) -> dict[str, Any]:
    request = json.loads(line)
    _set_clock(render, request.pop("clock"))
    texts, size = [], 0
    for text in render_cuts(render, **request):
        texts.append(text)
        size += len(text)
        if size > TEXT + 4 * len(line) * len(request["cuts"]):
            return {"refusal": f"writes too much: {size:,} characters"}
    return {"texts": texts}


def _set_clock(render: Callable[..., tuple[list[str], Any]], clock: str | None) -> None:
    """Set the time that templates see; None for the real one.

    transformers takes no clock as an argument, and reads that of its own module.
    """
    now = None if clock is None else datetime.fromisoformat(clock)

    class FixedClock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return now

    render.__globals__["datetime"] = datetime if now is None else FixedClock


def render_cuts(
    render: Callable[..., tuple[list[str], Any]],
    template: str,
    messages: list[dict[str, Any]],
    cuts: Sequence[tuple[int, bool]],
    tools: list[dict[str, Any]] | None,
    variables: dict[str, str],
) -> Iterator[str]:
    """Yield the text of each cut of a conversation.

    The arguments are those of `sandbox.render_cuts`; `render` is from `import_renderer`.
    """
    for count, is_prompt in cuts:
        (text,), _ = render(
            conversations=[messages[:count]],
            tools=tools,
            chat_template=template,
            add_generation_prompt=is_prompt,
            **variables,
        )
        yield text


def _one_line(error: Exception) -> str:
    """The message, without characters that a terminal would obey."""
    shown = "".join(c if c.isprintable() else " " for c in str(error)[:200]).strip()
    return shown or type(error).__name__


if __name__ == "__main__":
    main()
