"""``vl3train check`` shows what would be trained, or every problem, without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest

import vl3train
from tests.cli.conftest import sparse_checkpoint, write_tokenizer_json
from vl3train.cli import check
from vl3train.cli.main import main
from vl3train.config.paths import mark_finished
from vl3train.config.problems import ConfigError
from vl3train.preview.check_config import check_config

RECIPE = """\
name: mine
about: two sources
sources:
  - {name: pictures, shards: pictures}
  - {name: words, shards: words, weight: 0.5}
"""


@pytest.fixture
def with_data(workplace: Path) -> Path:
    (workplace / "mine.yaml").write_text(RECIPE)
    for name in ("pictures", "words"):
        (workplace / "data" / name).mkdir()
        (workplace / "data" / name / "00000.tar").touch()
    return workplace


GOOD = ("stage=1", "model=2b", "data.recipe=mine.yaml")


def test_a_good_config_is_summarised(with_data: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["check", *GOOD]) == 0
    words = " ".join(capsys.readouterr().out.split())
    for expected in (
        "stage 1: 1_encoder_adaptation, model 2b",
        "vision_encoder │ in full │ 1e-05 │ 412,147,440",
        "projector │ in full │ 0.001 │ 4,131,840",
        "language_model │ frozen │",
        "starts from vision encoder google/siglip-so400m-patch14-384, language model Qwen/Qwen2.5-",
        "16 packs (8 ranks x 2) of 16,384 tokens and 65,536 patches: 262,144 tokens, at most 128 samples",
        "merge size 1 for images, 2 for clips; no frame pruning",
        "recipe mine, 2 sources under data",
        "words, weight 0.5",
    ):
        assert expected in words, words


def test_adapters_are_shown(with_data: Path, capsys: pytest.CaptureFixture[str]):
    assert (
        main(["check", "stage=2", "stage.init_from=checkpoint", "data.recipe=mine.yaml", "adapter=lora"]) == 0
    )
    words = " ".join(capsys.readouterr().out.split())
    assert "language_model │ LoRA, rank 64 │ 0.0001 │ 1,543,714,304 frozen" in words
    assert "vision_encoder │ frozen │" in words
    assert (
        "adapters LoRA on language_model (rank 64, alpha 128, 73,859,072 parameters): all linear layers, dropout 0"
        in words
    )
    assert "starts from the checkpoint checkpoint" in words


def test_a_pattern_that_no_layer_has_is_a_problem_with_near_ones(
    with_data: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["stage=2", "stage.init_from=checkpoint", "data.recipe=mine.yaml", "adapter=lora"]
    assert main(["check", *words, "adapter.target_modules=['.*layers.99.*q_prj']"]) == 1
    assert "is no linear layer of language_model; near ones are q_proj" in " ".join(
        capsys.readouterr().out.split()
    )


def test_five_planted_mistakes_are_five_numbered_problems(
    with_data: Path, capsys: pytest.CaptureFixture[str]
):
    mistakes = (
        "step.max_tokns=8192",
        "machine.attention=flash",
        "step.global_packs=12",
        "stage.learning_rates.projector=-1",
        "data.recipe=mien",
    )
    assert main(["check", *GOOD, *mistakes]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "5 problems: this run cannot start"
    numbered = [line for line in lines if line[:1].isdigit() and line[1:3] == ". "]
    assert numbered == [
        "1. step.max_tokns=8192",
        "2. machine.attention=flash",
        "3. stage.learning_rates.projector=-1.0",
        "4. step.global_packs=12",
        "5. data.recipe=mien",
    ]
    assert "   -> did you mean step.max_tokens?" in lines
    assert "   -> take 8 or 16" in lines


def test_shards_that_are_missing_are_problems(with_data: Path, capsys: pytest.CaptureFixture[str]):
    (with_data / "data" / "words" / "00000.tar").unlink()
    assert main(["check", *GOOD]) == 1
    assert "words: data/words" in capsys.readouterr().out


def test_a_stage_can_be_checked_before_the_one_it_starts_from(
    with_data: Path, capsys: pytest.CaptureFixture[str]
):
    later = ("check", "stage=2", "data.recipe=mine.yaml", "stage.init_from=runs/2b/1_encoder_adaptation")
    assert main([*later]) == 1
    assert main([*later, "--ahead"]) == 0
    assert "which does not exist yet" in capsys.readouterr().out
    assert main(["check", "stage=2", "data.recipe=mine.yaml", "--ahead"]) == 1


def test_what_is_checked_is_what_is_trained(with_data: Path):
    parser = ArgumentParser()
    check.add_arguments(parser)
    assert check_config(parser.parse_args([*GOOD]), dp_size=4).machine.dp_size == 4
    with pytest.raises(ConfigError, match=r"step\.global_packs=16: does not divide over machine\.dp_size=3"):
        check_config(parser.parse_args([*GOOD]), dp_size=3)


def test_ranks_are_counted_as_train_and_plan_count_them(with_data: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["check", *GOOD, "--nproc", "4"]) == 0
    assert "(4 ranks x 4)" in capsys.readouterr().out
    assert main(["check", *GOOD, "--nproc", "3"]) == 1
    assert "does not divide over machine.dp_size=3" in " ".join(capsys.readouterr().out.split())


def test_check_needs_no_torch(with_data: Path):
    code = (
        "import sys\n"
        "from vl3train.cli.main import main\n"
        f"code = main(['check', *{GOOD!r}])\n"
        "print(code, [name for name in ('torch', 'transformers', 'deepspeed') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(vl3train.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.splitlines()[-1] == "0 []"


START = ("check", "stage=2", "model=2b", "data.recipe=mine.yaml", "stage.init_from=checkpoint")


def test_what_is_wrong_with_the_start_folder_is_told_together(
    with_data: Path, capsys: pytest.CaptureFixture[str]
):
    weights = with_data / "checkpoint" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    (with_data / "checkpoint" / "tokenizer.json").unlink()
    assert main([*START]) == 1
    out = capsys.readouterr().out
    assert out.startswith("2 problems")
    assert "model.safetensors is cut off" in out
    assert "has no tokenizer: neither tokenizer.json nor vocab.json" in out


def test_another_size_is_told_with_the_one_that_fits(with_data: Path, capsys: pytest.CaptureFixture[str]):
    sparse_checkpoint(with_data / "seven", "7b")
    assert main([*START, "stage.init_from=seven"]) == 1
    out = capsys.readouterr().out
    assert "its language_model has 7,615,616,512 parameters, model=2b has 1,543,714,304" in out
    assert "-> choose model=7b" in out


def test_a_tokenizer_of_another_model_is_told_by_ids_and_rows(
    with_data: Path, capsys: pytest.CaptureFixture[str]
):
    (with_data / "other").mkdir()
    write_tokenizer_json(with_data / "other", first=151_930)
    assert main([*START, "model.tokenizer_from=other"]) == 1
    out = capsys.readouterr().out
    assert "ids up to 151946, the language model's embedding only 151936 rows" in out
    assert "config.json says image_token_id=151655" in out
    assert "config.json says video_token_id=151656" in out


def test_the_parts_of_stage_1_are_checked_as_well(with_data: Path, capsys: pytest.CaptureFixture[str]):
    words = (
        "model.vision_encoder_from=data/parts/vision_encoder",
        "model.language_model_from=data/parts/language_model",
    )
    assert main(["check", *GOOD, *words]) == 1
    out = capsys.readouterr().out
    assert out.count("holds no weights") == 2
    assert "patches of 16 pixels" in out
    assert "has no tokenizer" in out


def test_a_training_is_refused_before_any_process_or_torch(with_data: Path):
    os.truncate(with_data / "checkpoint" / "model.safetensors", 1000)
    code = (
        "import sys\n"
        "from vl3train.train import main\n"
        f"code = main([*{START[1:]!r}, 'machine=one_gpu'])\n"
        "print(code, [name for name in ('torch', 'transformers', 'deepspeed') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(vl3train.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.splitlines()[-1] == "2 []"
    assert "is cut off" in done.stderr


def test_a_finished_run_and_a_template_that_is_not_used_are_said(
    with_data: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([*START, "machine.dp_size=1"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "chat template" not in out
    assert "finished" not in out
    assert "(1 rank x 16)" in out
    assert "1 frame a second" in out
    parser = ArgumentParser()
    check.add_arguments(parser)
    mark = Path("runs/2b/2_alignment")
    mark.mkdir(parents=True)
    mark_finished(check_config(parser.parse_args([*START[1:]])))
    (with_data / "checkpoint" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert main([*START]) == 0
    out = capsys.readouterr().out
    assert "chat template: chat_template.jinja of checkpoint is not used, it renders" in out
    assert "runs/2b/2_alignment: this run is finished; name another run.output_dir" in out
    (mark / "finished.json").write_text("{")
    assert main([*START]) == 1
    assert "finished.json is damaged" in capsys.readouterr().out


def test_a_number_that_stops_the_rules_hides_no_crash(with_data: Path, capsys: pytest.CaptureFixture[str]):
    assert main([*START, "stage.init_from=gone", "step.global_packs=0"]) == 1
    assert "step.global_packs=0" in capsys.readouterr().out
    assert main(["check", *GOOD, "stage.number=7"]) == 1
    assert "stage.number=7" in capsys.readouterr().out


def test_a_stage_before_without_a_checkpoint_is_no_obstacle_ahead(
    with_data: Path, capsys: pytest.CaptureFixture[str]
):
    (with_data / "earlier" / "checkpoints").mkdir(parents=True)
    assert main([*START, "stage.init_from=earlier", "--ahead"]) == 0
    assert "which has no complete checkpoint yet" in capsys.readouterr().out
