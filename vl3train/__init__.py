"""vl3train trains VideoLLaMA3 (arXiv:2501.13106) through its four stages, on images, videos and text."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vl3train.finetuning.api import finetune, load

__all__ = ["finetune", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The calls of finetuning/api.py, imported when they are asked for: `vl3train --help` waits for none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vl3train.finetuning import api

    return getattr(api, name)
