"""The web page: what it shows, that a threshold needs no second prediction, and all of it in a real browser."""

import importlib
import json
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlparse

import numpy as np
import pytest
from inference_models import CONFIGS, REPOSITORY, saved, write_checkpoints

from vig_backbone.openmmlab.errors import ConfigError
from vig_backbone.openmmlab.inference import ImageError, Predictor
from vig_backbone.openmmlab.inference.web_page import Views, build_page, serve_page

LOW, HIGH = 0.1, 0.99  # an untrained detector's scores are between them
CHROMIUM = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--window-size=1280,900"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key under which WebDriver gives an element


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def models(checkpoints: dict[str, Path]) -> dict[str, Predictor]:
    return {task: Predictor(CONFIGS[task], checkpoints[task], data="toy", device="cpu") for task in CONFIGS}


@pytest.fixture
def tool() -> Iterator[ModuleType]:
    sys.path.insert(0, str(REPOSITORY / "tools"))  # as for a script
    yield importlib.import_module("app")
    sys.path.remove(str(REPOSITORY / "tools"))


class Counter:
    """Counts the calls of a function."""

    def __init__(self, function: Callable) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.function(*args)


@pytest.fixture
def predictions(models: dict[str, Predictor], monkeypatch: pytest.MonkeyPatch) -> Counter:
    counter = Counter(models["detection"].predict)
    monkeypatch.setattr(models["detection"], "predict", counter)
    return counter


# ---- what the page shows


def test_another_threshold_draws_again_without_another_prediction(
    models: dict[str, Predictor], predictions: Counter, tmp_path: Path
) -> None:
    views = Views(models)
    shown = views.predict("detection", str(saved(tmp_path / "a.png")))
    picture, table = views.draw(shown, LOW)
    assert picture.shape == (256, 384, 3)
    assert table.splitlines()[0] == "| class | score | x1, y1, x2, y2 |"
    assert len(table.splitlines()) == 2 + len(shown.result.above(LOW))
    nothing, sentence = views.draw(shown, HIGH)
    assert sentence.startswith("Nothing with a score of 0.99 or more")
    assert not np.array_equal(picture, nothing)
    assert predictions.calls == 1


def test_segmentation_lists_the_shares_and_has_no_scores(models: dict[str, Predictor], tmp_path: Path) -> None:
    views = Views(models)
    shown = views.predict("segmentation", str(saved(tmp_path / "a.png")))
    picture, table = views.draw(shown, HIGH)
    assert picture.shape[1] > 384  # with a legend
    assert "| class | share of the image |" in table
    assert not views.has_scores("segmentation")
    assert views.has_scores("detection")


def test_nothing_is_shown_without_an_image_and_a_broken_one_says_why(
    models: dict[str, Predictor], tmp_path: Path
) -> None:
    views = Views(models)
    assert views.draw(views.predict("detection", None), LOW) == (None, "")
    (tmp_path / "a.png").write_bytes(b"broken")
    with pytest.raises(ImageError, match="damaged"):
        views.predict("detection", str(tmp_path / "a.png"))


def test_class_names_cannot_add_markup(models: dict[str, Predictor], tmp_path: Path) -> None:
    from dataclasses import replace

    views = Views(models)
    shown = views.predict("detection", str(saved(tmp_path / "a.png")))
    names = ["<script>alert(1)</script> | ![x](http://there)"] * len(shown.result.classes)
    _, table = views.draw(replace(shown, result=replace(shown.result, classes=names)), LOW)
    assert all(row.count("|") == 4 for row in table.splitlines())
    assert "<" not in table
    assert "](" not in table


# ---- the command


