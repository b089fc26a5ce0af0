"""Every command that the docs show is run, dry where there is a dry run, in a place that has the
files and runs that it speaks of.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from llmctl.config import commands
from llmctl.config.base import read_recipe
from tests.conftest import sentences
from tests.run_files import write_rows

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN = re.compile(r"(?:^|\$\(|-m )llmctl ([a-z]+ .*?|doctor|demo)\)?$", re.MULTILINE)
ON_THE_HUB = re.compile(r"(?<![\w./-])[A-Za-z][\w-]+/[\w.-]*(?:@[\w.]+)?(?![\w/])")
"""`owner/name`; what is there in a folder of that name is no Hub id."""


def shown():
    """Page and words of every command in a block of shell, or of no language."""
    for page in PAGES:
        fenced = page.read_text().split("```")[1::2]
        for block in (text for text in fenced if text.startswith(("sh\n", "\n"))):
            for line in SHOWN.findall(block.replace("\\\n", " ")):
                words = shlex.split(line, comments=True)
                ends = [n for n, word in enumerate(words) if word in (">", ">>", "|", "&&", "&")]
                yield page.name, tuple(words[: min(ends, default=len(words))])


LINES = list(dict.fromkeys(shown()))


@pytest.fixture(scope="module")
def world(cli, tokens, tmp_path_factory):
    """Runs and files by the names that the docs use."""
    root = tmp_path_factory.mktemp("world")
    (root / "recipes").symlink_to(ROOT / "recipes")
    runs = root / "runs"
    runs.mkdir()
    shutil.copytree(tokens, runs / "tok")
    said = sentences(24)
    rows = {
        "examples": [{"prompt": f"Say: {s}", "response": s} for s in said],
        "preferences": [{"prompt": s, "chosen": "Yes, gladly.", "rejected": "No."} for s in said],
        "prompts": [{"prompt": s} for s in said],
        "test": [{"prompt": s, "response": s} for s in said],
        "gsm8k": [{"question": s, "answer": f"#### {n}"} for n, s in enumerate(said)],
        "responses": [{"prompt": s, "response": "Yes."} for s in said],
        "faq": [{"q": s, "a": "Yes."} for s in said],
    }
    rows["feedback"] = rows["helpful"] = rows["harmless"] = rows["preferences"]
    for folder in (root, root / "data"):
        folder.mkdir(exist_ok=True)
        for name, found in rows.items():
            write_rows(folder / f"{name}.jsonl", found)
    (root / "data/text").mkdir()
    for name in ("held-out.txt", "notes.txt", "data/text/a.txt"):
        (root / name).write_text("\n".join(sentences(400)))
    (root / "tasks").mkdir()
    (root / "tasks/my_task.yaml").write_text(
        "task: my_task\ndataset_path: json\n"
        "dataset_kwargs: {data_files: {test: tasks/rows.jsonl}}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: '{{prompt}}'\n"
        "doc_to_target: ' {{response}}'\nmetric_list: [{metric: acc}]\n"
    )
    (root / "tasks/rows.jsonl").write_text((root / "examples.jsonl").read_text())
    few = ("--max-steps", 1, "--batch-size", 8, "--threads", 1)
    shape = ("--layers", 2, "--hidden", 32, "--heads", 2, "--context", 512)
    pairs = ("--data", "preferences.jsonl", "--val-size", 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        made = (
            ("pretrain", "--tokens", "runs/tok", *shape, *few, "-o", "runs/base"),
            ("sft", "--model", "runs/base", "--data", "examples.jsonl", *few, "-o", "runs/sft"),
            ("sft", "-c", "runs/sft/recipe.yaml", "--lora", "-o", "runs/lora"),
            ("reward", "--model", "runs/sft", *pairs, *few, "-o", "runs/reward"),
        )
        for command in made:
            result = cli(*command)
            assert result.code == 0, result.err
    for name, source in (
        *((name, "sft") for name in ("dpo", "ppo", "a", "b", "c", "demo/run", "small")),
        ("rm", "reward"),
    ):
        shutil.copytree(runs / source, runs / name)
    return root


def can_be_dry(command):
    """Whether the command has a dry run."""
    return "dry_run" in commands.config_of(command).model_fields


def names_the_hub(words, root):
    """Whether anything that is read is on the Hub, which is out of reach."""
    texts = list(words[1:])
    for word in words:
        if word.startswith("recipes/"):
            texts += [str(value) for value in read_recipe(root / word)[0].values()]
    found = [name for text in texts for name in ON_THE_HUB.findall(text)]
    return any(not (root / name).exists() and not name.startswith("runs/") for name in found)


def test_there_are_commands():
    assert len(LINES) > 60
    assert {words[0] for _, words in LINES} >= {"demo", "pretrain", "ppo", "report", "run", "plan"}


@pytest.mark.slow
@pytest.mark.parametrize(("page", "words"), LINES, ids=lambda x: x if isinstance(x, str) else "")
def test_a_command_of_the_docs_works(page, words, world, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    words = [word.replace("$run", "runs/sft").replace("/shared/", "") for word in words]
    command, processes = words[0], "--processes" in words
    if command == "rank" and not can_be_dry(command):
        pytest.skip("asks a person")
    if can_be_dry(command) and "--dry-run" not in words and "--score" not in words:
        words.append("--dry-run")
    if "-o" in words and command != "run":
        place = words.index("-o") + 1
        words[place] = str(tmp_path / Path(words[place]).name)
    if processes:
        del words[(at := words.index("--processes")) : at + 2]
    result = cli(*words)
    expected = 6 if names_the_hub(words, world) else 0
    if {"--from", "--only"} & {*words}:  # of a life cycle that has not been run here
        expected = 3
        assert "which is not complete" in result.err
    assert result.code == expected, f"{page}: llmctl {shlex.join(words)}\n{result.err}"
