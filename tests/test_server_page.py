"""The page, in a real browser: its numbers are those of the engine, and move while it works."""

import re
import shutil
import threading
import time

import pytest

from flexijax.engine.sampling import Sampling
from tests.server_kit import engine_of, httpx, served_model, serving

pytestmark = [pytest.mark.any_jax, pytest.mark.usefixtures("short_chunks")]

ASK = {"prompt": [7] * 40, "max_tokens": 80, "ignore_eos": True}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def served():
    lm = served_model()
    with serving(lm, engine_of(lm, Sampling(temperature=1.0))) as running:
        running.post("/v1/completions", ASK)
        running.quiet()
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
            served.post("/v1/completions", ASK)

    asking = [threading.Thread(target=busy) for _ in range(4)]
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        faults = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
        page.goto(f"{served.url}/")

        def shows(name, text):
            api.expect(page.locator(f"#{name}")).to_have_text(text, timeout=30_000)

        shows("state", "live")
        shows("running", "0")
        shows("model", "tiny")
        for one in asking:
            one.start()
        try:
            some = re.compile(r"^[0-9.]*[1-9]")
            for name in ("running", "waiting", "rate", "promoted", "overlap", "known"):
                shows(name, some)
            for tier in ("device", "host"):
                shows(tier, re.compile(r", [1-9]\d* %"))
        finally:
            ending.set()
            for one in asking:
                one.join(30)
        shows("running", "0")
        assert page.locator("#filled path").count() == 2
        assert not faults
        browser.close()
    time.sleep(0.1)
    served.quiet()
