"""What is rendered equals what VideoLlama3Processor makes of the same conversation; plans are kept to."""

from __future__ import annotations

import copy
import dataclasses
import io
import json

import av
import numpy as np
import pytest
import torch
from PIL import Image as PillowImage

from tests.data.conftest import LIMITS, drawn_picture, picture_bytes, still_and_moving
from vl3train.contracts.geometry import frame_indices
from vl3train.contracts.records import RenderSettings, SampleError
from vl3train.contracts.tokens import CHAT_TEMPLATE, IGNORE_INDEX
from vl3train.data.records.annotations import read_record
from vl3train.data.records.conversation import Conversation, Image, Stream, Text, Turn, Video
from vl3train.data.render.chat_tokens import ChatTokenizer
from vl3train.data.render.samples import blank_sample, measure_sample, render_sample

SETTINGS = RenderSettings(
    image_merge_size=1,
    video_merge_size=2,
    prune_frames=True,
    fps=2.0,
    min_frames=1,
    max_frames=180,
    image_min_pixels=3136,
    image_max_pixels=3211264,
    video_min_pixels=12544,
    video_max_pixels=12845056,
    max_visual_tokens=10240,
    tokenizer="",
)
RATE = 10


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return ChatTokenizer.from_folder(tokenizer_dir)


def user(*contents) -> Turn:
    return Turn("user", tuple(Text(one) if isinstance(one, str) else one for one in contents))


def assistant(text: str) -> Turn:
    return Turn("assistant", (Text(text),))


def render(conversation, parts, tokenizer, settings=SETTINGS, planned=None):
    return render_sample(conversation.to_json(), parts, settings, tokenizer, LIMITS, key="k", planned=planned)


def by_transformers(conversation, parts, processor, settings=SETTINGS):
    """The same through apply_chat_template's own steps: render the template, then call the processor."""
    messages, pictures, clips, metadata = [], [], [], []
    for turn in conversation.turns:
        contents = []
        for content in turn.content:
            contents.append({"type": content.type, "text": getattr(content, "text", None)})
            if isinstance(content, Image):
                pictures.append(PillowImage.open(io.BytesIO(parts[content.part])))
            elif isinstance(content, Video):
                with av.open(io.BytesIO(parts[content.part])) as container:
                    frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
                picked = frame_indices(
                    len(frames),
                    RATE,
                    fps=settings.fps,
                    min_frames=settings.min_frames,
                    max_frames=settings.max_frames,
                )
                clips.append(torch.from_numpy(np.stack([frames[i] for i in picked])).permute(0, 3, 1, 2))
                metadata.append({"total_num_frames": len(frames), "fps": RATE, "frames_indices": picked})
        messages.append({"role": turn.role, "content": contents})
    processor = copy.deepcopy(processor)  # it counts placeholders by this attribute, not by the argument
    processor.image_processor.merge_size = settings.image_merge_size
    text = processor.apply_chat_template(messages, tokenize=False, chat_template=CHAT_TEMPLATE)
    image_size = {"shortest_edge": settings.image_min_pixels, "longest_edge": settings.image_max_pixels}
    video_size = {"shortest_edge": settings.video_min_pixels, "longest_edge": settings.video_max_pixels}
    return processor(
        text=[text],
        images=pictures or None,
        videos=clips or None,
        images_kwargs={"merge_size": settings.image_merge_size, "size": image_size},
        videos_kwargs={
            "merge_size": settings.video_merge_size,
            "size": video_size,
            "do_sample_frames": False,
            "video_metadata": metadata,
            "use_token_compression": settings.prune_frames,
        },
        return_tensors="pt",
    )


