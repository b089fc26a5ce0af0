"""What commands import: packages that take long and that they do not use stay out."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.run_files import write_rows

ALLOWED = {
    *("llmctl", "torch", "torchgen", "functorch", "numpy", "safetensors", "tokenizers"),
    *("transformers", "huggingface_hub", "jinja2", "markupsafe", "regex", "tqdm", "packaging"),
    *("filelock", "requests", "urllib3", "idna", "certifi", "charset_normalizer", "yaml"),
    *("httpx", "httpcore", "httpx2", "httpcore2", "h11", "anyio", "sniffio", "truststore"),
    *("typer", "click", "shellingham", "rich", "pygments", "annotated_doc", "psutil", "dill"),
    *("pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"),
    *("PIL", "defusedxml", "hf_xet", "fsspec", "mypyc", "cython_runtime", "brotli", "zstandard"),
}
"""Packages that generating with a plain model may import."""
UNUSED = {
    "scipy",
    "torchao",
    "peft",
    "trl",
    "datasets",
    "bitsandbytes",
    "lm_eval",
    "pandas",
    "sklearn",
}
"""Packages that no command needs for a plain run, however many are installed."""
MODELS = {"sympy", "accelerate"}
"""What transformers' code of models brings."""


def packages_of(*arguments: object) -> set[str]:
    """Top-level packages that a command has imported when it ends."""
    program = (
        "import sys\nfrom llmctl.__main__ import start\nsys.argv[0] = 'llmctl'\n"
        "try:\n    start()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print('\\n'.join(sys.modules), file=sys.stderr)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = {line.split(".")[0] for line in ran.stderr.splitlines() if "import" not in line}
    return found - set(sys.stdlib_module_names)


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_plain_model_answers_without_code_of_models(base: Path, command: str) -> None:
    asked = ("--prompt", "a") if command == "generate" else ()
    found = packages_of(command, "--model", base, *asked, "--max-new-tokens", 1)
    named = {name for name in found if name.isidentifier() and not name.startswith("_")}
    assert not named & (UNUSED | MODELS)
    assert named <= ALLOWED


@pytest.mark.parametrize("command", ["pretrain", "sft", "evaluate", "quantize"])
def test_a_command_imports_nothing_that_it_does_not_use(
    base: Path, tokens: Path, tmp_path: Path, command: str
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "cat"}] * 4)
    text = tmp_path / "a.txt"
    text.write_text("the cat sees a dog\n" * 40)
    steps = ("--max-steps", 1, "--samples", 0, "--threads", 1, "-o", tmp_path / "run")
    asked = {
        "pretrain": ("--tokens", tokens, "--layers", 1, "--hidden", 16, "--heads", 1, *steps),
        "sft": ("--model", base, "--data", rows, "--val-size", 0, *steps),
        "evaluate": ("--model", base, "--data", text),
        "quantize": (
            *("--model", base, "--data", text, "--bits", 8, "--sample-tokens", 1),
            *("--eval-tokens", 64, "-o", tmp_path / "run"),
        ),
    }
    needed = {"bitsandbytes"} if command == "quantize" else set()  # which writes 8 bits
    assert not packages_of(command, *asked[command]) & (UNUSED - needed)
