"""Check the Hugging Face Hub: whether it is switched off, is reached, and knows the user."""

import os
from collections.abc import Iterator

from llmctl.checkup import CheckResult

TIMEOUT = 4.0
"""Seconds."""
OFFLINE = ("1", "ON", "YES", "TRUE")


def check_hub() -> Iterator[CheckResult]:
    """Make one short request, two with a token; the token itself is never shown."""
    import huggingface_hub
    from huggingface_hub import constants

    if huggingface_hub.is_offline_mode():
        names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        name = next((n for n in names if os.environ.get(n, "").upper() in OFFLINE), "")
        text = f"switched off by {name or 'the environment'}: only what is cached is found"
        yield CheckResult("hub", "warning", text, f"unset {name or 'HF_HUB_OFFLINE'}, to download")
        return
    endpoint = constants.ENDPOINT
    status = _status(f"{endpoint}/api/models?limit=1", None)
    if isinstance(status, str):
        fix = "check the network and HTTPS_PROXY, or work with local files: HF_HUB_OFFLINE=1"
        yield CheckResult("hub", "warning", f"{endpoint} is not reached: {status}", fix)
        return
    if status < 400:
        yield CheckResult("hub", "ok", f"{endpoint} answers")
    else:
        text = f"{endpoint} answers with an error ({status})"
        yield CheckResult("hub", "warning", text, "look again later, or check HF_ENDPOINT")
    yield _login(endpoint, huggingface_hub.get_token())


def _login(endpoint: str, token: str | None) -> CheckResult:
    if token is None:
        text = "not logged in: public models and data sets only (hf auth login for others)"
        return CheckResult("login", "ok", text)
    status = _status(f"{endpoint}/api/whoami-v2", token)
    if status == 200:
        return CheckResult("login", "ok", "the Hub knows the token")
    text = f"the Hub refuses the token ({status})"
    where = "replace HF_TOKEN, or unset it" if "HF_TOKEN" in os.environ else "run: hf auth login"
    return CheckResult("login", "warning", text, where)


def _status(url: str, token: str | None) -> int | str:
    """The HTTP status of a URL, or the name of the error."""
    from huggingface_hub import get_session
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # its client's

    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    try:
        return int(get_session().get(url, headers=headers, timeout=TIMEOUT).status_code)
    except (HTTPError, OSError) as error:
        return type(error).__name__
