"""A model with its name, and processes that decode what it is shown."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vl3train.contracts.records import RenderedSample, SampleError
from vl3train.data.render.decode_client import Decoder, DecodeServer
from vl3train.inference.answer import Asker
from vl3train.inference.questions import Question
from vl3train.model.generation.decode import slot_bytes
from vl3train.serving.incoming.errors import ApiError


class ServedModel:
    """Renders questions in the decode sandbox, with the limits of training: files of clients may be anything."""

    def __init__(self, name: str, asker: Asker, num_decoders: int) -> None:
        rendering = asker.rendering
        self.name, self.asker = name, asker
        self._server = DecodeServer(rendering.settings, rendering.tokenizer_dir, rendering.limits)
        self._pool = ThreadPoolExecutor(num_decoders, thread_name_prefix="decode")
        self._local = threading.local()  # a decoder is for one thread

    @property
    def context_tokens(self) -> int:
        """Most tokens of prompt and answer together."""
        config: Any = self.asker.packed.model.config
        return int(config.text_config.max_position_embeddings)

    async def render(self, question: Question, key: str) -> RenderedSample:
        """The question's ids and patches. Raises ApiError where it cannot be shown."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._pool, self._render, question, key)
        except SampleError as error:
            raise ApiError(400, str(error)) from None

    def room_for_answer(self, num_prompt_tokens: int, wanted: int | None) -> int:
        """Most tokens of an answer. Raises ApiError where the prompt leaves no room for it."""
        room = self.context_tokens - num_prompt_tokens
        needed = num_prompt_tokens + self.asker.max_new_tokens
        memory = self.asker.cache_bytes // slot_bytes(self.asker.packed.model, 1)
        if wanted is not None and wanted > self.asker.max_new_tokens:
            message = (
                f"at most {self.asker.max_new_tokens} tokens are made here; start the server with a larger "
            )
            raise ApiError(400, f"{message}--max-new-tokens", param="max_tokens")
        if room < (wanted or 1) or needed > memory - 256:
            message = (
                f"the prompt has {num_prompt_tokens} tokens; with {wanted or 1} of the answer they are more than the "
                f"{min(self.context_tokens, memory)} that there is room for; show fewer or shorter clips"
            )
            raise ApiError(400, message, param="messages", code="context_length_exceeded")
        return min(room, wanted or self.asker.max_new_tokens)

    def close(self) -> None:
        """End the decode processes."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._server.close()

    def _render(self, question: Question, key: str) -> RenderedSample:
        decoder = getattr(self._local, "decoder", None)
        if decoder is None:
            decoder = self._local.decoder = Decoder(self._server.address, self.asker.rendering.decode_seconds)
        try:
            sample: RenderedSample = decoder.render_unplanned(question.sample(), question.parts, key=key)
        except SampleError:
            if len(question.parts) > 1:
                decoder.check(question.sample(), question.parts, decode=True)  # its error names the medium
            raise
        return sample
