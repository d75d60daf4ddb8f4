"""The chat template of a checkpoint's folder, and how it differs from the one that training renders with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from vl3train.config import paths
from vl3train.config.schema import TrainConfig
from vl3train.contracts.tokens import CHAT_TEMPLATE
from vl3train.model.weights.headers.faults import read_object

KEPT = "start_chat_template.jinja"
"""File of a run's folder that keeps the template of its start folder, where it differs from ours."""

JSON_FILES = ("chat_template.json", "processor_config.json", "tokenizer_config.json")

PICTURES = (
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "And here?"}]},
)
WORDS = (
    {"role": "user", "content": "What is this?"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "And here?"},
)
"""Two conversations to compare templates by: that of a language model knows no pictures."""


class OwnTemplate(NamedTuple):
    """A folder's template that renders otherwise than ours."""

    file: str
    text: str
    difference: str  # where a probe conversation first differs, in words


def own_template(folder: Path, *, pictures: bool) -> OwnTemplate | None:
    """The template of a folder, where it renders otherwise than the published one; None where it does not, or has none.

    ``pictures``: the folder holds a whole VideoLLaMA3, so its template is compared by pictures as well.
    """
    file, text = _template_of(folder)
    if file is None or text == CHAT_TEMPLATE:
        return None
    for probe in (WORDS, *((PICTURES,) if pictures else ())):
        ours = _render(CHAT_TEMPLATE, probe)
        try:
            theirs = _render(text, probe)
        except Exception as error:  # a template is a program: it may raise anything
            return OwnTemplate(
                file, text, f"cannot render a probe conversation ({type(error).__name__}: {error})"
            )
        if ours != theirs:
            return OwnTemplate(
                file, text, f"renders a probe conversation otherwise: {_first_difference(theirs, ours)}"
            )
    return None


def start_template(cfg: TrainConfig) -> tuple[OwnTemplate, str] | None:
    """The template of the folder that a run starts from, where it renders otherwise, and what happens to it, in words.

    None also where the run starts from a name on the hub, or from a folder that is not there yet.
    """
    in_parts = paths.starts_from_parts(cfg)
    name = cfg.model.language_model_from if in_parts else cfg.stage.init_from
    if name is None or not Path(name).expanduser().is_dir():
        return None
    try:
        folder = Path(name).expanduser() if in_parts else paths.resolve_weights(name)
    except (FileNotFoundError, ValueError):
        return None  # `vl3train check --ahead` of a run without a checkpoint yet
    own = own_template(folder, pictures=not in_parts)
    if own is None:
        return None
    return own, (
        f"chat template: {own.file} of {folder} is not used, it {own.difference}. Training, and what is exported, have "
        f"the published template of VideoLLaMA3; the run's folder keeps the other as {KEPT}"
    )


def export_remark(source: Path, weights: Path) -> str | None:
    """What an exported folder has for a chat template, where there was another; None where there was none.

    ``source`` is what is exported, a run, a checkpoint or a folder of Hugging Face, and ``weights`` its weights.
    """
    for run in (source, source.parent.parent):
        if (run / KEPT).is_file():
            return (
                "chat template: the published one of VideoLLaMA3, with which the run was trained; that of the folder "
                f"it started from is another, kept as {run / KEPT}"
            )
    own = own_template(weights, pictures=True)
    if own is None:
        return None
    return (
        f"chat template: {own.file} of {weights} is written as it is. It is not the published template of "
        f"VideoLLaMA3, with which vl3train trains: it {own.difference}"
    )


def _template_of(folder: Path) -> tuple[str | None, str]:
    """Name of the file that transformers would take the template from, and the template."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja.name, jinja.read_text(encoding="utf-8", errors="replace")
    for name in JSON_FILES:
        if not (folder / name).is_file():
            continue
        content, _ = read_object(folder / name)
        found: Any = content.get("chat_template")
        if isinstance(found, list):  # several by name
            named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
            found = named.get("default")
        if isinstance(found, str):
            return name, found
    return None, ""


def _render(template: str, messages: tuple[dict[str, Any], ...]) -> str:
    """As transformers renders a template: in jinja's sandbox, with its settings and functions."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda _: ""
    compiled = environment.from_string(template)
    return compiled.render(
        messages=messages, add_generation_prompt=True, tools=None, documents=None, add_vision_id=False
    )


def _first_difference(theirs: str, ours: str) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours))
    )
    start = max(0, at - 12)
    return f"{theirs[start : at + 30]!r} instead of {ours[start : at + 30]!r}"
