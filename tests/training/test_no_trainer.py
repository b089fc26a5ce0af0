"""The product trains with its own loop: no trainer or hook of transformers or TRL is left."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.run_files import write_rows

SOURCE = Path(__file__).parents[2] / "src" / "llmctl"
FILES = sorted(SOURCE.rglob("*.py"))
TRAINERS = re.compile(
    r"(Seq2Seq|SFT|DPO|Reward|GRPO|PPO|KTO|RLOO|ORPO|CPO|Distillation)?Trainer(Callback|State|Control)?"
    r"|(Seq2Seq)?TrainingArguments|(SFT|DPO|Reward|GRPO|PPO|KTO|RLOO)Config"
)
"""Names that transformers and TRL give their trainers and the arguments of these."""
MODULES = ("transformers.trainer", "transformers.training_args", "trl.trainer", "trl.experimental")
HOOKS = (
    "_inner_training_loop",
    "_maybe_log_save_evaluate",
    "_prepare_for_training",
    "_prepare_dataset",
    "_save_checkpoint",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_get_train_sampler",
    "_get_eval_sampler",
    "_get_dataloader",
    "_prepare_inputs",
    "_set_signature_columns_if_needed",
    "_nested_gather",
    "_tr_loss",
    "get_batch_samples",
    "training_step",
    "prediction_step",
    "evaluation_loop",
    "create_optimizer_and_scheduler",
)
"""Methods and fields of `transformers.Trainer` that a subclass would override or read."""


def imports_of(tree):
    """(module, name) of every import of a file, wherever it stands; name None for a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.module, alias.name) for alias in node.names)


def is_trainer(module, name):
    package = module.partition(".")[0]
    if package not in ("transformers", "trl"):
        return False
    return module.startswith(MODULES) or (name is not None and bool(TRAINERS.fullmatch(name)))


def test_the_pattern_knows_a_trainer():
    known = (
        *(("transformers", "Trainer"), ("trl", "SFTTrainer"), ("trl", "DPOConfig")),
        *(("transformers", "TrainingArguments"), ("transformers", "TrainerCallback")),
        *(("trl.trainer.utils", "pad"), ("transformers.trainer_utils", None)),
    )
    assert all(is_trainer(*pair) for pair in known)
    assert not is_trainer("llmctl.training.loop", "Trainer")
    assert not is_trainer("transformers", "PreTrainedModel")


def test_no_file_imports_a_trainer():
    assert len(FILES) > 100
    assert [
        f"{file.relative_to(SOURCE)}: {module} {name or ''}"
        for file in FILES
        for module, name in imports_of(ast.parse(file.read_text()))
        if is_trainer(module, name)
    ] == []


def test_no_file_names_a_private_hook():
    names = re.compile(rf"\b({'|'.join(HOOKS)})\b")
    assert [
        f"{file.relative_to(SOURCE)}: {match[0]}"
        for file in FILES
        for match in names.finditer(file.read_text())
    ] == []


def test_nothing_is_imported_by_a_name_made_at_run_time():
    """Such as `import_module("trl.trainer")` or `getattr(transformers, "Trainer")`."""
    texts = re.compile(r"""["'](trl|transformers)(\.[\w.]*)?[Tt]rainer\w*["']""")
    assert [str(file) for file in FILES if texts.search(file.read_text())] == []


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_a_dry_run_on_a_cpu_loads_no_trl(roomy, tmp_path, command):
    row = {"prompt": "Who sees?", "response": "The cat."}
    if command == "dpo":
        row = {"prompt": "Who sees?", "chosen": "The cat.", "rejected": "A dog."}
    rows = [{**row, "prompt": f"{row['prompt']} {number}"} for number in range(20)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    program = (
        "import json, sys\n"
        "from llmctl.cli import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as ended:\n"
        "    code = ended.code or 0\n"
        "loaded = sorted(name for name in sys.modules if name.partition('.')[0] == 'trl')\n"
        "print(json.dumps([code, 'torch' in sys.modules, loaded]))\n"
    )
    flags = ("--model", roomy, "--data", data, "--device", "cpu", "--threads", 1, "-o", tmp_path)
    ran = subprocess.run(
        [sys.executable, "-c", program, command, *map(str, flags), "--dry-run"],
        capture_output=True,
        text=True,
    )
    assert json.loads(ran.stdout.splitlines()[-1]) == [0, True, []], ran.stderr
