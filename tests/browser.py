"""A real browser for tests of pages: headless Chromium, spoken to over its pipe (Chrome DevTools Protocol)."""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_SECONDS = 60  # for one answer; a busy machine starts slowly


class Browser:
    """One page in a headless Chromium: `with Browser() as browser: browser.open(path)`.

    `requested` are the URLs that the page asked for, `errors` what went wrong in its scripts or was blocked.
    """

    def __init__(self, width: int = 1200, height: int = 900) -> None:
        self.size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.requested: list[str] = []
        self.errors: list[str] = []
        self.seen: list[str] = []  # events since the last `open`
        self._session: str | None = None
        self._numbers, self._left = itertools.count(1), b""

    def __enter__(self) -> Browser:
        assert PROGRAM is not None
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        read, self._to = os.pipe()
        self._from, write = os.pipe()
        # Chromium reads file descriptor 3 and writes 4, where the ends of the pipes may lie the other way round.
        inner = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (read, write)]
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
                   f"--user-data-dir={self._profile.name}"]  # fmt: skip
        self._process = subprocess.Popen(
            [PROGRAM, *options],
            preexec_fn=lambda: [os.dup2(end, place) for place, end in enumerate(inner, 3)],
            pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for end in (read, write, *inner):
            os.close(end)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for part in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{part}.enable")
        self.call("Emulation.setDeviceMetricsOverride", **self.size)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for end in (self._to, self._from):
            os.close(end)
        self._profile.cleanup()

    def call(self, method: str, **values: Any) -> Any:
        """The answer to one command of the protocol."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": values}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (found := self._message()).get("id") != number:
            self._event(found)
        assert "error" not in found, found
        return found["result"]

    def open(self, path: Path) -> None:
        """Load a file and wait until it and its pictures are there."""
        self.seen.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while "Page.loadEventFired" not in self.seen:
            self._event(self._message())

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page; a promise's when it is kept."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def move_to(self, script: str) -> None:
        """The mouse to the middle of the element that a JavaScript expression gives."""
        where = f"(e => (e.scrollIntoView({{block: 'center'}}), e.getBoundingClientRect()))({script})"
        x, y = self.run(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({where})")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key: str, code: int) -> None:
        """A key, such as ("ArrowLeft", 37)."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def picture(self, path: Path) -> Path:
        """A PNG of the whole page."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))
        return path

    def _message(self) -> dict[str, Any]:
        deadline = time.monotonic() + _SECONDS
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"Chromium says nothing for {_SECONDS} seconds"
            part = os.read(self._from, 1 << 16)
            assert part, "Chromium ended"
            self._left += part
        found, _, self._left = self._left.partition(b"\0")
        return json.loads(found)

    def _event(self, found: dict[str, Any]) -> None:
        name, values = found.get("method", ""), found.get("params", {})
        self.seen.append(name)
        if name == "Network.requestWillBeSent":
            self.requested.append(values["request"]["url"])
        elif name == "Runtime.exceptionThrown":
            self.errors.append(str(values["exceptionDetails"]))
        elif name == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
            self.errors.append(str(values["entry"]))
