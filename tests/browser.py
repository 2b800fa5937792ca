"""A headless Chromium, driven over its DevTools protocol: as much of it as the page's tests need."""

import asyncio
import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp

BINARIES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)
STARTS, START_SECONDS = 3, 60


def binary() -> str:
    """The path of an installed Chromium; raises `FileNotFoundError` where there is none."""
    found = next((path for name in BINARIES if (path := shutil.which(name))), None)
    if found is None:
        raise FileNotFoundError(
            f"none of {', '.join(BINARIES)} is installed; on Debian: apt-get install chromium"
        )
    return found


@contextmanager
def browser(folder: Path) -> Iterator["Page"]:
    """One page of a fresh browser whose files go into `folder`."""
    process, port = _started(folder)
    loop = asyncio.new_event_loop()
    try:
        page = Page(loop)
        loop.run_until_complete(page.open(port))
        yield page
        loop.run_until_complete(page.close())
    finally:
        _stop(process)
        loop.close()


def _started(folder: Path) -> tuple[subprocess.Popen[bytes], int]:
    """A browser that listens, and its port. On a busy machine one start may hang: then another is made."""
    said = []
    for attempt in range(STARTS):
        profile = folder / str(attempt)
        profile.mkdir()
        with (profile / "stderr").open("wb") as stderr:
            command = [binary(), *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
            process = subprocess.Popen(command, stdout=stderr, stderr=stderr)
        deadline = time.monotonic() + START_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            with suppress(OSError):
                if lines := (profile / "DevToolsActivePort").read_text().split():
                    return process, int(lines[0])
            time.sleep(0.05)
        _stop(process)
        said.append(f"exit {process.returncode}: {(profile / 'stderr').read_text(errors='replace')[-2000:]}")
    raise RuntimeError("\n".join(["the browser did not start:", *said]))


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Page:
    """A tab. `events` holds everything the browser reported, as (method, parameters)."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._last = 0

    async def open(self, port: int) -> None:
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json") as response:
            tabs = await response.json()
        tab = next(tab for tab in tabs if tab["type"] == "page")
        self._socket = await self._session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0)
        for domain in ("Page", "Runtime", "Network", "DOM", "Log"):
            await self._call(f"{domain}.enable")

    async def close(self) -> None:
        await self._socket.close()
        await self._session.close()

    async def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last += 1
        await self._socket.send_json({"id": self._last, "method": method, "params": parameters})
        while True:
            message = json.loads((await self._socket.receive(30)).data)
            if message.get("id") == self._last:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return dict(message["result"])
            if "method" in message:
                self.events.append((message["method"], message["params"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol and its result."""
        return self.loop.run_until_complete(self._call(method, **parameters))

    def goto(self, url: str) -> None:
        """Opens a page."""
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def until(self, expression: str, seconds: float = 60) -> None:
        """Waits until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.evaluate(expression):
            if time.monotonic() > deadline:
                raise TimeoutError(f"never true: {expression}\n{self.evaluate('document.body.innerText')}")
            time.sleep(0.03)

    def text(self, selector: str) -> str:
        """What a person reads in the first element that matches."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))

    def visible(self, selector: str) -> bool:
        """Whether the first element that matches is shown."""
        return bool(self.evaluate(f"document.querySelector({json.dumps(selector)}).checkVisibility()"))

    def press(self, key: str, code: int, text: str = "") -> None:
        """One key, down and up."""
        for kind in ("keyDown", "keyUp"):
            extra = {"text": text} if text and kind == "keyDown" else {}
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **extra
            )

    def choose_file(self, selector: str, path: Path) -> None:
        """Gives a file input a file."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        """Size of the window in CSS pixels, and the colour scheme that the user prefers."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG file."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))
