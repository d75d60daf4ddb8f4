"""lmms-eval's tasks over `vl3train serve`: imported in lmms-eval's own environment, which has none of our libraries.

lmms-eval finds it by the entry point of pyproject.toml. It needs lmms-eval and the standard library.
"""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

KINDS = {"image": "image_url", "video": "video_url"}


def manifest() -> ModelManifest:
    """What the entry point gives: ``lmms_eval --model vl3train``."""
    return ModelManifest(model_id="vl3train", chat_class_path=f"{__name__}.Served")


class Served(lmms):
    """A model behind `vl3train serve`; the server batches the requests that come at the same time."""

    is_simple = False

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000/v1",
        model: str | None = None,
        media_root: str | None = None,
        max_new_tokens: int = 1024,
        num_concurrent: int = 8,
        timeout: float = 600.0,
        batch_size: int = 1,
        device: str | None = None,
    ) -> None:
        """``--model_args`` of lmms-eval.

        Args:
            base_url: of the server.
            model: its name there; None: the first.
            media_root: the server's --media-root, where this machine has it, too: files in it are named, not sent.
            max_new_tokens: longest answer, where a task allows a longer one; the server's --max-new-tokens, or less.
            num_concurrent: requests at a time; the server's --max-running, or more.
            timeout: seconds of one request.
            batch_size, device: lmms-eval gives them to every model; both are the server's.

        Raises:
            RuntimeError: nothing answers at ``base_url``.
        """
        super().__init__()
        self._url, self._timeout, self._concurrent = base_url.rstrip("/"), float(timeout), int(num_concurrent)
        self._most = int(max_new_tokens)
        self._root = None if media_root is None else Path(media_root).resolve()
        self._model = model or self._ask("models")["data"][0]["id"]

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """An answer to each request. Raises RuntimeError with the server's reason for one that it does not answer."""
        with ThreadPoolExecutor(self._concurrent) as pool:
            return list(pool.map(self._answer, requests))

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not served."""
        raise NotImplementedError("vl3train serves answers; choose a task with output_type: generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not served."""
        raise NotImplementedError("vl3train serves answers; choose a task with output_type: generate_until")

    def _answer(self, request: Any) -> GenerationResult:
        _, doc_to_messages, options, doc_id, task, split = request.args
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        body = {
            "model": self._model,
            "messages": [self._message(one) for one in messages],
            "max_tokens": min(options.get("max_new_tokens") or self._most, self._most),
            **sampling(options),
        }
        found = self._ask("chat/completions", body)
        counts = TokenCounts(
            input_tokens=found["usage"]["prompt_tokens"], output_tokens=found["usage"]["completion_tokens"]
        )
        return GenerationResult(text=found["choices"][0]["message"]["content"], token_counts=counts)

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        return {"role": message["role"], "content": list(self._parts(message["content"]))}

    def _parts(self, content: str | Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        for part in content:
            if part["type"] == "text":
                yield {"type": "text", "text": part["text"]}
                continue
            if part["type"] not in KINDS:
                raise ValueError(f"a task asks about {part['type']}, which VideoLLaMA3 does not take")
            fields = {"url": self._address(part["url"])}
            times = {"start": part.get("start_time"), "end": part.get("end_time")}
            fields |= {name: value for name, value in times.items() if value is not None}
            yield {"type": KINDS[part["type"]], KINDS[part["type"]]: fields}

    def _address(self, medium: Any) -> str:
        """Of a file, or of a picture of Pillow's, whose colours and transparency are the server's matter."""
        if hasattr(medium, "save"):
            file = io.BytesIO()
            medium.save(file, "PNG")
            return as_data_url(file.getvalue())
        path = Path(str(medium)).resolve()
        if self._root is not None and path.is_relative_to(self._root):
            return str(path.relative_to(self._root))
        return as_data_url(path.read_bytes())

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self._url}/{path}", data=data, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            reason = json.load(error)["error"]["message"]
            raise RuntimeError(f"{self._url}/{path} answers {error.code}: {reason}") from None
        except OSError as error:
            raise RuntimeError(
                f"nothing answers at {self._url} ({error}); start it with `vl3train serve MODEL`, or give "
                "--model_args base_url=http://HOST:PORT/v1"
            ) from None


def sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    """How tokens are drawn, and what ends an answer, by a task's ``generation_kwargs``.

    >>> sampling({"max_new_tokens": 16, "temperature": 0, "do_sample": False, "until": ["\\n\\n"], "num_beams": 1})
    {'stop': ['\\n\\n']}
    """
    until = options.get("until")
    found = {
        "stop": [until] if isinstance(until, str) else until,
        "temperature": options.get("temperature") if options.get("do_sample", True) else None,
        "top_p": options.get("top_p"),
    }
    return {name: value for name, value in found.items() if value}


def as_data_url(data: bytes) -> str:
    """The bytes as an address."""
    return f"data:application/octet-stream;base64,{base64.b64encode(data).decode()}"
