"""Rendering chat templates that nobody vouches for: the same text, and bounds that hold."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmctl.data.chat import sandbox, sandbox_process
from llmctl.data.chat.render import ChatFormat
from llmctl.data.chat.sandbox import CHATML_TEMPLATE, render_cuts
from llmctl.errors import ModelError
from tests.run_files import rows_in

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' }}\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{- bos_token }}\n{%- set date = strftime_now('%d %b %Y') if strftime_now is defined %}"
    "{%- if tools is not none and tools is defined %}{{- tools | tojson(indent=4) }}{%- endif %}"
    "{%- for message in messages %}{{- '<|start_header_id|>' + message.role + '<|end_header_id|>"
    "\n\n' + date + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant\n\n' }}{%- endif %}"
)
MISTRAL = (
    "{%- set ns = namespace(index=0, system='') %}{%- for message in messages %}"
    "{%- if message.role == 'system' %}{%- set ns.system = message.content %}{%- continue %}"
    "{%- endif %}{%- if (message.role == 'user') != (ns.index % 2 == 0) %}"
    "{{- raise_exception('roles must alternate user/assistant') }}{%- endif %}"
    "{%- set ns.index = ns.index + 1 %}{%- if message.role == 'user' %}"
    "{{- ' [INST] ' + ns.system ~ message.content + ' [/INST]' }}{%- else %}"
    "{{- message.content + eos_token }}{%- if message.tool_calls is defined %}"
    "{{- message.tool_calls | tojson }}{%- endif %}{%- endif %}{%- endfor %}"
)
GENERATION = "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ messages | tojson }}"
TALK = [
    {"role": "system", "content": "Be brief. <b>&amp;</b>"},
    {"role": "user", "content": " Hü 東京 🎉 \n\u2028'\"\\ \ud800"},
    {"role": "assistant", "content": "", "tool_calls": [{"id": 1.5, "x": True}], "name": None},
    {"role": "user", "content": "{{ 7 * 7 }}{% raw %}"},
]
HI = [{"role": "user", "content": "hi"}]


def render_prompt(template, messages, variables=None) -> str:
    (text,) = render_cuts(template, messages, [(len(messages), True)], variables or {})
    return text


@pytest.mark.parametrize("template", [CHATML_TEMPLATE, CHATML, LLAMA3, MISTRAL, GENERATION])
@pytest.mark.parametrize("messages", [TALK, TALK[1:2], HI * 1])
def test_the_text_is_what_transformers_makes(tokenizer, template, messages) -> None:
    tokenizer.chat_template = template
    rendered = render_prompt(template, messages, tokenizer.special_tokens_map)
    assert rendered == tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


def test_a_foreign_template_is_rendered_outside(tokenizer, monkeypatch) -> None:
    tokenizer.chat_template = CHATML
    expected = tokenizer.apply_chat_template(HI, add_generation_prompt=True)["input_ids"]
    inside: list[object] = []
    monkeypatch.setattr(type(tokenizer), "apply_chat_template", lambda *a, **k: inside.append(a))
    assert ChatFormat(tokenizer).encode_prompt(HI) == expected
    assert not inside


@pytest.mark.parametrize("trusted", [True, False])
def test_cuts_come_in_one_answer_and_see_the_tools(tokenizer, monkeypatch, trusted) -> None:
    template = "{{ tools | tojson if tools }}" + CHATML
    sent: list[str] = []
    monkeypatch.setattr(
        sandbox, "_request", lambda request, ask=sandbox._request: sent.append("") or ask(request)
    )
    cuts = [(1, True), (2, False), (1, True), (4, False)]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    variables = tokenizer.special_tokens_map
    texts = list(render_cuts(template, TALK, cuts, variables, tools, trusted=trusted))
    tokenizer.chat_template = template
    assert texts == [
        tokenizer.apply_chat_template(
            TALK[:count], tools=tools, tokenize=False, add_generation_prompt=is_prompt
        )
        for count, is_prompt in cuts
    ]
    assert len(sent) == (not trusted)


def test_a_template_of_ours_refuses_in_the_same_words() -> None:
    refusals = []
    for trusted in (True, False):
        with pytest.raises(ModelError) as refused:
            list(render_cuts("{{ raise_exception('no') }}", HI, [(1, True)], {}, trusted=trusted))
        refusals.append(refused.value.message)
    assert refusals == ["the chat template refuses these messages: no"] * 2


def test_the_bound_on_text_counts_all_cuts_and_what_they_were_given() -> None:
    cuts = [(1, True)] * 5
    long = [{"role": "user", "content": "x" * 400_000}]
    assert [len(text) for text in render_cuts("{{ messages[0].content }}", long, cuts, {})] == (
        [400_000] * 5
    )
    with pytest.raises(ModelError, match="writes too much: 1,200,000 characters"):
        list(render_cuts("{{ 'x' * 400000 }}", HI, cuts, {}))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no') }}", "refuses these messages: no"),
        ("{% if %}", "refuses these messages: Expected an expression"),
        ("{{ messages[9].content.x }}", "refuses these messages: list object has no element 9"),
        ("{{ 1 / 0 }}", "refuses these messages: division by zero"),
        ("{{ raise_exception('\x1b[2J\nz') }}", "refuses these messages: [2J z"),
        ("x" * 250_001, "is larger than 250,000 characters"),
        ("{{ 'x' * 2000000 }}", "writes too much: 2,000,000 characters"),
        (
            {"tool_use": "x"},
            "several chat templates (tool_use), and none of them is called `default`",
        ),
        (7, "the chat template is not text"),
    ],
)
def test_a_refusal_names_its_reason(tokenizer, template, message) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ModelError) as refused:
        ChatFormat(tokenizer).encode_prompt([*HI, *HI])
    assert message in str(refused.value)
    assert (refused.value.code, "\x1b" in str(refused.value)) == (4, False)


RANGE = "{% for a in range(99999) %}"
BOMBS = {
    "nested ranges": RANGE * 2 + "{% endfor %}" * 2,
    "a long string": "{{ 'x' * 10**9 }}",
    "a long list": "{% set x = [0] * 10**11 %}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}{{ n.x }}",
    "a macro without end": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "a macro that branches": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(50) }}",
    "a power": "{{ 10 ** (10 ** 9) }}",
    "a width": "{{ '%1000000000d' % 1 }}",
    "nested brackets": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "nested blocks": "{% for a in [1] %}" * 2000 + "{% endfor %}" * 2000,
    "much text": RANGE + "{{ 'x' * 999 }}{% endfor %}",
    "a megabyte": "{# x #}" * 150_000,
}
MEASURE = """
import json, resource, sys, time
from llmctl.data.chat.sandbox import render_cuts
from llmctl.errors import ModelError
for name, bomb in json.load(sys.stdin).items():
    begun = time.monotonic()
    try:
        (text,) = render_cuts(bomb, [{"role": "user", "content": "hi"}], [(1, True)], {})
        refused = f"{len(text)} characters"
    except ModelError as error:
        refused = str(error)
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(json.dumps([name, refused, time.monotonic() - begun, memory]))
"""


@pytest.mark.slow
def test_bombs_are_refused_in_time_and_memory() -> None:
    ran = subprocess.run(
        [sys.executable, "-O", "-c", MEASURE],
        input=json.dumps(BOMBS),
        capture_output=True,
        text=True,
    )
    rows = rows_in(ran.stdout)
    assert [row[0] for row in rows] == list(BOMBS), ran.stderr
    for name, refused, seconds, kilobytes in rows:
        print(f"{name:22} {seconds:.2f} s {kilobytes // 1024} MB  {refused.splitlines()[0]}")
        assert refused.startswith("the chat template "), name
        assert (seconds < 60, kilobytes < 1e6) == (True, True), name


@pytest.mark.slow
def test_after_a_bomb_the_next_one_renders(tokenizer) -> None:
    bomb = "{% if messages[0].content == 'hi' %}" + BOMBS["nested ranges"] + "{% endif %}fine"
    for _ in range(2):
        with pytest.raises(ModelError, match="takes too long: more than 3 s"):
            render_prompt(bomb, HI)
        assert render_prompt(bomb, TALK) == "fine"


def test_one_process_serves_and_each_text_is_quick() -> None:
    render_prompt(CHATML, HI)
    process = sandbox._renderer(os.getpid())
    begun = time.perf_counter()
    for _ in range(200):
        render_prompt(CHATML, TALK)
    assert (time.perf_counter() - begun) / 200 < 0.01
    assert sandbox._renderer(os.getpid()) is process


def test_a_renderer_that_was_killed_is_named_and_replaced() -> None:
    render_prompt(CHATML, HI)
    sandbox._renderer(os.getpid()).kill()
    with pytest.raises(ModelError, match="process"):
        render_prompt(CHATML, HI)
    assert render_prompt("fine", HI) == "fine"


HANG = """
import os
from llmctl.data.chat import sandbox
list(sandbox.render_cuts("fine", [], [(0, True)], {}))
print(sandbox._renderer(os.getpid()).pid, flush=True)
bomb = "{% for a in range(99999) %}" * 2 + "{% endfor %}" * 2
list(sandbox.render_cuts(bomb, [], [(0, True)], {}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_runs_on_when_it_is_stopped(number) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HANG],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    renderer = int(process.stdout.readline())
    time.sleep(0.3)
    process.send_signal(number)
    process.wait(5)
    process.stdout.close()
    limit = time.monotonic() + (0.5 if number == signal.SIGINT else sandbox_process.SECONDS + 1)
    while is_running(renderer):
        assert time.monotonic() < limit
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_renderer_is_light_and_imports_nothing_from_here(tmp_path) -> None:
    for name in ("jinja2", "json", "transformers", "numpy"):
        (tmp_path / f"{name}.py").write_text("open('canary', 'w')")
    program = (
        "import sys; from llmctl.data.chat.sandbox_process import import_renderer; "
        "import_renderer()"
    )
    loaded = subprocess.run(
        [sys.executable, "-P", "-c", f"{program}; print(*sys.modules)"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    ).stdout.split()
    assert "transformers.utils.chat_template_utils" in loaded
    assert not {"torch", "transformers.utils.hub", "transformers.modeling_utils"} & set(loaded)
    render = (
        "from llmctl.data.chat.sandbox import render_cuts; "
        "print(*render_cuts('fine', [], [(0, True)], {}))"
    )
    ran = subprocess.run(
        [sys.executable, "-P", "-c", render], capture_output=True, text=True, cwd=tmp_path
    )
    assert ran.stdout == "fine\n", ran.stderr
    assert not (tmp_path / "canary").exists()
