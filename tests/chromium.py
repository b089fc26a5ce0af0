"""A headless Chromium, driven through ChromeDriver by plain HTTP (W3C WebDriver, DevTools)."""

import base64
import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
OPEN = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
KEYS = {"Enter": "\ue007", "Backspace": "\ue003", "Tab": "\ue004"}


def is_there() -> bool:
    return bool(shutil.which("chromium") and shutil.which("chromedriver"))


class Browser:
    """One window."""

    def __init__(self, address: str) -> None:
        self.address = address

    def call(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self.address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with OPEN(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, url: str) -> None:
        self.call("/url", {"url": url})

    def js(self, expression: str) -> Any:
        return self.call("/execute/sync", {"script": f"return {expression}", "args": []})

    def press(self, *keys: str) -> None:
        """Real key events, to whatever has the focus."""
        strokes = [
            {"type": kind, "value": KEYS.get(key, key)}
            for key in keys
            for kind in ("keyDown", "keyUp")
        ]
        keyboard = {"type": "key", "id": "keyboard", "actions": strokes}
        self.call("/actions", {"actions": [keyboard]})

    def click(self, selector: str) -> None:
        """A real click in the middle of an element."""
        found = self.call("/element", {"using": "css selector", "value": selector})
        (element,) = found.values()
        self.call(f"/element/{element}/click", {})

    def double_click(self, selector: str, gap: int = 120) -> None:
        """Two real clicks in the middle of an element, so many milliseconds apart."""
        found = self.call("/element", {"using": "css selector", "value": selector})
        move = {"type": "pointerMove", "duration": 0, "x": 0, "y": 0, "origin": found}
        click = [{"type": kind, "button": 0} for kind in ("pointerDown", "pointerUp")]
        actions = [move, *click, {"type": "pause", "duration": gap}, *click]
        mouse = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}}
        self.call("/actions", {"actions": [{**mouse, "actions": actions}]})

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self.call("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def resize(self, width: int, height: int) -> None:
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )

    def prefer(self, scheme: str) -> None:
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.devtools("Emulation.setEmulatedMedia", features=[feature])

    def errors(self) -> list[str]:
        """What it complained about: a policy violated, a file not found."""
        return [entry["message"] for entry in self.call("/se/log", {"type": "browser"})]

    def shoot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.devtools("Page.captureScreenshot")["data"]))

    def wait(self, expression: str, seconds: float = 20) -> Any:
        """What an expression gives, as soon as it is true."""
        end = time.monotonic() + seconds
        while not (value := self.js(expression)):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.02)
        return value


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A fresh browser on a profile of its own."""
    command = ["chromedriver", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        try:
            assert driver.stdout is not None
            started = (re.search(r"successfully on port (\d+)", line) for line in driver.stdout)
            port = next(found[1] for found in started if found)
            options = {
                "binary": shutil.which("chromium"),
                "args": [*FLAGS, f"--user-data-dir={profile}"],
            }
            wanted = {"browserName": "chrome", "goog:chromeOptions": options}
            root = Browser(f"http://127.0.0.1:{port}")
            session = root.call("/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
            browser = Browser(f"{root.address}/session/{session}")
            yield browser
            close = urllib.request.Request(browser.address, method="DELETE")
            OPEN(close, timeout=60).close()
        finally:
            driver.terminate()
