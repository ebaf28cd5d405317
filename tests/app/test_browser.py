"""Every tab in a real Chromium, used as a person would: with the mouse, the keyboard, in the dark, on a phone."""

from __future__ import annotations

import json
import re

import pytest

from untwine.evaluation.protocols import PROTOCOLS, Protocol

pytestmark = pytest.mark.xdist_group("studio")
TABS = ("Create", "Watch", "Share", "Runs", "Measure")
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


class Visit:
    """A person on the page, who notices what goes wrong behind it."""

    def __init__(self, browser, url: str, *, dark: bool = False, phone: bool = False) -> None:
        self.context = browser.new_context(
            viewport=PHONE if phone else WIDE, color_scheme="dark" if dark else "light", accept_downloads=True
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        self.page.on("request", lambda r: self._check_address(r.url, url))
        self.page.on("response", lambda r: r.status >= 500 and self.problems.append(f"{r.status} {r.url}"))
        self.page.goto(url)
        self.page.wait_for_selector("#create-go")

    def _check_address(self, address: str, own: str) -> None:
        if not address.startswith((own, "data:", "blob:")):
            self.problems.append(f"reaches {address}")

    def open(self, tab: str) -> None:
        """Chooses a tab; on a phone some are behind the three dots."""
        found = self.page.get_by_role("tab", name=tab, exact=True)
        if not found.count() or not found.first.is_visible():
            self.page.locator(".overflow-menu > button").click()
            found = self.page.locator(".overflow-dropdown").get_by_role("button", name=tab, exact=True)
        found.first.click()

    def number(self, label: str, value: object) -> None:
        """Types into the number of a control that is in sight."""
        field = self.page.locator(f"input[type=number][aria-label*='{label}']:visible").first
        field.fill(str(value))
        field.press("Tab")

    def choose(self, label: str, option: str) -> None:
        """Chooses from a list that is in sight."""
        control = self.page.get_by_label(label, exact=True).locator("visible=true").first
        control.click()
        lists = self.page.locator(f"[id='{control.get_attribute('aria-controls')}']")  # another may still fade out
        lists.get_by_role("option", name=option, exact=True).locator("visible=true").click()

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def wait_text(self, selector: str, expected: str) -> None:
        """Until an element reads like this."""
        self.page.locator(selector, has_text=re.compile(expected)).first.wait_for()

    def close(self) -> None:
        self.context.close()
        assert self.problems == []


@pytest.fixture
def visit(browser, server):
    visits = []

    def begin(**how) -> Visit:
        visits.append(Visit(browser, server.url, **how))
        return visits[-1]

    yield begin
    for one in visits:
        one.close()


def test_create_choose_keep_and_watch(visit):
    v = visit()
    v.number("Images", 4)
    v.number("Steps", 6)
    v.number("Seed", 11)
    v.page.click("#create-go")
    v.page.locator("#create-gallery .thumbnail-item").nth(3).wait_for()
    v.wait_text("#create-status", r"4 images in [\d.]+ s, 10 network evaluations an image")
    v.page.locator("#create-gallery .thumbnail-item").nth(2).click()
    v.wait_text("#create-about", r"image\s*2\s*seed\s*11\s*label\s*2")
    with v.page.expect_download() as download:
        v.page.locator("#create-files a", has_text=re.compile("B")).first.click()
    assert download.value.suggested_filename == "samples.npz"
    v.page.click("#create-watch")
    v.page.locator("#watch-film li").nth(7).wait_for()
    assert v.page.locator("#watch-film li").count() == 1 + 6 + 1
    v.wait_text("#watch-status", "6 steps; guidance was active in 67% of them")
    v.page.locator("#watch-animation img").wait_for()
    assert v.page.locator("#watch-speed svg polyline").count() == 1


def test_texts_become_pictures(visit):
    v = visit()
    v.choose("Checkpoint", "ddt-emoji-text")
    prompt = v.page.get_by_label("Prompt").locator("visible=true").first
    prompt.fill("<b>anchor</b>")
    v.number("Images", 1)
    v.number("Steps", 1)
    v.page.click("#create-go")
    v.page.locator("#create-gallery .thumbnail-item").first.click()
    v.wait_text("#create-about", "<b>anchor</b>")


def test_cancel(visit, server):
    v = visit()
    v.number("Images", 16)
    v.number("Steps", 250)
    v.page.click("#create-go")
    v.page.locator(".progress-text, .progress-level", has_text=re.compile(r"\d+/250|drawing")).first.wait_for()
    v.page.click("#create-stop")
    v.wait_text("#create-status", r"Stopped after step \d+ of 250")
    assert server.studio.jobs._running is None
    v.number("Images", 1)
    v.number("Steps", 1)
    v.page.click("#create-go")
    v.wait_text("#create-status", "1 images? in")


def test_a_refusal_says_what_to_do(visit):
    v = visit()
    v.number("Seed", -5)
    v.page.click("#create-go")
    v.page.get_by_text(re.compile(r"Seed must be a whole number within \[0, 4294967295\], got -5")).wait_for()


def test_share_measure_compare_and_save(visit):
    v = visit()
    v.open("Share")
    v.page.locator("#share-map .uw-note").wait_for()
    v.number("Steps", 10)
    v.number("Images", 2)
    v.page.click("#share-go")
    v.page.locator("#share-map .uw-chart").wait_for()
    assert v.page.locator("#share-map .uw-box").count() == 10
    v.number("Budget", 4)
    v.page.wait_for_function("document.querySelectorAll('#share-map .uw-box').length == 4")
    v.page.click("#share-compare")
    v.page.locator("#share-sides table").wait_for()
    assert v.page.locator("#share-sides img").count() == 3
    assert "encoder passes an image" in v.text("#share-sides")
    with v.page.expect_download() as download:
        v.page.locator("#share-plan a").first.click()
    plan = json.loads(download.value.path().read_text())
    assert len(plan["sampling"]["refresh"]) == 4 and plan["sampling"]["num_inference_steps"] == 10


def test_runs_alone_compared_and_over_the_steps(visit):
    v = visit()
    v.open("Runs")
    v.page.locator("#runs-view svg").first.wait_for()
    v.choose("Run", "first")
    v.wait_text("#runs-view h3", "first")
    v.wait_text("#runs-sheets", "first, step 8")
    step = v.page.locator("#runs-step input[type=range]")
    step.focus()
    for _ in range(4):
        step.press("ArrowLeft")
    v.wait_text("#runs-sheets", "first, step 4")
    v.choose("Compare with", "second")
    v.wait_text("#runs-view", "second: validation")
    assert v.page.locator("#runs-sheets img").count() == 2


def test_measure_and_the_results_of_benchmarks(visit, monkeypatch):
    quick = Protocol(name="quick", encoder="pixels", num_samples=40, metrics=("fd", "kid"), principal_axes=8)
    monkeypatch.setitem(PROTOCOLS, "quick", quick)
    v = visit()
    v.open("Measure")
    v.page.locator("#measure-tables table").first.wait_for()
    v.choose("Protocol", "quick")
    v.number("Samples", 40)
    v.number("Steps", 2)
    v.page.click("#measure-go")
    v.page.locator("#measure-report table").wait_for()
    assert "KID (lower is better)" in v.text("#measure-report")
    v.page.locator("#measure-nearest img").wait_for()
    v.choose("Benchmark", "kill_resume")
    v.wait_text("#measure-tables", "runs_bitwise_equal")


@pytest.mark.parametrize("phone", [False, True], ids=["wide", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_light_dark_wide_and_on_a_phone(visit, dark, phone):
    v = visit(dark=dark, phone=phone)
    for tab in TABS:
        v.open(tab)
        v.page.wait_for_timeout(150)
        assert v.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{tab} is too wide"
        unnamed = v.page.evaluate(_UNNAMED)
        assert unnamed == [], f"{tab}: controls without a name"
    ground = v.page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
    assert (ground < 64) if dark else (ground > 192)
    for selector in (".uw-head h1", ".uw-head p"):
        assert v.page.evaluate(_CONTRAST, selector) >= 4.5, f"{selector} is hard to read"


_UNNAMED = """() => [...document.querySelectorAll("input, textarea, select, button")]
  .filter((e) => e.offsetParent && !e.labels?.length && !e.ariaLabel && !e.innerText.trim() && !e.title)
  .map((e) => e.outerHTML.slice(0, 160))"""
_CONTRAST = """(selector) => {
  const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number)
      .map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05; };
  const a = light(getComputedStyle(document.querySelector(selector)).color);
  const b = light(getComputedStyle(document.body).backgroundColor);
  return Math.max(a, b) / Math.min(a, b); }"""


def test_only_another_checkpoint_resets_the_settings(visit):
    """Leaving the list by Tab is no choice; Enter is one."""
    v = visit()
    steps, checkpoint = (
        v.page.locator(f"{kind}[aria-label*='{label}']:visible").first
        for kind, label in (("input[type=number]", "Steps"), ("input", "Checkpoint"))
    )
    v.number("Steps", 3)
    checkpoint.focus()
    v.page.keyboard.press("Tab")
    v.page.wait_for_timeout(1000)
    assert steps.input_value() == "3"
    checkpoint.fill("ddt-emoji-text")
    v.page.keyboard.press("Enter")
    v.page.get_by_label("Prompt").locator("visible=true").first.wait_for()
    assert steps.input_value() != "3"


def test_by_keyboard_alone(visit):
    v = visit()
    v.page.keyboard.press("Tab")
    reached = []
    for _ in range(40):
        focused = v.page.evaluate(
            "document.activeElement.id || document.activeElement.getAttribute('aria-label') || ''"
        )
        reached.append(focused)
        if focused == "create-go":
            break
        if "Steps" in focused and "number" in focused:
            v.page.keyboard.press("Control+a")
            v.page.keyboard.type("2")
        v.page.keyboard.press("Tab")
    assert reached[-1] == "create-go", reached
    v.page.keyboard.press("Enter")
    v.wait_text("#create-status", "8 images in .* 3 network evaluations")
