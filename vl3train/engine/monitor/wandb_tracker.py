"""The only door to Weights & Biases."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vl3train.config.checks.tracking import wandb_mode
from vl3train.config.choices import Tracker as TrackerKind
from vl3train.config.schema import TrackingConfig
from vl3train.contracts.files import write_whole

RUN_ID_FILE = "wandb_id.txt"


class Tracker:
    """One W&B run, or none: then every call does nothing."""

    def __init__(
        self,
        tracking: TrackingConfig,
        output_dir: str | Path,
        cfg_plain: Mapping[str, Any],
        *,
        step: int,
        enabled: bool = True,
    ) -> None:
        """Begin a W&B run, or resume the one that this output folder began.

        Args:
            tracking: What to track with. With ``kind=none`` wandb is not even imported.
            output_dir: Folder of the run; holds ``wandb_id.txt`` and W&B's own files.
            cfg_plain: The whole config as plain values (``config.plain.as_plain``).
            step: The next step; 0 in a new run.
            enabled: False on every rank but 0.

        A run that was killed and resumed logs some steps twice; W&B draws the later values.

        Raises ValueError where ``tracking.mode=auto`` looks for a key in a netrc file that cannot be read.
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
            # An offline client cannot ask what exists, and prints that at every start that is to resume.
            resume="allow" if mode == "online" else None,
            # Only the figures: no copy of the code, no console text, no machine statistics twice. And no address of
            # a git remote: W&B takes the password out of it, but not a token that stands for the user.
            settings=wandb.Settings(console="off", silent=True, save_code=False, disable_git=True),
            allow_val_change=True,
        )
        # Our own step is the axis: W&B's counter continues after the killed process's last line.
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        begun = "begins" if is_new else f"resumes at step {step}"
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

    def finish(self, exit_code: int = 0) -> None:
        """End the W&B run; a code other than 0 marks it as failed. May be called twice.

        Returns when W&B's own process has written everything and ended: the caller may then end at once.
        """
        if self._run is not None:
            import wandb

            self._run.finish(exit_code=exit_code)
            self._run = None
            wandb.teardown(exit_code)


def run_id_of(folder: Path) -> tuple[str, bool]:
    """The W&B id of this output folder, and whether it is new. It is on the disk before the W&B run begins."""
    file = folder / RUN_ID_FILE
    if file.exists():
        return file.read_text(encoding="utf-8").strip(), False
    new_id = secrets.token_hex(4)
    write_whole(file, new_id + "\n")
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
