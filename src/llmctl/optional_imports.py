"""Keep what transformers would import for nothing out of the process.

transformers imports scipy for the losses of object detectors and torchao for weights in few bits,
wherever they are installed, whenever it loads any model: half a second of every command. Here its
question whether they are installed is answered with no, in the modules that ask it for that, until
`allow` is called.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

UNUSED = {
    "transformers.loss.loss_for_object_detection": "scipy",
    "transformers.loss.loss_deformable_detr": "scipy",
    "transformers.integrations.torchao": "torchao",
    "transformers.quantizers.quantizer_torchao": "torchao",
}
"""Modules and the package that each would import."""
QUESTION = "is_{}_available"


class _Deny(MetaPathFinder):
    """Answers before one of the modules is imported, and finds none itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if (package := UNUSED.get(fullname)) is not None:
            _answer(package, lambda *_, **__: False)
        return None


def deny() -> None:
    """Have transformers do without scipy and torchao from now on."""
    if not any(isinstance(finder, _Deny) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Deny())


def allow(package: str) -> None:
    """Have transformers import a package after all, before a model is loaded that needs it."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Deny)]
    utils = sys.modules.get("transformers.utils.import_utils")
    if utils is None or not hasattr(utils, f"_own_{package}"):
        return
    _answer(package, getattr(utils, f"_own_{package}"))
    for name, wanted in UNUSED.items():
        if wanted == package and name in sys.modules:
            importlib.reload(sys.modules[name])
    if package == "torchao" and "transformers.quantizers.auto" in sys.modules:
        made: Any = sys.modules["transformers.quantizers.quantizer_torchao"]
        chosen: Any = sys.modules["transformers.quantizers.auto"]
        chosen.AUTO_QUANTIZER_MAPPING["torchao"] = made.TorchAoHfQuantizer


def _answer(package: str, answer: Any) -> None:
    """Answer transformers' question whether a package is there; keep its own way of telling."""
    question = QUESTION.format(package)
    asked: Any = sys.modules["transformers.utils.import_utils"]
    if not hasattr(asked, f"_own_{package}"):
        setattr(asked, f"_own_{package}", getattr(asked, question))
    for name in ("transformers.utils.import_utils", "transformers.utils"):
        if name in sys.modules:
            setattr(sys.modules[name], question, answer)
