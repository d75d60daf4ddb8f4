"""What a resumed run takes its weights from."""

from __future__ import annotations

import pytest

from vl3train.config.schema import TrainConfig
from vl3train.engine.start.model import build_model


def test_adapters_without_the_weights_that_they_are_on_are_told(tmp_path):
    adapter = tmp_path / "checkpoints" / "step_00000002" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="base is missing: it holds the weights that the adapters in"):
        build_model(TrainConfig(), adapter.parent, tmp_path)
