"""`stablesr web`: a page to restore pictures in, and an HTTP API."""

import os
import secrets
import socket
import sys
import threading
import webbrowser
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from stablesr_kit.cli.messages import failing_in_one_line, quieten_imports, usage_error
from stablesr_kit.cli.restore import DtypeName, Engine, Workers


def web(
    host: Annotated[
        str, typer.Option(help="Where to listen; other than loopback, a token is asked for.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 7860,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page.")] = True,
    token: Annotated[
        str | None,
        typer.Option(
            help="That requests must carry.", envvar="STABLESR_TOKEN", show_default="none on loopback, else a new one"
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|DIR", help="People may choose it; can be given again.", show_default="mini"),
    ] = None,
    face_model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|DIR", help="Likewise of CodeFormer, also for inpainting and colour.", show_default="mini"
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Of jobs and results.", show_default="stablesr-kit/web in the user's cache"),
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda|cuda:N|mps", help="Where to compute.")] = "auto",
    dtype: Annotated[DtypeName, typer.Option(help="Precision, as of restore.")] = "auto",
    queue: Annotated[int, typer.Option(help="Jobs that may wait; others are told when to come back.", min=1)] = 32,
    max_upload: Annotated[int, typer.Option(metavar="MB", help="Of one file.", min=1)] = 200,
    keep_hours: Annotated[float, typer.Option(help="How long results are kept.", min=0.0)] = 24.0,
    keep_gb: Annotated[float, typer.Option(help="Room for jobs and results; the oldest go first.", min=0.0)] = 10.0,
    allow_url: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Also open addresses that begin so, such as http://127.0.0.1:8000; loopback only, can be given again.",
            show_default="none",
        ),
    ] = None,
    engine: Engine = "here",
    workers: Workers = None,
) -> None:
    """Serve a page to restore pictures in, and an HTTP API (its description is at /docs).

    Jobs are kept on disk: a server that was killed finishes them when it starts again.
    """
    quieten_imports()
    try:
        from stablesr_kit.web.api import LOOPBACK, build_app, serve
        from stablesr_kit.web.jobs import Limits, origin_of
        from stablesr_kit.web.service import Service
    except ImportError as error:
        usage_error(f"the page needs {error.name}, which is not installed: pip install 'stablesr-kit[web]'")
    if token is None and host not in LOOPBACK:
        token = secrets.token_urlsafe(16)
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token and token):
        usage_error("--token must be of letters, digits and signs, without spaces")
    origins = [origin_of(one) for one in allow_url or []]
    for one, origin in zip(allow_url or [], origins, strict=True):
        if origin is None or urlsplit(one).path.strip("/") or host not in LOOPBACK:
            usage_error(
                f"--allow-url {one} must be such as http://127.0.0.1:8000, without a path, and --host on loopback"
            )
    if workers is not None and (workers < 1 or engine != "ray"):
        usage_error(f"--workers {workers} must be at least 1, with --engine ray; leave it out otherwise")
    if engine == "ray" and find_spec("ray") is None:
        usage_error("--engine ray needs Ray, which is not installed: pip install 'stablesr-kit[ray]'")
    limits = Limits(
        queue=queue,
        upload_bytes=max_upload * 2**20,
        origins=tuple(filter(None, origins)),
        keep_s=keep_hours * 3600,
        keep_bytes=int(keep_gb * 10**9),
    )
    with failing_in_one_line():
        service = Service(
            (folder or _cache()).absolute(),
            models={_name(one): one for one in model or ["mini"]},
            face_models={_name(one): one for one in face_model or ["mini"]},
            device=device,
            dtype=dtype,
            limits=limits,
            engine=engine,
            workers=workers,
        )
    taken = _listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{taken.getsockname()[1]}/"
    opened = address if token is None else f"{address}?token={token}"
    typer.echo(f"stablesr web: {opened}  (API: {address}docs, jobs: {service.folder}; Ctrl-C ends it)")
    sys.stdout.flush()
    if browser:
        threading.Timer(1.0, webbrowser.open, [opened]).start()
    serve(build_app(service, host=host, token=token, build_page=_page), taken)


def _page(service: Any) -> Any:
    from stablesr_kit.web.page import build_page

    return build_page(service)


def _name(model: str) -> str:
    """What people choose a model by: the name of its folder, not where it is."""
    return Path(model).name


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "stablesr-kit" / "web"


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens; ends the command if there is none to have."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        taken = socket.socket(family, socket.SOCK_STREAM)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((host, port))
    except OSError as error:
        usage_error(
            f"--host {host} --port {port} cannot be listened at ({error.strerror}); give another, such as --port 0"
        )
    return taken
