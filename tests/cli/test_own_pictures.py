"""From files to training: moving pictures, lists and folders of pictures are clips with their own times."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from tests.cli.indexed import config_words
from tests.data.conftest import drawn_picture
from tests.engine.runs import figures, run
from vl3train.cli.main import main
from vl3train.data.pictures.colours import DEEP_GREY, DROPPED_TRANSPARENCY

PICTURES = [Image.fromarray(drawn_picture(56, 84, number)) for number in range(6)]


def moving(form, number, milliseconds):
    buffer = io.BytesIO()
    options = {"save_all": True, "append_images": PICTURES[1:number], "duration": milliseconds}
    PICTURES[0].save(buffer, form, **options)
    return buffer.getvalue()


@pytest.fixture
def own(tmp_path):
    """Records with their media; by the answer how many frames each clip shows."""
    (tmp_path / "folder").mkdir()
    for number, picture in enumerate(PICTURES):
        picture.save(tmp_path / f"{number}.png")
        picture.save(tmp_path / "folder" / f"{number}.png")
    (tmp_path / "moving.gif").write_bytes(moving("GIF", 4, 500))
    (tmp_path / "moving.webp").write_bytes(moving("WEBP", 3, 1000))
    Image.fromarray(np.full((56, 56), 1200, np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.zeros((56, 56, 4), np.uint8)).save(tmp_path / "clear.png")
    clips = [
        ({"video": "moving.gif", "fps": 2}, 4),  # half a second each
        ({"video": "moving.webp"}, 3),
        ({"video": ["0.png", "1.png"], "times": [0, 2.5]}, 4),  # each stays for 2.5 s and is taken twice
        ({"video": ["0.png", "1.png", "2.png"], "fps": 1}, 3),
        ({"video": "folder"}, 2),  # six pictures, three a second
    ]
    pictures = [({"image": name}, 1) for name in ("deep.png", "clear.png", "moving.gif")]
    records = [{**media, "question": "How many?", "answer": frames} for media, frames in [*clips, *pictures]]
    turns = [{"from": side, "value": text} for side, text in (("human", "A?"), ("gpt", ""), ("human", "B?"))]
    records.append({"conversations": [*turns, {"from": "gpt", "value": "0"}]})
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def test_clips_of_pictures_become_shards_are_indexed_and_trained(own, tiny_model_dir, capsys):
    files = [str(own / "own.jsonl"), "--media-root", str(own)]
    assert main(["shards", *files, "--out", str(own / "shards"), "--decode"]) == 0
    out = capsys.readouterr().out
    assert "9 samples in 1 shards" in out
    assert f"1 with a picture that is {DEEP_GREY}" in out
    assert f"1 with a picture that is {DROPPED_TRANSPARENCY}" in out
    assert "1 with an answer without words" in out

    recipe = {"name": "own", "about": "", "sources": [{"name": "own", "shards": "shards"}]}
    (own / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = config_words(own, tiny_model_dir, f"data.plan_cache={own / 'plans'}", "run.num_steps=2")
    words = [*(word for word in words if not word.startswith("step.")), "step.max_tokens=1024"]
    words += ["step.max_patches=2048", "step.global_packs=2", "run.evaluate_at_end=false"]
    assert main(["index", *words]) == 0
    out = capsys.readouterr().out
    assert "own: 9 samples" in out
    assert f"own: 1 samples with a picture that is {DEEP_GREY}" in out
    assert f"own: 1 samples with a picture that is {DROPPED_TRANSPARENCY}" in out
    assert "own: 1 samples with an answer without words" in out
    (rows,) = (own / "shards").glob("index-*/*.parquet")
    assert [grids[0] if grids else 0 for grids in pq.read_table(rows)["grids"].to_pylist()] == [
        *(4, 3, 4, 3, 2),
        *(1, 1, 1, 0),
    ]

    folder = run(words)
    assert [step for step, *_ in figures(folder)] == ["1", "2"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["failed_samples"] for line in lines] == [0, 0]
