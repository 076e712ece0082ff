"""Pictures for the docs, taken in a real browser: the page of a run, wide and on a phone, light and dark, and the docs' start page.

    fxrank demo --output run/demo && make docs
    python -m benchmarks.pictures                  # from run/demo/report.html and run/site, into docs/images

Needs Chromium with its driver (Debian: `apt-get install chromium chromium-driver`) and selenium (`pip install 'fxrank[dev]'`).
"""

import argparse
import base64
import importlib.util
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WIDTHS = {"wide": 1400, "phone": 400}
"""Pixels."""
TALLEST = 2400
"""Of a picture: what lies below is not in it."""
PATIENCE = 60.0
"""Seconds that a page has to be drawn."""


def missing() -> str | None:
    """What is not installed of what a picture needs, None if all is."""
    if shutil.which("chromedriver") is None or browser() is None:
        return "needs Chromium and its driver (Debian: apt-get install chromium chromium-driver)"
    if importlib.util.find_spec("selenium") is None:
        return "selenium is not installed (pip install 'fxrank[dev]')"
    return None


def browser() -> str | None:
    """The path of Chromium."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def chromium() -> Iterator[Any]:
    """A driver of a headless Chromium that keeps what pages say to the console (`driver.get_log("browser")`). Raises `RuntimeError` that says
    what to install.
    """
    if (lacking := missing()) is not None:
        raise RuntimeError(f"pictures are taken in a browser: {lacking}.")
    webdriver = importlib.import_module("selenium.webdriver")
    service = importlib.import_module("selenium.webdriver.chrome.service").Service(shutil.which("chromedriver"))
    options = webdriver.ChromeOptions()
    options.binary_location = browser()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()


def show(driver: Any, path: Path, *, width: int = 1400, dark: bool = False, drawn: bool = True) -> None:
    """Load a file at this width, as on a phone if that is below 600 pixels, for readers who prefer dark pages or light ones. With `drawn` it is
    a run's page, which is waited for: raises `TimeoutError`.
    """
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    driver.get(path.absolute().as_uri())
    end = time.monotonic() + PATIENCE
    while drawn and driver.execute_script("return document.documentElement.dataset.drawn") != "yes":
        if time.monotonic() > end:
            raise TimeoutError(
                f"{path} was not drawn within {PATIENCE:g} s; the console says {driver.get_log('browser')}."
            )
        time.sleep(0.05)


def take(driver: Any, path: Path) -> Path:
    """A picture of what is shown, from the top, as PNG."""
    width, height = (
        driver.execute_script(f"return document.documentElement.scroll{side}") for side in ("Width", "Height")
    )
    clip = {"x": 0, "y": 0, "width": width, "height": min(height, TALLEST), "scale": 1}
    taken = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    path.write_bytes(base64.b64decode(taken["data"]))
    return path


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    """Take them all. Returns their paths."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--page", default="run/demo/report.html")
    p.add_argument("--site", default="run/site/index.html")
    p.add_argument("--output", default="docs/images")
    options = p.parse_args(arguments)
    found = []
    with chromium() as driver:
        for name, width in WIDTHS.items():
            for theme in ("light", "dark"):
                show(driver, Path(options.page), width=width, dark=theme == "dark")
                found.append(take(driver, Path(options.output) / f"report_{name}_{theme}.png"))
        show(driver, Path(options.site), drawn=False)
        found.append(take(driver, Path(options.output) / "docs_start.png"))
    return found


if __name__ == "__main__":
    print(*main(), sep="\n")
