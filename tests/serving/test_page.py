"""The chat page in a real browser: pictures and clips go in, frames and growing answers come out, for two models."""

from __future__ import annotations

import http.client
import re
import shutil

import pytest

from tests.serving.conftest import as_data_url, ask, said, served
from vl3train.serving.page import FILE, page_policy

WAIT = 60_000
"""Milliseconds: nothing here takes long, but others may have the cores."""


@pytest.fixture(scope="module")
def address(served_asker, lively_model_dir):
    from vl3train.inference.answer import Asker

    other = Asker.load(lively_model_dir, device="cpu", max_new_tokens=64, fps=2.0)
    with served({"one": served_asker, "two": other}, with_page=True) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        yield browser
        browser.close()


def test_two_models_see_a_picture_and_a_clip_and_answer(browser, address, media):
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
    asked, complaints = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"http://{address}/")
    page.locator("section[data-model=two]").wait_for(timeout=WAIT)
    page.set_input_files("#files", [media / "a.jpg", media / "long.mp4"])
    page.locator("#attached .chip").nth(1).wait_for(timeout=WAIT)
    page.fill("#most", "12")
    page.fill("#text", "How many? <b>&amp;")
    page.keyboard.press("Enter")
    page.locator(".turn.theirs[data-done]").nth(1).wait_for(timeout=WAIT)

    media_of = [("image", as_data_url(media / "a.jpg")), ("video", as_data_url(media / "long.mp4"))]
    for name, seconds in (("one", 1.0), ("two", 0.5)):
        column = page.locator(f"section[data-model={name}]")
        body = said("How many? <b>&amp;", *media_of, model=name, max_tokens=12)
        expected = ask(address, body)[1]["choices"][0]["message"]["content"]
        assert column.locator(".turn.theirs span").text_content() == expected
        assert "<b>&amp;" in column.locator(".turn.mine").text_content()
        stamps = column.locator("figcaption").all_text_contents()
        assert stamps == [f"{number * seconds:.1f} s" for number in range(len(stamps))]
        assert len(stamps) >= 5
        assert column.locator("canvas").count() == len(stamps) + 1
    red = """canvas => { const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        let count = 0;
        for (let i = 0; i < data.length; i += 4) count += data[i] > data[i + 1] + 60;
        return count / (data.length / 4); }"""
    canvases = page.locator("section[data-model=one] .item:nth-of-type(2) canvas")
    dropped = [int(one.get_attribute("data-dropped")) for one in canvases.all()]
    assert dropped[0] == 0 < sum(dropped)
    marked = [one.evaluate(red) for one in canvases.all()]
    assert [share > 0.1 for share in marked] == [count > 0 for count in dropped]
    page.uncheck("#overlay")
    assert max(one.evaluate(red) for one in canvases.all()) < 0.01
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert complaints == []
    assert {url.split("/")[2] for url in asked if url.startswith("http")} == {address}

    page.fill("#text", "And now?")  # the earlier turns are part of it
    page.click("#send")
    page.locator(".turn.theirs[data-done]").nth(3).wait_for(timeout=WAIT)
    first, second = page.locator("section[data-model=one] .about:last-child").all_text_contents()[-2:]
    assert int(second.split(" ")[0]) > int(first.split(" ")[0])
    page.set_input_files("#files", [{"name": "x.mp4", "mimeType": "video/mp4", "buffer": b"no clip"}])
    page.click("#send")
    page.locator(".turn.failed").nth(1).wait_for(timeout=WAIT)
    assert "clip of 7 bytes" in page.locator(".turn.failed").first.text_content()
    page.click("#anew")
    assert page.locator(".turn").count() == 0


def test_the_page_loads_nothing_and_may_do_nothing_else(address):
    html = FILE.read_text()
    assert re.findall(r"""(?:src|href)=["'](?!data:,)""", html) == []
    assert "innerHTML" not in html
    assert len(re.findall("<script", html)) == 1
    connection = http.client.HTTPConnection(address)
    connection.request("GET", "/")
    response = connection.getresponse()
    assert response.read().decode() == html
    connection.close()
    policy = response.headers["Content-Security-Policy"]
    assert policy == page_policy(html)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert response.headers["X-Frame-Options"] == "DENY"
