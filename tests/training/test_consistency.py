"""Two processes that hold different things do not train; both end in words, with one code."""

import json
import os
import shutil
import time

import pytest

from llmctl.data.chat.sandbox import CHATML_TEMPLATE
from llmctl.files import sha256_file
from llmctl.training import consistency
from tests.processes import call_llmctl
from tests.run_files import edit_tensors, read_rows, write_rows
from tests.training.objectives import OBJECTIVES, PRETRAIN, RECORDER, SFT, run_ranks

pytestmark = pytest.mark.slow
PPO_FLAGS = ("--max-steps", "1", "--batch-size", "4", "--max-new-tokens", "4", "--samples", "0")
REWARD, DPO = (next(o for o in OBJECTIVES if o.name == name) for name in ("reward", "dpo"))
CLASSIFY = next(objective for objective in OBJECTIVES if objective.name == "classify")


def call_own(arguments):
    """Run a command with the arguments of this rank."""
    consistency.SEEN_WITHIN = 2.0
    return call_llmctl(arguments[int(os.environ["RANK"])])


def end(commands, folder):
    """Start a rank with each command -> exit codes, all that was written, seconds."""
    began = time.monotonic()
    ended = run_ranks(call_own, (commands,), folder)
    seconds = time.monotonic() - began
    return [code for code, _ in ended], "".join(text for _, text in ended), seconds


@pytest.fixture
def hosts(inputs, tmp_path):
    """The inputs on the disks of two hosts."""
    for name in ("a", "b"):
        shutil.copytree(inputs, tmp_path / name)
    return tmp_path / "a", tmp_path / "b"


@pytest.fixture
def start(hosts, tmp_path):
    """Train an objective on two hosts' own files into one directory, the second with more flags."""

    def run(objective, *more):
        first, second = (objective.arguments(host, tmp_path / "run") for host in hosts)
        return end([first, [*second, *more]], tmp_path / "logs")

    return run


def refused(ended, code, *said):
    codes, text, seconds = ended
    assert codes == [code, code], text
    assert seconds < 60
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, text
    for words in said:
        assert words in errors[0]
    assert "Traceback" not in text


def test_the_same_on_both_trains(start, tmp_path):
    """Under other paths, and with other threads."""
    codes, text, _ = start(SFT, "--threads", "2")
    assert codes == [0, 0], text
    assert (tmp_path / "run" / "model").is_dir()


@pytest.mark.parametrize("objective", [PRETRAIN, SFT, DPO, REWARD, CLASSIFY], ids=str)
def test_another_setting_is_named_with_both_values(start, tmp_path, objective):
    refused(
        start(objective, "--lr", "0.5"),
        2,
        *("`lr` differs between processes", "0.5 on rank 1", "on rank 0 ("),
    )
    assert not (tmp_path / "run").exists()


def test_what_only_one_was_told_is_refused(start):
    refused(start(SFT, "--resume"), 2, "`resume` differs", "False on rank 0", "True on rank 1")


def test_another_version_is_refused(start, tmp_path, monkeypatch):
    ended = run_ranks(
        call_with_other_torch, (SFT.arguments(tmp_path / "a", tmp_path / "run"),), tmp_path / "logs"
    )
    text = "".join(text for _, text in ended)
    assert [code for code, _ in ended] == [2, 2], text
    assert "`version of torch` differs between processes" in text
    assert "2.0.0 on rank 1" in text


def call_with_other_torch(arguments):
    """Run a command, as rank 1 with another torch."""
    if os.environ["RANK"] == "1":
        versions = consistency.versions
        consistency.versions = lambda: {**versions(), "torch": "2.0.0"}
    return call_llmctl(arguments)


@pytest.mark.parametrize("objective", [SFT, REWARD, DPO, CLASSIFY], ids=str)
def test_other_rows_are_refused(start, hosts, tmp_path, objective):
    """As many of them and as long: nothing else would show it."""
    name = objective.data[1]
    rows = read_rows(hosts[1] / name)
    write_rows(hosts[1] / name, [rows[1], rows[0], *rows[2:-1], rows[0]])
    refused(start(objective), 3, "differs between processes", "rank 1")
    assert not (tmp_path / "run").exists()


def test_other_tokens_are_refused(start, hosts):
    """Of the same tokenizer and the same number: two are exchanged, and the index says so."""
    shard = next((hosts[1] / "tokens" / "tokens").glob("train-*.bin"))
    content = bytearray(shard.read_bytes())
    content[0:2], content[8:10] = content[8:10], content[0:2]
    shard.write_bytes(content)
    index = shard.parent / "index.json"
    text = index.read_text().replace(
        json.loads(index.read_text())["splits"]["train"]["shards"][0]["sha256"], sha256_file(shard)
    )
    index.write_text(text)
    refused(start(PRETRAIN), 3, "`tokens` differs between processes")


@pytest.mark.parametrize("objective", [PRETRAIN, SFT, CLASSIFY], ids=str)
def test_other_weights_are_refused(start, hosts, objective):
    edit_tensors(
        hosts[1] / objective.model / "model.safetensors",
        lambda tensors: [tensor.mul_(1.01) for tensor in tensors.values()],
    )
    refused(start(objective), 4, "`model", "differs between processes")


def test_another_template_is_refused(hosts, tmp_path):
    """It would be saved with the model; here it renders the same."""
    commands = []
    for host, more in zip(hosts, ("", "{# of another day #}"), strict=True):
        (host / "chat.jinja").write_text(CHATML_TEMPLATE + more)
        template = ("--chat-template", host / "chat.jinja")
        commands.append(SFT.arguments(host, tmp_path / "run", *template))
    refused(end(commands, tmp_path / "logs"), 4, "`chat_template` differs")


def test_a_run_directory_of_each_host_is_refused(hosts, tmp_path):
    commands = [SFT.arguments(host, host / "run") for host in hosts]
    refused(end(commands, tmp_path / "logs"), 3, "rank 1 (", "does not see the run")
    assert not any((host / "run").exists() for host in hosts)


def test_a_file_that_one_host_lacks_ends_both(start, hosts):
    (hosts[1] / "chats.jsonl").unlink()
    refused(start(SFT), 3, "chats.jsonl")


def test_ppo_is_compared_too(inputs, hosts, tmp_path):
    prompts = [{"prompt": f"{RECORDER.WHO[0]} {who}"} for who in RECORDER.WHO]
    for host in hosts:
        write_rows(host / "prompts.jsonl", prompts)

    def arguments(host, *more):
        flags = ("--reward-rule", "length:3", "--val-size", "0", "-o", tmp_path / "run")
        data = ("--model", host / "llama", "--data", host / "prompts.jsonl")
        return [*map(str, ("ppo", *data, *PPO_FLAGS, *flags, *more))]

    refused(
        end([arguments(hosts[0]), arguments(hosts[1], "--kl-coef", "0.5")], tmp_path / "one"),
        2,
        "`kl_coef` differs",
    )
    write_rows(hosts[1] / "prompts.jsonl", prompts[::-1])
    refused(end([arguments(host) for host in hosts], tmp_path / "two"), 3, "`data` differs")
