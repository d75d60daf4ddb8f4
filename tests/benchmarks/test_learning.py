"""benchmarks/learning.py: tasks with known answers, their shards and recipes, the options of its runs, its figures."""

from __future__ import annotations

import dataclasses
import io
import re
import tarfile

import av
import pytest
from PIL import Image

from benchmarks.lessons.figures import constant_answer, figure
from benchmarks.lessons.lesson import HELD_OUT, Page
from benchmarks.lessons.pages import is_new
from benchmarks.lessons.runs import SCALES, STAGES, Place, options
from benchmarks.lessons.tasks import TASKS, lesson
from benchmarks.lessons.variants import VARIANTS
from benchmarks.lessons.write import Shard, changed, write_data
from vl3train.config.load import read_config
from vl3train.data.recipe import load_recipe, recipe_problems
from vl3train.demo.clips import SOURCE_FPS, Clip
from vl3train.demo.scenes import Scene
from vl3train.scoring.predictions import Prediction

NUMBER = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}


def drawn(task, split, count=45):
    return [lesson(task, split, 0, number) for number in range(count)]


def shapes_of(medium):
    return [(shape.colour, shape.kind) for shape in medium.shapes]


@pytest.mark.parametrize("task", TASKS)
def test_the_same_number_is_the_same_sample_and_splits_differ(task):
    for split in ("train", "same", "new"):
        assert lesson(task, split, 0, 7) == lesson(task, split, 0, 7) != lesson(task, split, 0, 8)
    assert lesson(task, "train", 0, 7) != lesson(task, "same", 0, 7)


def test_answers_about_pictures_are_what_the_pictures_show():
    for split in ("train", "new"):
        for one in drawn("counting", split):
            colour = one.question.split()[2]
            (shown,) = one.media
            assert NUMBER[one.answer] == [c for c, _ in shapes_of(shown)].count(colour)
        for one in drawn("attributes", split):
            (shown,) = one.media
            asked = one.question.rstrip("?").split()[-1]
            assert [tuple({one.answer, asked} & set(pair)) for pair in shapes_of(shown)].count(()) == len(
                shown.shapes
            ) - 1
        for one in drawn("comparison", split):
            holds = [len(medium.shapes) for medium in one.media]
            if "more" in one.question:
                assert holds[one.answer == "second"] > holds[one.answer == "first"]
        for one in drawn("chart", split):
            (shown,) = one.media
            pick = max if "tallest" in one.question else min
            assert one.answer == pick(shown.bars, key=lambda bar: bar[1])[0]
        for one in drawn("document", split):
            assert f"{one.question.rstrip('?').split()[-1]} {one.answer}" in one.media[0].lines
        for one in drawn("reading", split):
            assert one.media[0].lines == (one.answer.replace(" ", ""),)


def seen_by_second(clip):
    """What a run that samples one frame a second sees."""
    return [shapes_of(frame) for frame in clip.frames[::SOURCE_FPS]]


def test_answers_about_clips_are_what_a_frame_a_second_shows():
    for split in ("train", "new"):
        for one in drawn("grounding", split):
            start, end = (float(time) for time in re.findall(r"[\d.]+(?= )", one.answer))
            asked = tuple(re.findall(r"the (\w+) (\w+) there", one.question)[0])
            there = [second for second, seen in enumerate(seen_by_second(one.media[0])) if asked in seen]
            assert (there[0], there[-1] + 1) == (start, end)
        for one in drawn("events", split):
            seen = [bool(now) for now in seen_by_second(one.media[0])]
            begins = [now and not before for before, now in zip([False, *seen], seen, strict=False)]
            assert sum(begins) == NUMBER[one.answer] == sum(seen)
        for one in drawn("order", split):
            colours = list(dict.fromkeys(c for seen in seen_by_second(one.media[0]) for c, _ in seen))
            place = ("first", "second", "third", "fourth").index(one.question.rstrip("?").split()[-1])
            assert len(colours) > place
            times = {
                c: next(i for i, seen in enumerate(seen_by_second(one.media[0])) if c in dict(seen))
                for c in colours
            }
            assert sorted(times, key=times.__getitem__)[place] == one.answer
        for one in drawn("static", split):
            seen = seen_by_second(one.media[0])
            assert [(one.answer in dict(now)) for now in seen].count(True) == 3
            assert one.answer not in dict(seen[0]) | dict(seen[-1])
        for one in drawn("direction", split):
            colour = one.question.rstrip("?").split()[-2]
            path = [next(s for s in frame.shapes if s.colour == colour) for frame in one.media[0].frames]
            dx, dy = path[-1].x - path[0].x, path[-1].y - path[0].y
            sides = ("left", "right") if abs(dx) > abs(dy) else ("up", "down")
            assert one.answer == sides[(dx if abs(dx) > abs(dy) else dy) > 0]


