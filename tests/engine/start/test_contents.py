"""A run whose shards changed under it says what changed, before it trains on them."""

from __future__ import annotations

import dataclasses
import shutil

import pytest

from tests.data.shards_fixture import make_source, train_config
from tests.engine.checkpoints.made import make
from vl3train.contracts.records import SampleError
from vl3train.data.pipeline import open_data
from vl3train.engine.checkpoints.load import refuse_other_identity
from vl3train.engine.ranks import RunError
from vl3train.engine.start.contents import CONTENTS, held_out_changes, keep_contents, train_changes
from vl3train.engine.start.data import RunData


def run_data(data):
    return RunData(train=data, held_out=data, num_steps=1, changed=[])


@pytest.fixture
def words(tmp_path):
    """A source of three shards, and the folder of a run on them."""
    make_source(tmp_path / "words", images=0, clips=0, texts=6, seed=1, per_shard=2)
    make_source(tmp_path / "others", images=0, clips=0, texts=3, seed=2, per_shard=3)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: words\nabout: words\nsources:\n- {name: words, shards: words/shards}\n")
    (tmp_path / "run").mkdir()
    return train_config(tmp_path, recipe), tmp_path / "words" / "shards", tmp_path / "run"


def test_what_changed_is_said_at_a_resume_and_at_a_fresh_start(words, tmp_path, tokenizer_dir):
    cfg, shards, folder = words

    def opened():
        return open_data(cfg, tokenizer_dir=tokenizer_dir, held_out=False, build=True)

    data = opened()
    assert data.changed == ()
    identity = {"stage": 2, "adapter": {"kind": "none"}, "plan": data.plan.describe()}
    checkpoint = make(folder, 1, identity)
    keep_contents(folder, run_data(data))
    written = (folder / CONTENTS).stat().st_mtime_ns
    keep_contents(folder, run_data(data))
    assert (folder / CONTENTS).stat().st_mtime_ns == written, "nothing changed"
    refuse_other_identity(checkpoint, identity, lambda: pytest.fail("nothing differs"))
    assert train_changes(folder, run_data(data)) == [
        "shards and settings are as they were; the index was made by another build of this program"
    ]

    first, second, third = sorted(shards.glob("*.tar"))
    other = tmp_path / "others" / "shards" / first.name
    replaced = other.stat().st_size
    sizes = first.stat().st_size, second.stat().st_size
    shutil.copy(other, first)  # a run that is under way
    with pytest.raises(SampleError, match=f"(?s){first.name}.*replaced or damaged|{first.name} ends before"):
        [data.index.read_sample(row) for row in range(data.index.num_samples)]
    shutil.copy(second, shards / "shard-000009.tar")
    third.unlink()
    data = opened()
    (line,) = data.changed
    expected = (
        "1 shard added: shard-000009.tar",
        f"1 shard removed: {third.name}",
        f"1 shard replaced: {first.name} (",
        "2 samples, now 3",
    )
    assert all(part in line for part in expected)
    assert (f"{sizes[0]} bytes, now {replaced}" in line) == (sizes[0] != replaced)
    assert opened().changed == (), "said once"

    now = {"stage": 2, "plan": data.plan.describe()}
    with pytest.raises(RunError, match=r"plan\.index: the checkpoint has") as refused:
        refuse_other_identity(checkpoint, now, lambda: train_changes(folder, run_data(data)))
    assert all(f"  data: source words: {part}" in str(refused.value) for part in expected[:3])
    assert len(held_out_changes(folder, run_data(data))) == 3

    cfg.data.max_frames += 1
    other_settings = dataclasses.replace(
        data, places=tuple((name, _with_frames(place, cfg.data.max_frames)) for name, place in data.places)
    )
    shutil.copytree(data.places[0][1].folder, other_settings.places[0][1].folder)
    lines = train_changes(folder, run_data(other_settings))
    assert lines[0] == f"setting max_frames: {cfg.data.max_frames - 1}, now {cfg.data.max_frames}"
    (folder / CONTENTS).write_bytes(b"damaged")
    assert "is missing or damaged" in train_changes(folder, run_data(data))[0]


def _with_frames(place, max_frames):
    return dataclasses.replace(place, settings=dataclasses.replace(place.settings, max_frames=max_frames))
