"""The command writes shards, names what is wrong, and never overwrites."""

from __future__ import annotations

import json
from argparse import ArgumentParser

import pytest

from tests.data.faults_fixture import clip, jpeg
from vl3train.cli import make_shards
from vl3train.cli.main import main
from vl3train.data.records.importers import IMPORTERS


def run(*words):
    parser = ArgumentParser()
    make_shards.add_arguments(parser)
    return make_shards.main(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def records(tmp_path):
    file = tmp_path / "qa.jsonl"
    rows = [{"q": f"question {i}", "a": f"answer {i}", "picture": f"{i}.jpg"} for i in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
    return file


COLUMNS = ("--columns", "picture=image", "q=user", "a=assistant")


def test_bad_records_are_named_and_nothing_is_written(tmp_path, records, capsys):
    assert run(records, "--out", tmp_path / "out", "--media-root", tmp_path, *COLUMNS) == 1
    err = capsys.readouterr().err
    assert "qa.jsonl:4" in err
    assert "no such file" in err
    assert "--skip-rejected" in err
    assert not (tmp_path / "out").exists()


def test_the_good_ones_are_written_when_asked(tmp_path, records, capsys):
    words = (records, "--out", tmp_path / "out", "--media-root", tmp_path, *COLUMNS, "--skip-rejected")
    assert run(*words, "--samples-per-shard", 2) == 0
    out = capsys.readouterr().out
    assert "3 samples in 2 shards" in out
    assert "1 records were rejected" in out
    with pytest.raises(FileExistsError):
        run(*words)


def test_the_keys_of_addresses_in_records_are_neither_shown_nor_kept(tmp_path, records, capsys):
    signed = "https://me:s3cr3t@host/a.jpg?sig=s3cr3t"
    pictures = [
        signed,
        f"{'x/' * 50}a.jpg?sig=s3cr3t",
        {"uri": signed, "headers": {"Authorization": "s3cr3t"}},
    ]
    with records.open("a") as file:
        for picture in [*pictures, signed.replace("https", "file")]:
            file.write(json.dumps({"q": "What?", "a": "A cat.", "picture": picture}) + "\n")
    words = (records, "--out", tmp_path / "out", "--media-root", tmp_path, *COLUMNS, "--skip-rejected")
    assert run(*words) == 0
    assert main(["shards", signed, "--out", str(tmp_path / "other")]) == 1
    said = capsys.readouterr()
    kept = (tmp_path / "out" / "rejected.jsonl").read_text()
    assert len(kept.splitlines()) == 5
    assert "https://host/a.jpg" in kept
    for text in (said.out, said.err, kept):
        assert "s3cr3t" not in text


def test_check_groups_faults_and_writes_nothing(tmp_path, capsys):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    records = [{"image": f"gone-{i}.png", "conversations": turns} for i in range(5)]
    records += [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}]
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ["shards", str(file), "--media-root", str(tmp_path), "--check"]
    assert main(words) == 1
    out = capsys.readouterr().out
    assert "6 records, 1 can be written, 5 are rejected" in out
    assert "5 like these" in out
    assert out.count("gone-") == 3  # examples
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]
    file.write_text(json.dumps(records[-1]) + "\n")
    assert main(words) == 0
    assert main(words[:-1]) == 1
    assert "--out" in capsys.readouterr().err


def test_every_broken_line_is_counted_and_missing_files_are_named(tmp_path, capsys):
    good = json.dumps(
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    )
    file = tmp_path / "records.jsonl"
    file.write_text("\n".join([good, '{"a"', good, "{,}", '{"b"']) + "\n")
    assert main(["shards", str(file), "--check"]) == 1
    out = capsys.readouterr().out
    assert "5 records, 2 can be written, 3 are rejected" in out
    assert "records.jsonl:2: no JSON" in out
    assert "records.jsonl:5: no JSON" in out
    assert main(["shards", str(file), "--out", str(tmp_path / "out")]) == 1
    assert "3 of 5 records cannot be used" in capsys.readouterr().err
    assert main(["shards", str(file), "--out", str(tmp_path / "out"), "--skip-rejected"]) == 0
    assert "2 samples" in capsys.readouterr().out
    for words in (["--check"], ["--out", str(tmp_path / "other")]):
        gone = [str(tmp_path / name) for name in ("gone.jsonl", "lost.parquet")]
        assert main(["shards", *gone, str(file), *words]) == 1
        err = capsys.readouterr().err
        assert "gone.jsonl: no such file or folder" in err
        assert "lost.parquet: no such file or folder" in err
        assert "hf:NAME" in err


def test_files_that_are_cut_off_are_found_and_changed_data_where_all_is_decoded(tmp_path, capsys):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
    whole, film = jpeg(1), clip(tmp_path)
    media = {
        "a.jpg": whole,
        "b.jpg": whole[: len(whole) // 2],
        "c.mp4": film,
        "d.mp4": film[: len(film) // 2],
        "e.jpg": whole[:1500] + b"\xff\x00" * 9 + whole[1518:],
        "f.mp4": film[:-90] + b"\xff" * 60 + film[-30:],
    }
    records = []
    for name, data in media.items():
        (tmp_path / name).write_bytes(data)
        records.append({"image" if name.endswith("jpg") else "video": name, "conversations": turns})
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in [*records, {"conversations": turns}]))
    words = ["shards", str(file), "--media-root", str(tmp_path)]
    found_now = ("records.jsonl:2: b.jpg: image of", "records.jsonl:4: d.mp4: clip")
    for decode, num_used, found in (
        ([], 5, found_now),
        (["--decode"], 3, (*found_now, "jsonl:5: e.jpg: image of", "jsonl:6: f.mp4: clip")),
    ):
        assert main([*words, "--check", *decode]) == 1
        out = capsys.readouterr().out
        assert f"7 records, {num_used} can be written, {7 - num_used} are rejected" in out
        assert [one for one in found if one not in out] == []
        assert main([*words, "--out", str(tmp_path / f"out{num_used}"), *decode, "--skip-rejected"]) == 0
        assert f"{num_used} samples in 1 shards" in capsys.readouterr().out


def test_an_option_by_its_former_name_is_answered_with_its_present_one(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["shards", "a.json", "--out", "x", "--skip-bad"])
    assert ended.value.code == 2
    assert "--skip-bad was renamed to --skip-rejected" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["shards", "--help"])
    assert "--skip-bad" not in capsys.readouterr().out


def test_unread_keys_are_listed_once_and_roots_and_preferences_are_options(tmp_path, capsys):
    for name in ("one/a.jpg", "two/b.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(jpeg())
    rows = [{"image": f"{name}.jpg", "query": "What?", "response": "A cat.", "source": "x"} for name in "ab"]
    rows[0]["rejected_response"] = "A dog."
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["shards", str(file), "--media-root", str(tmp_path / "one")]
    assert main([*words, "--check"]) == 1
    out = capsys.readouterr().out
    assert "preference data (rejected_response)" in out
    assert "no such file" in out
    words += ["--media-root", str(tmp_path / "two"), "--chosen-only"]
    for more, said in (("--check",), "2 can be written"), (("--out", str(tmp_path / "out")), "2 samples"):
        assert main([*words, *more]) == 0
        out = capsys.readouterr().out
        assert said in out
        assert out.count("not read: source (2 records)") == 1


def test_help_names_the_importers(capsys):
    with pytest.raises(SystemExit):
        main(["shards", "--help"])
    out = capsys.readouterr().out
    assert all(f"  {name}:" in out for name in IMPORTERS)
