"""Ranks wait for each other only so long; NCCL keeps its last collectives, unless the environment forbids it."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist

from vl3train.config.schema import RunConfig
from vl3train.engine.monitor.collectives import RECORDED_COLLECTIVES, record_collectives, shorten_timeouts


def test_every_group_gets_the_timeout_of_steps(one_rank):
    other = dist.new_group([0], timeout=timedelta(hours=4))
    shorten_timeouts(RunConfig(output_dir="out", collective_timeout_seconds=77.0))
    for group in (dist.group.WORLD, other):
        options = group._get_backend(one_rank.device).options
        assert options._timeout == timedelta(seconds=77)


def test_the_flight_recorder_is_on_where_the_environment_does_not_say(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith(("TORCH_FR_", "TORCH_NCCL_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "to be put back")
    monkeypatch.delenv("TORCH_FR_BUFFER_SIZE")
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", "to be put back")
    monkeypatch.delenv("TORCH_FR_DUMP_TEMP_FILE")
    record_collectives(tmp_path)
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == RECORDED_COLLECTIVES
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0"
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "nccl_trace_rank_")
    monkeypatch.delenv("TORCH_FR_BUFFER_SIZE")
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "7")  # the name before
    record_collectives(tmp_path)
    assert "TORCH_FR_BUFFER_SIZE" not in os.environ
