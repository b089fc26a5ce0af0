"""`llmctl audit`: examples and a model's tokenizer in, a report on stdout out."""

from typing import Any

from llmctl.config.commands.audit import AuditConfig
from llmctl.data.audit.audit import audit, require_sound
from llmctl.data.audit.show import print_report
from llmctl.data.sft import load_sft_data
from llmctl.errors import DataError


def run(config: AuditConfig) -> dict[str, Any] | None:
    """Print the report; with --json it is the result, and holds the error if there is one.

    Raises:
        DataError: the examples would train a broken model.
    """
    data = load_sft_data(config)
    report = audit(data, config, packing=True)
    result = {"stage": "audit", **report.as_json()}
    if not config.as_json:
        print_report(report, data, config.example)
    try:
        require_sound(report)
    except DataError as error:
        error.report = result
        raise
    return result if config.as_json else None