def test_new_draws_what_training_never_does():
    for task in ("captions", "attributes", "counting", "relations", "direction", "speed", "grounding"):
        for one in drawn(task, "train", 90):
            scenes = [
                m for medium in one.media for m in (medium.frames if isinstance(medium, Clip) else [medium])
            ]
            assert not {pair for scene in scenes for pair in shapes_of(scene)} & set(HELD_OUT)
    for task in ("captions", "attributes", "relations", "direction", "speed"):
        for one in drawn(task, "new"):
            scene = one.media[0].frames[0] if isinstance(one.media[0], Clip) else one.media[0]
            assert set(shapes_of(scene)) & set(HELD_OUT), task
    words = {
        split: {one.media[0].lines[0] for one in drawn("reading", split, 90)} for split in ("train", "new")
    }
    assert not words["train"] & words["new"]
    for one in drawn("document", "train"):
        assert not any(is_new(line) for line in one.media[0].lines)
    lengths = {
        split: {len(one.media[0].frames) for one in drawn("order", split)}
        for split in ("train", "same", "new")
    }
    assert max(lengths["train"] | lengths["same"]) < min(lengths["new"])
    ratios = {
        split: [
            max(one.media[0].width / one.media[0].height, one.media[0].height / one.media[0].width)
            for one in drawn("counting", split)
        ]
        for split in ("train", "new")
    }
    assert max(ratios["train"]) < min(ratios["new"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Shards of all tasks, a few samples each."""
    out = tmp_path_factory.mktemp("learning")
    assert write_data(out, {"train": 3, "same": 1, "new": 1}, 0) == 5 * len(TASKS)
    return out


def test_shards_have_real_files_of_the_drawn_sizes(data):
    for task in TASKS:
        ((shard),) = (data / f"{task}-train").iterdir()
        with tarfile.open(shard) as tar:
            parts = {member.name: tar.extractfile(member).read() for member in tar}
        for number in range(3):
            for place, medium in enumerate(lesson(task, "train", 0, number).media):
                (name,) = [name for name in parts if name.startswith(f"{number:07d}.{place}.")]
                if isinstance(medium, Clip):
                    with av.open(io.BytesIO(parts[name])) as container:
                        stream = container.streams.video[0]
                        assert (stream.width, stream.frames) == (medium.frames[0].width, len(medium.frames))
                else:
                    assert Image.open(io.BytesIO(parts[name])).size == (medium.width, medium.height)
    assert write_data(data, {"train": 3}, 0) == 0  # what is there is not written again


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_has_recipes_and_options_that_a_run_accepts(name, data):
    place = Place(root=data.parent, scale=SCALES["debug"])
    place = dataclasses.replace(place, root=data)  # recipes below data/data, shards in data
    (data / "data").mkdir(exist_ok=True)
    for stage in STAGES if name == "full" else (3,):
        start = None if stage == 1 else place.run(name, 0, stage - 1)
        words = options(place, name, 0, stage, start)
        cfg, problems = read_config(words)
        assert not problems
        variant = VARIANTS[name]
        recipe = load_recipe(cfg.data.recipe, data)
        assert {source.name for source in recipe.sources if source.shards is not None}
        if not (variant.changed_train or variant.changed_held_out):
            assert recipe_problems(recipe, data) == []


def test_changes_are_what_their_names_say():
    def as_changed(change, number=4, task="counting"):
        shard = Shard(path=None, task=task, split="train", change=change, seed=0, first=0, size=9)
        return changed(shard, lesson(task, "train", 0, number), number)

    right = as_changed("")
    assert as_changed("shuffled_images").media != right.media
    assert as_changed("shuffled_images").answer == right.answer
    assert len({as_changed("shuffled_answers", number).answer for number in range(20)}) > 2
    assert as_changed("shuffled_answers").media == right.media
    (blank,) = as_changed("blank_images").media
    assert (blank.width, blank.height, blank.shapes) == (right.media[0].width, right.media[0].height, ())
    clip = as_changed("blank_images", task="order").media[0]
    assert not any(frame.shapes for frame in clip.frames)
    stills = as_changed("no_times", task="order")
    (moving,) = as_changed("", task="order").media
    assert list(stills.media) == list(moving.frames[::SOURCE_FPS])
    assert all(isinstance(medium, Scene | Page) for medium in stills.media)


def test_figures_have_chance_interval_and_each_seed():
    answers = [
        Prediction(
            key=f"seed-{seed}/{number}",
            answer_number=0,
            source="counting-new",
            question="",
            reference=("one", "two", "two")[number % 3],
            prediction="two",
            is_cut=False,
            scores={"exact": float(number % 3 > 0)},
        )
        for seed in range(2)
        for number in range(30)
    ]
    line = figure("full", "counting", "new", 4, answers)
    assert (line["figure"], line["value"], line["chance"]) == ("accuracy_counting", 0.6667, 0.6667)
    assert line["ci95"][0] < line["value"] < line["ci95"][1]
    assert (line["seeds"], line["reached"]) == ([0.6667, 0.6667], False)
    assert figure("full", "counting", "same", 2, answers)["figure"] == "accuracy_counting_full_same_after_2"
    spans = [dataclasses.replace(one, reference="2.0 to 4.0 seconds") for one in answers]
    assert constant_answer(spans, "temporal_iou") == 1.0
