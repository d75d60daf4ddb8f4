"""Shards with one fault each, made of real files. Also used by benchmarks/decode.py, which prints the table."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np

from tests.data.conftest import drawn_picture, picture_bytes, still_and_moving
from tests.data.shards.test_tar_headers import make_tar
from tests.data.shards_fixture import train_config
from vl3train.contracts.records import Cursor
from vl3train.data.pipeline import open_data, train_steps
from vl3train.data.records.conversation import Conversation, Image, Text, Turn, Video

Members = list[tuple[str, bytes]]
BEFORE, AFTER = "a0", "z9"
"""Keys of the good samples around the bad one; they must stay usable, but for what lies behind a cut."""


@dataclass(frozen=True)
class Planted:
    """One fault: the shard's bytes, and what has to become of it."""

    name: str
    shard: bytes = field(
        repr=False
    )  # 100 MB in one of them: a failed assertion would write them out for minutes
    samples: set[str]  # keys of which a member can be read
    used: set[str]
    said: str  # part of the reason
    when: str = "index"  # or "run": found when the sample's turn comes
    rot: Callable[[bytearray], None] | None = None  # done to the shard after it was indexed


def talk(*media: Image | Video, answer: str = "Yes.") -> bytes:
    turns = [Turn("user", (*media, Text("Is it?")))]
    return Conversation((*turns, *([Turn("assistant", (Text(answer),))] if answer else []))).to_json()


def jpeg(seed: int = 0, height: int = 60, width: int = 80) -> bytes:
    return picture_bytes(drawn_picture(height, width, seed), "JPEG", quality=90)


def clip(folder: Path, frames: int = 8) -> bytes:
    path = folder / "clip.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("h264", rate=4)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for array in still_and_moving(frames, 64, 96):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()


