"""A real browser on the pages: Debian's chromium, headless, driven by selenium."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

SCREENSHOTS = Path(__file__).parents[2] / "screenshots"  # git-ignored


@dataclass(frozen=True)
class Browser:
    """What the tests do in it. A page is opened afresh by `open`, at a size and in a colour scheme."""

    driver: webdriver.Chrome

    def open(self, path: Path, *, width: int = 1100, scheme: str = "light") -> None:
        self.driver.get_log("browser"), self.driver.get_log("performance")  # forget the page before
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.emulate("screen", scheme)
        self.driver.get(path.as_uri())

    def emulate(self, media: str, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})

    def console(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """What the page asked for, itself first; pictures inside it (`data:`) are no requests."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        urls = [e["request"]["url"] for e in sent if e["documentURL"] == self.driver.current_url]
        return [url for url in urls if not url.startswith("data:")]

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def text(self) -> str:
        return str(self.run("return document.body.innerText"))

    def press(self, key: str) -> None:
        self.driver.switch_to.active_element.send_keys(key)

    def focused(self) -> str | None:
        """The label or text of what has the focus; None for the body."""
        label: str | None = self.run(
            "const e = document.activeElement;"
            "return e === document.body ? null : e.getAttribute('aria-label') || e.textContent"
        )
        return label

    def tab(self) -> None:
        self.press(Keys.TAB)

    def count(self, selector: str) -> int:
        return len(self.driver.find_elements(By.CSS_SELECTOR, selector))

    def screenshot(self, name: str) -> Path:
        """The whole page, kept in /screenshots."""
        SCREENSHOTS.mkdir(exist_ok=True)
        target = SCREENSHOTS / f"{name}.png"
        size = self.run("return [innerWidth, document.documentElement.scrollHeight]")
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 600},
        )
        assert self.driver.save_screenshot(str(target))
        return target


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not binary or not driver:
        missing = "needs Debian's chromium and chromium-driver"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    options = Options()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    session = webdriver.Chrome(options, Service(driver))
    try:
        yield Browser(session)
    finally:
        session.quit()
