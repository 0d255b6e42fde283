"""A browser by the WebDriver protocol (W3C) over httpx: Debian's chromium and its driver, nothing else."""

from __future__ import annotations

import base64
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx

from tests import harness
from tests.pipeline import free_port

T = TypeVar("T")
MISSING = "browser tests need Debian's chromium and its driver: apt-get install chromium chromium-driver"
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
# A look at a page costs browser and driver 10 ms of CPU or more.
LOOK_SECONDS = 0.15
KEYS = {"Enter": "\ue007", "Escape": "\ue00c", "ArrowRight": "\ue014", "ArrowLeft": "\ue012", "Tab": "\ue004"}


def wait_until(condition: Callable[[], T], *, seconds: float = 20) -> T:
    """Like the harness's, with looks further apart."""
    return harness.wait_until(condition, seconds=seconds, every=LOOK_SECONDS)


def is_installed() -> bool:
    return bool(shutil.which("chromium") and shutil.which("chromedriver"))


class Browser:
    """One headless browser with its driver, both ended by `close`."""

    def __init__(self, folder: Path, *, dark: bool = False, language: str = "en") -> None:
        port = free_port()
        self._driver = subprocess.Popen(["chromedriver", f"--port={port}", "--silent"], stdout=subprocess.DEVNULL)
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)
        wait_until(self._is_ready, seconds=20)
        arguments = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-proxy-server",
            f"--user-data-dir={folder}", f"--lang={language}",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            *(["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []),
        ]  # fmt: skip
        wanted = {"goog:chromeOptions": {"args": arguments, "prefs": {"intl.accept_languages": language}}}
        wanted["goog:loggingPrefs"] = {"browser": "ALL"}  # type: ignore[dict-item]
        made = self._send("POST", "/session", {"capabilities": {"alwaysMatch": {"browserName": "chrome", **wanted}}})
        self._session = f"/session/{made['sessionId']}"

    def _is_ready(self) -> bool:
        try:
            return bool(self._http.get("/status").json()["value"]["ready"])
        except (httpx.HTTPError, ValueError):
            return False

    def close(self) -> None:
        try:
            self._send("DELETE", self._session)
        finally:
            self._http.close()
            self._driver.terminate()
            self._driver.wait(20)

    def _send(self, method: str, path: str, body: Any = None) -> Any:
        answer = self._http.request(method, path, json=body if body is not None else ({} if method == "POST" else None))
        value = answer.json()["value"]
        assert answer.status_code == 200, f"{path}: {value.get('error')}: {str(value.get('message'))[:400]}"
        return value

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        return self._send(method, self._session + path, body)

    def open(self, url: str) -> None:
        self._call("POST", "/url", {"url": url})

    @property
    def url(self) -> str:
        return str(self._call("GET", "/url"))

    def run(self, script: str, *arguments: Any) -> Any:
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def run_async(self, script: str, *arguments: Any) -> Any:
        return self._call("POST", "/execute/async", {"script": script, "args": list(arguments)})

    def find(self, css: str) -> str:
        return str(self._call("POST", "/element", {"using": "css selector", "value": css})[ELEMENT])

    def click(self, css: str) -> None:
        self._call("POST", f"/element/{self.find(css)}/click")

    def type(self, css: str, text: str) -> None:
        self._call("POST", f"/element/{self.find(css)}/value", {"text": text})

    def fill(self, css: str, text: str) -> None:
        self._call("POST", f"/element/{self.find(css)}/clear")
        self.type(css, text)

    def press(self, key: str) -> None:
        actions = [{"type": kind, "value": KEYS.get(key, key)} for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    @property
    def text(self) -> str:
        return str(self.run("return document.body.innerText"))

    def waits_for(self, words: str, *, seconds: float = 20) -> None:
        wait_until(lambda: words in self.text, seconds=seconds)

    def console_log(self, url: str) -> list[str]:
        """The browser's complaints, for example of a blocked style or script, except those about other servers."""
        said = [str(entry["message"]) for entry in self._call("POST", "/se/log", {"type": "browser"})]
        return [line for line in said if url in line or "//127.0.0.1" not in line]

    def _command(self, name: str, /, **values: Any) -> Any:
        """A command of the browser's own protocol."""
        return self._call("POST", "/goog/cdp/execute", {"cmd": name, "params": values})

    def set_cookie(self, url: str, name: str, value: str, path: str) -> None:
        self._command("Network.setCookie", url=url, name=name, value=value, path=path, httpOnly=True)

    @contextmanager
    def before_pages(self, script: str) -> Iterator[None]:
        """Each page that is opened in the block runs `script` before its own scripts."""
        made = self._command("Page.addScriptToEvaluateOnNewDocument", source=script)
        yield
        self._command("Page.removeScriptToEvaluateOnNewDocument", identifier=made["identifier"])

    def resize(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._command("Emulation.setDeviceMetricsOverride", **metrics)

    def scheme(self, name: str) -> None:
        """`light` or `dark`, like the system's setting."""
        self._command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def screenshot(self) -> bytes:
        return base64.b64decode(self._call("GET", "/screenshot"))
