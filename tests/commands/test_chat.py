"""`llmctl chat`: its replies, its commands, what it forgets, and how it behaves at a terminal."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from llmctl.commands import chat
from llmctl.config.sections import Sampling
from llmctl.data.chat.render import ChatFormat
from llmctl.decode.conversation import ContextWindow, Conversation
from llmctl.decode.forward import HuggingFaceForward
from llmctl.decode.loop import Prompt, decode
from llmctl.decode.prefix import PrefixForward, conversation_forward
from llmctl.decode.terminal import ReplyInterrupt, Terminal, UserInput, read_input
from llmctl.errors import DataError
from tests.conftest import pipe
from tests.run_files import rows_in

SHORT = ("--max-new-tokens", 8)


def new_llama(tokenizer, context: int = 200) -> LlamaForCausalLM:
    """A model that was never trained: what it says is noise, a different one for each seed."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=len(tokenizer),
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=context,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "noise"
    new_llama(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def endless(tokenizer, tmp_path_factory) -> Path:
    """A model that says `ab` on line after line and never ends: each token makes one likely."""
    lm = new_llama(tokenizer, context=100_000)
    a, b, newline = tokenizer.convert_tokens_to_ids(["a", "b", "Ċ"])
    with torch.no_grad():
        for parameter in (*lm.model.layers.parameters(), lm.lm_head.weight):
            parameter.zero_()
        lm.model.embed_tokens.weight.copy_(torch.eye(len(tokenizer)))
        for before, after in ((a, b), (b, newline), (newline, a)):
            lm.lm_head.weight[after, before] = 1.0
    folder = tmp_path_factory.mktemp("model") / "endless"
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def say(cli, model, monkeypatch):
    """Pipe lines to a conversation."""

    def run(*lines: str, options=SHORT, model=model):
        pipe(monkeypatch, *lines)
        return cli("chat", "--model", model, "--threads", 1, *options)

    return run


def replies_of(result) -> list[str]:
    return [row["response"] for row in rows_in(result.out)]


def saved(path: Path) -> list[tuple[str, str]]:
    """Role and content of each message of a saved conversation, which is one row."""
    (row,) = rows_in(path.read_text())
    return [(message["role"], message["content"]) for message in row["messages"]]


JSON = (*SHORT, "--json")


# Replies


def test_a_reply_is_what_generate_gives(say, cli, model) -> None:
    options = (*SHORT, "--seed", 5, "--system", "Be kind.")
    result = say("The cat <|im_end|>", options=options)
    generated = cli(
        *("generate", "--model", model, "--chat", "--prompt", "The cat <|im_end|>"), *options
    )
    assert result.code == 0
    assert result.out == generated.out
    assert len(result.out) > 4


def test_replies_through_a_pipe_have_a_blank_line_between(say) -> None:
    rows = rows_in(say("The cat", "A dog", options=JSON).out)
    result = say("The cat", "", "A dog")
    assert result.out == f"{rows[0]['response']}\n\n{rows[1]['response']}\n"
    assert "\x1b" not in result.out + result.err
    assert [set(row) for row in rows] == [{"prompt", "response", "finish_reason", "seed"}] * 2
    assert [(row["prompt"], row["seed"]) for row in rows] == [("The cat", 0), ("A dog", 0)]
    assert {row["finish_reason"] for row in rows} <= {"eos", "length"}


def test_the_model_sees_what_was_said_before(say, tokenizer, model, tmp_path) -> None:
    file = tmp_path / "talk.jsonl"
    options = ("--temperature", 0, *JSON, "-o", file)
    first, second = rows_in(say("The cat", "A dog", options=options).out)
    turns = saved(file)
    assert turns == [
        ("user", "The cat"),
        ("assistant", first["response"]),
        ("user", "A dog"),
        ("assistant", second["response"]),
    ]
    messages = [{"role": role, "content": content} for role, content in turns[:-1]]
    prompt = Prompt(ChatFormat(tokenizer).encode_prompt(messages), 0)
    (expected,) = decode(
        LlamaForCausalLM.from_pretrained(model),
        [prompt],
        Sampling(max_new_tokens=8, greedy=True),
        eos={tokenizer.eos_token_id},
        tokenizer=tokenizer,
    )
    assert second["response"] == expected.text
    assert [second["response"]] != replies_of(say("A dog", options=("--temperature", 0, *JSON)))


def test_messages_of_many_lines(say) -> None:
    lines = ("one\\", "two", '"""', "/three", "", 'four"""', "//five", '""" six """', "seven\\")
    rows = rows_in(say(*lines, options=JSON).out)
    texts = ["one\ntwo", "/three\n\nfour", "/five", " six ", "seven"]
    assert [row["prompt"] for row in rows] == texts


def test_a_block_without_an_end_is_an_error(say) -> None:
    result = say("The cat", '"""', "A dog", options=JSON)
    assert result.code == 3
    assert "does not end" in result.err
    assert len(rows_in(result.out)) == 2


def test_bytes_that_are_no_text(cli, model, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xe9\n")))
    result = cli("chat", "--model", model)
    assert (result.code, "stdin: not UTF-8 at byte 1" in result.err) == (3, True)


# Commands


def test_undo_takes_the_last_exchange_back(say, tmp_path) -> None:
    file = tmp_path / "talk.jsonl"
    result = say("The cat", "A dog", "/undo", "/undo 2", f"/save {file}", "/undo", "/undo")
    assert result.code == 0
    assert [role for role, _ in saved(file)] == ["user", "assistant"]
    assert "dropped: A dog" in result.err
    assert "/undo takes nothing after it, got `2`" in result.err
    assert "nothing to undo" in result.err


def test_retry_gives_another_reply_and_always_the_same(say, tmp_path) -> None:
    file = tmp_path / "talk.jsonl"
    lines = ("The cat", "A dog", "/retry", "/retry", f"/save {file}")
    result = say(*lines, options=JSON)
    texts = replies_of(result)
    assert len(set(texts)) == 4
    assert [row["prompt"] for row in rows_in(result.out)][1:] == ["A dog"] * 3
    assert [content for _, content in saved(file)] == ["The cat", texts[0], "A dog", texts[3]]
    file.unlink()
    assert replies_of(say(*lines, options=JSON)) == texts
    assert "nothing to answer anew" in say("/retry").err
    greedy = say("The cat", "A dog", "/retry", options=(*JSON, "--greedy"))
    assert "will be the same" in greedy.err
    assert replies_of(greedy)[1] == replies_of(greedy)[2]


def test_the_system_message(say, tmp_path) -> None:
    file = tmp_path / "talk.jsonl"
    lines = ("Hi", "/system Be kind.\\", "And short.", "/retry", f"/save {file}", "/clear", "Hi")
    result = say(*lines, "/system off", "/clear", "Hi", "/system", options=JSON)
    turns = saved(file)
    assert turns[0] == ("system", "Be kind.\nAnd short.")
    assert "system message: none" in result.err.splitlines()[-1]
    assert len(rows_in(result.out)) == 4
    greedy = (*JSON, "--temperature", 0)
    plain, kind, again = replies_of(
        say("Hi", "/clear", "/system Be kind.", "Hi", "/clear", "/system off", "Hi", options=greedy)
    )
    assert plain == again != kind
    assert replies_of(say("Hi", options=(*greedy, "--system", "Be kind."))) == [kind]


def test_save_never_replaces_a_file(say, tmp_path) -> None:
    file = tmp_path / "talk.jsonl"
    file.write_text("mine")
    result = say(f"/save {tmp_path}/x", "Hi", f"/save {file}", "/save", f"/save {tmp_path}/a/b")
    assert result.code == 0
    assert file.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [file]
    for refusal in ("nothing to save", "exists already", "needs a FILE", "no such directory"):
        assert refusal in result.err
    assert say("Hi", options=("-o", file)).code == 3
    assert say("Hi", options=(*SHORT, "-o", file, "--overwrite")).code == 0
    assert len(saved(file)) == 2


def test_an_unknown_command_is_no_message(say) -> None:
    result = say("/udno", "/xyzzy", "/help", "Hi", "/exit", "Hi", options=JSON)
    error, other, reply = rows_in(result.out)
    assert (error["error"]["message"], reply["prompt"]) == ("no command /udno", "Hi")
    assert "did you mean /undo?" in error["error"]["hint"]
    assert "/help lists them" in other["error"]["hint"]
    assert "/save FILE" in result.err
    assert result.code == 0


# The context


def test_what_does_not_fit_is_forgotten_but_saved(say, tmp_path) -> None:
    file = tmp_path / "talk.jsonl"
    lines = [f"The cat sees star {i}" for i in range(7)]
    options = ("--system", "Kind.", "--context", 120, *JSON, "-o", file, "--temperature", 0)
    result = say(*lines, options=options)
    assert len(rows_in(result.out)) == 7
    assert result.err.count("the context is full") == 1
    assert len(saved(file)) == 15
    cleared = say(lines[0], *lines[:5], "/clear", lines[0], options=options[:-4] + options[-2:])
    assert replies_of(cleared)[0] == replies_of(cleared)[-1] == replies_of(result)[0]


def test_the_oldest_exchanges_go_and_the_system_message_stays(tokenizer, monkeypatch) -> None:
    talk = conversation_of(new_llama(tokenizer), tokenizer, context=100)
    talk.set_system("Kind.")
    seen, encode = [], ChatFormat.encode_prompt
    monkeypatch.setattr(
        ChatFormat, "encode_prompt", lambda self, rows: seen.append(rows) or encode(self, rows)
    )
    for number in range(6):
        talk.send(f"The cat sees star {number}", lambda _: None)
        roles = [message["role"] for message in seen[-1]]
        assert roles == ["system", *["user", "assistant"] * (len(roles) // 2 - 1), "user"]
        assert seen[-1][-1]["content"] == f"The cat sees star {number}"
        assert len(encode(ChatFormat(tokenizer), seen[-1])) + 8 <= 100
    assert 3 <= len(roles) < 12
    assert talk.dropped == (12 - len(roles)) // 2


def test_a_message_too_long_is_an_error_and_the_talk_goes_on(say, tmp_path) -> None:
    file = tmp_path / "talk.jsonl"
    result = say("Hi", "The cat sees " * 200, "Ho", options=(*JSON, "-o", file))
    first, error, second = rows_in(result.out)
    assert result.code == 0
    assert "the context has 200" in error["error"]["message"]
    assert error["error"]["code"] == 3
    assert [text for role, text in saved(file) if role == "user"] == ["Hi", "Ho"]
    assert first["prompt"] + second["prompt"] == "HiHo"


def test_a_reply_ends_where_the_context_does(say) -> None:
    (row,) = rows_in(say("Hi", options=("--context", 40, "--json", "--seed", 3)).out)
    assert row["finish_reason"] == "length"
    assert 0 < len(row["response"]) < 200


def test_what_leaves_no_room_is_refused(say) -> None:
    refused = {
        ("--context", 5): (3, "the chat template takes"),
        ("--context", 201): (2, "--context 201: the model's context is 200"),
        ("--system", "The cat sees " * 200): (3, "the system message has"),
    }
    for options, (code, text) in refused.items():
        result = say("Hi", options=options)
        assert (result.code, text in result.err) == (code, True), result.err
    assert "leaves no room" in say("/system " + "The cat sees " * 200).err


# Start


def test_a_model_without_a_template_is_refused(say, tokenizer, model, tmp_path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    for file in model.iterdir():
        if "template" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    result = say("Hi", model=folder)
    assert result.code == 4
    assert "no chat template" in result.err
    assert "llmctl generate" in result.err


def test_a_dry_run_needs_no_weights_and_prints_a_recipe(say, cli, model, tmp_path) -> None:
    folder = tmp_path / "light"
    folder.mkdir()
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    options = ("--dry-run", "--context", 100, "--system", "Kind.", "-o", tmp_path / "talk.jsonl")
    result = say("Hi", model=folder, options=options)
    assert result.code == 0, result.err
    assert "context of 100 tokens" in result.err
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(result.out)
    again = cli("chat", "-c", recipe, "--dry-run")
    assert (again.code, again.out) == (0, result.out)
    assert {path.name for path in tmp_path.iterdir()} == {"light", "recipe.yaml"}
    assert cli("chat", "--model", folder).code == 4


# Keys and values that are kept


def conversation_of(lm, tokenizer, context=None, forward=None) -> Conversation:
    sampling = Sampling(max_new_tokens=8)
    window = ContextWindow(tokenizer, context or 500, 8)
    return Conversation(lm, forward or conversation_forward(lm, [1, 2]), window, sampling, 0)


@pytest.fixture
def gpt2(tokenizer) -> GPT2LMHeadModel:
    """A model that the fast pass does not cover."""
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, initializer_range=0.2
    )
    return GPT2LMHeadModel(config).eval()


def test_what_was_read_is_not_read_again(gpt2) -> None:
    forward, plain = conversation_forward(gpt2, [1]), HuggingFaceForward(gpt2)
    assert isinstance(forward, PrefixForward)
    lengths = []
    gpt2.transformer.wte.register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
    talk = [[1, 2, 3, 4], [1, 2, 3, 4, 20, 21, 22], [1, 2, 9], [1, 2, 9], [5, 6]]
    with torch.inference_mode():
        for prompt, new in zip(talk, (4, 2, 1, 1, 2), strict=True):
            read = [forward.prefill([prompt]), *(forward.step(torch.tensor([t])) for t in (20, 30))]
            assert lengths[-3:] == [new, 1, 1]
            full = [plain.prefill([prompt]), *(plain.step(torch.tensor([t])) for t in (20, 30))]
            torch.testing.assert_close(torch.cat(read), torch.cat(full), atol=1e-5, rtol=1e-5)


def test_an_interrupted_pass_leaves_nothing_wrong_behind(gpt2) -> None:
    forward, plain = PrefixForward(gpt2), HuggingFaceForward(gpt2)

    def cut(*_: object) -> None:
        raise ReplyInterrupt

    with torch.inference_mode():
        forward.prefill([[1, 2, 3, 4]])
        hook = gpt2.transformer.h[1].register_forward_pre_hook(cut)
        with pytest.raises(ReplyInterrupt):
            forward.step(torch.tensor([5]))
        hook.remove()
        prompt = [1, 2, 3, 4, 5, 6]
        torch.testing.assert_close(forward.prefill([prompt]), plain.prefill([prompt]))


def test_kept_keys_change_no_reply(gpt2, tokenizer) -> None:
    talks = [
        conversation_of(gpt2, tokenizer, forward=forward)
        for forward in (PrefixForward(gpt2), HuggingFaceForward(gpt2))
    ]
    for talk in talks:
        for text in ("The cat", "A dog", "My friend"):
            talk.send(text, lambda _: None)
        talk.undo()
        talk.retry(lambda _: None)
    assert talks[0].turns == talks[1].turns
    assert len({turn.text for turn in talks[0].turns}) == 2


# Ctrl-C


def stopping_after(pieces: int):
    shown = []

    def on_piece(piece: str) -> None:
        shown.append(piece)
        if len(shown) == pieces:
            raise ReplyInterrupt

    return shown, on_piece


def test_a_reply_that_was_stopped_is_kept_as_far_as_it_came(tokenizer) -> None:
    talk = conversation_of(new_llama(tokenizer), tokenizer)
    shown, on_piece = stopping_after(3)
    reply = talk.send("A dog", on_piece)
    assert (reply.text, reply.finish_reason) == ("".join(shown), "interrupted")
    assert talk.turns == [reply]
    other, on_piece = stopping_after(2)
    assert talk.retry(on_piece).text == "".join(other)
    assert len(talk.turns) == 1


def test_a_reply_stopped_before_its_first_word_is_not_kept(tokenizer) -> None:
    talk = conversation_of(new_llama(tokenizer), tokenizer)
    kept = talk.send("The cat", lambda _: None)
    terminal = Terminal()
    terminal._was_pressed = True  # between the key Enter and the reply
    talk.interruptible = terminal.interruptible
    assert talk.send("A dog", lambda _: None).finish_reason == "interrupted"
    talk.retry(lambda _: None)
    assert talk.turns == [kept]


def press_twice(done: list[str]) -> None:
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.raise_signal(signal.SIGINT)
        done.append("clearing up")


def test_only_one_press_counts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Terminal() as terminal:
        signal.raise_signal(signal.SIGINT)  # nothing to stop: kept for the next reply
        with pytest.raises(ReplyInterrupt), terminal.interruptible():
            pytest.fail("was to be stopped")
        terminal._was_pressed, done = False, []
        with pytest.raises(ReplyInterrupt), terminal.interruptible():
            press_twice(done)
    assert done == ["clearing up"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_through_a_pipe_ends_the_program(say, monkeypatch, tmp_path) -> None:
    file = tmp_path / "talk.jsonl"
    send = Conversation.send

    def say_and_stop(self, text, on_piece):
        if text == "A dog":
            on_piece("Wo")
            signal.raise_signal(signal.SIGINT)
        return send(self, text, on_piece)

    monkeypatch.setattr(chat.Conversation, "send", say_and_stop)
    result = say("The cat", "A dog", "My friend", options=(*SHORT, "-o", file))
    assert result.code == 130
    assert result.out.endswith("\n\nWo\n")
    assert result.err.endswith("error: interrupted\n")
    assert len(saved(file)) == 2


# The terminal


def test_turns_are_read_from_lines() -> None:
    def turns(*lines: str) -> list[UserInput | None]:
        rest = iter(lines)

        def next_line(_: str) -> str:
            for line in rest:
                return line
            raise EOFError

        return [read_input(next_line), *(read_input(next_line) for _ in lines[1:])]

    assert turns("/save  a b.jsonl ") == [UserInput("a b.jsonl", "/save")]
    assert turns("/", "//", " /x") == [UserInput("", "/"), UserInput("/"), UserInput(" /x")]
    assert turns('"""a\nb"""') == [UserInput("a\nb")]
    assert turns('""""""', "") == [UserInput(""), UserInput("")]
    with pytest.raises(DataError):
        turns('"""')


def test_a_model_cannot_steer_the_terminal() -> None:
    assert Terminal().visible("a\x1b]52;c\x07\x9b\r\n\té") == "a\ufffd]52;c\ufffd\ufffd\ufffd\n\té"


class Screen:
    """A process on a terminal of its own: keys in, what is shown out."""

    def __init__(self, *command: object) -> None:
        keys, terminal = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llmctl", *map(str, command)],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env={**os.environ, "TERM": "xterm"},
            start_new_session=True,
            preexec_fn=_own_terminal,
        )
        os.close(terminal)
        self.keys, self.shown = keys, ""

    def press(self, text: str) -> None:
        os.write(self.keys, text.encode())

    def stop(self) -> None:
        """Ctrl-C at the prompt, once readline waits there: Python sees none just before."""
        time.sleep(0.3)
        self.press("\x03")

    def until(self, text: str) -> str:
        """What was shown up to a text, which must come within a minute."""
        deadline = time.monotonic() + 60
        while text not in self.shown:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self.keys], [], [], max(left, 0))
            assert ready, f"no {text!r} in {self.shown!r}"
            self.shown += os.read(self.keys, 65_536).decode(errors="replace")
        before, self.shown = self.shown.split(text, 1)
        return before


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_keys_typed_while_the_model_loads_are_not_lost(endless) -> None:
    screen = Screen("chat", "--model", endless, "--threads", 1)
    try:
        screen.press("/undo\n/un")  # a line, and the beginning of the next
        screen.until("Ctrl-D leaves")
        screen.until("> ")
        screen.until("nothing to undo")
        screen.until("> ")
        screen.press("known\n")
        screen.until("no command /unknown")
        screen.until("> ")
        screen.press("\x04")
        assert screen.process.wait(timeout=30) == 0
    finally:
        screen.process.kill()
        screen.process.wait()
        os.close(screen.keys)


def test_a_conversation_at_a_terminal(endless, tmp_path) -> None:
    file = tmp_path / "talk.jsonl"
    screen = Screen(
        *("chat", "--model", endless, "--threads", 1, "--max-new-tokens", 90_000, "--seed", 2)
    )
    try:
        screen.until("Ctrl-D leaves")
        screen.until("\x1b[?2004h> ")  # asks the terminal to mark what is pasted
        screen.press("The cat\n")
        screen.until("ab\r\nab\r\nab\r\n")  # as it is written: the whole would take minutes
        screen.press("\x03\x03")
        screen.until("> ")
        screen.press("\x1b[200~A dog\rand a bird\x1b[201~\n")  # pasted: one message of two lines
        screen.until("ab\r\nab\r\nab\r\n")
        screen.press("\x03")
        screen.until("> ")
        screen.press("/und\t\n")  # completed
        screen.until("dropped: A dog\r\nand a bird\r\n")
        screen.until("> ")
        screen.press("half a mess")
        screen.until("half a mess")
        screen.stop()
        screen.until("> ")
        screen.stop()
        screen.until("Ctrl-C again")
        screen.until("> ")
        screen.press(f"/save {file}\n")
        screen.until("saved to")
        screen.until("> ")
        screen.press("\x04")
        assert screen.process.wait(timeout=30) == 0
    finally:
        screen.process.kill()
        screen.process.wait()
        os.close(screen.keys)
    (_, said), (_, reply) = saved(file)
    assert said == "The cat"
    assert reply.startswith("ab\nab\nab\n")
    assert len(reply) < 90_000
