"""The only door to Weights & Biases.

Most of W&B is a process of its own, wandb-core, which may be killed, hang, or find its disk full at any moment. That
ends the W&B run, never ours: each call of the library is made by ``_write`` or ``_within``, whatever it raises. Its
errors are of many classes, most of them of its inner parts.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from vl3train.config.checks.tracking import wandb_mode
from vl3train.config.schema import TrackingConfig
from vl3train.contracts.files import write_whole
from vl3train.engine.ranks import OneRankError
from vl3train.engine.tracking.tracker import ShownAnswer, flat_figures

RUN_ID_FILE = "wandb_id.txt"
DATA_DIR = "WANDB_DATA_DIR"
SECONDS_TO_FINISH = 600.0
"""For wandb-core to write and send what it has, at the end of a run whose GPUs wait for it."""
SECONDS_TO_DISCARD = 10.0


class WandbTracker:
    """One W&B run."""

    def __init__(
        self,
        tracking: TrackingConfig,
        output_dir: str | Path,
        cfg_plain: Mapping[str, Any],
        *,
        step: int,
    ) -> None:
        """Begin a W&B run, or resume the one that this output folder began.

        Args:
            tracking: What to track with.
            output_dir: Folder of the run; holds ``wandb_id.txt`` and W&B's own files.
            cfg_plain: The whole config as plain values (``config.plain.as_plain``).
            step: Steps that are done; 0 in a new run.

        A run that was killed and resumed logs some steps twice; W&B draws the later values. Where W&B does not start,
        the run goes on without it.

        Raises ValueError where ``tracking.mode=auto`` looks for a key in a netrc file that cannot be read, and
        OneRankError where W&B refuses the key or the options.
        """
        folder = Path(output_dir).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        mode = wandb_mode(tracking.mode)
        # W&B copies tables and artifacts to the home folder, and an offline run needs them when it is uploaded.
        self._sets_data_dir = DATA_DIR not in os.environ
        os.environ.setdefault(DATA_DIR, str(folder / "wandb"))
        self._run: Any | None = None
        run_id, is_new = run_id_of(folder)
        try:
            self._run = begin_run(tracking, folder, run_id, cfg_plain, mode)
        except (wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
            raise OneRankError(
                f"W&B refuses the run: {error}. Mend it, or set tracking.mode=offline or tracking=none"
            ) from error
        except Exception as error:
            self._lose(f"W&B does not start, and gets no figures of this run: {error!r}")
            return
        begun = "begins" if is_new else f"resumes after step {step}"
        if mode == "offline":
            print(
                f"W&B run {run_id} {begun}, offline. To upload it later:"
                f" wandb sync {folder / 'wandb'}/offline-run-*-{run_id}",
                flush=True,
            )
        else:
            print(f"W&B run {run_id} {begun}: {self._run.url}", flush=True)

    def log(self, figures: Mapping[str, Any], step: int) -> None:
        """Log the figures of one step. Nested ones are named ``source_losses/captions``; None is left out."""
        self._write(lambda run: run.log({**flat_figures(figures), "step": step}))

    def answers(self, rows: Sequence[ShownAnswer], step: int) -> None:
        """A table, ``held_out_answers``: W&B keeps that of each evaluation."""
        self._write(lambda run: run.log({"held_out_answers": answer_table(rows), "step": step}))

    def data(self, files: Sequence[Path], fingerprints: Mapping[str, Any]) -> None:
        """An artifact of the type "dataset". Runs on the same data share one version of it."""

        def give(run: Any) -> None:
            artifact = wandb.Artifact("data", type="dataset", metadata=dict(fingerprints))
            for file in files:
                artifact.add_file(str(file))
            run.log_artifact(artifact)

        self._write(give)

    def alert(self, title: str, text: str, *, is_bad: bool) -> None:
        """An alert; W&B sends one of a title a minute at most."""
        self._write(lambda run: run.alert(title=title, text=text, level="WARN" if is_bad else "INFO"))

    def finish(self, exit_code: int = 0) -> None:
        """End the W&B run; a code other than 0 marks it as failed. May be called twice.

        Returns when W&B's own process has written everything and ended: the caller may then end at once.
        """

        run = self._run
        if run is None:
            return

        def end() -> None:
            run.finish(exit_code=exit_code)
            wandb.teardown(exit_code)

        if problem := _within(SECONDS_TO_FINISH, end):
            folder = Path(run.settings.sync_dir)
            self._lose(f"W&B has not taken all of this run: {problem}. To upload it: wandb sync {folder}")
        else:
            self._forget()

    def _write(self, act: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            act(self._run)
        except Exception as error:
            self._lose(f"W&B gets no more figures of this run: {error!r}")

    def _lose(self, told: str) -> None:
        """Leave W&B alone from now on. Its connection is discarded, or the next run of this process would take it."""
        print(told, flush=True)
        _within(SECONDS_TO_DISCARD, wandb.teardown)
        self._forget()

    def _forget(self) -> None:
        if self._sets_data_dir:
            os.environ.pop(DATA_DIR, None)
        self._run = None


def _within(seconds: float, act: Callable[[], object]) -> str | None:
    """Call it; why it did not come to its end, None where it did. W&B waits for a process that hangs for ever."""
    problem: list[str] = []

    def call() -> None:
        try:
            act()
        except SystemExit as error:  # W&B's way to say that its process did not end with 0
            problem.append(f"its process ended with {error.code}")
        except Exception as error:
            problem.append(repr(error))

    thread = threading.Thread(target=call, name="wandb-end", daemon=True)
    thread.start()
    thread.join(seconds)
    return f"it hangs for {seconds:g} s" if thread.is_alive() else next(iter(problem), None)


def begin_run(
    tracking: TrackingConfig, folder: Path, run_id: str, cfg_plain: Mapping[str, Any], mode: str
) -> Any:
    """W&B's run. Raises whatever W&B raises."""
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
    return run


def answer_table(rows: Sequence[ShownAnswer]) -> Any:
    """A row for each answer, with its picture and scores."""
    metrics = list(dict.fromkeys(name for row in rows for name in row.scores))
    table = wandb.Table(columns=["source", "sample", "picture", "question", "expected", "answer", *metrics])
    for row in rows:
        picture = None if row.picture is None else wandb.Image(row.picture)
        scores = [row.scores.get(name) for name in metrics]
        table.add_data(row.source, row.key, picture, row.question, row.expected, row.answer, *scores)
    return table


def run_id_of(folder: Path) -> tuple[str, bool]:
    """The W&B id of this output folder, and whether it is new. It is on the disk before the W&B run begins."""
    file = folder / RUN_ID_FILE
    if file.exists():
        return file.read_text(encoding="utf-8").strip(), False
    new_id = secrets.token_hex(4)
    write_whole(file, new_id + "\n")
    return new_id, True
