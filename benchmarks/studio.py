"""How long people wait: from ``untwine app`` to the first picture on the page, and with fifty at once.

``--screenshots`` writes the pictures of docs/studio.md instead. Both need Chromium and the extras app, test.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import ROOT, save
from playwright.sync_api import Browser, Page, sync_playwright

UNTWINE = str(Path(sys.executable).with_name("untwine"))
CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
IMAGES = ROOT / "docs" / "images"
PICTURES = (
    "studio-create.png",
    "studio-watch.png",
    "studio-share.png",
    "studio-runs.png",
    "studio-measure.png",
    "studio-phone.png",
    "studio-dark.png",
)
WIDE, PHONE = {"width": 1200, "height": 760}, {"width": 390, "height": 844}


@contextmanager
def studio(*options: str) -> Iterator[tuple[str, float]]:
    """A studio in a process of its own: its address, and when it was started."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as outputs:
        command = [UNTWINE, "app", "--port", str(port), "--outputs", outputs, *options]
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split()[2]
            yield address, started
        finally:
            process.terminate()
            process.wait()


def first_picture(browser: Browser) -> dict[str, float]:
    """Seconds from the start of the process: until it listens, until the page is there, until it shows a picture."""
    with studio() as (address, started):
        listening = time.perf_counter() - started
        page = browser.new_page(viewport=WIDE)
        page.goto(address)
        page.wait_for_selector("#create-go")
        there = time.perf_counter() - started
        page.click("#create-go")
        page.wait_for_selector("#create-gallery img", timeout=120_000)
        picture = time.perf_counter() - started
        page.close()
    return {"listening": round(listening, 2), "page": round(there, 2), "first_picture": round(picture, 2)}


def at_once(count: int, steps: int, images: int) -> dict[str, Any]:
    """Seconds of each of ``count`` requests that come in the same moment, and of the same ones one after another."""
    sys.path.insert(0, str(ROOT))
    from tests.app.calls import call, create_data

    def one(seed: int) -> float:
        started = time.perf_counter()
        kind, told = call(address, "create", create_data(seed=seed, steps=steps, count=images))
        assert kind == "complete", told
        return time.perf_counter() - started

    with studio("--max-queue", str(count)) as (address, _):
        one(0)
        alone = [one(seed) for seed in range(10)]
        started = time.perf_counter()
        with ThreadPoolExecutor(count) as people:
            seconds = sorted(people.map(one, range(count)))
        total = time.perf_counter() - started
    return {
        "requests": count,
        "steps": steps,
        "images": images,
        "alone_median": round(statistics.median(alone), 3),
        "median": round(statistics.median(seconds), 3),
        "p95": round(seconds[int(0.95 * count) - 1], 3),
        "all_done": round(total, 3),
    }


def trained(folder: Path) -> Path:
    """Two runs on the digits for the pictures of the docs, which differ in the learning rate."""
    for name, rate in (("digits", "2e-3"), ("digits-slow", "3e-4")):
        flags = ["--train.num-steps", "400", "--train.log-every", "10", "--train.sample-every", "100"]
        flags += ["--train.validate-every", "50", "--optimizer.lr", rate, "--out", str(folder / name)]
        subprocess.run([UNTWINE, "train", "ddt-digits", *flags], check=True, cwd=ROOT)
    return folder


def screenshots(browser: Browser, runs: Path) -> None:
    """Each tab after it has been used, one of them in the dark and one on a phone."""
    with studio("--runs", str(runs)) as (address, _):
        page = _visit(browser, address)
        page.get_by_label("Checkpoint", exact=True).locator("visible=true").first.click()
        page.get_by_role("option", name="ddt-fashion", exact=True).locator("visible=true").click()
        page.wait_for_timeout(5000)
        _create(page)
        _shoot(page, "studio-create.png")
        page.locator("#create-gallery .thumbnail-item").nth(7).click()
        page.wait_for_timeout(800)
        page.click("#create-watch")
        page.wait_for_selector("#watch-film li", timeout=120_000)
        _shoot(page, "studio-watch.png")
        _share(page)
        _shoot(page, "studio-share.png")
        _tab(page, "Runs")
        page.wait_for_selector("#runs-view .uw-chart", timeout=60_000)
        page.get_by_label("Compare with", exact=True).locator("visible=true").first.click()
        page.get_by_role("option").locator("visible=true").last.click()
        page.wait_for_timeout(1500)
        _shoot(page, "studio-runs.png")
        _tab(page, "Measure")
        page.wait_for_selector("#measure-tables table")
        page.click("#measure-go")
        page.wait_for_selector("#measure-report table", timeout=600_000)
        page.get_by_label("Benchmark", exact=True).click()
        page.get_by_role("option", name="kill_resume", exact=True).locator("visible=true").click()
        _shoot(page, "studio-measure.png")
        phone = _visit(browser, address, viewport=PHONE)
        _create(phone)
        _shoot(phone, "studio-phone.png")
        dark = _visit(browser, address, color_scheme="dark")
        _share(dark)
        _shoot(dark, "studio-dark.png")


def _visit(browser: Browser, address: str, **how: Any) -> Page:
    page = browser.new_page(**{"viewport": WIDE, **how})
    page.goto(address)
    page.wait_for_selector("#create-go")
    page.wait_for_timeout(500)
    return page


def _tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()
    page.wait_for_timeout(500)


def _create(page: Page) -> None:
    page.click("#create-go")
    page.wait_for_selector("#create-gallery img", timeout=180_000)
    page.wait_for_timeout(1000)


def _share(page: Page) -> None:
    _tab(page, "Share")
    page.click("#share-go")
    page.wait_for_selector("#share-map .uw-chart", timeout=180_000)
    page.click("#share-compare")
    page.wait_for_selector("#share-sides table", timeout=180_000)


def _shoot(page: Page, name: str) -> None:
    assert name in PICTURES
    page.mouse.move(0, 0)
    page.wait_for_timeout(1200)
    page.screenshot(path=IMAGES / name, full_page=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--screenshots", action="store_true", help="write docs/images/studio-*.png and stop")
    parser.add_argument("--runs", type=Path, help="runs for the screenshots; default: trains two")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=50)
    args = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        if args.screenshots:
            with tempfile.TemporaryDirectory() as folder:
                screenshots(browser, args.runs or trained(Path(folder)))
            return
        starts = [first_picture(browser) for _ in range(args.repeats)]
    busy = [round(load, 2) for load in os.getloadavg()]
    save("studio", {"starts": starts, "at_once": at_once(args.at_once, 10, 4), "load_average": busy})


if __name__ == "__main__":
    main()
