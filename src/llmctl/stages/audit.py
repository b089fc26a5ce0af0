"""`llmctl audit`: examples and a model's tokenizer in, a report on stdout out."""

import json
from typing import Any

from llmctl.config.stages import AuditConfig
from llmctl.console import log
from llmctl.data.audit import audit, refusal, require_sound
from llmctl.data.report import print_report
from llmctl.data.supervised import load_supervised
from llmctl.redact import redacted


def run(config: AuditConfig) -> dict[str, Any] | None:
    """Print the report; with --json it is the result, and holds the error if there is one.

    Raises:
        DataError: the examples would train a broken model.
    """
    data = load_supervised(config)
    report = audit(data, config, packing=config.packing)
    if not config.as_json:
        print_report(report, data)
        require_sound(report)
        return None
    result = {"stage": "audit", **report.as_json()}
    error = refusal(report)
    if error is None:
        return result
    # Raised, it would be a second object on stdout, without the figures.
    print(json.dumps(redacted({**result, "error": error.as_json()})), flush=True)
    log.error("%s", error)
    raise SystemExit(error.code)
