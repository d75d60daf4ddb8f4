"""From a request to its answer, whole or as it grows, or to what the model would see of it."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from vl3train.contracts.strict_json import json_text
from vl3train.inference.answering import Answered, Asked
from vl3train.inference.live import LiveModels, Waiting
from vl3train.inference.questions import Question, question_batch
from vl3train.serving.incoming.chat_request import ChatRequest, read_chat_request
from vl3train.serving.incoming.errors import ApiError
from vl3train.serving.incoming.media import load_media
from vl3train.serving.incoming.options import ServingOptions
from vl3train.serving.served_model import ServedModel
from vl3train.serving.shown import shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """Answers requests with the models that are served; the first is taken where a request names none."""

    models: dict[str, ServedModel]
    live: LiveModels
    options: ServingOptions

    async def respond(self, http: web.Request) -> web.StreamResponse:
        """The response to a request. Raises ApiError for one that cannot be answered."""
        request, question, model = await self.read(http)
        head: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model.name,
        }
        sample = await model.render(question, head["id"])
        batch = question_batch(sample)
        asked = Asked(key=head["id"], batch=batch, max_new_tokens=1, stops=request.stops)
        asked.max_new_tokens = model.room_for_answer(asked.num_prompt_tokens, request.max_tokens)
        growing = Growing(self.live, model, request, asked)
        if request.stream:
            return await stream(http, head, growing, with_usage=request.stream_usage)
        async with contextlib.aclosing(growing.pieces()) as pieces:
            async for _ in pieces:
                pass
        message = {"role": "assistant", "content": growing.answered.text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason(growing.answered)}
        return web.json_response(
            {**head, "object": "chat.completion", "choices": [choice], "usage": usage(growing.answered)}
        )

    async def show(self, http: web.Request) -> web.StreamResponse:
        """What the model would see of a request. Raises ApiError for one that cannot be shown."""
        _, question, model = await self.read(http)
        sample = await model.render(question, uuid.uuid4().hex)
        found = await asyncio.to_thread(shown, sample, model.asker.rendering.tokenizer)
        return web.json_response({"model": model.name, **found})

    async def read(self, http: web.Request) -> tuple[ChatRequest, Question, ServedModel]:
        """A request, with its media, and the model that it asks."""
        request = read_chat_request(await http.read())
        model = self.model_of(request)
        return request, Question(request.turns, await load_media(request.media, self.options)), model

    def model_of(self, request: ChatRequest) -> ServedModel:
        """The model that a request names. Raises ApiError where there is no such model."""
        name = request.model or next(iter(self.models))
        if name not in self.models:
            message = f"no model {name} is served here; there is {', '.join(self.models)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self.models[name]


class Growing:
    """An answer on its way from the thread that makes it to the client."""

    def __init__(self, live: LiveModels, model: ServedModel, request: ChatRequest, asked: Asked) -> None:
        self.answered: Answered
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue[str | Answered | Exception]()
        self._is_wanted, self._live = True, live
        asked.tell, asked.is_wanted = self._put, lambda: self._is_wanted
        self._waiting = Waiting(
            asker=model.asker,
            sampling=request.sampling,
            seed=request.seed,
            asked=asked,
            answered=self._put,
            failed=self._put,
        )

    async def pieces(self) -> AsyncGenerator[str, None]:
        """The text as it grows; ``answered`` is there at its end. Whoever leaves before it cuts the answer."""
        self._live.ask(self._waiting)
        try:
            while True:
                event = await self._events.get()
                if isinstance(event, str):
                    yield event
                elif isinstance(event, Answered):
                    self.answered = event
                    return
                else:
                    message = f"no answer was made: {type(event).__name__}; the server's own messages have the reason"
                    raise ApiError(500, message) from event
        finally:
            self._is_wanted = False

    def _put(self, event: str | Answered | Exception) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)


async def stream(
    http: web.Request, head: dict[str, Any], growing: Growing, *, with_usage: bool
) -> web.StreamResponse:
    """Server-sent events, as OpenAI's: one for each piece, then why it ended, then [DONE]."""
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    )
    await response.prepare(http)
    chunk = {**head, "object": "chat.completion.chunk"}

    async def send(event: dict[str, Any]) -> None:
        await response.write(f"data: {json_text(event, letters=True)}\n\n".encode())

    def choices(delta: dict[str, str], ends: str | None = None) -> list[dict[str, Any]]:
        return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": ends}]

    try:
        await send({**chunk, "choices": choices({"role": "assistant", "content": ""})})
        async with contextlib.aclosing(growing.pieces()) as pieces:
            async for piece in pieces:
                await send({**chunk, "choices": choices({"content": piece})})
        await send({**chunk, "choices": choices({}, reason(growing.answered))})
        if with_usage:
            await send({**chunk, "choices": [], "usage": usage(growing.answered)})
    except ApiError as error:  # the status has been sent
        await send(error.body())
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


def reason(answered: Answered) -> str:
    """Why an answer has ended."""
    return "length" if answered.is_cut else "stop"


def usage(answered: Answered) -> dict[str, int]:
    """Tokens of the prompt, visual ones as they are left by pruning, and of the answer."""
    prompt, answer = answered.asked.num_prompt_tokens, answered.num_tokens
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
