"""Whole runs on records of the same media: with shared prefixes they have the losses of the records apart."""

from __future__ import annotations

import json
import re

import pytest

from tests.data.test_families import NUM_RECORDS, make_records
from tests.engine.runs import run
from vl3train.cli.main import main
from vl3train.data.prepare.annotated_records import AnnotatedRecords
from vl3train.data.prepare.write_shards import write_shards

STEPS = 2


@pytest.fixture(scope="module")
def words(tmp_path_factory, tiny_model_dir):
    """The options of a run whose every step has all records once."""
    root = tmp_path_factory.mktemp("family-runs")
    (root / "records.jsonl").write_text("".join(json.dumps(one) + "\n" for one in make_records(root)))
    write_shards(
        AnnotatedRecords((str(root / "records.jsonl"),), (root / "media",)),
        root / "shards",
        max_samples=1000,
        max_bytes=10**9,
        skip_rejected=False,
        progress=lambda *_: None,
        share_media=True,
    )
    source = {"name": "mixed", "shards": "shards", "held_out": "shards"}
    (root / "recipe.yaml").write_text(
        json.dumps({"name": "mixed", "about": "A few media.", "sources": [source]})
    )
    return [
        "stage=3",
        "model=debug",
        "data=demo",
        "machine=cpu",
        f"stage.init_from={tiny_model_dir}",
        f"data.root={root}",
        f"data.recipe={root / 'recipe.yaml'}",
        f"data.plan_cache={root / 'plans'}",
        "data.num_workers=0",
        "step.max_tokens=4096",
        "step.max_patches=8192",
        "step.global_packs=1",
        "step.max_samples=null",
        f"run.num_steps={STEPS}",
        "run.evaluate_at_end=true",
    ]


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


@pytest.mark.parametrize(
    "adapter",
    [(), pytest.param(("adapter=lora", "adapter.rank=8"), marks=pytest.mark.long)],
    ids=["whole", "lora"],
)
def test_a_run_with_shared_prefixes_has_the_losses_of_one_without(words, tmp_path, adapter, capsys):
    """Of its steps, and of its held-out samples. The one without says what it misses."""
    shared, apart = (
        run([*words, *adapter, f"data.share_prefix={on}", f"run.output_dir={tmp_path / on}"])
        for on in ("true", "false")
    )
    said = " ".join(capsys.readouterr().out.split())
    assert re.findall(r"(\d\d%) of the samples show .*share_prefix=true would take (\d\d%)", said) == [
        ("82%", "39%")
    ]
    found, wanted = lines(shared), lines(apart)
    assert len(found) == len(wanted) == STEPS
    for line, other in zip(found, wanted, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert line["supervised_tokens"] == other["supervised_tokens"]
    [held_out, other] = (
        json.loads((out / "evaluations.jsonl").read_text())["sources"]["mixed"] for out in (shared, apart)
    )
    assert held_out["samples"] == other["samples"] == NUM_RECORDS
    assert held_out == pytest.approx(other, rel=1e-4)
    assert sum(line["tokens"] for line in found) < 0.7 * sum(line["tokens"] for line in wanted)


@pytest.mark.long
def test_verify_compares_records_behind_a_prefix_with_themselves_alone(words, tmp_path, capsys):
    words = [*words, "data.share_prefix=true", "machine.dp_size=1", f"run.output_dir={tmp_path}"]
    assert main(["index", *words]) == 0
    assert main(["verify", *words, "--samples", "2"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"passed\s+behind a shared prefix equals alone: 4 samples", said)
    assert "18 of its samples are in 5 families" in said