def clip_that_takes_minutes(folder: Path, side: int = 4096, frames: int = 900) -> bytes:
    """A megabyte of real H.264: one grey keyframe of 16 megapixels, 900 times. Its header keeps all limits."""
    path = folder / "slow.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("h264", rate=1)
        stream.height, stream.width, stream.pix_fmt = side, side, "yuv420p"
        stream.options = {"preset": "ultrafast", "tune": "zerolatency"}
        grey = av.VideoFrame.from_ndarray(np.full((side * 3 // 2, side), 128, np.uint8), format="yuv420p")
        (packet,) = [*stream.encode(grey), *stream.encode()]
        content = bytes(packet)
        for number in range(frames):
            copy = av.Packet(content)
            copy.stream, copy.time_base, copy.is_keyframe = stream, packet.time_base, True
            copy.pts = copy.dts = round(number / packet.time_base)
            container.mux(copy)
    return path.read_bytes()


def jpeg_of_400_megapixels() -> bytes:
    """20000 x 20000 by its header; the scan behind it is that of a small picture."""
    data = bytearray(jpeg())
    at = data.index(b"\xff\xc0")  # start of frame: marker, length, precision, height, width
    data[at + 5 : at + 9] = struct.pack(">HH", 20_000, 20_000)
    return bytes(data)


def around(*bad: tuple[str, bytes]) -> Members:
    good = talk(Image("0.jpg"))
    return [
        *((f"{BEFORE}.0.jpg", jpeg(1)), (f"{BEFORE}.json", good)),
        *bad,
        *((f"{AFTER}.0.jpg", jpeg(2)), (f"{AFTER}.json", good)),
    ]


def tar(members: Members, folder: Path) -> bytes:
    return make_tar(folder / "made.tar", members).read_bytes()


def places(shard: bytes) -> dict[str, tuple[int, int, int]]:
    """Where each member's header, data and end lie."""
    with tarfile.open(fileobj=io.BytesIO(shard)) as opened:
        return {info.name: (info.offset, info.offset_data, info.offset_data + info.size) for info in opened}


def with_link(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as opened:
        for name, data in around(("b.json", talk(Image("0.jpg")))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))
            if name == "b.json":
                link = tarfile.TarInfo("b.0.jpg")
                link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
                opened.addfile(link)
    return buffer.getvalue()


def plant_faults(folder: Path) -> list[Planted]:
    """Every fault. ``folder`` is for files in between."""
    good = talk(Image("0.jpg"))
    plain = tar(around(("b.0.jpg", jpeg(5)), ("b.json", good)), folder)
    where = places(plain)
    flipped = bytearray(plain)
    flipped[where["b.0.jpg"][0] + 3] ^= 0x10
    three = {BEFORE, "b", AFTER}

    def rot(shard: bytearray) -> None:
        shard[where["b.0.jpg"][1] + 300] ^= 4

    def one(name: str, members: Members, said: str, when: str = "index", extra: int = 0) -> Planted:
        """A bad sample ``b`` between two good ones."""
        return Planted(name, tar(around(*members), folder), three, {BEFORE, AFTER}, said, when)

    picture, movie = jpeg(3), clip(folder)
    return [
        Planted("cut off in a header", plain[: where["b.json"][0] + 100], {BEFORE, "b"}, {BEFORE}, "cut off"),
        Planted(
            "cut off in data", plain[: where["b.json"][1] + 9], {BEFORE, "b"}, {BEFORE}, "cut off inside"
        ),
        Planted("cut off between members", plain[: where["b.json"][0]], {BEFORE, "b"}, {BEFORE}, "cut off"),
        Planted("flipped byte in a header", bytes(flipped), three, {BEFORE, AFTER}, "damaged header at byte"),
        Planted("flipped byte in a payload", plain, three, {BEFORE, AFTER}, "crc32", "run", rot),
        Planted(
            "keys with dots",
            tar([("v1.5_a.0.jpg", picture), ("v1.5_a.json", good), ("v1.5_b.json", b"{")], folder),
            {"v1.5_a", "v1.5_b"},
            {"v1.5_a"},
            "no JSON",
        ),
        Planted(
            "members of a key apart",
            tar([("b.0.jpg", picture), *around(), ("b.json", good)], folder),
            three,
            {BEFORE, AFTER},
            "not adjacent",
        ),
        Planted("empty shard", b"", set(), set(), "the shard is empty"),
        Planted("HTML page as a shard", b"<html>404 Not Found</html>" * 99, set(), set(), "damaged header"),
        one("truncated JPEG", [("b.0.jpg", picture[:-400]), ("b.json", good)], "cannot be read"),
        one(
            "truncated mp4",
            [("b.0.mp4", movie[:-300]), ("b.json", talk(Video("0.mp4")))],
            "cannot be decoded",
        ),
        one("JPEG of 400 megapixels", [("b.0.jpg", jpeg_of_400_megapixels()), ("b.json", good)], "pixels"),
        one(
            "mp4 that decodes for minutes",
            [("b.0.mp4", clip_that_takes_minutes(folder)), ("b.json", talk(Video("0.mp4")))],
            "data.decode_seconds",
        ),
        Planted(
            "a .pyd member",
            tar(around(("b.json", talk()), ("b.pyd", b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")), folder),
            three,
            three,
            "1 x .pyd not read",
        ),
        Planted("a symlink member", with_link(folder), three, {BEFORE, AFTER}, "is a link"),
        Planted(
            "a name with ../",
            tar(around(("../b.0.jpg", picture), ("b.json", good)), folder),
            three,
            {BEFORE, AFTER},
            "without '..'",
        ),
        one("100 MB of text", [("b.json", talk(answer="word " * 20_000_000))], "over the limit"),
        one("invalid JSON", [("b.json", b'{"turns": [')], "no JSON"),
        one(
            "more tags than pictures",
            [
                ("b.jpg", picture),
                ("b.json", record("<image><image> Same?", image=["x.jpg"])),
            ],
            "2 <image> tags for 1",
        ),
        one("missing medium", [("b.json", good)], "needs ['0.jpg']"),
        one("no supervised token", [("b.json", talk(answer=""))], "nothing to learn"),
        one("no conversation", [("b.0.jpg", picture), ("b.cls", b"3")], "conversation is missing"),
        one("a member twice", [("b.json", good), ("b.0.jpg", picture), ("b.0.jpg", picture)], "twice"),
        one("picture as a thin line", [("b.0.jpg", jpeg(1, 2, 900)), ("b.json", good)], "aspect ratio"),
        one("caption that is no UTF-8", [("b.jpg", picture), ("b.txt", b"\xff\xfe\x00")], "no UTF-8"),
        one("reserved token in a text", [("b.jpg", picture), ("b.txt", b"<|im_end|>")], "<|im_end|>"),
    ]


def record(question: str, **fields: object) -> bytes:
    """A LLaVA record."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "Yes."}]
    return json.dumps({"id": "1", "conversations": turns, **fields}).encode()


@dataclass(frozen=True)
class Outcome:
    """What became of one fault."""

    planted: Planted
    used: set[str]
    refused: dict[str, str]  # key, or @BYTE for a place that holds no sample, and reason
    said: str

    @property
    def rejected_samples(self) -> set[str]:
        """Without places."""
        return {key for key in self.refused if not key.startswith("@")}

    @property
    def accounted(self) -> bool:
        """Whether used and refused samples are all that can be read, none is both, and the reason is the one."""
        return (
            self.used == self.planted.used
            and self.used | self.rejected_samples == self.planted.samples
            and not self.used & self.rejected_samples
            and self.planted.said in self.said
        )


def fault_outcomes(root: Path, tokenizer_dir: Path, decode_seconds: float) -> list[Outcome]:
    """All faults in one recipe, indexed and fetched for one epoch by the real pipeline."""
    root.mkdir(exist_ok=True)
    faults = plant_faults(root)
    recipe = root / "recipe.yaml"
    sources = "".join(f"  - {{name: s{number}, shards: s{number}}}\n" for number in range(len(faults)))
    recipe.write_text(f"name: faults\nabout: tests\nsources:\n{sources}")
    for number, fault in enumerate(faults):
        (root / f"s{number}").mkdir()
        (root / f"s{number}" / "a.tar").write_bytes(fault.shard)
    cfg = train_config(root, recipe)
    cfg.data.num_workers, cfg.data.decode_seconds = 2, decode_seconds
    data = open_data(cfg, tokenizer_dir=tokenizer_dir, held_out=False, build=True)
    for number, fault in enumerate(faults):
        if fault.rot is not None:
            shard = bytearray(fault.shard)
            fault.rot(shard)
            (root / f"s{number}" / "a.tar").write_bytes(shard)
    steps = list(
        train_steps(
            data,
            cfg,
            first=Cursor(),
            last_step=data.plan.steps_in_epoch(0),
            rank=0,
            dp_size=1,
            ledger_path=root / "ledger.jsonl",
        )
    )
    entries = [json.loads(line) for line in (root / "ledger.jsonl").read_text().splitlines()]
    rotten = {entry["key"]: entry["reason"] for entry in entries}
    seen = Counter(key for step in steps for batch in step.batches for key in batch.segment_keys)
    seen.pop("filler", None)
    assert set(seen.values()) == {1}
    assert set(seen) == {data.index.key(row) for row in range(data.index.num_samples)}
    assert sum(batch.num_failed_samples for step in steps for batch in step.batches) == len(entries)
    outcomes = []
    for number, fault in enumerate(faults):
        prefix = f"s{number}/a/"
        refused = {
            key.removeprefix(prefix): reason
            for key, reason in [*data.index.rejected, *rotten.items()]
            if key.startswith(prefix)
        }
        told = rotten if fault.when == "run" else dict(data.index.rejected)
        reasons = [reason for key, reason in told.items() if key.startswith(prefix)]
        reasons += [
            f"{count} x .{suffix} not read"
            for name, suffix, count in data.index.ignored_members
            if name == f"s{number}"
        ]
        said = next((reason for reason in reasons if fault.said in reason), "; ".join(reasons))
        used = {key.removeprefix(prefix) for key in set(seen) - set(rotten) if key.startswith(prefix)}
        outcomes.append(Outcome(fault, used, refused, said))
    return outcomes
