"""An engine's state in files of its own, with the weights in them: as builds before 2026-12 wrote it."""

from __future__ import annotations

from vl3train.engine.zero.engine_state import FOLDER
from vl3train.engine.zero.state_files import MODEL, SAME, WEIGHTS_IN


def write_state(engine, folder):
    """What ``engine.load(folder)`` reads. All ranks call it."""
    state = engine.take_state()
    for content in state.files.values():
        if WEIGHTS_IN in content:
            del content[WEIGHTS_IN]
            module = content["module"]
            module.update({MODEL + name: tensor for name, tensor in state.weights.items()})
            module.update({name: module[other] for name, other in content.pop(SAME).items()})
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    state.write(folder)
    engine.rank.barrier()
