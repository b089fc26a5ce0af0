"""A stage of several processes: its recipe in, `llmctl STAGE --processes N` run, its result out."""

import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

from llmctl.errors import from_json
from llmctl.pipeline.references import Stage
from llmctl.runs.ownership import parse_object
from llmctl.signals import handled_by


def launch(stage: Stage, controls: dict[str, bool]) -> dict[str, Any]:
    """Run a stage as a command of its own, which launches its processes; return its result.

    Signals are passed on, so that it saves; what it says on stderr is said here. It runs in a
    session of its own: a terminal's Ctrl-C would else reach it twice, and end it at once.

    Raises:
        UserError: as the command said it, with its exit code.
    """
    with tempfile.TemporaryDirectory(prefix="llmctl-") as folder:
        recipe = Path(folder) / f"{stage.name}.yaml"
        recipe.write_text(stage.config.to_yaml(stage.stage))
        flags = [f"--{name.replace('_', '-')}" for name, wanted in controls.items() if wanted]
        command = [sys.executable, "-m", "llmctl", stage.stage, "-c", str(recipe)]
        command += ["-o", str(stage.out), "--json", *flags]
        with (Path(folder) / "stdout").open("w+b") as said:
            code = _run(command, said.fileno())
            said.seek(0)
            lines = said.read().splitlines()
    result = parse_object(lines[-1]) if lines else {}
    if code:
        told = result.get("error")
        raise from_json(told if isinstance(told, dict) else {}, code)
    return result


def _run(command: list[str], stdout: int) -> int:
    """Run a command to its end; the exit code, as a shell tells it."""
    with subprocess.Popen(
        command, stdout=stdout, stderr=subprocess.PIPE, start_new_session=True, text=True
    ) as process:

        def pass_on(number: int, _: FrameType | None) -> None:
            process.send_signal(number)

        assert process.stderr is not None
        with handled_by(pass_on):
            for line in process.stderr:
                print(line, end="", file=sys.stderr)
            code = process.wait()
    return code if code >= 0 else 128 - code
