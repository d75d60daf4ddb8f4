"""One small fine-tuning from records to report: what it leaves, and what it says when it is given again."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import vl3train
from tests.finetuning.records import make_records, record, write_jsonl
from vl3train.cli.main import main
from vl3train.finetuning import launching
from vl3train.finetuning.api import Trained
from vl3train.scoring.predictions import read_predictions

DOCS = Path(__file__).parents[2] / "docs"
SMALL = {"data.num_workers": 0, "adapter.rank": 4, "step.max_samples": 4, "finetune.predictions": 2}
"""What the page's commands take more here, so that they are quick."""


class Tuned:
    """A finished fine-tuning: its folder, the words of its command, and what it printed."""

    def __init__(self, folder: Path, words: list[str], printed: str) -> None:
        self.folder, self.words, self.printed = folder, words, printed


def page_commands() -> list[list[str]]:
    """The words of each command of docs/finetune.md, without the program; those that begin anew take SMALL, too."""
    text = (DOCS / "finetune.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line)[1:] for block in blocks for line in block.splitlines()]
    small = [f"{key}={value}" for key, value in SMALL.items()]
    return [words + (small if "my.jsonl" in words else []) for words in commands]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny_model_dir: Path, warm_python: list[str]) -> Iterator[Tuned]:
    """The page's commands, run in their order in a folder that has what they name."""
    folder = tmp_path_factory.mktemp("finetune")
    make_records(folder, 9)
    (folder / "model").symlink_to(tiny_model_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(launching, "PYTHON", warm_python)
        lines: list[str] = []
        patch.setattr("vl3train.cli.finetune.tell", lines.append)
        for words in page_commands():
            assert main(words) == 0, words
        patch.undo()
        patch.chdir(folder)
        yield Tuned(folder / "runs" / "mine", page_commands()[1], "\n".join(lines))


@pytest.mark.two_processes
def test_it_leaves_the_best_checkpoint_answers_and_a_report(tuned: Tuned):
    out = tuned.folder
    best = json.loads((out / "best.json").read_text())
    values = {one["step"]: one["value"] for one in best["history"]}
    assert best["value"] == min(values.values()) == values[best["step"]]
    assert (out / best["checkpoint"] / "adapter").is_dir()
    evaluations = [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
    assert [line["when"] for line in evaluations][:1] == ["start"]
    found = read_predictions(out / "predictions.jsonl")
    assert len(found) == 2
    assert all(one.reference and set(one.scores) == {"exact"} for one in found)
    assert len(list((out / "predictions_seen").iterdir())) == 2
    assert "report.html" in {file.name for file in (out / "report").iterdir()}
    assert f"vl3train generate --model {out / best['checkpoint']}" in tuned.printed
    assert (out / "export" / "config.json").is_file()
    assert "WARNING: 6 steps are few" in tuned.printed
    assert "9 train (9 image), 3 are held out" in tuned.printed


@pytest.mark.two_processes
def test_the_plan_counts_what_the_run_trains(tuned: Tuned):
    [line] = {line for line in tuned.printed.splitlines() if line.startswith("trained")}
    told = int(line.split()[1].replace(",", ""))
    resume = json.loads(next((tuned.folder / "checkpoints").glob("*/resume.json")).read_text())
    assert told == sum(part["trained"] for part in resume["identity"]["model"].values())


@pytest.mark.two_processes
def test_given_again_it_is_finished_and_changes_no_data(tuned: Tuned, capsys):
    shards = {path: path.stat().st_mtime_ns for path in (tuned.folder / "data").rglob("*.tar")}
    assert main([*tuned.words, "--dry-run", "run.max_hours=1"]) == 0, (
        "an option of one launch is not the file's"
    )
    assert main(["finetune", "--config", str(tuned.folder / "run.yaml"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("held out; there already, from the same records") == 2
    assert {path: path.stat().st_mtime_ns for path in (tuned.folder / "data").rglob("*.tar")} == shards
    assert main([*tuned.words, "run.seed=3"]) == 1
    assert "run.seed: unset in the file, 3 in the command" in capsys.readouterr().err


@pytest.mark.two_processes
def test_the_file_is_one_that_train_takes(tuned: Tuned, capsys):
    assert main(["check", "--config", str(tuned.folder / "run.yaml")]) == 0
    assert "this run is finished" in capsys.readouterr().out
    options = yaml.safe_load((tuned.folder / "run.yaml").read_text())
    assert (options["run.num_epochs"], options["optim.learning_rate"]) == (2, 1e-4)


@pytest.mark.two_processes
def test_the_notebook_runs(tuned: Tuned):
    """On the finished run: its training is not begun again."""
    book = json.loads((DOCS / "finetune.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    for cell in cells:
        exec(cell.replace("options = {}", f"options = {SMALL}"), names)
    assert isinstance(names["model"], Trained)
    with pytest.raises(ValueError, match=r"no.png does not exist"):
        names["model"].ask("What?", image="no.png")


def test_all_that_is_wrong_is_told_at_once_and_nothing_is_written(
    tmp_path: Path, tiny_model_dir: Path, capsys
):
    file = make_records(tmp_path, 2)
    bad = write_jsonl(tmp_path / "bad.jsonl", [record("pictures/77.png", "a", "b")])
    words = ["finetune", str(file), str(bad), "--model", str(tiny_model_dir), "--out", str(tmp_path / "out")]
    words += ["--media-root", str(tmp_path)]
    assert main([*words, "lr=1", "step.max_tokens=0"]) == 1
    told = capsys.readouterr().err
    assert "problems:\n1. " in told
    assert "lr=1: no such option; did you mean optim.learning_rate?" in told
    assert "step.max_tokens=0: must be at least 1" in told
    assert "1 records cannot be used" in told
    assert "77.png" in told
    assert not (tmp_path / "out").exists()
    (tmp_path / "recipe.yaml").write_text("name: mine\n")
    assert main([*words[:-3], str(tmp_path), "--media-root", str(tmp_path), "--skip-rejected"]) == 1
    assert "recipe.yaml is a recipe that this command did not write" in capsys.readouterr().err


def test_words_that_say_too_little_or_the_same_twice_are_told(tmp_path: Path, capsys):
    assert main(["finetune"]) == 1
    assert main(["finetune", "a.jsonl", "--config", "run.yaml", "--lr", "1"]) == 1
    told = capsys.readouterr().err
    assert "RECORDS and --model must be given" in told
    assert "--config run.yaml says what is trained; leave RECORDS, --lr out" in told


def test_importing_the_package_is_light():
    code = (
        "import sys, vl3train; print(sorted({'torch', 'hydra', 'yaml', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
    assert set(vl3train.__all__) == {"finetune", "load"}
