"""Ranks are counted alike by the commands that train and those that look ahead."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from importlib import import_module

import pytest

from vl3train.cli import ranks
from vl3train.config.choices import Device
from vl3train.config.problems import ConfigError
from vl3train.config.schema import TrainConfig


@pytest.mark.parametrize("gpus", [0, 4])
@pytest.mark.parametrize("command", ["train", "check", "plan"])
def test_the_ranks_of_a_run(command, gpus, monkeypatch):
    monkeypatch.setattr(ranks, "gpu_count", lambda: gpus)
    parser = ArgumentParser()
    import_module(f"vl3train.cli.{command}").add_arguments(parser)

    def counted(*words):
        return ranks.ranks_of(parser.parse_args(words))

    assert counted("stage=1", "--nproc", "3") == 3
    assert counted("stage=1", "machine.dp_size=2") is None, "as it is written"
    assert counted("stage=1") == (gpus or None)


def test_torch_is_not_asked_where_there_is_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "GPU_DEVICES", ("no_such_device*",))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 9)
    assert ranks.gpu_count() == 0
    monkeypatch.setattr(ranks, "GPU_DEVICES", ("null",))
    assert ranks.gpu_count() == 9


def test_a_machine_without_a_gpu_does_not_start_the_ranks_of_another(monkeypatch):
    monkeypatch.setattr(ranks, "gpu_count", lambda: 0)
    cfg = TrainConfig()
    cfg.machine.dp_size = 8

    def started(*words, nproc=None):
        return ranks.ranks_to_start(cfg, Namespace(overrides=list(words), nproc=nproc))

    with pytest.raises(ConfigError, match="this one has no GPU; --nproc N starts N processes on the CPU"):
        started("stage=1")
    assert started("stage=1", nproc=8) == started("machine.dp_size=8") == 8
    cfg.machine.device = Device.cpu
    assert started("stage=1") == 8
    cfg.machine.device, cfg.machine.dp_size = Device.auto, 1
    assert started("stage=1") == 1
