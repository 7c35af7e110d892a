"""A headless Chromium, driven over its own debugging protocol; for tests of pages."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from websockets.sync.client import connect


def find_browser() -> str | None:
    """The Chromium or Chrome that is installed here."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


class Browser:
    """One page in one headless browser; a context."""

    def __init__(self, url: str) -> None:
        program = find_browser()
        assert program
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        options += [f"--user-data-dir={self._folder.name}", "--autoplay-policy=no-user-gesture-required"]
        self._process = subprocess.Popen(
            [program, *options, "--window-size=1000,700", url],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._ids = itertools.count(1)
        self._line = connect(self._page(), max_size=1 << 26)

    def _page(self) -> str:
        port_file = Path(self._folder.name, "DevToolsActivePort")
        for _ in range(300):
            try:
                port = int(port_file.read_text().split()[0])
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=5) as answer:
                    pages = [page for page in json.load(answer) if page["type"] == "page"]
                if pages:
                    return str(pages[0]["webSocketDebuggerUrl"])
            except (OSError, ValueError, IndexError):
                pass
            time.sleep(0.1)
        raise TimeoutError("the browser did not start")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol."""
        number = next(self._ids)
        self._line.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._line.recv(timeout=30))
            if answer.get("id") == number:
                return dict(answer["result"])

    def value(self, expression: str) -> Any:
        """The value of an expression in the page."""
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait_for(self, expression: str, limit_s: float) -> Any:
        """Wait until an expression is true; what it is then, or when the time is over."""
        end_s = time.monotonic() + limit_s
        while not (found := self.value(expression)) and time.monotonic() < end_s:
            time.sleep(0.2)
        return found

    def screenshot(self) -> bytes:
        """The page as PNG."""
        return base64.b64decode(self.ask("Page.captureScreenshot")["data"])

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.close()
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()
