"""A real browser for tests: Chromium in its DevTools protocol."""

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

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
        for domain in ("Page", "Runtime", "Network", "DOM"):
            self.call(f"{domain}.enable")
        self.size(1280, 800)

    def call(self, method: str, **parameters) -> dict:
        """The answer to one command; events that come before it are kept."""
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session and not method.startswith("Browser.") else {}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self.receive())
            if answer.get("id") == self.sent:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def receive(self) -> bytes:
        parts = []
        while (part := self.back.read(1)) != b"\0":
            assert part, "Chromium has ended"
            parts.append(part)
        return b"".join(parts)

    def read(self, expression: str):
        """The value of an expression of JavaScript."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression: str) -> None:
        end = time.monotonic() + 60
        while not self.read(expression):
            assert time.monotonic() < end, f"never came true: {expression}"
            time.sleep(0.02)

    def open(self, page: Path | str, ready: str) -> None:
        """Open a page, a file or an address, and wait until the expression ``ready`` is true on it."""
        self.call("Page.navigate", url=page if isinstance(page, str) else page.as_uri())
        self.until(f"document.readyState == 'complete' && {ready}")

    def press(self, key: str, **more) -> None:
        code, number = KEYS[key]
        event = {"key": key, "code": code, "windowsVirtualKeyCode": number} | more
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **event, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def upload(self, selector: str, *files: Path) -> None:
        """Give files to an input for files, as a person does."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def locate(self, selector: str) -> dict:
        """Left, top, width and height of an element, which is brought into view."""
        rectangle = "(r => ({x: r.x, y: r.y, width: r.width, height: r.height}))(e.getBoundingClientRect())"
        find = f"document.querySelector({json.dumps(selector)})"
        return self.read(f"(e => (e.scrollIntoView({{block: 'nearest', behavior: 'instant'}}), {rectangle}))({find})")

    def drag(self, *points: tuple[float, float]) -> None:
        """Press the mouse at the first point, move over the others, release at the last; one point is a click."""
        mouse = {"button": "left", "clickCount": 1}
        for n, (x, y) in enumerate(points):
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, buttons=int(n > 0), **mouse)
            if n == 0:
                self.call("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, buttons=1, **mouse)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=x, y=y, **mouse)

    def click(self, selector: str) -> None:
        """Click the middle of an element that has come to rest: pages may scroll smoothly."""
        place, last_place = self.locate(selector), None
        while place != last_place:
            time.sleep(0.1)
            place, last_place = self.locate(selector), place
        self.drag((place["x"] + place["width"] / 2, place["y"] + place["height"] / 2))

    def download_to(self, folder: Path) -> None:
        """Downloads go to ``folder`` from now on."""
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def requests(self) -> list[str]:
        """The addresses of all requests so far."""
        requests = (event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent")
        return [parameters["request"]["url"] for parameters in requests]

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