def assert_equal(sample, expected, processor, conversation):
    assert sample.input_ids.tolist() == expected["input_ids"][0].tolist()
    items = [
        content for turn in conversation.turns for content in turn.content if not isinstance(content, Text)
    ]
    patches, masks, grids, merges, at, mask_at = [], [], [], [], {"image": 0, "video": 0}, 0
    rows = {"image": 0, "video": 0}
    for item in items:
        pixels = "pixel_values" if item.type == "image" else "pixel_values_videos"
        grid = expected[f"{item.type}_grid_thw"][at[item.type]]
        merge = int(expected[f"{item.type}_merge_sizes"][at[item.type]])
        count = int(grid.prod())
        patches.append(expected[pixels][rows[item.type] : rows[item.type] + count])
        if item.type == "video":
            masks.append(expected["video_compression_mask"][mask_at : mask_at + count // merge**2])
            mask_at += count // merge**2
        else:
            masks.append(torch.ones(count // merge**2, dtype=torch.bool))
        rows[item.type] += count
        at[item.type] += 1
        grids.append(grid.tolist())
        merges.append(merge)
    assert sample.grids.tolist() == grids
    assert sample.merge_sizes.tolist() == merges
    if items:
        torch.testing.assert_close(
            torch.from_numpy(sample.patches) / 127.5 - 1, torch.cat(patches), atol=1e-4, rtol=0
        )
        assert sample.keep_mask.tolist() == torch.cat(masks).tolist()
    pads = (processor.image_token_id, processor.video_token_id)
    assert sorted(sample.placeholder_positions) == np.flatnonzero(np.isin(sample.input_ids, pads)).tolist()
    assert len(sample.placeholder_positions) == sample.keep_mask.sum()


@pytest.fixture
def parts(encode_clip):
    return {
        "0.jpg": picture_bytes(drawn_picture(61, 143, 1), "JPEG", quality=85),
        "1.png": picture_bytes(drawn_picture(200, 87, 2)),
        "2.mp4": encode_clip(still_and_moving(30, 96, 130), rate=RATE, options={"crf": "10"}),
        "3.mp4": encode_clip([drawn_picture(64, 48, seed) for seed in range(12)], rate=RATE),
    }


CASES = {
    "one image": (user(Image("0.jpg"), "What is it?"), assistant("A cat.")),
    "two images": (
        user("First:", Image("0.jpg"), "second:", Image("1.png"), "Compare."),
        assistant("They differ. Yes!"),
    ),
    "a clip": (user(Video("2.mp4"), "Describe the video."), assistant("A square moves.")),
    "clip and image": (
        user(Video("2.mp4"), Image("1.png"), Video("3.mp4"), "Which?"),
        assistant("The second."),
        user("And this?", Image("0.jpg")),
        assistant(" A cat."),
    ),
    "text": (
        Turn("system", (Text("Be brief.\n"),)),
        user("What is the capital of France?"),
        assistant("Paris."),
        user("Really? ¿Ça va? 你好 é"),
        assistant("\nYes.\n\n"),
    ),
}


@pytest.mark.parametrize("image_merge_size", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_rendered_equals_transformers(parts, processor, tokenizer, case, image_merge_size):
    settings = dataclasses.replace(SETTINGS, image_merge_size=image_merge_size)
    conversation = Conversation(CASES[case])
    sample = render(conversation, parts, tokenizer, settings)
    assert_equal(sample, by_transformers(conversation, parts, processor, settings), processor, conversation)
    if "clip" in case:
        assert not sample.keep_mask.all()


def test_unpruned_and_shrunk_by_budget(parts, processor, tokenizer):
    conversation = Conversation(CASES["a clip"])
    settings = dataclasses.replace(SETTINGS, prune_frames=False, video_min_pixels=784, max_visual_tokens=60)
    sample = render(conversation, parts, tokenizer, settings)
    as_budget = dataclasses.replace(settings, video_max_pixels=60 * 28**2)
    assert_equal(sample, by_transformers(conversation, parts, processor, as_budget), processor, conversation)
    assert sample.keep_mask.all()
    assert len(sample.keep_mask) <= 60


def test_the_frames_of_a_clip_share_its_pixels(parts, processor, tokenizer):
    conversation = Conversation(CASES["a clip"])
    settings = dataclasses.replace(SETTINGS, video_min_pixels=784, video_max_pixels=40_000)
    sample = render(conversation, parts, tokenizer, settings)
    assert_equal(sample, by_transformers(conversation, parts, processor, settings), processor, conversation)
    assert sample.grids[0].prod() * 14**2 <= 40_000


def test_all_pictures_share_the_budget(parts, tokenizer):
    settings = dataclasses.replace(
        SETTINGS, image_min_pixels=196, video_min_pixels=784, max_visual_tokens=200
    )
    both = measure_sample(Conversation(CASES["two images"]).to_json(), parts, settings, tokenizer, LIMITS)
    one = measure_sample(Conversation(CASES["one image"]).to_json(), parts, settings, tokenizer, LIMITS)
    assert both.num_visual_tokens <= 200
    assert one.num_visual_tokens <= 200
    assert max(both.kept_tokens) <= 100


def test_measured_equals_rendered(parts, tokenizer):
    for prune in (True, False):
        settings = dataclasses.replace(SETTINGS, prune_frames=prune)
        for case, turns in CASES.items():
            data = Conversation(turns).to_json()
            planned = measure_sample(data, parts, settings, tokenizer, LIMITS)
            sample = render(Conversation(turns), parts, tokenizer, settings, planned)
            assert len(sample.input_ids) == planned.num_tokens
            assert (sample.labels != IGNORE_INDEX).sum() == planned.num_supervised_tokens > 0
            assert len(sample.patches) == planned.num_patches
            assert sample.keep_mask.sum() == len(sample.placeholder_positions) == planned.num_visual_tokens
            assert tuple(map(tuple, sample.grids)) == planned.grids
            kinds = {"one image": "image", "two images": "image", "a clip": "video", "text": "text"}
            assert planned.modality == kinds.get(case, "mixed")


def test_the_planned_count_is_kept_whatever_the_decoder_rounds(parts, tokenizer):
    conversation = Conversation(CASES["a clip"])
    planned = measure_sample(conversation.to_json(), parts, SETTINGS, tokenizer, LIMITS)
    other = dataclasses.replace(
        planned,
        num_tokens=planned.num_tokens + 3,
        num_visual_tokens=planned.num_visual_tokens + 3,
        prefix_tokens=planned.prefix_tokens + 3,
        kept_tokens=(planned.kept_tokens[0] + 3,),
    )
    sample = render(conversation, parts, tokenizer, planned=other)
    assert sample.keep_mask.sum() == planned.num_visual_tokens + 3
    assert len(sample.input_ids) == other.num_tokens


@pytest.mark.parametrize("change", [{"num_tokens": 7}, {"grids": ((1, 2, 2),)}, {"kept_tokens": (10**6,)}])
def test_another_length_than_planned_is_refused(parts, tokenizer, change):
    conversation = Conversation(CASES["a clip"])
    planned = measure_sample(conversation.to_json(), parts, SETTINGS, tokenizer, LIMITS)
    with pytest.raises(SampleError, match="index the shards again"):
        render(conversation, parts, tokenizer, planned=dataclasses.replace(planned, **change))


def test_blank_sample_has_the_planned_lengths(parts, tokenizer):
    data = Conversation(CASES["clip and image"]).to_json()
    planned = measure_sample(data, parts, SETTINGS, tokenizer, LIMITS)
    real = render(Conversation(CASES["clip and image"]), parts, tokenizer)
    blank = blank_sample(planned, key="k", source=3)
    for field in dataclasses.fields(blank):
        ours, theirs = getattr(blank, field.name), getattr(real, field.name)
        if isinstance(ours, np.ndarray):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), field.name
    assert blank.keep_mask.sum() == planned.num_visual_tokens
    assert not blank.patches.any()
    assert (blank.labels == IGNORE_INDEX).all()
    text = measure_sample(Conversation(CASES["text"]).to_json(), {}, SETTINGS, tokenizer, LIMITS)
    assert blank_sample(text, key="k", source=0).grids.shape == (0, 3)


def test_a_stream_shows_each_frame_once_and_before_its_message(parts, tokenizer):
    stream = [Stream("2.mp4", until, start=0.5) for until in (1.1, 1.2, 2.0)]
    turns = []
    for content, text in zip(stream, ("Is it red?", "It is.", "Now?"), strict=True):
        turns += [Turn("stream", (content,)), user(text) if "?" in text else assistant(text)]
    sample = render(Conversation(tuple(turns)), parts, tokenizer)
    assert sample.grids[0, 0] == 4  # 0.5, 1.0 | 1.5, 2.0; what comes later is not shown
    text = tokenizer.decode([i for i in sample.input_ids if i != tokenizer.video_pad_id])
    frame = "<|stream_start|>stream\nTime {}s: \n<|stream_end|>\n"
    assert text == (
        frame.format("0.0")
        + frame.format("0.5")
        + "<|im_start|>user\nIs it red?<|im_end|>\n<|im_start|>assistant\nIt is.<|im_end|>\n"
        + frame.format("1.0")
        + frame.format("1.5")
        + "<|im_start|>user\nNow?<|im_end|>\n"
    )
    learned = tokenizer.decode([i for i in sample.labels if i != IGNORE_INDEX])
    ends = "\n<|stream_end|>" * 2
    assert learned == ends + "It is.<|im_end|>" + ends
    late = Conversation((Turn("stream", (Stream("2.mp4", 0.2, start=1.0),)), assistant("No.")))
    with pytest.raises(SampleError, match="no frame comes before"):
        render(late, parts, tokenizer)


def test_bad_samples_say_why(parts, tokenizer):
    conversation = Conversation(CASES["one image"])
    for bad, reason in (
        ({}, "needs"),
        ({"0.jpg": b"no image"}, "cannot be read"),
        ({"0.jpg": picture_bytes(np.zeros((2, 500, 3), np.uint8))}, "aspect ratio"),
    ):
        with pytest.raises(SampleError, match=reason):
            measure_sample(conversation.to_json(), bad, SETTINGS, tokenizer, LIMITS)
    with pytest.raises(SampleError, match="is no JSON"):
        measure_sample(b"[1, 2", parts, SETTINGS, tokenizer, LIMITS)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([("user", "Hi"), ("assistant", " \n")], "the assistant says nothing"),
        (
            [("user", "Hi"), ("assistant", ""), ("user", "?"), ("assistant", "\ufeff")],
            "the assistant says nothing",
        ),
        ([("user", "Hi"), ("assistant", "Yes.", {"loss": False})], "is 0 in every answer"),
        ([("user", "Hi")], "no assistant turn"),
    ],
)
def test_a_sample_that_teaches_nothing_is_refused_at_every_door(tokenizer, turns, reason):
    """By `shards --check`, by the index and in training; written as a record and as an earlier build wrote shards."""
    messages = [{"role": role, "content": text, **dict(*more)} for role, text, *more in turns]
    earlier = Conversation(tuple(Turn(role, (Text(text),), not more) for role, text, *more in turns))
    with pytest.raises(SampleError, match=reason):
        read_record({"messages": messages}, where="a")
    for data in (earlier.to_json(), json.dumps({"messages": messages}).encode()):
        with pytest.raises(SampleError, match=reason):
            measure_sample(data, {}, SETTINGS, tokenizer, LIMITS)
        with pytest.raises(SampleError, match=reason):
            render_sample(data, {}, SETTINGS, tokenizer, LIMITS, key="k", planned=None)


@pytest.mark.parametrize("rule", ["training", "released", "answers"])
def test_what_is_planned_of_a_stream_is_what_is_rendered(parts, tokenizer, rule):
    settings = dataclasses.replace(SETTINGS, stream_supervision=rule)
    said = [
        ("user", "Say when.", 0.1),
        ("assistant", "Now.", 0.9),
        ("assistant", "", 1.4),
        ("assistant", "End.", 1.9),
    ]
    turns = [
        turn
        for role, words, time in said
        for turn in (Turn("stream", (Stream("2.mp4", time),)), Turn(role, (Text(words),)))
    ]
    conversation = Conversation(tuple(turns))
    planned = measure_sample(conversation.to_json(), parts, settings, tokenizer, LIMITS)
    sample = render(conversation, parts, tokenizer, settings, planned)
    assert planned.num_supervised_tokens == int((sample.labels != IGNORE_INDEX).sum())
    again = render(conversation, parts, tokenizer, settings, planned)
    assert sample.labels.tolist() == again.labels.tolist()


def test_the_rule_of_streams_names_an_index():
    others = {
        dataclasses.replace(SETTINGS, stream_supervision=rule).fingerprint()
        for rule in ("training", "answers")
    }
    assert len(others) == 2
