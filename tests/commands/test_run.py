"""`llmctl run`: what has changed runs, what broke goes on, what cannot work is refused at once."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmctl import metrics
from llmctl.config.gates import Gate
from llmctl.pipeline.gate_checks import flatten, require_known_metrics
from llmctl.pipeline.steps import stage_names
from tests.processes import spawn, wait_for
from tests.run_files import digest

SMALL = "layers: 2, hidden: 32, heads: 2, context: 32, batch_size: 8"
CHAIN = """
defaults: {threads: 1}
stages:
  - {name: tok, stage: tokenize, data: [CORPUS], vocab_size: 320}
  - {name: base, stage: pretrain, tokens: tok, SMALL, max_steps: 20}
  - {name: say, stage: generate, model: base, prompt: [The cat], max_new_tokens: 4, temperature: 0}
"""


@pytest.fixture
def recipe(tmp_path, corpus):
    """Write a recipe, in which CORPUS and SMALL are filled in; its path."""

    def write(text=CHAIN, name="life.yaml"):
        path = tmp_path / name
        path.write_text(text.replace("CORPUS", str(corpus)).replace("SMALL", SMALL))
        return path

    return write


@pytest.fixture(scope="session")
def finished(cli, corpus, tmp_path_factory):
    """A chain that ran; tests that change something copy it."""
    folder = tmp_path_factory.mktemp("chain")
    path = folder / "life.yaml"
    path.write_text(CHAIN.replace("CORPUS", str(corpus)).replace("SMALL", SMALL))
    result = cli("run", path, "-o", folder / "out")
    assert result.code == 0, result.err
    return folder / "out"


@pytest.fixture
def out(finished, tmp_path):
    """A copy of the finished chain, which reads its own stages as the original does."""
    import shutil

    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def states(result):
    return {stage["name"]: stage["state"] for stage in json.loads(result.out)["stages"]}


def run_json(cli, *arguments):
    result = cli("run", *arguments, "--json")
    assert result.code == 0, result.err
    return states(result)


def test_the_result_is_a_run_of_each_stage(finished):
    assert (finished / "tok/tokenizer").is_dir()
    assert (finished / "base/model/config.json").is_file()
    row = json.loads((finished / "say.jsonl").read_text())
    assert row["prompt"] == "The cat"
    journal = json.loads((finished / "pipeline.json").read_text())
    assert journal["state"] == "completed"
    assert journal["exit_code"] == 0
    assert [stage["state"] for stage in journal["stages"]] == ["completed"] * 3
    assert journal["stages"][1]["inputs"] == ["tok"]
    assert journal["stages"][1]["result"]["val_loss"] > 0
    assert "<html" in (finished / "report.html").read_text()


@pytest.mark.slow
def test_a_stage_in_a_chain_gives_the_weights_that_it_gives_alone(finished, tmp_path):
    recipe = tmp_path / "base.yaml"
    recipe.write_text((finished / "base/recipe.yaml").read_text())
    alone = spawn("pretrain", "-c", recipe, "-o", tmp_path / "alone")
    _, err = alone.communicate()
    assert alone.returncode == 0, err
    assert digest(tmp_path / "alone") == digest(finished / "base")


def test_the_same_again_does_nothing(cli, recipe, out):
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    result = cli("run", recipe(), "-o", out)
    assert result.code == 0, result.err
    assert result.out == f"{out}\n"
    for name in ("tok", "base", "say"):
        assert f"{name}: unchanged" in result.err
    after = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    changed = {p.name for p in after if after[p] != before.get(p)}
    assert changed <= {".llmctl.lock", "out", "pipeline.json", "report.html"}


def test_a_changed_stage_runs_anew_and_so_do_those_below(cli, recipe, out):
    before = digest(out / "base")
    text = CHAIN.replace("max_steps: 20", "max_steps: 21")
    found = run_json(cli, recipe(text), "-o", out)
    assert found == {"tok": "unchanged", "base": "completed", "say": "completed"}
    assert digest(out / "base") != before


def test_what_only_the_last_stage_says_changes_only_that(cli, recipe, out):
    text = CHAIN.replace("The cat", "A dog")
    found = run_json(cli, recipe(text), "-o", out)
    assert found == {"tok": "unchanged", "base": "unchanged", "say": "completed"}
    assert json.loads((out / "say.jsonl").read_text())["prompt"] == "A dog"


def test_other_data_under_the_same_name_runs_all_anew(cli, tmp_path, corpus):
    data = tmp_path / "data.jsonl"
    data.write_bytes(corpus.read_bytes())
    path = tmp_path / "life.yaml"
    path.write_text(f"stages: [{{name: tok, stage: tokenize, data: ['{data}'], vocab_size: 300}}]")
    assert run_json(cli, path, "-o", tmp_path / "out") == {"tok": "completed"}
    assert run_json(cli, path, "-o", tmp_path / "out") == {"tok": "unchanged"}
    data.write_text(data.read_text() + json.dumps({"text": "One more of them."}) + "\n")
    assert run_json(cli, path, "-o", tmp_path / "out") == {"tok": "completed"}


def test_other_code_runs_all_anew(cli, recipe, out, monkeypatch):
    monkeypatch.setattr("llmctl.pipeline.content_hash.code_hash", lambda: "another")
    found = run_json(cli, recipe(), "-o", out)
    assert set(found.values()) == {"completed"}


def test_a_result_that_lost_a_file_is_made_again(cli, recipe, out):
    before = digest(out / "base")
    (out / "base/model/model.safetensors").unlink()
    found = run_json(cli, recipe(), "-o", out)
    assert found["base"] == "completed"
    assert digest(out / "base") == before


def test_a_written_file_that_changed_is_made_again(cli, recipe, out):
    before = (out / "say.jsonl").read_text()
    (out / "say.jsonl").write_text("mine\n")
    assert run_json(cli, recipe(), "-o", out)["say"] == "completed"
    assert (out / "say.jsonl").read_text() == before


def test_another_seed_reaches_every_stage(cli, recipe, out):
    found = run_json(cli, recipe(), "-o", out, "--seed", 5)
    assert found["base"] == "completed"
    assert "seed: 5" in (out / "base/recipe.yaml").read_text()
    assert json.loads((out / "say.jsonl").read_text())["seed"] == 5


def test_from_runs_anew_without_a_change(cli, recipe, out):
    found = run_json(cli, recipe(), "-o", out, "--from", "base")
    assert found == {"tok": "left", "base": "completed", "say": "completed"}


def test_only_leaves_the_others_as_they_are(cli, recipe, out):
    text = CHAIN.replace("max_steps: 20", "max_steps: 30").replace("The cat", "A dog")
    found = run_json(cli, recipe(text), "-o", out, "--only", "say")
    assert found == {"tok": "left", "base": "left", "say": "completed"}
    assert run_json(cli, recipe(text), "-o", out)["base"] == "completed"


def test_only_needs_what_it_reads(cli, recipe, tmp_path):
    result = cli("run", recipe(), "-o", tmp_path / "new", "--only", "say")
    assert result.code == 3
    assert "stage `say` reads `base`, which is not complete" in result.err
    assert "--only base" in result.err


def test_a_gate_that_fails_ends_the_run_and_one_that_is_loosened_goes_on(cli, recipe, out):
    gated = CHAIN.replace("max_steps: 20", 'max_steps: 20, gates: {val_loss: "<BOUND"}')
    before = (out / "base/manifest.json").read_bytes()
    for _ in range(2):
        result = cli("run", recipe(gated.replace("BOUND", "0.5")), "-o", out, "--json")
        assert result.code == 8, result.err
        assert "stage `base`: gate val_loss < 0.5 does not hold" in result.err
        report = json.loads(result.out)
        assert report["error"]["code"] == 8
        assert report["stages"][1]["gates"][0]["holds"] is False
        assert report["stages"][2]["state"] == "waiting"
        assert report["stage"] == "run"
        assert f"report: {out / 'report.html'}" in result.err
        assert "Of 1 gate, 1 did not hold." in (out / "report.html").read_text()
    found = run_json(cli, recipe(gated.replace("BOUND", "50")), "-o", out)
    assert found["base"] == "unchanged"
    assert (out / "base/manifest.json").read_bytes() == before


def test_a_gate_on_a_figure_that_no_such_stage_gives_is_refused_at_once(cli, recipe, tmp_path):
    gated = CHAIN.replace("max_steps: 20", 'max_steps: 20, gates: {val_los: "<9"}')
    result = cli("run", recipe(gated), "-o", tmp_path / "out")
    assert result.code == 2
    assert "gates: `pretrain` gives no figure `val_los`: did you mean `val_loss`?" in result.err
    assert not (tmp_path / "out").exists()


def test_a_gate_on_a_figure_that_this_run_did_not_give_is_told(cli, recipe, out):
    gated = CHAIN.replace("max_steps: 20", 'max_steps: 20, gates: {mfu: ">0"}')
    result = cli("run", recipe(gated), "-o", out)
    assert result.code == 8
    assert "gate `mfu > 0`: the stage gave no figure of that name" in result.err


def test_every_figure_of_a_result_can_be_gated(finished):
    """A metric that a stage gives and the table does not have could never be demanded."""
    seen = set()
    for entry in json.loads((finished / "pipeline.json").read_text())["stages"]:
        for name, value in flatten(entry["result"]):
            seen.add(entry["stage"])
            gate = Gate(name, ">=", value)
            require_known_metrics([gate], entry["stage"], Path("a.yaml"), None)
    assert seen == {"tokenize", "pretrain", "generate"}
    assert all(metrics.result_names(stage) for stage in stage_names())


def test_the_exit_code_is_that_of_the_stage_that_failed(cli, recipe, out):
    broken = (
        CHAIN.replace("lr: 1", "") + "  - {name: more, stage: generate, model: base, prompt: [x]}\n"
    )
    text = broken.replace("max_steps: 20", "max_steps: 20, lr: 1.0e+30")
    result = cli("run", recipe(text), "-o", out, "--json")
    assert result.code == 7, result.err
    assert "stage `base`:" in result.err
    report = json.loads(result.out)
    assert [stage["state"] for stage in report["stages"]] == [
        "unchanged", "failed", "waiting", "waiting",
    ]  # fmt: skip
    assert json.loads((out / "pipeline.json").read_text())["exit_code"] == 7
    assert run_json(cli, recipe(broken), "-o", out)["base"] == "completed"


LONG = CHAIN.replace("max_steps: 20", "max_steps: 80, save_every: 15")


@pytest.fixture(scope="session")
def whole(cli, corpus, tmp_path_factory):
    """The longer chain, not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    path = folder / "life.yaml"
    path.write_text(LONG.replace("CORPUS", str(corpus)).replace("SMALL", SMALL))
    result = cli("run", path, "-o", folder / "out")
    assert result.code == 0, result.err
    return folder / "out"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)], ids=["kill", "terminate"]
)
def test_a_stage_that_was_stopped_goes_on_to_the_same_weights(
    cli, recipe, whole, out, number, code
):
    running = spawn("run", recipe(LONG), "-o", out)  # replaces a stage that had completed
    wait_for(out / "base/checkpoints/checkpoint-15", running)
    running.send_signal(number)
    _, err = running.communicate()
    assert running.returncode == code, err
    assert number == signal.SIGKILL or "the same command goes on" in err
    state = json.loads((out / "pipeline.json").read_text())["stages"][1]["state"]
    assert state == ("running" if number == signal.SIGKILL else "preempted")
    result = cli("run", recipe(LONG), "-o", out)
    assert result.code == 0, result.err
    assert "base (pretrain): goes on where it was" in result.err
    assert digest(out / "base") == digest(whole / "base")
    assert (out / "say.jsonl").read_bytes() == (whole / "say.jsonl").read_bytes()


