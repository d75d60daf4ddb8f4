"""The step that is shown is the step that runs; supervised words are marked; the page opens in a browser."""

from __future__ import annotations

import base64
import doctest
import io
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from tests.cli.indexed import words
from tests.data.conftest import drawn_picture
from vl3train.cli.main import main
from vl3train.data.media.patches import resize_and_patchify
from vl3train.preview import step_samples
from vl3train.preview.step_samples import frame_picture

__all__ = ["words"]

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_doctests():
    assert doctest.testmod(step_samples).failed == 0


@pytest.fixture(scope="module")
def shown(words, tmp_path_factory):
    """Standard output and page of the command for step 2."""
    import contextlib

    page, out = tmp_path_factory.mktemp("page") / "step.html", io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["inspect", "step=2", *words, "--samples", "50", "--out", str(page)]) == 0
    return out.getvalue(), page


def test_page_and_table_hold_the_samples_of_the_step(shown, words, tmp_path):
    from vl3train.config.load import load_config
    from vl3train.config.paths import tokenizer_source
    from vl3train.data.pipeline import open_data
    from vl3train.model.weights.processor import build_processor

    cfg = load_config(words)
    build_processor(tokenizer_source(cfg)).save_pretrained(tmp_path)
    data = open_data(cfg, tokenizer_dir=tmp_path, held_out=False, build=False)
    packs = data.plan.step_packs(data.plan.cursor_at(1))
    keys = {data.index.key(row) for pack in packs for row in pack.samples}
    text, html = shown[0], shown[1].read_text()
    assert keys == set(re.findall(r"<h3>(.*?)</h3>", html))
    assert all(key in text for key in keys)
    assert html.count("micro-batch") >= 4
    supervised = sum(data.index.lengths(row).num_supervised_tokens for pack in packs for row in pack.samples)
    assert f"{supervised:,} of them supervised" in html


def test_exactly_the_answers_are_marked(shown):
    html = shown[1].read_text()
    marked = re.findall(r"<mark>(.*?)</mark>", html, re.DOTALL)[1:]  # the first explains the colour
    assert marked
    assert all(
        re.fullmatch(r"(There are \d+\.|A square moves \d+\.|(It jumps ?)+)&lt;\|im_end\|&gt;", text)
        for text in marked
    )
    assert len(marked) == html.count("<h3>")


def test_the_page_needs_no_other_file_and_its_pictures_are_whole(shown):
    html = shown[1].read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    addresses = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    assert addresses
    for address in addresses:
        with Image.open(io.BytesIO(base64.b64decode(address))) as picture:
            picture.load()


@pytest.mark.parametrize("merge", [1, 2])
def test_patches_are_put_together_again_and_pruned_tokens_are_dark(merge):
    picture = drawn_picture(56, 84)
    patches = resize_and_patchify(picture, grid=(4, 6), merge_size=merge)
    kept = np.ones(24 // merge**2, bool)
    assert np.array_equal(frame_picture(patches, kept, (4, 6), merge), picture)
    kept[0] = False
    side = 14 * merge
    dark = frame_picture(patches, kept, (4, 6), merge)
    assert np.array_equal(dark[:side, :side], (picture[:side, :side] * 0.25).astype(np.uint8))
    assert np.array_equal(dark[side:], picture[side:])


def test_a_wrong_step_is_refused(words, capsys):
    assert main(["inspect", *words]) == 1
    assert "add step=N" in capsys.readouterr().err
    for step in (0, 9999):
        assert main(["inspect", f"step={step}", *words]) == 1
        assert "the first is step=1" in capsys.readouterr().err


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: the page is not opened in a browser")
def test_a_browser_shows_the_page(shown, tmp_path):
    arguments = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path}",
    ]
    address = shown[1].resolve().as_uri()
    dom = subprocess.run(
        [BROWSER, *arguments, "--dump-dom", address], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert dom.count("<h3>") == shown[1].read_text().count("<h3>") > 0
    shot = tmp_path / "shot.png"
    subprocess.run(
        [BROWSER, *arguments, "--window-size=1000,1400", f"--screenshot={shot}", address],
        capture_output=True,
        timeout=120,
        check=True,
    )
    with Image.open(shot) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 100
    assert (
        np.abs(pixels.astype(int) - (218, 251, 225)).sum(axis=1) < 6
    ).any()  # the green of supervised words


def test_a_step_that_the_run_skipped_is_shown_with_its_losses(shown, words, tmp_path, capsys):
    import yaml

    from vl3train.config.load import load_config
    from vl3train.config.plain import as_plain
    from vl3train.contracts.bad_step import BadStep, SampleLoss, dump_path, write_bad_step

    keys = re.findall(r"<h3>(.*?)</h3>", shown[1].read_text())
    of_sample = {"source": "all", "rank": 0, "micro_batch": 0, "supervised_tokens": 2}
    losses = [float("nan"), *(float(len(keys) - number) for number in range(1, len(keys)))]
    samples = [
        SampleLoss(key=key, loss=loss, **of_sample) for key, loss in zip(keys[::-1], losses, strict=True)
    ]
    cfg = load_config([*words, f"run.output_dir={tmp_path}"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(as_plain(cfg)))
    numbers = {"loss": float("nan"), "grad_norm": 1.0, "most_loss": None, "most_grad_norm": None}
    bad = BadStep(
        step=2,
        epoch=0,
        reason="loss nan",
        part_grad_norms={},
        source_losses={},
        samples=tuple(samples),
        **numbers,
    )
    dump = dump_path(tmp_path, 2)
    write_bad_step(dump, bad)
    page = tmp_path / "page.html"
    assert main(["inspect", "--dump", str(dump), "--samples", "1", "--out", str(page)]) == 0
    told = capsys.readouterr().out
    assert "the run skipped this step: loss nan" in told
    assert f"not finite: rank 0, micro-batch 0, {keys[-1]}" in told
    assert "    loss nan" in told
    first = set(re.findall(r"<h3>(.*?)</h3>", page.read_text()))
    assert keys[-1] in first, "the worst of its pack, although it is the last of it"
    assert '<p class="why">loss nan</p>' in page.read_text()
    main(
        ["inspect", "step=2", "--config", str(tmp_path / "config.yaml"), "--samples", "1", "--out", str(page)]
    )
    assert "the run skipped this step: loss nan" in capsys.readouterr().out, "found in the run's folder"
    assert main(["inspect", "step=3", "--dump", str(dump)]) != 0
    assert "is about step 2" in capsys.readouterr().err
