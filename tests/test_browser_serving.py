"""The live page of `stitchable serve` in a real browser, the command's own process behind it."""

import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from odd_images import picture
from test_browser import Page, browser, folder  # noqa: F401  # fixtures

pytestmark = pytest.mark.browser


@pytest.fixture
def address(folder: Path, request) -> Iterator[str]:  # noqa: F811
    token = getattr(request, "param", None)
    command = [sys.executable, "-W", "ignore", "-m", "stitchable_cli", "serve", str(folder), "--port", "0"]
    command += ["--slo-ms", "5000", "--threads", "1", *(["--token", token] if token else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.search(r"9 choices, target 5000 ms, (http://\S+)", line)
        assert match, line
        yield match[1]
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def classify(address: str, content: bytes) -> None:
    request = urllib.request.Request(f"{address}/v1/classify", content, {"Content-Type": "image/png"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.status == 200


def test_the_page_shows_load_what_ran_and_moves_the_target(browser, address, tmp_path) -> None:  # noqa: F811
    picture().save(tmp_path / "picture.png")
    page = Page(browser, address)
    page.wait_for("#slo", r"^5000\.0 ms$")
    assert page.find("#title").text == "tiny"
    assert page.find("#attainment").text == "–"
    for _ in range(12):
        classify(address, (tmp_path / "picture.png").read_bytes())
    page.wait_for("#attainment", r"^100\.0 %$")
    assert page.find("#ran").text == "stitch 4"
    assert len(browser.find_elements(By.CSS_SELECTOR, "#curve circle")) == 9
    chosen = page.find("#curve circle[data-name='stitch 4']")
    assert chosen.get_attribute("data-part") == "1.000"
    heights = [float(bar.get_attribute("height")) for bar in browser.find_elements(By.CSS_SELECTOR, "#load rect")]
    assert max(heights) > 0
    slider = page.find("#target")
    slider.send_keys(Keys.HOME)  # which no stitch can hold
    page.wait_for("#message", "no answer is possible within .* the quickest that may give it, stitch")
    page.wait_for("#slo", r"^5000\.0 ms$")
    slider.send_keys(Keys.ARROW_LEFT)  # from the right end, a hundred times the quickest answer
    page.wait_for("#slo", r"^\d{2,3}\.\d ms$")
    page.wait_for("#message", "^$")


@pytest.mark.parametrize("address", ["a secret"], indirect=True)
def test_the_page_asks_for_the_token(browser, address) -> None:  # noqa: F811
    page = Page(browser, address)
    page.wait_for("#message", "this server asks for a bearer token")
    page.find("#token").send_keys("a secret", Keys.ENTER)
    page.wait_for("#slo", r"^5000\.0 ms$")
    page.wait_for("#message", "^$")