def test_missing_demo_says_what_to_run(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert tool.run_command(tool.main, tool.parse_args(["--work-dir", str(tmp_path)])) == 2
    assert "run `make demo` first" in capsys.readouterr().err


def test_demo_models_are_those_that_the_demo_wrote_last(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "detection").mkdir()
    record, checkpoint = tmp_path / "detection" / "last_checkpoint", tmp_path / "detection" / "epoch_12.pth"
    record.write_text(str(checkpoint))
    with pytest.raises(ConfigError, match="no trained model"):  # it is gone
        tool.demo_models(tmp_path)
    checkpoint.touch()
    assert tool.demo_models(tmp_path) == [("det_configs/mask_rcnn_vig_t.py", str(checkpoint))]


def test_config_without_a_checkpoint_is_refused(tool: ModuleType, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        tool.parse_args(["a.py", "a.pth", "b.py"])
    assert caught.value.code == 2
    assert "expected pairs" in capsys.readouterr().err


def test_without_gradio_the_page_says_what_to_install(
    models: dict[str, Predictor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[app\]'"):
        build_page(models)


def test_command_serves_this_machine_alone_and_forbids_other_hosts(
    tool: ModuleType, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradio = pytest.importorskip("gradio", reason="needs the extra 'app' (Gradio)")
    answers = []

    def look_and_end(page: Any) -> None:
        with urllib.request.urlopen(page.local_url, timeout=30) as answer:
            answers.append((page.local_url, answer.status, answer.headers["content-security-policy"]))
        page.close()

    monkeypatch.setattr(gradio.Blocks, "block_thread", look_and_end)
    arguments = [str(CONFIGS["detection"]), str(checkpoints["detection"]), "--data", "toy", "--device", "cpu"]
    assert tool.run_command(tool.main, tool.parse_args(arguments)) == 0
    ((address, status, policy),) = answers
    assert f"open {address}" in capsys.readouterr().out
    assert urlparse(address).hostname == "127.0.0.1"
    assert status == 200
    assert policy.startswith("default-src 'self' ")
    assert "http" not in policy


# ---- in a browser


class Browser:
    """Chromium through chromedriver, by the requests of the W3C's WebDriver protocol that are needed here."""

    def __init__(self, driver: str, profile: Path) -> None:
        options = dict(args=[*CHROMIUM, f"--user-data-dir={profile}"])
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"performance": "ALL"}}
        self.session = driver
        answer = self.ask("POST", "/session", capabilities=dict(alwaysMatch=wanted))
        self.session = f"{driver}/session/{answer['sessionId']}"

    def ask(self, method: str, path: str, **body: Any) -> Any:
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(f"{self.session}{path}", data, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def run(self, script: str, *args: Any) -> Any:
        return self.ask("POST", "/execute/sync", script=script, args=args)

    def element(self, selector: str) -> str:
        """Its address; waits for it."""
        self.wait(f"document.querySelector({selector!r}) !== null")
        found = self.ask("POST", "/element", using="css selector", value=selector)
        return f"/element/{found[ELEMENT]}"

    def type_into(self, selector: str, text: str) -> None:
        self.ask("POST", f"{self.element(selector)}/value", text=text)

    def click(self, selector: str) -> None:
        self.ask("POST", f"{self.element(selector)}/click")

    def wait(self, condition: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not self.run(f"return {condition}"):
            if time.monotonic() > end:
                raise AssertionError(
                    f"not within {seconds} s: {condition}\n{self.run('return document.body.innerText')}"
                )
            time.sleep(0.1)

    def screenshot(self, file: Path) -> None:
        from base64 import b64decode

        file.write_bytes(b64decode(self.ask("GET", "/screenshot")))

    def requested_hosts(self) -> set[str]:
        messages = [
            json.loads(entry["message"])["message"] for entry in self.ask("POST", "/se/log", type="performance")
        ]
        sent = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
        return {urlparse(url).hostname for url in sent if urlparse(url).scheme in ("http", "https", "ws", "wss")}


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}; on Debian: apt install chromium chromium-driver")
    process = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        line = next(line for line in process.stdout if "started successfully on port" in line)
        found = Browser(f"http://127.0.0.1:{line.split()[-1].rstrip('.')}", tmp_path / "profile")
        yield found
        found.ask("DELETE", "")
    finally:
        process.terminate()
        process.wait()


def test_page_in_a_browser(
    browser: Browser, models: dict[str, Predictor], predictions: Counter, tmp_path: Path
) -> None:
    pytest.importorskip("gradio", reason="needs the extra 'app' (Gradio)")
    found, result = "document.querySelector('#found').innerText", "document.querySelector('#result img')"
    page = build_page(models, threshold=LOW)
    try:
        browser.ask("POST", "/url", url=serve_page(page, "127.0.0.1", None))

        browser.type_into("#image input[type=file]", str(saved(tmp_path / "a.png")))
        browser.wait(f"{found}.includes('x1, y1, x2, y2') && {result} !== null && {result}.naturalWidth === 384")
        browser.screenshot(tmp_path / "detection.png")
        first = browser.run(f"return {result}.src")

        browser.type_into("#score input[type=range]", "\ue010")  # the key End
        browser.wait(f"{found}.includes('Nothing with a score of 1 or more')")
        browser.wait(f"{result}.src !== {first!r}")
        assert predictions.calls == 1

        browser.click("#model input")
        browser.click("#model [role=option][aria-label=segmentation], ul[role=listbox] [aria-label=segmentation]")
        browser.wait(f"{found}.includes('share of the image') && {result}.naturalWidth > 384")
        browser.wait("!document.querySelector('#score')?.offsetParent")  # no scores, no slider
        browser.screenshot(tmp_path / "segmentation.png")

        (tmp_path / "broken.png").write_bytes(b"broken")
        browser.click("#image button[aria-label*=Remove], #image button[aria-label=Clear]")
        browser.type_into("#image input[type=file]", str(tmp_path / "broken.png"))
        browser.wait("document.body.innerText.includes('cannot identify image')")

        assert browser.requested_hosts() == {"127.0.0.1"}
    finally:
        page.close()
