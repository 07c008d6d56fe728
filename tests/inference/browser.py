"""Control of a headless Chromium by its DevTools protocol. It needs only the standard library and
websockets, which viser installs.
"""

import base64
import json
import re
import subprocess
import tempfile
import threading
import time
from typing import Any

from websockets.sync.client import connect

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--no-first-run",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
    "--remote-debugging-address=127.0.0.1",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",  # allows WebGL without a GPU
]
CENTER = "((r) => [r.x + r.width / 2, r.y + r.height / 2])"


class Browser:
    """A browser with one page. Close it, or use it as a context manager."""

    def __init__(self, url: str, width: int = 1200, height: int = 800):
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        command = [
            "chromium",
            *FLAGS,
            f"--user-data-dir={self._folder.name}",
            f"--window-size={width},{height}",
        ]
        self._process = subprocess.Popen(
            [*command, "about:blank"], stderr=subprocess.PIPE, text=True
        )
        self._session, self._sent = None, 0
        stderr = self._process.stderr
        assert stderr is not None
        address = next(
            (found[0] for line in stderr if (found := re.search(r"ws://\S+", line))), None
        )
        assert address, "chromium did not start"
        # The browser would block if nobody read the pipe.
        threading.Thread(target=lambda: [None for _ in stderr], daemon=True).start()
        self._socket = connect(address, max_size=None)
        targets = self("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        self(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self("Page.navigate", url=url)

    def __call__(self, method: str, **params: Any) -> dict:
        """Run a DevTools command. Returns its result."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params}
        self._socket.send(
            json.dumps(message | ({"sessionId": self._session} if self._session else {}))
        )
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("id") == self._sent:
                assert "error" not in answer, f"{method}: {answer}"
                return answer["result"]

    def js(self, expression: str) -> Any:
        answer = self(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = 30) -> Any:
        """Wait until an expression is true. Returns its value. Raises TimeoutError."""
        end = time.monotonic() + seconds
        while not (value := self.js(expression)):
            if time.monotonic() > end:
                raise TimeoutError(f"{expression}; the page says {self.text()!r}")
            time.sleep(0.1)
        return value

    def text(self) -> str:
        return self.js("document.body.innerText")

    def wait_text(self, text: str) -> None:
        self.wait(f"document.body.innerText.includes({json.dumps(text)})")

    def click(self, x: float, y: float) -> None:
        self("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind, held in (("mousePressed", 1), ("mouseReleased", 0)):
            self(
                "Input.dispatchMouseEvent",
                type=kind,
                x=x,
                y=y,
                button="left",
                buttons=held,
                clickCount=1,
            )
            time.sleep(0.05)

    def click_on(self, element: str) -> None:
        """Click an element, given by an expression, when it exists and no longer moves."""
        place = f"(e => e && e.offsetWidth && (e.scrollIntoView(), {CENTER}(e.getBoundingClientRect())))({element})"
        last = None
        while (now := self.wait(place)) != last:
            last = now
            time.sleep(0.2)
        self.click(*now)

    def press(self, text: str) -> None:
        """Click the button whose text includes `text`."""
        self.click_on(
            f"[...document.querySelectorAll('button')].find(e => e.innerText.includes({json.dumps(text)}))"
        )

    def choose(self, now: str, option: str) -> None:
        """Open the list that shows `now` and choose the first option that includes `option`."""
        self.click_on(
            f"[...document.querySelectorAll('input')].find(e => e.value === {json.dumps(now)})"
        )
        # Options of hidden lists are skipped.
        shown = "[...document.querySelectorAll('[role=option]')].filter(e => e.offsetWidth)"
        self.click_on(f"{shown}.find(e => e.textContent.includes({json.dumps(option)}))")

    def screenshot(self) -> bytes:
        """Return a picture (PNG) of the page, when two pictures in a row are equal."""
        self.js("document.activeElement.blur()")  # hides a blinking caret
        end, last = time.monotonic() + 30, b""
        while time.monotonic() < end:
            picture = base64.b64decode(self("Page.captureScreenshot", format="png")["data"])
            if picture == last:
                return picture
            last = picture
            time.sleep(0.3)
        raise TimeoutError("the page does not come to rest")

    def close(self) -> None:
        self._process.terminate()  # ten seconds faster than Browser.close
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._socket.close()
        self._folder.cleanup()

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
