"""The page, in a real browser: what people click, drop, move and paint, and what they are told."""

import io
import shutil
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from stablesr_kit import CodeFormerPipeline
from stablesr_kit.imaging.metadata import read_provenance
from stablesr_kit.web.jobs import Limits
from stablesr_kit.web.page import _Blocks, build_page
from stablesr_kit.web.service import Service
from tests.helpers.clips import moving, write_clip
from tests.helpers.tiny import tiny_codeformer
from tests.helpers.web_server import png, served

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")
PATIENCE_MS = 60_000
TABS = ("Restore", "Batch", "Video", "Faces", "About")


@pytest.fixture(scope="module")
def service(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Service:
    folder = tmp_path_factory.mktemp("page")
    CodeFormerPipeline(tiny_codeformer()).save_pretrained(folder / "faces")
    return Service(
        folder / "served",
        models={"tiny": str(model)},
        face_models={"tiny": str(folder / "faces")},
        device="cpu",
        limits=Limits(pixels=100_000),
    )


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    with served(service, build_page) as address:
        first = httpx.get(address)
        assert (first.status_code, "The page is being prepared" in first.text) == (200, True)
        end = time.monotonic() + 120
        while httpx.get(f"{address}/health").json()["page"] != "ready":
            assert time.monotonic() < end
            time.sleep(0.2)
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page in a desktop's window, used by one test after the other as by a person."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(PATIENCE_MS)
    page.elsewhere = []
    page.on(
        "request",
        lambda one: None if one.url.startswith((address, "data:", "blob:")) else page.elsewhere.append(one.url),
    )
    page.goto(address)
    page.locator("#go").wait_for()
    yield page
    page.close()


def drop(page: Any, content: bytes, name: str = "photo.png", where: str = "#picture") -> None:
    """Put a file where pictures are dropped, in place of the one before."""
    if page.locator(f"{where} input[type=file]").count() == 0:
        page.locator(f"{where} button").last.click()
    file = {"name": name, "mimeType": "image/png", "buffer": content}
    page.locator(f"{where} input[type=file]").set_input_files(file)


def told(page: Any, text: str, where: str = "#told") -> str:
    """What the page says, once it says this."""
    page.locator(where).get_by_text(text).wait_for()
    said: str = page.locator(where).inner_text()
    return said


def downloaded(page: Any, button: str = "#download") -> bytes:
    with page.expect_download() as download:
        page.locator(button).click()
    return Path(download.value.path()).read_bytes()


def test_a_dropped_picture_is_restored_compared_and_downloaded(page: Any, service: Service) -> None:
    page.locator("#go").click()
    told(page, "There is no picture yet; drop one.")
    drop(page, png(24, 32))
    told(page, "Ready.")
    page.get_by_label("Scale", exact=True).first.fill("2")
    page.get_by_label("Steps").first.fill("3")
    page.locator("#plan").get_by_text("64 x 48 pixels; plan:").wait_for()
    page.locator("#go").click()
    told(page, "Done in")
    assert page.locator("#slider img").count() == 2
    result = downloaded(page)
    assert Image.open(io.BytesIO(result)).size == (64, 48)
    (job,) = service.jobs()
    assert result == service.result(job).read_bytes()
    assert page.elsewhere == []


def test_another_w_is_decoded_again_and_nothing_is_sampled(page: Any, service: Service) -> None:
    before = downloaded(page)
    calls: list[Any] = []
    service._loaded[1].unet.register_forward_pre_hook(lambda *_: calls.append(None))
    page.get_by_label("number input for w", exact=True).first.fill("1")
    page.get_by_label("number input for w", exact=True).first.press("Tab")
    told(page, "Decoded again in")
    after = downloaded(page)
    assert not calls
    assert after != before
    (service.folder / "again.png").write_bytes(after)
    made = read_provenance(service.folder / "again.png")
    assert made is not None
    assert made["w"] == 1
    page.get_by_label("none", exact=True).first.check()
    told(page, "Decoded again in")


def test_a_dropped_result_sets_its_parameters(page: Any, service: Service) -> None:
    result = (service.folder / "again.png").read_bytes()
    page.get_by_label("Seed").first.fill("9")
    page.get_by_label("Steps").first.fill("7")
    drop(page, result, "again.png")
    told(page, "its parameters are set")
    assert page.get_by_label("Seed").first.input_value() == "0"
    assert page.get_by_label("Steps").first.input_value() == "3"
    assert page.get_by_label("Scale", exact=True).first.input_value() == "2"
    assert page.get_by_label("number input for w", exact=True).first.input_value() == "1"


def test_cancel_stops_soon(page: Any, service: Service) -> None:
    steps = page.get_by_label("Steps").first
    try:
        steps.fill("1000")
        steps.press("Tab")
        page.wait_for_timeout(500)  # until the page has the number
        page.locator("#go").click()
        told(page, "Sampling")
        job = service.jobs()[-1]
        assert job.options["steps"] == 1000
        began = time.time()
        page.locator("#stop").click()
        told(page, "Cancelled.")
        assert job.state == "cancelled"
        assert (job.ended or 0) - began < 10  # a second or less where the tests have the machine for themselves
    finally:
        steps.fill("3")
        steps.press("Tab")


def test_what_is_wrong_is_said_in_a_line(page: Any) -> None:
    page.get_by_role("button", name="Advanced").click()
    page.locator("#tile textarea, #tile input").first.fill("many")
    page.locator("#go").click()
    told(page, "--tile 'many' is not known; give auto, none or a number of pixels such as 512")
    page.locator("#tile textarea, #tile input").first.fill("auto")
    for content, name, line in (
        (b"hello", "text.png", "not a picture of a format that is read, or damaged"),
        (png(400, 300), "large.png", "more than the limit of 0.1"),
    ):
        drop(page, content, name)
        said = told(page, line)
        assert "/" not in said.replace("and/or", "")


def test_many_pictures_come_back_as_a_zip_with_what_failed(page: Any) -> None:
    page.get_by_role("tab", name="Batch").click()
    page.locator("#batch_go").click()
    told(page, "There are no pictures yet; drop some.", "#batch_told")
    files = [("a.png", png(seed=1)), ("b.png", png(seed=2)), ("broken.png", b"no picture")]
    page.locator("#pictures input[type=file]").set_input_files(
        [{"name": name, "mimeType": "image/png", "buffer": content} for name, content in files]
    )
    page.locator("#pictures").get_by_text("broken").wait_for()
    page.locator("#batch_go").click()
    told(page, "1 failed", "#batch_told")
    page.get_by_text("the file is no picture of a known format").locator("visible=true").first.wait_for()
    with zipfile.ZipFile(io.BytesIO(downloaded(page, "#batch_download"))) as results:
        assert sorted(results.namelist()) == ["a.png", "b.png", "errors.txt"]


def test_a_clip_is_restored_shown_and_downloaded(page: Any, service: Service, tmp_path: Path) -> None:
    page.get_by_role("tab", name="Video").click()
    page.locator("#video_go").click()
    told(page, "There is no clip yet; drop one.", "#video_told")
    drop(page, b"no clip", "talk.mp4", "#clip")
    assert "/" not in told(page, "talk.mp4: cannot be read as a clip", "#video_told")
    clip = write_clip(tmp_path / "in.mp4", moving(6, 40, 60), audio_seconds=0.2)
    drop(page, clip.read_bytes(), "talk.mp4", "#clip")
    told(page, "Ready.", "#video_told")
    tab = page.get_by_role("tabpanel").locator("visible=true")
    tab.get_by_label("Scale", exact=True).fill("2")
    tab.get_by_label("Steps").fill("2")
    tab.get_by_label("Steps").press("Tab")
    page.locator("#video_plan").get_by_text("6 frames of 120 x 80 pixels; plan:").wait_for()
    page.locator("#video_go").click()
    told(page, "Done in", "#video_told")
    result = downloaded(page, "#video_download")
    job = service.jobs()[-1]
    assert (job.clip, job.options["steady"], result) == (".mp4", "bands", service.result(job).read_bytes())
    for name, width in (("Before", 60), ("After", 120)):
        shown = page.locator("#video_result").get_by_label(name)
        page.wait_for_function("one => one.readyState >= 2", arg=shown.element_handle())
        assert shown.evaluate("one => one.videoWidth") == width


def test_a_clip_shows_its_progress_and_is_cancelled(page: Any, service: Service) -> None:
    steps = page.get_by_role("tabpanel").locator("visible=true").get_by_label("Steps")
    steps.fill("300")
    steps.press("Tab")
    page.wait_for_timeout(500)
    page.locator("#video_go").click()
    told(page, "Restoring, 0 of 6 frames done:", "#video_told")
    page.locator("#video_stop").click()
    told(page, "Cancelled.", "#video_told")
    assert service.jobs()[-1].state == "cancelled"


def test_without_pyav_the_tab_says_what_to_install(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    bare = Service(tmp_path / "bare", models={"tiny": str(model)}, device="cpu")
    texts = [block.value for block in _Blocks(bare).blocks.blocks.values() if type(block).__name__ == "Markdown"]
    bare.close()
    assert "Clips need PyAV, which is not installed: `pip install 'stablesr-kit[video]'`" in texts


def test_what_is_painted_over_is_filled_in_and_nothing_else(page: Any) -> None:
    page.get_by_role("tab", name="Faces").click()
    pixels = np.full((64, 64, 3), 100, np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    drop(page, content.getvalue(), "face.png", "#faces_picture")
    told(page, "Ready.", "#faces_told")
    page.get_by_label("Fill in a face").check()
    canvas = page.locator("#painted canvas").first
    canvas.wait_for()
    page.locator("#faces_go").click()
    told(page, "nothing is painted yet", "#faces_told")
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 10, y + 4, steps=4)
    page.mouse.up()
    time.sleep(1)
    page.locator("#faces_go").click()
    told(page, "Done in", "#faces_told")
    filled = np.asarray(Image.open(io.BytesIO(downloaded(page, "#faces_download"))))
    changed = (filled != 100).any(-1)
    assert 0 < changed.mean() < 0.9
    assert not changed[0].any()


def test_an_event_that_names_a_file_of_this_machine_is_refused(address: str) -> None:
    for path in ("/etc/passwd", "http://127.0.0.1/x.png", "page/../../secret.png"):
        data = [{"path": path, "meta": {"_type": "gradio.FileData"}}]
        event = {"data": data, "fn_index": 0, "session_hash": "abc"}
        answer = httpx.post(f"{address}/gradio_api/queue/join", json=event)
        assert (answer.status_code, "not opened" in answer.text) == (403, True), path
    assert httpx.get(f"{address}/gradio_api/file=/etc/passwd").status_code in (403, 404)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_every_field_has_a_name(browser: Any, address: str, scheme: str) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page.set_default_timeout(PATIENCE_MS)
    page.goto(address)
    page.locator("#go").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert all(page.get_by_role("tab", name=name, exact=True).is_visible() for name in TABS)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    shade = np.mean([int(part) for part in background.strip("rgba()").split(",")[:3]])
    assert (shade < 128) == (scheme == "dark")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("input:not([type=file]), textarea, button, select")]
            .filter(one => one.offsetParent !== null)
            .filter(one => !(one.labels && one.labels.length) && !one.ariaLabel && !one.title && !one.innerText.trim())
            .map(one => one.outerHTML.slice(0, 120))"""
    )
    assert unnamed == []
    page.close()
