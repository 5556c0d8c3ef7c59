"""The page, in a real browser: its numbers are those of the engine, and move while it works."""

import re
import shutil
import threading
import time

import pytest

from flexijax.engine.sampling import Sampling
from tests.server_kit import engine_of, httpx, served_model, serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def served():
    lm = served_model()
    with serving(lm, engine_of(lm, Sampling(temperature=1.0))) as running:
        yield running


def test_the_page_needs_nothing_from_elsewhere(served):
    response = httpx.get(f"{served.url}/")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert not re.findall(r"(?:src|href)=\"(?!data:)", response.text)
    assert "//" not in re.sub(
        r"http://www.w3.org/2000/svg|^\s*//.*$", "", response.text, flags=re.M
    )
    shown = set(re.findall(r"\bnow\.(\w+)", response.text)) - {"name"}
    shown |= {f"{name}_total" for name in re.findall(r"change\(\"(\w+)_total\"\)", response.text)}
    # What is drawn is what is measured.
    assert shown <= set(served.metrics())


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_the_numbers_move(served):
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    ending = threading.Event()

    def busy():
        while not ending.is_set():
            ask = {"prompt": [7] * 40, "max_tokens": 80, "ignore_eos": True}
            served.post("/v1/completions", ask)

    asking = [threading.Thread(target=busy) for _ in range(4)]
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        faults = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
        page.goto(f"{served.url}/")
        page.wait_for_function("document.getElementById('state').textContent === 'live'")
        assert page.inner_text("#running") == "0" and page.inner_text("#model") == "tiny"
        for one in asking:
            one.start()
        try:
            wanted = "['running', 'rate', 'promoted'].every((id) => parseFloat("
            page.wait_for_function(wanted + "document.getElementById(id).textContent) > 0)")
            page.wait_for_function("parseInt(document.getElementById('waiting').textContent) > 0")
            page.wait_for_function(
                "/, [1-9]\\d* %/.test(document.getElementById('device').textContent)"
            )
            page.wait_for_function(
                "/, [1-9]\\d* %/.test(document.getElementById('host').textContent)"
            )
        finally:
            ending.set()
            for one in asking:
                one.join(30)
        page.wait_for_function("document.getElementById('running').textContent === '0'")
        assert page.locator("#filled path").count() == 2
        assert not faults
        browser.close()
    time.sleep(0.1)
    served.quiet()
