"""The page in a real browser: nothing fails, nothing is fetched, nothing of the model's text runs, selectors work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.report.conftest import ATTACKS

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium (extra `test`) drives the browser")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="no chromium and chromedriver here (Debian: chromium chromium-driver)"
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def open_page(browser: Any, report: Any, folder: Path) -> Any:
    """Opens the report at a width and in a colour scheme; its logs start empty."""

    def call(width: int = 1400, scheme: str = "light") -> Any:
        browser.get("about:blank")
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        for kind in ("browser", "performance"):
            browser.get_log(kind)
        browser.get((folder / "report.html").as_uri())
        return browser

    return call


def choose(driver: Any, id: str, value: str) -> None:
    script = "const s = document.getElementById(arguments[0]); s.value = arguments[1];"
    driver.execute_script(script + "s.dispatchEvent(new Event('change'))", id, value)


def picture(driver: Any, id: str) -> str:
    return driver.execute_script("return document.getElementById(arguments[0]).innerHTML", id)


def test_nothing_fails_and_nothing_is_fetched(open_page, folder):
    driver = open_page()
    assert driver.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert {url for url in urls if not url.startswith("data:")} == {(folder / "report.html").as_uri()}
    charts = driver.execute_script(
        "return [...document.querySelectorAll('.chart')].map(c => c.querySelectorAll('svg').length)"
    )
    assert len(charts) == 10
    assert all(charts)


def test_model_text_is_shown_and_not_run(open_page):
    driver = open_page()
    assert driver.execute_script("return window.attacked") is None
    assert ATTACKS[0] in driver.execute_script("return document.querySelector('.subtitle').textContent")
    shown = driver.execute_script("return document.getElementById('canvas').textContent")
    assert any(attack in shown for attack in ATTACKS[:2])
    assert driver.execute_script("return document.querySelectorAll('main script, main img').length") == 0


def test_the_selectors_change_the_picture(open_page):
    driver = open_page()
    for id, value, chart in (
        ("site", "intermediate", "jaccard"),
        ("layer", "1", "drift"),
        ("tokens", "masked", "movement"),
        ("rule", "1", "jaccard-map"),
        ("site", "input", "unions"),
        ("tokens", "prompt", "density"),
        ("canvas-prompt", "1", "canvas"),
        ("canvas-colour", "similarity", "canvas"),
    ):
        before = picture(driver, chart)
        choose(driver, id, value)
        assert picture(driver, chart) != before, (id, value, chart)
    assert "prompt" in driver.execute_script("return document.querySelector('.selection').textContent")
    assert driver.get_log("browser") == []


def test_the_canvas_answers_to_the_keyboard(open_page):
    driver = open_page()
    keys = webdriver.Keys
    driver.execute_script("document.querySelector('#canvas button').focus()")
    details = []
    for key in (keys.ARROW_RIGHT, keys.END, keys.HOME, keys.ARROW_LEFT):
        driver.switch_to.active_element.send_keys(key)
        details.append(driver.execute_script("return document.getElementById('canvas-detail').textContent"))
    places = [detail.split("(position ")[1].split(")")[0] for detail in details]
    assert places == ["1", "7", "0", "0"]
    assert all("committed at step" in detail for detail in details)


def test_numbers_open_as_a_table(open_page):
    driver = open_page()
    driver.execute_script("document.querySelector('details[data-for=drift] summary').click()")
    script = "return document.querySelectorAll('details[data-for=drift] tbody tr').length"
    wait(driver, lambda: driver.execute_script(script) == 8)


@pytest.mark.parametrize(("scheme", "ground"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 23, 27)")])
def test_the_page_follows_the_colour_scheme_and_the_button_turns_it(open_page, scheme, ground):
    driver = open_page(scheme=scheme)
    read = "return getComputedStyle(document.body).backgroundColor"
    assert driver.execute_script(read) == ground
    driver.execute_script("document.getElementById('theme').click()")
    assert driver.execute_script(read) != ground


@pytest.mark.parametrize("width", [1400, 400])
def test_nothing_is_wider_than_the_screen(open_page, width):
    driver = open_page(width)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width


def wait(driver: Any, condition: Any) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 5).until(lambda _: condition())
