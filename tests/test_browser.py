"""The page of `stitchable app` in a real browser, and its file as a Space of its own (see also test_app.py)."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait

from families import make
from odd_images import broken, picture, readable
from stitchable import StitchableForImageClassification
from stitchable.app import load_page, space_folder
from stitchable.card import Card
from stitchable.processing import image_processor
from stitchable.publishing import processor_of, save_repository

pytestmark = pytest.mark.browser
SECONDS = 60


@contextmanager
def serve(command: list[str], cwd: Path, **variables: str) -> Iterator[str]:
    """The address of a page that a command serves on the loopback interface."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(cwd / "uploads"), **variables}
    with (cwd / "log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(SECONDS):
            assert process.poll() is None, (cwd / "log").read_text(encoding="utf-8")
            try:
                urlopen(address, timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(SECONDS)
    assert "Traceback" not in (cwd / "log").read_text(encoding="utf-8")


class Page:
    """What a visitor does and reads."""

    def __init__(self, driver: WebDriver, address: str) -> None:
        self.driver = driver
        driver.get(address)

    def find(self, selector: str):
        return WebDriverWait(self.driver, SECONDS).until(lambda driver: driver.find_element(By.CSS_SELECTOR, selector))

    def wait_for(self, selector: str, pattern: str) -> str:
        """The text of an element as soon as it matches."""
        seen = ""

        def matches(driver: WebDriver) -> bool:
            nonlocal seen
            elements = driver.find_elements(By.CSS_SELECTOR, selector)
            seen = "\n".join(element.text for element in elements)
            return re.search(pattern, seen) is not None

        wait = WebDriverWait(self.driver, SECONDS, ignored_exceptions=[StaleElementReferenceException])
        wait.until(matches, f"{selector} never showed {pattern!r}, at last {seen!r}")
        return seen

    def upload(self, path: Path) -> None:
        """Put an image in the place of the one that is shown."""
        self.find("#picture button[aria-label='Remove Image']").click()
        WebDriverWait(self.driver, SECONDS).until(lambda _: "%" not in self.find("#scores-A").text)
        self.find("#picture input[type=file]").send_keys(str(path))

    def pick(self, number: int) -> None:
        self.find(".gallery-item, .gallery button")
        self.driver.find_elements(By.CSS_SELECTOR, ".gallery-item, .gallery button")[number].click()

    def scores(self, side: str) -> list[tuple[str, str]]:
        """Classes and percentages, the best first."""
        lines = self.wait_for(f"#scores-{side}", r"%").splitlines()
        return re.findall(r"(class \d)\n(\d+%)", "\n".join(lines[2:]))


@pytest.fixture(scope="module")
def browser() -> Iterator[WebDriver]:
    options = webdriver.ChromeOptions()
    for argument in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"):
        options.add_argument(argument)
    options.add_argument("--window-size=1200,1300")
    options.binary_location = shutil.which("chromium") or "chromium"
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver") or "chromedriver"))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint of nine stitches, of which larger ones are noted as better."""
    model = make("vit", id2label={i: f"class {i}" for i in range(5)})
    for stitch in model.stitches:
        model.record(stitch.id, metrics={"accuracy": round((stitch.flops or 0) / 1e6, 4)})
    path = tmp_path_factory.mktemp("page") / "tiny"
    save_repository(model, path, image_processor(model.config, crop_pct=1.0), Card("tiny", "noise"))
    return path


@pytest.fixture(scope="module")
def address(folder, tmp_path_factory) -> Iterator[str]:
    cwd = tmp_path_factory.mktemp("served")
    (cwd / "images").mkdir()
    picture().rotate(90).save(cwd / "images" / "turned.png")
    with serve([sys.executable, "-m", "stitchable_cli", "app", str(folder), "--images", "images"], cwd) as address:
        yield address


@pytest.fixture
def page(browser, address) -> Page:
    page = Page(browser, address)
    page.wait_for("#facts-A", r"Stitch 0:[^$]*ms here")  # of the first picture there is
    return page


def expected(folder: Path, path: Path, stitch_id: int) -> list[tuple[str, str]]:
    model = StitchableForImageClassification.from_pretrained(folder)
    page = load_page()
    pixel_values = processor_of(model)(images=page.read_picture(path), return_tensors="pt")["pixel_values"]
    scores, _ = page.classify(model.eval(), pixel_values, model.stitches[stitch_id])
    best = sorted(scores.items(), key=lambda item: -item[1])
    return [(name, f"{round(100 * score)}%") for name, score in best]


def test_an_image_is_classified_by_two_stitches_side_by_side(page, folder, tmp_path) -> None:
    picture().save(tmp_path / "picture.png")
    page.upload(tmp_path / "picture.png")
    for side, stitch_id in (("A", 0), ("B", 4)):  # the cheapest and the most accurate
        facts = page.wait_for(f"#facts-{side}", r"\d\.\d\d ms here")
        assert f"Stitch {stitch_id}:" in facts
        assert page.scores(side) == expected(folder, tmp_path / "picture.png", stitch_id)


def test_the_slider_moves_the_stitch_its_answer_and_its_mark_on_the_curve(page, folder, tmp_path) -> None:
    model = StitchableForImageClassification.from_pretrained(folder)
    picture().save(tmp_path / "picture.png")
    page.upload(tmp_path / "picture.png")
    page.wait_for("#facts-A", r"Stitch 0:[^$]*ms here")
    curve = page.find("#curve img").get_attribute("src")
    slider = page.find("#budget-A input[type=range]")
    slider.send_keys(Keys.END)
    page.wait_for("#facts-A", r"Stitch 4:[^$]*ms here")
    assert page.scores("A") == expected(folder, tmp_path / "picture.png", 4)
    WebDriverWait(page.driver, SECONDS).until(lambda _: page.find("#curve img").get_attribute("src") != curve)
    budget = page.find("#budget-A input[type=number]")
    budget.clear()
    middle = sorted(stitch.flops for stitch in model.stitches)[4]
    budget.send_keys(f"{middle / 1e3 + 0.001:.3f}", Keys.TAB)  # in kFLOPs
    wanted = model.for_budget(flops=middle)
    facts = page.wait_for("#facts-A", rf"Stitch {wanted.id}:[^$]*ms here")
    assert f"{wanted.flops / 1e3:.3f} kFLOPs, {wanted.params:,} parameters, accuracy" in facts


def test_any_stitch_can_be_chosen_and_a_picture_picked(page, folder, tmp_path) -> None:
    page.find("#stitch-B input").click()
    page.find("ul[role=listbox] li[aria-label^='5:']").click()
    page.wait_for("#facts-B", r"Stitch 5:[^$]*ms here")
    wanted = expected(folder, folder / "sample.png", 5)
    assert page.scores("B") != wanted
    page.pick(1)
    WebDriverWait(page.driver, SECONDS).until(lambda _: page.scores("B") == wanted)
    # After a picture was picked, a broken one still gets its message.
    page.upload(broken(tmp_path)["text"])
    page.wait_for("[data-testid=toast-body]", "not an image")


def test_odd_images_are_answered(page, folder, tmp_path) -> None:
    for path, _ in readable(tmp_path).values():
        if path.suffix == ".tiff":  # which no browser shows
            continue
        wanted = expected(folder, path, 0)
        page.upload(path)
        WebDriverWait(page.driver, SECONDS).until(
            lambda _, wanted=wanted: page.scores("A") == wanted, f"{path.name} is not answered as {wanted}"
        )


@pytest.mark.parametrize(
    ("kind", "message"), [("truncated", "cannot be read"), ("text", "not an image"), ("empty", "")]
)
def test_a_broken_image_gets_a_message_and_the_page_goes_on(kind, message, page, folder, tmp_path) -> None:
    page.upload(broken(tmp_path)[kind])
    said = page.wait_for("[data-testid=toast-body]", message)
    assert "Traceback" not in said
    assert str(tmp_path) not in said
    picture().save(tmp_path / "picture.png")
    page.find("#picture input[type=file]").send_keys(str(tmp_path / "picture.png"))
    WebDriverWait(page.driver, SECONDS).until(
        lambda _: page.scores("A") == expected(folder, tmp_path / "picture.png", 0)
    )


def test_a_cascade_says_which_stage_answered_and_why(browser, folder, tmp_path) -> None:
    """Of two cascades one is never sure after its first stage, and the other always."""
    model = StitchableForImageClassification.from_pretrained(folder)
    cheap, dear = (model.stitches[i].flops for i in (0, 4))
    last = {"stitch": 4, "flops": dear}
    model.cascades = [
        {
            "id": number,
            "stages": [{"stitch": 0, "flops": cheap, "score": "max_probability", "threshold": threshold}, last],
            "flops": cheap,
            "max_flops": cheap + dear,
            "metrics": {"accuracy": 0.99},
        }
        for number, threshold in enumerate((1.0, 0.0))
    ]
    save_repository(model, tmp_path / "model", image_processor(model.config, crop_pct=1.0), Card("tiny", "noise"))
    with serve([sys.executable, "-m", "stitchable_cli", "app", str(tmp_path / "model")], tmp_path) as address:
        page = Page(browser, address)
        for number, stage, stitch_id, relation in ((0, 2, 4, "below 1.000"), (1, 1, 0, "at least 0.000")):
            page.find("#stitch-B input").click()
            page.find(f"ul[role=listbox] li[aria-label^='cascade {number}']").click()
            said = page.wait_for("#facts-B", rf"Cascade {number}:[^$]*Stage {stage} of 2")
            assert f"stitch {stitch_id}, answered: largest probability of stitch 0" in said
            assert relation in said
            wanted = expected(folder, folder / "sample.png", stitch_id)
            WebDriverWait(browser, SECONDS).until(lambda _, wanted=wanted: page.scores("B") == wanted)


def test_the_file_alone_is_a_space(browser, folder, tmp_path) -> None:
    shutil.copytree(space_folder(), tmp_path, dirs_exist_ok=True)
    (tmp_path / "images").mkdir()
    picture().save(tmp_path / "images" / "ramp.png")
    with serve([sys.executable, "app.py"], tmp_path, STITCHABLE_MODEL=str(folder)) as address:
        page = Page(browser, address)
        page.wait_for("#facts-B", "Stitch 4:")
        assert len(browser.find_elements(By.CSS_SELECTOR, ".gallery-item, .gallery button")) == 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("", "the variable STITCHABLE_MODEL must be the id of a stitchable model"),
        ("/no/such/folder", "/no/such/folder"),
        ("someone/absent", "someone/absent"),
    ],
)
def test_a_space_without_a_model_says_so(model, message, browser, tmp_path) -> None:
    shutil.copytree(space_folder(), tmp_path, dirs_exist_ok=True)
    with serve([sys.executable, "app.py"], tmp_path, STITCHABLE_MODEL=model) as address:
        said = Page(browser, address).wait_for("#message", "No model")
    assert message in said
    assert "Traceback" not in said