def test_a_kill_before_a_stage_replaced_the_old_one_does_not_take_the_old_for_the_new(
    cli, recipe, out
):
    journal = json.loads((out / "pipeline.json").read_text())
    text = CHAIN.replace("max_steps: 20", "max_steps: 25")
    before = digest(out / "base")
    planned = cli("run", recipe(text), "-o", out, "--dry-run")
    assert planned.code == 0
    from llmctl.pipeline.content_hash import content_hash
    from llmctl.pipeline.references import resolve
    from llmctl.pipeline.steps import load

    stages = resolve(load(recipe(text)), out)
    addresses = {"tok": journal["stages"][0]["address"]}
    manifest = json.loads((out / "base/manifest.json").read_text())
    journal["stages"][1] |= {
        "state": "running",
        "address": content_hash(stages[1], addresses),
        "replaces": manifest["run_id"],
    }
    (out / "pipeline.json").write_text(json.dumps(journal))
    assert run_json(cli, recipe(text), "-o", out)["base"] == "completed"
    assert digest(out / "base") != before


def test_runs_that_are_not_of_the_life_cycle_are_not_replaced(cli, recipe, base, tmp_path):
    import shutil

    shutil.copytree(base, tmp_path / "out/base")
    before = digest(tmp_path / "out/base")
    result = cli("run", recipe(), "-o", tmp_path / "out")
    assert result.code == 3
    assert "holds something that this life cycle did not make" in result.err
    assert digest(tmp_path / "out/base") == before
    result = cli("run", recipe(), "-o", tmp_path / "out/base")
    assert result.code == 3
    assert "this is the directory of one run" in result.err
    result = cli("run", recipe(), "-o", tmp_path / "out", "--overwrite")
    assert result.code == 0, result.err


