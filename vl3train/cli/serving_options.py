"""What `vl3train serve` and `vl3train chat` share: their options, and the way from a model's folder to a server."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from vl3train.config.choices import FrameSampling
from vl3train.config.paths import short_names


def add_serving_arguments(parser: ArgumentParser) -> None:
    """Arguments of both commands."""
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s, which only this machine reaches; 0.0.0.0: every network)",
    )
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s; 0: any free one")
    parser.add_argument(
        "--media-root", type=Path, metavar="DIR", help="requests may name files below it (default: no files)"
    )
    parser.add_argument(
        "--allow-urls", action="store_true", help="fetch pictures and clips from public web addresses"
    )
    parser.add_argument(
        "--allow-host",
        nargs="+",
        default=[],
        metavar="NAME",
        help="further names of this server, behind a proxy",
    )
    parser.add_argument(
        "--max-media-mib", type=int, default=100, help="of a request's files together (default: %(default)s)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=1024, help="longest answer to ask for (default: %(default)s)"
    )
    parser.add_argument(
        "--max-running", type=int, default=8, help="answers in progress at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--max-waiting",
        type=int,
        default=32,
        help="requests behind those; more are refused (default: %(default)s)",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is a GPU)")
    parser.add_argument(
        "--fps", type=float, help="frames sampled from each second of a clip (default: as in training)"
    )
    parser.add_argument("--max-frames", type=int, help="most frames of a clip (default: as in training)")
    parser.add_argument(
        "--max-visual-tokens", type=int, help="of a request before pruning (default: as in training)"
    )
    parser.add_argument(
        "--frame-sampling",
        choices=[one.value for one in FrameSampling],
        help="data.frame_sampling of the training (default: a run's own; transformers for an export)",
    )


def serve_models(folders: list[Path], args: Namespace, *, with_page: bool) -> None:
    """Serve until Ctrl-C.

    Raises ValueError or OSError for options or models that cannot be used, or an address that is taken.
    """
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        raise ValueError("serving needs aiohttp: pip install 'vl3train[serve]'") from None
    from vl3train.serving.incoming.options import ServingOptions

    options = ServingOptions(
        host=args.host,
        port=args.port,
        media_root=args.media_root,
        allow_urls=args.allow_urls,
        names=tuple(args.allow_host),
        max_media_bytes=args.max_media_mib * 2**20,
        max_new_tokens=args.max_new_tokens,
        num_slots=args.max_running,
        max_waiting=args.max_waiting,
        with_page=with_page,
    )
    names = short_names(folders)

    from vl3train.inference.answer import Asker
    from vl3train.serving.app import serve

    askers = {
        name: Asker.load(
            folder,
            device=args.device,
            fps=args.fps,
            max_frames=args.max_frames,
            max_visual_tokens=args.max_visual_tokens,
            max_new_tokens=options.max_new_tokens,
            frame_sampling=args.frame_sampling,
        )
        for name, folder in zip(names, folders, strict=True)
    }
    serve(askers, options, lambda line: print(line, flush=True))
