"""What a run leaves out, adds or gets wrong: options, mixtures and data of each variant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.lessons.tasks import TASKS


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to train. ``changed_...`` is the change of its shards, one of ``write.CHANGES``."""

    about: str
    options: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    changed_train: str = ""
    changed_held_out: str = ""
    left_out: tuple[int, ...] = ()
    only_clips: bool = False

    def words(self, stage: int) -> tuple[str, ...]:
        """Options of a stage."""
        return self.options.get(stage, ())

    def weights(self, stage: int) -> dict[str, float]:
        """Share of each task that a stage trains."""
        if not self.only_clips:
            return {name: task.weights[stage] for name, task in TASKS.items() if stage in task.weights}
        return {name: 1.0 for name, task in TASKS.items() if task.kind == "clip"}

    def folders(self, task: str, split: str) -> str:
        """The folder of a task's split."""
        change = self.changed_train if split == "train" else self.changed_held_out
        return f"{task}-{split}{f'-{change}' if change else ''}"


NO_PRUNING = {stage: ("stage.prune_frames=false",) for stage in (3, 4)}
ABLATIONS = {
    "square": Variant(
        about="each picture is resized to 112 x 112 before, whatever its size",
        changed_train="square",
        changed_held_out="square",
    ),
    "no_pruning": Variant(about="no visual token of a clip is dropped", options=NO_PRUNING),
    "only_clips": Variant(about="all stages train clips and nothing else, as many steps", only_clips=True),
    "no_times": Variant(
        about="clips are pictures in a row, one a second, without time stamps; beside no_pruning",
        options={**NO_PRUNING, 3: ("stage.image_merge_size=2", "stage.prune_frames=false")},
        changed_train="no_times",
        changed_held_out="no_times",
    ),
    **{
        f"without_{stage}": Variant(about=f"stage {stage} is left out, its steps too", left_out=(stage,))
        for stage in (1, 2, 3, 4)
    },
}
WRONG = {
    "shuffled_images": Variant(
        about="training shows the media of another sample of the task", changed_train="shuffled_images"
    ),
    "blank_images": Variant(
        about="training shows grey media of the same sizes", changed_train="blank_images"
    ),
    "shuffled_answers": Variant(
        about="training has the answer of another sample of the task", changed_train="shuffled_answers"
    ),
}
VARIANTS = {"full": Variant(about="the four stages"), **ABLATIONS, **WRONG}