def test_two_at_once_in_one_directory_are_refused(cli, recipe, out):
    from llmctl.runs.lock import locked

    before = (out / "pipeline.json").read_bytes()
    with locked(out):
        result = cli("run", recipe(), "-o", out)
    assert result.code == 3
    assert "in use by another run" in result.err
    assert (out / "pipeline.json").read_bytes() == before


def test_a_recipe_of_one_stage_is_a_life_cycle_of_one(cli, corpus, tmp_path):
    path = tmp_path / "tok.yaml"
    path.write_text(f"stage: tokenize\ndata: ['{corpus}']\nvocab_size: 300\nout: {tmp_path}/made\n")
    assert run_json(cli, path) == {"tokenize": "completed"}
    assert (tmp_path / "made/tokenize/tokens/index.json").is_file()


def test_paths_come_from_the_environment(cli, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", str(corpus.parent))
    path = tmp_path / "life.yaml"
    path.write_text(
        f"out: ${{env:NOWHERE:-{tmp_path}/default}}\n"
        "stages: [{stage: tokenize, data: ['${env:PLACE}/corpus.jsonl'], vocab_size: 300}]\n"
    )
    assert run_json(cli, path) == {"tokenize": "completed"}
    assert (tmp_path / "default/tokenize").is_dir()


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(cli, recipe, tmp_path):
    result = cli("run", recipe(), "-o", tmp_path / "out", "--dry-run")
    assert result.code == 0, result.err
    assert "base             pretrain   starts" in result.err
    assert not (tmp_path / "out").exists()
    again = tmp_path / "again.yaml"
    again.write_text(result.out)
    repeated = cli("run", again, "--dry-run", "--json")
    assert repeated.code == 0, repeated.err
    assert json.loads(repeated.out)["stages"][1]["tokens"] == "tok"


def test_a_stage_wins_over_a_file_of_its_name_and_says_so(cli, recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tok").mkdir()
    result = cli("run", recipe(), "-o", tmp_path / "out", "--dry-run")
    assert result.code == 0, result.err
    assert "`tok` means the stage, not the file here: write ./tok for that" in result.err


ROUNDS = """
stages:
  - {name: sft, stage: sft, model: MODEL, data: ["builtin:tasks"]}
  - rounds: 2
    first: {ppo: sft}
    stages:
      - {name: reward, stage: reward, model: sft, data: ["builtin:preferences:${round}"]}
      - {name: ppo, stage: ppo, model: ppo, reward_model: [reward=2], data: ["builtin:tasks"]}
  - {name: say, stage: generate, model: ppo, prompt: [Hi]}
"""


def test_rounds_are_written_out(tmp_path, base):
    from llmctl.pipeline.references import resolve
    from llmctl.pipeline.steps import load

    path = tmp_path / "rounds.yaml"
    path.write_text(ROUNDS.replace("MODEL", str(base)))
    stages = {stage.name: stage for stage in resolve(load(path), Path("o"))}
    assert list(stages) == ["sft", "reward-1", "ppo-1", "reward-2", "ppo-2", "say"]
    assert [stages[name].config.model for name in ("ppo-1", "ppo-2", "say", "reward-2")] == [
        "o/sft", "o/ppo-1", "o/ppo-2", "o/sft",
    ]  # fmt: skip
    assert stages["ppo-2"].config.reward_model == ["o/reward-2=2"]
    assert stages["reward-2"].config.data == ["builtin:preferences:2"]
    assert stages["ppo-2"].inputs == ("ppo-1", "reward-2")


STEP = "{name: tok, stage: tokenize, data: [CORPUS]}"
BAD = {
    "no stages": ("defaults: {}", "`stages` is a list of stages"),
    "not a list": ("stages: tokenize", "`stages` is a list of stages"),
    "a key": ("stages: []\nstage_s: 1", "unknown key `stage_s`: did you mean `stages`?"),
    "a stage": (
        "stages:\n  - {stage: pretain}",
        ":2: no stage `pretain`: did you mean `pretrain`?",
    ),
    "chat": ("stages:\n  - {stage: chat}", ":2: no stage `chat`"),
    "no stage": ("stages:\n  - {name: x}", ":2: no `stage`"),
    "a name": ("stages:\n  - {stage: tokenize, name: ../x}", ":2: name: expected letters"),
    "twice": (f"stages:\n  - {STEP}\n  - {STEP}", ":3: two stages are called `tok`"),
    "a field": (
        "stages:\n  - stage: tokenize\n    data: [CORPUS]\n    vocab: 3",
        ":4: stage `tokenize`: unknown key `vocab`",
    ),
    "a value": (
        "stages:\n  - stage: tokenize\n    data: [CORPUS]\n    vocab_size: many",
        ":4: stage `tokenize`: vocab_size: ",
    ),
    "a missing field": (
        "stages:\n  - {stage: sft, data: ['builtin:tasks']}",
        ":2: stage `sft`: --model",
    ),
    "no parents": ("stages:\n  - {stage: pretrain}", ":2: stage `pretrain`: give --tokens"),
    "later": (
        f"stages:\n  - {{name: base, stage: pretrain, tokens: tok}}\n  - {STEP}",
        ":2: stage `base`: tokens: `tok` comes later, or is this stage itself",
    ),
    "itself": (
        "stages:\n  - {name: a, stage: sft, model: a, data: ['builtin:tasks']}",
        ":2: stage `a`: model: `a` comes later, or is this stage itself",
    ),
    "nothing there": (
        "stages:\n  - {stage: sft, model: runs/none/here, data: ['builtin:tasks']}",
        ":2: stage `sft`: model: no stage, run or folder `runs/none/here`",
    ),
    "no data": (
        "stages:\n  - {stage: tokenize, data: [none.txt]}",
        "stage `tokenize`: no such file",
    ),
    "tokens of the Hub": (
        f"stages:\n  - {STEP}\n  - {{stage: pretrain, tokens: toc, size: nano}}",
        ":3: stage `pretrain`: tokens: no stage, run or folder `toc`\n"
        "name a stage before this one, a run, a folder\n",
    ),
    "the wrong kind": (
        f"stages:\n  - {STEP}\n  - {{stage: sft, model: tok, data: ['builtin:tasks']}}",
        ":3: stage `sft`: model takes a language model, and `tok` (tokenize) gives token shards or",
    ),
    "steering": (
        "stages:\n  - {stage: tokenize, data: [CORPUS], out: x}",
        ":2: `out` steers one call",
    ),
    "defaults": (
        f"defaults: {{lr_: 1}}\nstages:\n  - {STEP}",
        ":1: defaults: no stage here has a field",
    ),
    "a gate": (
        "stages:\n  - {stage: tokenize, data: [CORPUS], gates: {tokens: 0.9}}",
        ":2: gates: tokens: expected a sign and a number, got 0.9",
    ),
    "a variable": (
        "stages:\n  - {stage: tokenize, data: ['${env:LLMCTL_NOT_SET}/x']}",
        ":2: data: the environment has no LLMCTL_NOT_SET",
    ),
    "a variable elsewhere": (
        "stages:\n  - {stage: tokenize, data: [CORPUS], vocab_size: '${env:HOME}'}",
        ":2: vocab_size: ${env:…} is for paths",
    ),
    "rounds": (
        f"stages:\n  - {{rounds: 0, stages: [{STEP}]}}",
        ":2: rounds: expected a number from 1 on",
    ),
    "empty rounds": ("stages:\n  - {rounds: 2}", ":2: `rounds` repeats a list of `stages`"),
    "rounds in rounds": (
        f"stages:\n  - rounds: 2\n    stages:\n      - {{rounds: 2, stages: [{STEP}]}}",
        ":4: a block of `rounds` holds stages, no other block",
    ),
    "no first": (
        "stages:\n  - rounds: 2\n    stages:\n"
        "      - {name: a, stage: sft, model: a, data: ['builtin:tasks']}",
        ":4: stage `a-1`: model: `a` comes later",
    ),
    "another first": (
        f"stages:\n  - {{rounds: 2, first: {{b: tok}}, stages: [{STEP}]}}",
        "first: `b` is no stage of this block",
    ),
    "stdin": (
        "stages:\n  - {stage: tokenize, data: ['-']}",
        "stage `tokenize`: data: a life cycle does not",
    ),
    "positions": (
        f"stages:\n  - {STEP}\n  - {{name: base, stage: pretrain, tokens: tok, size: nano}}\n"
        "  - {stage: sft, model: base, data: ['builtin:tasks'], max_length: 999}",
        ":4: stage `sft`: --max-length 999: `OUT/base` has 256 positions\n",
    ),
    "no template": (
        f"stages:\n  - {STEP}\n  - {{name: base, stage: pretrain, tokens: tok, size: nano}}\n"
        "  - {stage: generate, model: base, prompt: [Hi], chat: true}",
        ":4: stage `generate`: `OUT/base` will have no chat template",
    ),
    "memory": (
        f"stages:\n  - {STEP}\n  - {{name: base, stage: pretrain, tokens: tok, size: 8b}}",
        "B of memory needed at the least",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_recipe_is_refused_with_its_line(cli, recipe, tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, message = BAD[name]
    result = cli("run", recipe(text), "-o", tmp_path / "out")
    code = {"no data": 3, "stdin": 3, "no template": 4, "memory": 5}.get(name, 2)
    assert result.code == code, result.err
    assert message.replace("OUT", str(tmp_path / "out")) in result.err
    assert not (tmp_path / "out").exists()


def test_a_slip_in_the_name_of_a_stage_is_told(cli, recipe, tmp_path):
    text = f"stages:\n  - {STEP}\n  - {{stage: pretrain, tokens: toc, size: nano}}"
    warned = "`toc` is no stage: did you mean `tok`?"
    assert warned in cli("run", recipe(text), "-o", tmp_path / "out").err
    assert "no stage" not in cli("run", recipe(), "-o", tmp_path / "out", "--dry-run").err


def test_a_bad_recipe_is_refused_before_the_heavy_libraries_load(recipe, tmp_path):
    code = (
        "import sys; sys.argv[0] = 'llmctl'\n"
        "import atexit; atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
        "from llmctl.cli import main; main()"
    )
    path = recipe("stages:\n  - {stage: tokenize, data: [CORPUS], vocab: 3}")
    command = [sys.executable, "-c", code, "run", str(path), "-o", str(tmp_path / "o")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, "unknown key `vocab`" in ran.stderr) == (2, True)
    assert not set(ran.stderr.split()) & {"torch", "transformers", "accelerate", "datasets"}


def test_a_foreign_page_is_refused_before_the_first_stage(cli, recipe, out):
    (out / "report.html").write_text("my own page")
    journal = (out / "pipeline.json").read_bytes()
    result = cli("run", recipe(), "-o", out)
    assert (result.code, "report.html" in result.err) == (3, True)
    assert (out / "report.html").read_text() == "my own page"
    assert (out / "pipeline.json").read_bytes() == journal, "nothing was begun"


def test_bad_calls_are_refused(cli, recipe, tmp_path, monkeypatch):
    assert "give one RECIPE" in cli("run").err
    assert "give one RECIPE" in cli("run", "a.yaml", "-c", "b.yaml").err
    result = cli("run", tmp_path / "none.yaml")
    assert (result.code, "cannot read the recipe" in result.err) == (2, True)
    result = cli("run", recipe(), "--from", "bas", "-o", tmp_path / "o")
    assert (result.code, "--from bas: no such stage" in result.err) == (2, True)
    assert cli("run", recipe(), "--from", "base", "--only", "base").code == 2
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "::1"}
    for variable, value in {**launched, "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(variable, value)
    result = cli("run", recipe(), "-o", tmp_path / "o")
    assert (result.code, "works in one process" in result.err) == (2, True)
    assert "`processes: N` in a stage" in result.err


def test_a_dry_run_reads_the_data_of_stages_whose_model_is_still_to_be_made(cli, recipe, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "Hi", "response": "Hello."}\n{"prompt": "Hi"}\n')
    text = CHAIN + f"  - {{stage: sft, model: base, data: ['{data}']}}\n"
    result = cli("run", recipe(text), "-o", tmp_path / "out", "--dry-run")
    assert result.code == 3
    assert f"{data}:2: stage `sft`: this row is" in result.err or "no column" in result.err


def test_a_dry_run_tries_stages_that_depend_on_no_other(cli, base, tmp_path):
    template = tmp_path / "broken.jinja"
    template.write_text("{% for %}")
    path = tmp_path / "life.yaml"
    path.write_text(
        f"stages:\n  - {{stage: sft, model: '{base}', data: ['builtin:tasks'], "
        f"chat_template: '{template}'}}\n"
    )
    result = cli("run", path, "-o", tmp_path / "out", "--dry-run")
    assert result.code == 4, result.err
    assert "stage `sft`: " in result.err
    assert str(template) in result.err


def test_stages_leave_the_process_as_it_was():
    import numpy
    import torch

    from llmctl.pipeline.isolation import ProcessState

    process_state = ProcessState()

    def draw():
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    with process_state.restored():
        first = draw()
        os.environ["LLMCTL_LEFT"] = "1"
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.set_num_threads(torch.get_num_threads() + 1)
    assert "LLMCTL_LEFT" not in os.environ
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert torch.get_num_threads() == process_state.threads
    with process_state.restored():
        assert draw() == first


def test_the_table_shows_how_every_stage_stands(recipe, tmp_path):
    import io

    from rich.console import Console

    from llmctl.pipeline.references import resolve
    from llmctl.pipeline.steps import load
    from llmctl.pipeline.view import StageView

    view = StageView(resolve(load(recipe()), tmp_path))
    view.end("tok", "unchanged", {"vocab_size": 320})
    view.begin("base", "starts")
    view._watch("pretrain", 7, 20, "loss 3.1")
    written = io.StringIO()
    Console(file=written, width=100).print(view.table())
    tok, base, say = written.getvalue().splitlines()
    assert "vocab_size 320" in tok
    assert "7/20" in base
    assert "loss 3.1" in base
    assert say.split() == ["say", "generate"]


def test_progress_is_told_to_who_watches():
    from llmctl.console import ProgressBar, progress_to

    told = []
    with progress_to(lambda *facts: told.append(facts)), ProgressBar("count", 3) as progress:
        progress.update(2, "half")
    assert told == [("count", 0, 3, ""), ("count", 2, 3, "half")]


@pytest.mark.slow
def test_several_processes_run_as_a_command(cli, recipe, tmp_path):
    text = CHAIN.replace("max_steps: 20", "max_steps: 4, processes: 2, device: cpu")
    result = cli("run", recipe(text), "-o", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "out/base/manifest.json").read_text())["world_size"] == 2
    assert json.loads(result.out)["stages"][1]["result"]["val_loss"] > 0


@pytest.mark.slow
def test_the_error_of_a_command_keeps_its_code_and_its_words(recipe, tmp_path, capfd):
    from llmctl.errors import DataError
    from llmctl.pipeline.references import resolve
    from llmctl.pipeline.runner import launch
    from llmctl.pipeline.steps import load

    stage = resolve(load(recipe()), tmp_path)[1]  # whose tokens are not there
    with pytest.raises(DataError) as caught:
        launch(stage, {"overwrite": False})
    assert caught.value.code == 3
    assert "error: " in capfd.readouterr().err
