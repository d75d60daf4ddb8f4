"""A run's folder in a real file system of fsspec: it comes back whole, and a store that fails stops nothing."""

from __future__ import annotations

import shutil

import fsspec
import pytest

from tests.engine.checkpoints.made import make
from tests.engine.runs import figures, run
from vl3train.cli.main import main
from vl3train.engine.mirror.remote import Mirror, MirrorError
from vl3train.engine.mirror.uploads import Uploads, other_run_there
from vl3train.engine.ranks import RunError
from vl3train.model.weights.headers.manifest import MANIFEST

ADDRESS = "memory://bucket/runs/mine"


@pytest.fixture
def store():
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def run_folder(tmp_path):
    folder = tmp_path / "run"
    for step in (10, 20):
        make(folder / "checkpoints", step)
    for name in ("config.yaml", "metrics.jsonl", "run.lock", "best.json.7.partial", "base/MANIFEST.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_what_was_copied_comes_back(tmp_path, store):
    folder, mirror = run_folder(tmp_path), Mirror(ADDRESS)
    for name in ("step_00000010", "step_00000020"):
        assert mirror.put(folder, name) > 100
    assert mirror.put(folder, "step_00000020") == 0, "nothing has changed"
    found = {path for path in store.find("/bucket/runs/mine")}
    assert "/bucket/runs/mine/base/MANIFEST.json" in found
    assert not any(path.endswith(("run.lock", ".partial")) for path in found)
    got = []
    assert Mirror(ADDRESS).get(tmp_path / "back", got.append) == "step_00000020"
    assert sorted(path.name for path in (tmp_path / "back" / "checkpoints").iterdir()) == [
        "latest",
        "step_00000020",
    ]
    assert (tmp_path / "back" / "config.yaml").read_text() == "config.yaml"
    with pytest.raises(MirrorError, match="has checkpoints already"):
        mirror.get(tmp_path / "back", got.append)


def test_what_the_run_deletes_is_deleted_there(tmp_path, store):
    folder, mirror = run_folder(tmp_path), Mirror(ADDRESS)
    mirror.put(folder, "step_00000010")
    shutil.rmtree(folder / "checkpoints" / "step_00000010")
    mirror.put(folder, "step_00000020")
    assert mirror.names() == ["step_00000020"]


def test_a_copy_that_is_not_whole_does_not_count(tmp_path, store):
    folder, mirror = run_folder(tmp_path), Mirror(ADDRESS)
    for name in ("step_00000010", "step_00000020"):
        mirror.put(folder, name)
    store.rm(f"/bucket/runs/mine/checkpoints/step_00000020/{MANIFEST}")
    assert mirror.get(tmp_path / "back", print) == "step_00000010"
    store.pipe_file("/bucket/runs/mine/checkpoints/step_00000010/engine/weights.bin", b"y" * 100)
    with pytest.raises(MirrorError, match=r"did not come whole: engine/weights.bin is not what was written"):
        mirror.get(tmp_path / "again", print)
    assert not list(tmp_path.glob("again/checkpoints/step_????????"))


def test_an_older_one_comes_where_the_newest_is_damaged(tmp_path, store):
    folder, mirror, said = run_folder(tmp_path), Mirror(ADDRESS), []
    for name in ("step_00000010", "step_00000020"):
        mirror.put(folder, name)
    store.pipe_file("/bucket/runs/mine/checkpoints/step_00000020/engine/weights.bin", b"y" * 100)
    assert mirror.get(tmp_path / "back", said.append) == "step_00000010"
    assert any("step_00000020 did not come whole" in line for line in said)
    assert sorted(path.name for path in (tmp_path / "back/checkpoints").iterdir()) == [
        "latest",
        "step_00000010",
    ]


def test_a_step_that_is_copied_anew_is_not_whole_before_its_end(tmp_path, store, monkeypatch):
    folder = run_folder(tmp_path)
    Mirror(ADDRESS).put(folder, "step_00000020")
    with monkeypatch.context() as patch:  # the process dies at its first file
        patch.setattr(type(store), "put_file", lambda *_, **__: 1 / 0)
        with pytest.raises(MirrorError):
            Mirror(ADDRESS).put(folder, "step_00000020")
    resumed = Mirror(ADDRESS)
    (folder / "checkpoints/step_00000020/engine/weights.bin").write_bytes(b"z" * 100)
    put = store.put_file

    def dies_at_the_manifest(_, source, target, **more):
        if target.endswith(MANIFEST) and "step_" in target:
            raise OSError("died")
        return put(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "put_file", dies_at_the_manifest)
        with pytest.raises(MirrorError, match="died"):
            resumed.put(folder, "step_00000020")
    with pytest.raises(MirrorError, match="holds no whole checkpoint"):
        resumed.get(tmp_path / "back", print)


def test_a_run_does_not_replace_the_copy_of_another(tmp_path, store):
    folder, said = run_folder(tmp_path), []
    mirror = Mirror(ADDRESS)
    assert other_run_there(mirror, folder, False, said.append) is None, "nothing is there"
    mirror.put(folder, "step_00000010")
    assert other_run_there(Mirror(ADDRESS), folder, True, said.append) is None, "it goes on"
    lost = other_run_there(Mirror(ADDRESS), tmp_path / "new", False, said.append)
    assert "has step_00000010 of another run, or of this one before its folder was lost" in lost
    (folder / "metrics.jsonl").write_text("figures of another run")
    assert "or name another place" in other_run_there(Mirror(ADDRESS), folder, True, said.append)
    (folder / "metrics.jsonl").unlink()
    assert other_run_there(Mirror(ADDRESS), folder, True, said.append) is None, "its figures are lost"
    assert not said


def test_a_place_that_does_not_say_what_it_holds_keeps_no_run_from_its_start(tmp_path, store, monkeypatch):
    def refuse(*_):
        raise PermissionError("403")

    monkeypatch.setattr(type(store), "exists", refuse)
    said = []
    assert other_run_there(Mirror(ADDRESS), run_folder(tmp_path), True, said.append) is None
    assert "PermissionError: 403. The run goes on, and each checkpoint is tried" in said[0]


def test_the_manifest_comes_last(tmp_path, store, monkeypatch):
    folder, mirror, order = run_folder(tmp_path), Mirror(ADDRESS), []
    put = store.put_file
    monkeypatch.setattr(
        type(store), "put_file", lambda _, source, target, **more: (order.append(target), put(source, target))
    )
    mirror.put(folder, "step_00000020")
    assert order[-1].endswith(f"step_00000020/{MANIFEST}")


def test_a_store_that_fails_is_told_without_its_secret_and_tried_again(tmp_path, store, monkeypatch):
    folder, said = run_folder(tmp_path), []
    address = "memory://me:swordfish@bucket/runs/mine"
    uploads = Uploads(folder, Mirror(address), said.append)
    with monkeypatch.context() as patch:

        def refuse(_, source, target, **more):
            raise PermissionError(f"403 for {address}/{target}")

        patch.setattr(type(store), "put_file", refuse)
        uploads.offer("step_00000010")
        uploads.finish(30)
    [line] = said
    assert "step_00000010 could not be copied: memory://bucket/runs/mine: PermissionError: 403" in line
    assert "swordfish" not in line
    uploads.offer("step_00000020")
    uploads.finish(30)
    assert said[1].startswith("step_00000020 is in memory://bucket/runs/mine: ")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("floppy://a/b", "floppy:// is no place for a copy of a run"),
        ("zip://a::s3://bucket/b", "is no place"),
        ("oci://bucket/b", "Install ocifs|oci"),
    ],
)
def test_a_place_that_fsspec_does_not_know_is_told(address, said):
    with pytest.raises(MirrorError, match=said):
        Mirror(address)


def test_a_run_goes_on_elsewhere_from_its_copy(demo_words, tmp_path, capsys):
    words = [*demo_words, "stage=1", "run.num_steps=5", "run.evaluate_at_end=false"]
    straight = run([*words, f"run.output_dir={tmp_path / 'straight'}"])
    copy = tmp_path / "copy"
    run([*words, f"run.output_dir={tmp_path / 'one'}", f"run.upload_to={copy}", "run.stop_after_steps=3"])
    assert f"step_00000003 is in {copy}: " in capsys.readouterr().out
    shutil.rmtree(tmp_path / "one")
    assert main(["checkpoint", str(copy), "--fetch", str(tmp_path / "two")]) == 0
    run([*words, f"run.output_dir={tmp_path / 'two'}"])
    assert figures(tmp_path / "two") == figures(straight)
    with pytest.raises(RunError, match=r"run.upload_to: floppy://"):
        run([*words, f"run.output_dir={tmp_path / 'three'}", "run.upload_to=floppy://a/b"])
