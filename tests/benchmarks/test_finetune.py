"""The benchmark of fine-tuning gives both sides the same samples, and its lines have the figures' names."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.finetune import ROWS, lines_of, ratio_line, shown
from benchmarks.gpu.measure import measure_beside, prepare
from benchmarks.gpu.rows import tiny
from benchmarks.gpu.trainer import chunks

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["lora_2b", "qlora_7b"])
def test_the_trainers_first_loss_is_ours(name):
    if "qlora" in name:
        pytest.importorskip("bitsandbytes")
    row = replace(tiny(ROWS[name]), rank=8, steps=1, stock_rows=2)
    step, work = prepare(row, 0, CPU)
    own = [step(work.data(number), work.steps[number]["supervised"]) for number in range(3)]
    found = measure_beside(replace(row, way="trainer"), CPU)
    assert found["losses"] == pytest.approx(own, abs=5e-3)
    assert found["tokens_a_second"] > 0
    assert found["tokens_a_pack"] == max(of_step["longest"] for of_step in work.steps)
    trained = [one for one, parameter in _parameters(step) if parameter.requires_grad]
    assert all("lora_" in one for one in trained)


def _parameters(step):
    return step.__self__.engine.engine.module.named_parameters()


def test_a_steps_samples_become_as_many_micro_batches_in_every_step():
    class Sample:
        def __init__(self, length):
            self.input_ids = [0] * length

    samples = [Sample(length) for length in (5, 1, 9, 3, 7)]
    parts = chunks(samples, 2)
    assert [[len(one.input_ids) for one in part] for part in parts] == [[1, 3, 5], [7, 9]]
    assert [len(part) for part in chunks(samples, 5)] == [1] * 5
    with pytest.raises(ValueError, match="5 samples do not make 6"):
        chunks(samples, 6)


def test_lines_have_the_names_of_the_figures():
    own = {
        "peak_gib": 20.0,
        "reserved_gib": 21.0,
        "tokens_a_second": 900.0,
        "tflops": 1.0,
        "seconds_a_pack": 1.0,
    }
    theirs = {"tokens_a_second": 300.0, "tried": {1: "300 tokens/s", 2: "out of memory"}}
    lines = lines_of("qlora_7b", ROWS["qlora_7b"], own, theirs)
    assert [line["figure"] for line in lines] == [
        "qlora_7b_peak_gib",
        "qlora_7b_tokens_a_second",
        "qlora_7b_trainer_tokens_a_second",
    ]
    assert (lines[0]["value"], lines[0]["aim"]) == (20.0, 23.0)
    ratio = ratio_line({"qlora_7b": 3.0, "lora_7b": 2.5})
    assert (ratio["figure"], ratio["value"]) == ("lora_ratio_to_trainer", 2.5)
    assert "| 3.00 |" in shown("qlora_7b", ROWS["qlora_7b"], own, theirs, 3.0)
    [failed] = lines_of("lora_2b", ROWS["lora_2b"], {"failed": "out of memory"}, {})
    assert (failed["figure"], failed["value"]) == ("lora_2b_peak_gib", None)
