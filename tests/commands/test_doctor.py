"""`llmctl doctor`: each line true, each flaw with its fix and its exit code."""

import json
import shutil
from collections import namedtuple

import pytest

from llmctl.checkup import device, machine, network, packages
from tests.hub_server import TOKEN, HubHandler, serving
from tests.processes import shown_on_a_terminal


def examined(cli, *arguments):
    result = cli("doctor", "--json", *arguments)
    found = json.loads(result.out)
    return result, {check["name"]: check for check in found["checks"]}


def states(findings):
    return [(check.name, check.state) for check in findings]


def test_what_is_sound_is_said_to_be(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result, checks = examined(cli)
    assert result.code == 0, result.out
    for name in ("python", "packages", "extras", "threads", "cpu", "bitsandbytes", "directory"):
        assert checks[name]["state"] == "ok", checks[name]
    assert "torch 2." in checks["packages"]["text"]
    assert str(tmp_path) in checks["directory"]["text"]
    assert checks["hub"]["state"] == "warning"
    assert checks["hub"]["fix"] == "unset HF_HUB_OFFLINE, to download"


@pytest.mark.slow
def test_lines_are_plain_in_a_pipe_and_colored_on_a_terminal(cli, tmp_path):
    result = cli("doctor")
    first, *_ = result.out.splitlines()
    assert first.startswith("ok       python        3.")
    assert "\x1b" not in result.out
    with (tmp_path / "err").open("w") as err:
        seen = shown_on_a_terminal("doctor", stderr=err)
    assert (tmp_path / "err").read_text() == "", "a sound stack says nothing else"
    assert "\x1b[32mok" in seen


def test_packages_are_held_to_what_is_asked_and_to_the_tested_set(monkeypatch):
    asked = ["torch>=99", "numpy>=2", "nowhere>=1", "typer>=0.1", "never; sys_platform == 'beos'"]
    monkeypatch.setattr(packages, "requires", lambda _: [*asked, "gguf>=99; extra == 'gguf'"])
    monkeypatch.setattr(packages, "tested_versions", lambda: {"numpy": "0.1"})
    found = {check.name: check for check in packages.check_packages()}
    assert set(found) == {"torch", "numpy", "nowhere", "packages"}
    assert (found["torch"].state, found["torch"].fix) == ("failure", 'pip install "torch>=99"')
    assert (found["numpy"].state, found["numpy"].fix) == ("warning", 'pip install "numpy==0.1"')
    assert found["nowhere"].text == "missing; nowhere>=1 is needed"
    assert found["nowhere"].error.code == 5
    extras = {check.name: check for check in packages.check_extras()}
    assert extras["gguf"].fix == 'pip install "llmctl[gguf]"'


def test_an_absent_extra_is_named_with_what_to_type(monkeypatch):
    monkeypatch.setattr(packages, "requires", lambda _: ["nowhere>=1; extra == 'wandb'"])
    (check,) = packages.check_extras()
    assert (check.state, check.text) == (
        "ok",
        'none; to add others: pip install "llmctl[wandb]"',
    )


def test_the_tested_set_is_found():
    assert "torch" in packages.tested_versions()
    assert "huggingface-hub" in packages.tested_versions(), "names are compared as pip does"


@pytest.mark.parametrize(
    ("value", "state", "fix"),
    [
        ("64", "warning", "export OMP_NUM_THREADS=2, or unset it"),
        ("all", "warning", "unset OMP_NUM_THREADS"),
        ("1", "ok", None),
    ],
)
def test_threads_beyond_the_cores_are_told(monkeypatch, value, state, fix):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    check = machine.check_threads(2)
    assert (check.state, check.fix) == (state, fix)


@pytest.mark.parametrize(("gigabytes", "state"), [(0.5, "failure"), (2, "warning"), (100, "ok")])
def test_little_memory_or_disk_is_told(monkeypatch, gigabytes, state):
    assert machine.check_memory(int(gigabytes * 1e9)).state == state
    usage = namedtuple("usage", "total used free")
    disk = gigabytes * 3 if state != "failure" else gigabytes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, int(disk * 1e9)))
    assert states(machine.check_disks()) == [("directory", state), ("cache", state)]


def test_a_directory_that_cannot_be_written_is_an_error_of_the_output(cli, monkeypatch):
    monkeypatch.setattr(machine, "_can_write", lambda folder: False)
    result, checks = examined(cli)
    assert result.code == 3
    assert json.loads(result.out)["error"]["code"] == 3
    assert "not to be written" in checks["directory"]["text"]
    assert result.err.startswith("error: doctor found what must be mended: directory, cache\n")


@pytest.mark.parametrize("error", [float("nan"), 0.5])
def test_weights_that_do_not_survive_4_bits_are_a_failure(cli, monkeypatch, error):
    monkeypatch.setattr(device, "_round_trip_error", lambda _: error)
    result, checks = examined(cli)
    assert result.code == 5
    assert "--load-in-4bit" in checks["bitsandbytes"]["fix"]


@pytest.mark.parametrize(
    ("built_for", "visible", "state", "text"),
    [
        (None, None, "failure", "built for the CPU only"),
        ("13.0", None, "failure", "does not serve it"),
        ("13.0", "", "ok", "hidden by CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_gpu_that_torch_does_not_see_is_told(
    monkeypatch, tmp_path, built_for, visible, state, text
):
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX Kernel Module  580.65.06  Sun\n")
    monkeypatch.setattr(device, "DRIVER", tmp_path / "version")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    check = device._unused_gpu("2.13.0", built_for)
    assert check.state == state
    assert text in check.text
    assert device._driver() == "580.65.06"


@pytest.fixture
def endpoint():
    class Hub(HubHandler):
        def do_GET(self):
            known = self.headers.get("authorization") == f"Bearer {TOKEN}"
            status = 401 if "whoami" in self.path and not known else 200
            self.answer(b"{}", 500 if "broken" in self.path else status)

    with serving(Hub) as address:
        yield address


@pytest.mark.parametrize(
    ("token", "place", "expected"),
    [
        (None, "", [("hub", "ok"), ("login", "ok")]),
        (TOKEN, "", [("hub", "ok"), ("login", "ok")]),
        (f"{TOKEN}x", "", [("hub", "ok"), ("login", "warning")]),
        (None, "/broken", [("hub", "warning"), ("login", "ok")]),
        (TOKEN, None, [("hub", "warning")]),
    ],
)
def test_the_hub_is_asked_and_the_token_never_shown(endpoint, monkeypatch, token, place, expected):
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    where = "http://127.0.0.1:9" if place is None else endpoint + place
    monkeypatch.setattr(constants, "ENDPOINT", where)
    found = list(network.check_hub())
    assert states(found) == expected, found
    assert all(check.fix for check in found if check.state != "ok")
    assert token is None or not any(token in str(check) for check in found)


@pytest.mark.gpu
def test_a_gpu_is_tried(cli):
    _, checks = examined(cli)
    assert checks["gpu 0"]["state"] in ("ok", "warning")
    assert "CUDA" in checks["gpu 0"]["text"]
    assert "on cuda" in checks["bitsandbytes"]["text"]
