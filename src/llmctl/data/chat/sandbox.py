"""Render chat templates safely: untrusted ones in a process of their own.

In: a template, messages, and up to where to render them. Out: texts. A template that comes with a
model is an untrusted program. Jinja's sandbox keeps it from files and from Python, but not from
running for ever or filling the memory. So it runs in `sandbox_process.py`, whose time and memory
the kernel bounds.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

from llmctl.data.chat import sandbox_process
from llmctl.errors import ModelError

PASSED_ON = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG")
"""Environment variables that the sandbox process gets: no secret."""
TEMPLATE_SIZE = 250_000
"""Characters of a template at most; the longest of well-known models have a tenth of it."""
SHARE = 4_000_000
"""Characters of messages that a request may have rendered, over all its cuts: the time that a row
may take grows with it, and a request's does not."""
HINT = "such a template is broken or hostile: use another tokenizer, or continue plain text"


class TemplateRefusal(ModelError):
    """A chat template does not render some messages."""


CHATML_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
        {{- message['content'] + '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
"""ChatML; the markers tell `return_assistant_tokens_mask` which tokens the assistant wrote."""


def render_cuts(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    cuts: Sequence[tuple[int, bool]],
    variables: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    clock: str | None = None,
    trusted: bool = False,
) -> Iterator[str]:
    """Render several cuts of a conversation, as many at the cost of one request as it may take.

    Each text is to the letter that of `apply_chat_template`.

    Args:
        template: jinja.
        messages: the conversation, as JSON has it.
        cuts: each how many of the messages to render, and whether the assistant is to go on.
        variables: further variables of the template: the tokenizer's special tokens.
        tools: JSON schemas of what the assistant may call.
        clock: the time that the template sees (ISO 8601); None for now.
        trusted: llmctl wrote the template, which then runs in this process.

    Raises:
        TemplateRefusal: the template refuses the messages, is broken, or takes too much time or
            memory.
    """
    if len(template) > TEMPLATE_SIZE:
        raise TemplateRefusal(f"the chat template is larger than {TEMPLATE_SIZE:,} characters")
    present = [{k: v for k, v in message.items() if v is not None} for message in messages]
    request: dict[str, Any] = {
        "template": template,
        "messages": present,
        "tools": None if tools is None else list(tools),
        "variables": dict(variables),
    }
    if trusted:  # none of ours writes the date
        yield from _render_here({**request, "cuts": list(cuts)})
        return
    step = max(1, SHARE // (1 + len(json.dumps(present)))) if len(cuts) > 2 else 2
    for start in range(0, len(cuts), step):
        share = list(cuts[start : start + step])
        answer = _request(json.dumps({**request, "cuts": share, "clock": clock}))
        if "texts" not in answer:
            raise TemplateRefusal(f"the chat template {answer['refusal']}", hint=HINT)
        yield from answer["texts"]


def _render_here(request: dict[str, Any]) -> Iterator[str]:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        yield from sandbox_process.render_cuts(render_jinja_template, **request)
    except TemplateError as error:
        raise TemplateRefusal(f"the chat template refuses these messages: {error}") from None


def _request(request: str) -> dict[str, Any]:
    """Send a request to this process's renderer; one that died, or was interrupted, is replaced."""
    process = _renderer(os.getpid())
    assert process.stdin is not None
    assert process.stdout is not None
    with ExitStack() as undo:
        undo.callback(_renderer.cache_clear)
        undo.callback(_end, process)
        try:
            process.stdin.write(request.encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return {"refusal": "cannot be rendered: its process ended"}
        answer = process.stdout.readline()
        if not answer.endswith(b"\n"):
            if process.wait() == -signal.SIGPROF:
                limit = f"{sandbox_process.SECONDS:.0f} s of a processor"
                return {"refusal": f"takes too long: more than {limit}"}
            return {"refusal": f"ends its process (exit code {process.returncode})"}
        undo.pop_all()
    return json.loads(answer)  # type: ignore[no-any-return]


@cache
def _renderer(_: int) -> subprocess.Popen[bytes]:
    """The process that renders for this one, whose id keeps forks from sharing it.

    It gets no Ctrl-C of the terminal (a process group of its own). As a script, and with `-P`, it
    imports neither from the working directory nor from its own.
    """
    process = subprocess.Popen(
        [sys.executable, "-P", str(Path(sandbox_process.__file__).resolve())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # Each thread that numpy would start takes from the address space that is bounded.
        env={
            **{name: os.environ[name] for name in PASSED_ON if name in os.environ},
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        },
        process_group=0,
    )
    atexit.register(_end, process)
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    atexit.unregister(_end)
    process.kill()
    process.communicate()
