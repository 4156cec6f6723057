"""Pictures of a report as people see it: a page of committed results in headless Chromium, wide and on a phone.

    python scripts/report_pictures.py              docs/img/report-{1280,390}-{light,dark}.png
    python scripts/report_pictures.py --out DIR

Chromium and its driver are the Debian packages chromium and chromium-driver; selenium and pillow come with qjax[test].
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout

RESULTS = ("quickstart", "outliers", "training_qat")
WIDTHS, SCHEMES = (1280, 390), ("light", "dark")
TALL = {1280: 1975, 390: 2070}  # pixels of a picture, at most
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def missing() -> str:
    """What a machine lacks to show pages, "" for nothing."""
    lacks = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    with contextlib.suppress(ImportError):
        import selenium  # noqa: F401

        return " and ".join(lacks)
    return " and ".join([*lacks, "selenium"])


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser with an empty profile, which goes with it."""
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory() as profile:
        options = Options()
        options.binary_location = str(shutil.which("chromium"))
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        service = Service(shutil.which("chromedriver"), env={**os.environ, "HOME": profile})
        driver = webdriver.Chrome(options=options, service=service)
        try:
            yield driver
        finally:
            driver.quit()


def look(driver: Any, path: Path, width: int, scheme: str, height: int = 900) -> None:
    """Open a page as a screen of some width shows it, "light" or "dark"."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme_of = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme_of)
    driver.get(path.resolve().as_uri())


def picture(driver: Any, tall: int) -> bytes:
    """The page's top as a PNG of 128 colours."""
    from PIL import Image

    whole = driver.execute_script("return [innerWidth, document.documentElement.scrollHeight]")
    clip = {"x": 0, "y": 0, "width": whole[0], "height": min(tall, whole[1]), "scale": 1}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    image = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
    out = io.BytesIO()
    image.quantize(128, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


def main() -> None:
    """Write the pictures."""
    from qjax.report.page import page
    from qjax.report.result import read

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "img")
    parser.add_argument("paths", type=Path, nargs="*", help="result files; none: those of the documentation")
    asked = parser.parse_args()
    if lacks := missing():
        sys.exit(f"this machine has no {lacks}: apt-get install chromium chromium-driver, pip install 'qjax[test]'")
    paths = asked.paths or [ROOT / "experiments" / "results" / f"{name}.json" for name in RESULTS]
    asked.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, chromium() as driver:
        at = Path(folder) / "report.html"
        at.write_text(page([read(path) for path in paths]), encoding="utf-8")
        for width in WIDTHS:
            for scheme in SCHEMES:
                look(driver, at, width, scheme)
                made = asked.out / f"report-{width}-{scheme}.png"
                made.write_bytes(picture(driver, TALL[width]))
                print(f"{made}: {made.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
