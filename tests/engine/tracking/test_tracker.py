"""Which tracker a run has, and that the others are not even imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vl3train.config.choices import Tracker as TrackerKind
from vl3train.config.schema import TrainConfig
from vl3train.engine.tracking.tracker import NoTracker, start_tracker


def test_without_a_tracker_no_library_of_one_is_imported(tmp_path):
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from vl3train.config.schema import TrainConfig\n"
        "from vl3train.engine.tracking.tracker import start_tracker\n"
        "tracker = start_tracker(TrainConfig(), Path(sys.argv[1]), step=0, is_first=True)\n"
        "tracker.log({'loss': 1.0}, 0); tracker.finish(0)\n"
        "assert not {'wandb', 'tensorboard'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], check=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", TrackerKind, ids=lambda kind: kind.value)
def test_other_ranks_track_nothing(tmp_path, kind):
    cfg = TrainConfig()
    cfg.tracking.kind = kind
    assert isinstance(start_tracker(cfg, tmp_path / "run", step=0, is_first=False), NoTracker)
    assert not (tmp_path / "run").exists()
