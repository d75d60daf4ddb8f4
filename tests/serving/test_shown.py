"""The chat page draws what the model sees: every frame, its time in the prompt, and what pruning drops."""

from __future__ import annotations

import base64
import io

import av
import numpy as np
import pytest
from PIL import Image

from tests.serving.conftest import as_data_url, ask, said, served
from vl3train.inference.questions import render
from vl3train.inference.requests import Request, as_question
from vl3train.serving.shown import frame_times, shown_items


@pytest.fixture(scope="module")
def still(tmp_path_factory):
    """Six seconds that change at the third only: other frames keep one token."""
    path = tmp_path_factory.mktemp("still") / "still.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 112, 112, "yuv420p"
        for number in range(24):
            frame = np.full((112, 112, 3), 200 if 12 <= number < 16 else 30, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def address(served_asker):
    with served({"small": served_asker}, with_page=True) as address:
        yield address


def test_frames_times_and_dropped_tokens_are_those_of_the_prompt(address, served_asker, media, still):
    words = "Time 9.9s:,Time 8.8s: and no frame"
    body = said(words, ("image", as_data_url(media / "a.jpg")), ("video", as_data_url(still)))
    body["messages"][0]["content"].insert(0, {"type": "text", "text": words})
    status, found = ask(address, body, "/vl3train/shown")
    assert status == 200
    picture, clip = found["items"]
    assert (picture["kind"], picture["frames"][0]["time"], picture["kept"]) == (
        "image",
        None,
        picture["tokens"],
    )
    assert [frame["time"] for frame in clip["frames"]] == ["0.0", "1.0", "2.0", "3.0", "4.0", "5.0"]
    per_frame = clip["rows"] * clip["columns"]
    dropped = [len(frame["dropped"]) for frame in clip["frames"]]
    assert dropped[0] == 0
    assert per_frame - 1 in dropped, "a frame keeps one token at least"
    assert 0 in dropped[1:], "a frame keeps all"
    assert clip["tokens"] - clip["kept"] == sum(dropped)
    _, answer = ask(address, {**body, "max_tokens": 1})
    assert answer["usage"]["prompt_tokens"] == found["prompt_tokens"]

    question = as_question(Request(prompt="x", images=(media / "a.jpg",), videos=(still,)))
    sample = render(question, served_asker.rendering, key="")
    drawn = list(shown_items(sample, served_asker.rendering.tokenizer))
    assert [sorted(set(range(per_frame)) - set(np.flatnonzero(row))) for row in drawn[1].kept] == [
        frame["dropped"] for frame in clip["frames"]
    ]
    first = clip["frames"][0]["picture"].removeprefix("data:image/jpeg;base64,")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(first))))
    assert pixels.shape[1] / pixels.shape[0] == clip["pixels"][0] / clip["pixels"][1]
    assert abs(float(pixels.mean()) - 30) < 8


@pytest.mark.parametrize("kept", [[2, 1, 1, 3], [1, 2], [3], [40, 1, 1, 1, 1]])
def test_times_are_found_whatever_stands_before(served_asker, kept):
    tokenizer = served_asker.rendering.tokenizer
    ids, places = tokenizer.encode("user\nTime 7.0s:,Time 6.0s:"), []
    for number, count in enumerate(kept):
        ids += tokenizer.encode(("," if number else "") + f"Time {number * 1.5:.1f}s:")
        places += range(len(ids), len(ids) + count)
        ids += [tokenizer.video_pad_id] * count
    ids += tokenizer.encode("\nTime 5.5s:,Time 4.4s:")
    expected = [f"{number * 1.5:.1f}" for number in range(len(kept))]
    assert frame_times(np.array(ids), np.array(places), kept, tokenizer) == expected


def test_what_cannot_be_shown_is_told_and_without_the_page_there_is_no_such_address(address, served_asker):
    status, body = ask(address, said("x", ("video", "data:;base64,AAAA")), "/vl3train/shown")
    assert status == 400
    assert "clip of 3 bytes" in body["error"]["message"]
    with served({"small": served_asker}) as plain:
        assert ask(plain, said("x"), "/vl3train/shown")[0] == 404
        assert ask(plain, None, "/", "GET")[0] == 404
