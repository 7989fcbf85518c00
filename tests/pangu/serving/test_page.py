"""The page in a real browser: type, stream, stop, recipes, errors; and no request leaves the machine."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from tests.pangu.serving.fake_engine import FakeEngine
from tests.pangu.serving.servers import serving

pytest.importorskip("fastapi")
pytest.importorskip("selenium")
if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip("no Chromium here: bash scripts/browser.sh installs it", allow_module_level=True)

ANSWER = "图书馆开放了。今天天气很好，我们去公园看花。"
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
         "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    driver.set_page_load_timeout(30)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, tokenizer):
    """(browser, engine) with the page open and ready."""
    engine = FakeEngine(tokenizer.vocabulary_size, context=200, script=[*tokenizer.encode(ANSWER), 9],
                        seconds_per_token=0.04)
    with serving(engine, tokenizer) as (address, service):
        browser.get(address + "/")
        until(lambda: text(browser, "state") == "ready")
        yield browser, engine, address, service
        browser.get("about:blank")


def until(condition, seconds=15):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the page did not come so far"
        time.sleep(0.02)


def text(browser, name):
    return browser.find_element("id", name).get_property("textContent").strip()


def recipe(browser, name):
    browser.find_element("css selector", f'#recipes [data-name="{name}"]').click()


def test_type_stream_and_figures(page, tokenizer):
    browser, *_ = page
    recipe(browser, "")
    browser.find_element("id", "prompt").send_keys("今天天气")
    browser.execute_script("window.pieces = 0; new MutationObserver(all => { window.pieces += all.length; })"
                           ".observe(document.getElementById('answer'), {childList: true})")
    browser.find_element("id", "go").click()
    seen = set()
    until(lambda: seen.add(text(browser, "answer")) or text(browser, "state") == "ended by itself")
    assert text(browser, "answer") == tokenizer.decode(tokenizer.encode(ANSWER))
    assert len(seen - {""}) > 1 and browser.execute_script("return window.pieces") > 10, "it came in one piece"
    assert text(browser, "prompt") == "今天天气"
    assert text(browser, "f-prompt") == str(len(tokenizer.encode("今天天气")))
    assert text(browser, "f-made") == str(len(tokenizer.encode(ANSWER)) + 1)
    assert float(text(browser, "f-speed")) > 1 and text(browser, "f-first").endswith("ms")
    # Go on: the continuation becomes part of the prompt.
    browser.find_element("id", "keep").click()
    until(lambda: text(browser, "state") == "ended by itself" and text(browser, "answer"))
    assert text(browser, "prompt").startswith("今天天气") and len(text(browser, "prompt")) > 20


def test_stop_frees_the_slot(page):
    browser, engine, *_ = page
    recipe(browser, "")
    browser.find_element("id", "prompt").send_keys("今天")
    browser.find_element("id", "go").click()
    until(lambda: text(browser, "answer"))
    assert engine.stats().running == 1 and text(browser, "go").startswith("Stop")
    browser.find_element("id", "go").click()
    until(lambda: text(browser, "state") == "stopped" and engine.stats().running == 0)
    assert engine.stats().cancelled_total == 1 and text(browser, "go").startswith("Generate")


def test_recipes_fill_prompt_and_settings(page):
    browser, *_ = page
    recipe(browser, "couplet")
    assert text(browser, "prompt") == "上联：春风送暖千山绿\n下联："
    assert browser.find_element("name", "stop").get_property("value") == "\\n | 上联"
    assert browser.find_element("name", "top_k").get_property("value") == "5"
    field = browser.find_element("css selector", "#inputs textarea")
    field.clear()
    field.send_keys("天对地")
    assert text(browser, "prompt") == "上联：天对地\n下联："
    recipe(browser, "poem")
    assert [one.get_attribute("name") for one in browser.find_elements("css selector", "#inputs textarea")] == [
        "title", "line"]
    first = text(browser, "prompt")
    recipe(browser, "poem")  # again: the next example
    assert text(browser, "prompt") != first


def test_errors_are_shown(page):
    browser, engine, *_ = page
    recipe(browser, "")
    browser.find_element("id", "prompt").send_keys("长" * 220)
    browser.find_element("id", "go").click()
    until(lambda: browser.find_element("id", "error").is_displayed())
    assert "maximum context length is 200 tokens" in text(browser, "error")
    engine.close()  # whatever runs now ends in an error
    recipe(browser, "couplet")
    assert not browser.find_element("id", "error").is_displayed()
    browser.find_element("id", "go").click()
    until(lambda: browser.find_element("id", "error").is_displayed())
    assert "shutting down" in text(browser, "error")


@pytest.mark.parametrize("width, scheme", [(390, "light"), (1000, "dark")])
def test_it_fits_a_phone_and_the_night(page, width, scheme):
    browser, *_ = page
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [
        {"name": "prefers-color-scheme", "value": scheme}]})
    recipe(browser, "summary")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    color = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, color[4:-1].split(","))) < 200) == (scheme == "dark")
    assert browser.find_element("id", "go").rect["height"] >= 40
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_no_request_leaves_the_machine(page):
    browser, _, address, _ = page
    recipe(browser, "couplet")
    browser.find_element("id", "go").click()
    until(lambda: text(browser, "state") in ("ended by itself", "length reached"))
    asked = [message["params"]["request"]["url"] for message in
             (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
             if message["method"] == "Network.requestWillBeSent"
             and not message["params"]["request"]["url"].startswith("chrome://")]  # the browser's own empty tab
    assert any(url.endswith("/v1/completions") for url in asked)
    assert all(url.startswith(("http://127.0.0.1:", "data:", "about:")) for url in asked), asked
    wrong = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"
             and " 400 " not in entry["message"] and " 503 " not in entry["message"]]
    assert not wrong
    if folder := os.environ.get("PAGE_SCREENSHOT"):
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": 1000, "height": 640, "deviceScaleFactor": 1, "mobile": False})
        browser.save_screenshot(str(Path(folder)))
