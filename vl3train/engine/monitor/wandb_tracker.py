"""The only door to Weights & Biases."""

from __future__ import annotations

import netrc
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from vl3train.config.choices import Tracker as TrackerKind
from vl3train.config.choices import WandbMode
from vl3train.config.schema import TrackingConfig

RUN_ID_FILE = "wandb_id.txt"


class Tracker:
    """One W&B run, or nothing: a tracker that was started without one accepts every call and does nothing."""

    def __init__(
        self,
        tracking: TrackingConfig,
        output_dir: str | Path,
        cfg_plain: Mapping[str, Any],
        *,
        step: int,
        enabled: bool = True,
    ) -> None:
        """Begin a W&B run, or go on with the one that this output folder began.

        Args:
            tracking: What to track with. With ``kind=none`` wandb is not even imported.
            output_dir: Folder of the run; holds ``wandb_id.txt`` and W&B's own files.
            cfg_plain: The whole config as plain values (``config.schema.as_plain``).
            step: Step that comes next; 0 in a new run.
            enabled: False on every rank but 0.

        A resumed run logs steps that a killed one logged already a second time; W&B draws the later values.
        """
        self._run: Any | None = None
        if tracking.kind is TrackerKind.none or not enabled:
            return
        import wandb

        folder = Path(output_dir).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        mode = wandb_mode(tracking.mode)
        run_id, is_new = run_id_of(folder)
        run = wandb.init(
            project=tracking.project,
            entity=tracking.entity,
            dir=str(folder),
            id=run_id,
            name=folder.name,
            config=dict(cfg_plain),
            mode=mode,  # type: ignore[arg-type]
            # An offline client cannot ask what exists, and says so at every start when told to resume.
            resume="allow" if mode == "online" else None,
            # Only the figures: no copy of the code, no console text, no machine statistics twice.
            settings=wandb.Settings(console="off", silent=True),
            allow_val_change=True,
        )
        # Our own step is the axis: W&B's counter goes on from the killed process's last line.
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        begun = "begins" if is_new else f"goes on at step {step}"
        if mode == "offline":
            print(
                f"W&B run {run_id} {begun}, offline. To upload it later:"
                f" wandb sync {folder / 'wandb'}/offline-run-*-{run_id}",
                flush=True,
            )
        else:
            print(f"W&B run {run_id} {begun}: {run.url}", flush=True)
        self._run = run

    def log(self, figures: Mapping[str, Any], step: int) -> None:
        """Log the figures of one step. Nested ones are named ``source_losses/captions``; None is left out."""
        if self._run is not None:
            self._run.log({**flat_figures(figures), "step": step})

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Log rows that share their keys as a W&B table."""
        if self._run is None or not rows:
            return
        import wandb

        columns: list[str | int] = list(rows[0])
        table = wandb.Table(columns=columns, data=[list(row.values()) for row in rows])
        self._run.log({name: table, "step": step})

    def finish(self, exit_code: int = 0) -> None:
        """End the W&B run; a code other than 0 marks it as failed. May be called twice.

        Returns when W&B's own process has written everything and ended: the caller may end without ceremony.
        """
        if self._run is not None:
            import wandb

            self._run.finish(exit_code=exit_code)
            self._run = None
            wandb.teardown(exit_code)


def wandb_mode(wanted: WandbMode) -> str:
    """``online`` or ``offline``. ``auto`` follows WANDB_MODE, else is online where a key can be found."""
    if wanted is not WandbMode.auto:
        return wanted.value
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    return "online" if has_api_key() else "offline"


def has_api_key() -> bool:
    """Whether WANDB_API_KEY is set, or a netrc file has an entry for the W&B server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    file = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    if not file.is_file():
        return False
    try:
        return netrc.netrc(str(file)).authenticators(host) is not None
    except netrc.NetrcParseError as error:
        raise ValueError(
            f"{file} cannot be read ({error}); repair it or set tracking.mode=offline"
        ) from error


def run_id_of(folder: Path) -> tuple[str, bool]:
    """The W&B id of this output folder and whether it is new. It is on the disk before the run begins."""
    file = folder / RUN_ID_FILE
    if file.exists():
        return file.read_text(encoding="utf-8").strip(), False
    new_id = secrets.token_hex(4)
    partial = file.with_suffix(".partial")
    partial.write_text(new_id + "\n", encoding="utf-8")
    partial.replace(file)
    return new_id, True


def flat_figures(figures: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested figures with their names joined.

    >>> flat_figures({"loss": 2.0, "memory_gib": None, "source_losses": {"captions": 1.5}})
    {'loss': 2.0, 'source_losses/captions': 1.5}
    """
    flat: dict[str, Any] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            flat.update(flat_figures(value, f"{prefix}{name}/"))
        elif value is not None:
            flat[prefix + name] = value
    return flat
