"""The server: its routes, how it starts, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping

from aiohttp import web

from vl3train.inference.answer import Asker
from vl3train.inference.live import LiveModels
from vl3train.serving.completions import Completions
from vl3train.serving.incoming.doors import Doors
from vl3train.serving.incoming.errors import ApiError
from vl3train.serving.incoming.options import ServingOptions
from vl3train.serving.page import chat_page
from vl3train.serving.served_model import ServedModel


def serve(askers: Mapping[str, Asker], options: ServingOptions, tell: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; answers in progress are cut then. Raises ValueError where it cannot listen."""
    asyncio.run(_serve(askers, options, tell))


async def _serve(askers: Mapping[str, Asker], options: ServingOptions, tell: Callable[[str], None]) -> None:
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    async with running(askers, options, tell) as address:
        tell(f"serving {', '.join(askers)} at {address}; Ctrl-C ends it")
        if not options.is_local:
            tell("whoever reaches this machine can use it: there is no password")
        await ended.wait()
        tell("ending")


@contextlib.asynccontextmanager
async def running(
    askers: Mapping[str, Asker], options: ServingOptions, tell: Callable[[str], None]
) -> AsyncIterator[str]:
    """The address of a server that runs as long as the ``async with`` block."""
    live = LiveModels(options.num_slots)
    models = {name: ServedModel(name, asker, options.num_decoders) for name, asker in askers.items()}
    runner = web.AppRunner(
        make_app(models, live, options, tell),
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=1.0,
    )
    await runner.setup()
    try:
        site = web.TCPSite(runner, options.host, options.port)
        try:
            await site.start()
        except OSError as error:
            reason = f"cannot listen on {options.host}, port {options.port}: {error.strerror}"
            raise ValueError(f"{reason}; choose another --port or --host") from None
        host, port = runner.addresses[0][:2]
        yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
    finally:
        await asyncio.to_thread(live.close)
        await runner.cleanup()
        for model in models.values():
            model.close()


def make_app(
    models: dict[str, ServedModel], live: LiveModels, options: ServingOptions, tell: Callable[[str], None]
) -> web.Application:
    """The routes."""
    doors = Doors(options, tell)
    app = web.Application(middlewares=[doors.pass_through], client_max_size=options.max_body_bytes)
    completions = Completions(models=models, live=live, options=options)
    created = int(time.time())

    def about(name: str) -> dict[str, object]:
        if name not in models:
            raise ApiError(404, f"no model {name}; there is {', '.join(models)}", code="model_not_found")
        return {"id": name, "object": "model", "created": created, "owned_by": "vl3train"}

    async def list_models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [about(name) for name in models]})

    async def one_model(request: web.Request) -> web.Response:
        return web.json_response(about(request.match_info["name"]))

    async def health(_: web.Request) -> web.Response:
        state = {
            "status": "ok" if live.is_alive else "the thread that answers has ended",
            "in_progress": live.num_in_progress,
            "waiting": live.num_waiting,
        }
        return web.json_response(state, status=200 if live.is_alive else 503)

    app.router.add_get("/health", health)
    app.router.add_get("/v1/models", list_models)
    app.router.add_get("/v1/models/{name}", one_model)
    app.router.add_post("/v1/chat/completions", completions.respond)
    if options.with_page:
        app.router.add_get("/", chat_page)
        app.router.add_post("/vl3train/shown", completions.show)
    return app
