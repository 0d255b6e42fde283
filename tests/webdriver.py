"""A browser by the WebDriver protocol (W3C) over httpx: Debian's chromium and its driver, nothing else."""

from __future__ import annotations

import base64
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx

from tests.harness import wait_until
from tests.pipeline import free_port

MISSING = "browser tests need Debian's chromium and its driver: apt-get install chromium chromium-driver"
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
KEYS = {"Enter": "\ue007", "Escape": "\ue00c", "ArrowRight": "\ue014", "ArrowLeft": "\ue012", "Tab": "\ue004"}


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

    def console_log(self) -> list[str]:
        """The browser's complaints, for example of a blocked style or script."""
        return [str(entry["message"]) for entry in self._call("POST", "/se/log", {"type": "browser"})]

    def resize(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("POST", "/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics})

    def scheme(self, name: str) -> None:
        """`light` or `dark`, like the system's setting."""
        media = {"features": [{"name": "prefers-color-scheme", "value": name}]}
        self._call("POST", "/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": media})

    def screenshot(self) -> bytes:
        return base64.b64decode(self._call("GET", "/screenshot"))
