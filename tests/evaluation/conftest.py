"""Fixtures of the tests of studies: a real browser."""

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# key: (code, Windows' number), as the DevTools protocol wants them
KEYS = {
    "ArrowLeft": ("ArrowLeft", 37), "ArrowRight": ("ArrowRight", 39), "Backspace": ("Backspace", 8),
    "a": ("KeyA", 65), "l": ("KeyL", 76), "Enter": ("Enter", 13),
    "ArrowUp": ("ArrowUp", 38), "ArrowDown": ("ArrowDown", 40), "f": ("KeyF", 70), "2": ("Digit2", 50),
}  # fmt: skip


class Browser:
    """Chromium without a window, spoken to in its DevTools protocol over a pipe: no driver and no further package."""

    def __init__(self, folder: Path):
        theirs, self.to = os.pipe()
        back, their_back = os.pipe()
        flags = ["--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        command = ["sh", "-c", f'exec "$0" "$@" 3</dev/fd/{theirs} 4>/dev/fd/{their_back}', CHROMIUM, *flags]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        profile = f"--user-data-dir={folder / 'profile'}"
        self.process = subprocess.Popen([*command, profile], pass_fds=(theirs, their_back), **quiet)
        os.close(theirs)
        os.close(their_back)
        self.back, self.sent, self.session, self.events = os.fdopen(back, "rb"), 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")
        self.size(1280, 800)

    def call(self, method: str, **parameters) -> dict:
        """The answer to one command; events that come before it are kept."""
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session and not method.startswith("Browser.") else {}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            found = json.loads(self.receive())
            if found.get("id") == self.sent:
                assert "error" not in found, found
                return found["result"]
            self.events.append(found)

    def receive(self) -> bytes:
        parts = []
        while (part := self.back.read(1)) != b"\0":
            assert part, "Chromium has ended"
            parts.append(part)
        return b"".join(parts)

    def read(self, expression: str):
        """The value of an expression of JavaScript."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str) -> None:
        end = time.monotonic() + 60
        while not self.read(expression):
            assert time.monotonic() < end, f"never came true: {expression}"
            time.sleep(0.02)

    def open(self, page: Path, ready: str) -> None:
        """Open a page and wait until the expression ``ready`` is true on it."""
        self.call("Page.navigate", url=page.as_uri())
        self.until(f"document.readyState == 'complete' && {ready}")

    def press(self, key: str, **more) -> None:
        code, number = KEYS[key]
        event = {"key": key, "code": code, "windowsVirtualKeyCode": number} | more
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **event, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def size(self, width: int, height: int, mobile: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self.call("Browser.close")
        self.process.wait(60)
        os.close(self.to)
        self.back.close()


@pytest.fixture
def browser(tmp_path):
    if CHROMIUM is None:
        pytest.skip("needs Chromium on the PATH (apt-get install chromium)")
    browser = Browser(tmp_path)
    yield browser
    browser.close()
