"""A headless Chromium behind chromedriver, spoken to over HTTP: no package is needed for it."""

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NEEDED = ("chromium", "chromedriver")


class Page:
    """One browser window of a given width."""

    def __init__(self, address: str, width: int):
        self.address = address
        options = {
            "args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
            "mobileEmulation": {"deviceMetrics": {"width": width, "height": 900, "pixelRatio": 1}},
            "binary": shutil.which("chromium"),
        }
        made = self.post(
            "/session",
            capabilities={
                "alwaysMatch": {
                    "goog:chromeOptions": options,
                    "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
                }
            },
        )
        self.session = f"/session/{made['sessionId']}"

    def post(self, path: str, method: str = "POST", **body: Any) -> Any:
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self.address + path, data, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, file: Path) -> None:
        self.post(f"{self.session}/url", url=file.resolve().as_uri())

    def run(self, script: str) -> Any:
        return self.post(f"{self.session}/execute/sync", script=script, args=[])

    def scheme(self, name: str) -> None:
        """Prefer "light" or "dark"."""
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.post(
            f"{self.session}/goog/cdp/execute",
            cmd="Emulation.setEmulatedMedia",
            params={"features": features},
        )

    def console(self) -> list[str]:
        return [one["message"] for one in self.post(f"{self.session}/se/log", type="browser")]

    def requests(self) -> list[str]:
        """The addresses that were asked for, data URIs left out."""
        lines = self.post(f"{self.session}/se/log", type="performance")
        events = [json.loads(line["message"])["message"] for line in lines]
        urls = [
            e["params"]["request"]["url"]
            for e in events
            if e["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not url.startswith("data:")]

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.post(f"{self.session}/screenshot", method="GET")))

    def close(self) -> None:
        self.post(self.session, method="DELETE")


@contextlib.contextmanager
def browser(width: int) -> Iterator[Page]:
    """Yield a `Page`; skip the test where there is no Chromium."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        pytest.skip(
            f"{' and '.join(missing)} is not installed "
            f"(Debian: apt-get install chromium chromium-driver)"
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        driver = subprocess.Popen(
            ["chromedriver", f"--port={port}", f"--log-path={folder}/driver.log"],
            env={"HOME": folder, "TMPDIR": folder, "PATH": "/usr/local/bin:/usr/bin:/bin"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            for _ in range(100):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.1)
            page = Page(f"http://127.0.0.1:{port}", width)
            yield page
            page.close()
        finally:
            driver.terminate()
            driver.wait(10)
