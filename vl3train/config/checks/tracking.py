"""Where W&B's key is, and what keeps a run from being tracked. Imports no wandb, no TensorBoard."""

from __future__ import annotations

import netrc
import os
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlparse

from vl3train.config.choices import Tracker, WandbMode
from vl3train.config.problems import Problem
from vl3train.config.schema import TrainConfig


def tracking_problems(cfg: TrainConfig) -> list[Problem]:
    """A W&B run that is to be online and has no key, a netrc file that cannot be read, TensorBoard not installed."""
    mode, kind = cfg.tracking.mode, cfg.tracking.kind
    if kind is Tracker.tensorboard and find_spec("tensorboard") is None:
        way_out = "pip install 'vl3train[tensorboard]'"
        return [Problem("tracking.kind", kind, "the package tensorboard is not installed", way_out)]
    if kind is not Tracker.wandb or mode is WandbMode.offline:
        return []
    if mode is WandbMode.auto and os.environ.get("WANDB_MODE"):
        return []  # no key is looked for
    try:
        found = wandb_key_is_set()
    except ValueError as error:
        way_out = "repair the file, set WANDB_API_KEY, or use tracking.mode=offline"
        return [Problem("tracking.mode", mode, str(error), way_out)]
    if found or mode is WandbMode.auto:
        return []
    way_out = "run `wandb login`, set WANDB_API_KEY, or use tracking.mode=offline and `wandb sync` later"
    return [Problem("tracking.mode", mode, "no W&B key is set", way_out)]


def wandb_mode(wanted: WandbMode) -> str:
    """``online`` or ``offline``. ``auto`` follows WANDB_MODE, else it is online where W&B would find a key.

    Raises ValueError where the netrc file cannot be read.
    """
    if wanted is not WandbMode.auto:
        return wanted.value
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    return "online" if wandb_key_is_set() else "offline"


def wandb_key_is_set() -> bool:
    """Whether W&B would find a key: in WANDB_API_KEY, or in the netrc file, where ``wandb login`` writes it.

    Raises ValueError, which names the file, where that file cannot be read.
    """
    if os.environ.get("WANDB_API_KEY"):
        return True
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    if not file.is_file():
        return False
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(str(file)).authenticators(host) is not None
    except netrc.NetrcParseError as error:
        # Its text quotes the word that it did not expect, which may be the key.
        why = f"line {error.lineno} is malformed"
    except UnicodeDecodeError:
        why = "it is not UTF-8 text"
    except OSError as error:
        why = error.strerror or type(error).__name__
    raise ValueError(f"W&B's key is looked for in {file}, which cannot be read: {why}")
