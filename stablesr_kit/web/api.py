"""The HTTP API of a server, and the guard at its door."""

import asyncio
import contextlib
import hmac
import html
import json
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Annotated, Any
from urllib.parse import parse_qs, urlsplit

import fastapi
import h11
import uvicorn
from fastapi import FastAPI, File, Form, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from stablesr_kit.cli.messages import one_line
from stablesr_kit.errors import StableSRKitError
from stablesr_kit.version import __version__
from stablesr_kit.web.jobs import ENDED, Job, QueueFull, Refused, Upload, fetched
from stablesr_kit.web.service import Service, metrics

logger = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")
COOKIE = "stablesr_token"
HEAD_S, HEAD_BYTES = 20.0, 32 * 1024
"""Of a connection's first request, without its body."""
BODY_GAP_S, BODY_S = 20.0, 600.0
"""How long a client may pause while it sends a body, and how long all may take."""
LINGER_S = 2.0
"""How long what is sent after an answer is read, before the connection is reset."""
TOLD_EVERY_S, KEPT_ALIVE_EVERY_S = 0.2, 15.0
FORM_BYTES = 2**20
"""Of a request beside its files."""
OPEN_PATHS = ("/health",)
"""Answered without a token: they tell nothing about anybody."""
PAGE_PATHS = (
    "/",
    "/assets/",
    "/config",
    "/favicon.ico",
    "/gradio_api/cancel",
    "/gradio_api/file=",
    "/gradio_api/heartbeat/",
    "/gradio_api/info",
    "/gradio_api/queue/data",
    "/gradio_api/queue/join",
    "/gradio_api/reset",
    "/gradio_api/startup-events",
    "/gradio_api/upload",
    "/gradio_api/upload_progress",
    "/manifest.json",
    "/static/",
    "/svelte/",
    "/theme.css",
)
"""What the page asks for; Gradio's other routes stay shut."""
HEADERS = {
    "content-security-policy": (
        "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob:; "
        "frame-ancestors 'self'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def build_app(
    service: Service,
    *,
    host: str = "127.0.0.1",
    token: str | None = None,
    build_page: Callable[[Service], ASGIApp] | None = None,
) -> FastAPI:
    """The application of a server.

    host: it listens at; on loopback only the names of loopback are answered. token: that every request must carry.
    build_page: what makes the page, in a thread of its own, while the API answers already; None is no page.
    """
    page = _Page(service, build_page)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        building = asyncio.create_task(page.run())
        yield
        page.is_over.set()
        with contextlib.suppress(Exception):
            await building
        await run_in_threadpool(service.close)

    app = FastAPI(
        title="stablesr-kit",
        version=__version__,
        description="Restore and enlarge pictures. Errors are {'detail': one line}.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    add_routes(app, service, page)
    app.mount("", page)
    app.add_middleware(Guard, host=host, token=token, body_bytes=4 * service.limits.upload_bytes + FORM_BYTES)
    return app


def serve(app: FastAPI, listening: socket.socket) -> None:
    """Answer requests until Ctrl-C or SIGTERM."""
    uvicorn.Server(config_of(app)).run(sockets=[listening])


def config_of(app: FastAPI) -> uvicorn.Config:
    """How an application is served: with limits for what comes before it."""
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        http=_Protocol,
        ws="none",
        server_header=False,
        h11_max_incomplete_event_size=HEAD_BYTES,
        limit_concurrency=500,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=2,
    )


class _Protocol(H11Protocol):
    """Closes a connection that does not get on with its first request, and one that sends too much after its answer.

    A connection that is closed while data arrives is reset, and its client may lose the answer: so what still comes is
    read for a while, and left.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_Lingering(transport, self))  # type: ignore[arg-type]
        self.head_task = self.loop.call_later(HEAD_S, self._give_up)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.cycle is not None:
            self.head_task.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self.head_task.cancel()
        super().connection_lost(exc)

    def _give_up(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            self.transport.close()


class _Lingering:
    """A transport that, where a request was not read to its end, closes only its own direction at first."""

    def __init__(self, transport: asyncio.Transport, protocol: _Protocol) -> None:
        self.transport, self.protocol, self.is_lingering = transport, protocol, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    def is_closing(self) -> bool:
        """Whether nothing more is answered."""
        return self.is_lingering or self.transport.is_closing()

    def close(self) -> None:
        """Close it now, or once the client has the answer and is silent."""
        is_read = self.protocol.conn.their_state in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED)
        if is_read or self.is_lingering or self.transport.is_closing() or not self.transport.can_write_eof():
            self.transport.close()
            return
        self.is_lingering = True
        self.transport.write_eof()
        self.transport.resume_reading()
        self.protocol.loop.call_later(LINGER_S, self.transport.close)


def add_routes(app: FastAPI, service: Service, page: "_Page") -> None:
    """The API; names are a contract."""

    @app.post("/api/jobs", status_code=202, summary="Hand in a picture, several, or a zip of them")
    def submit(
        request: fastapi.Request,
        file: Annotated[list[UploadFile] | None, File(description="Pictures, zips of pictures, or one clip.")] = None,
        url: Annotated[str, Form(description="Address of a file, if the server opens some (--allow-url).")] = "",
        options: Annotated[
            str, Form(description='JSON, by the command\'s option names: {"scale": 2, "w": 0.5}')
        ] = "{}",
        command: Annotated[str, Form(description="restore or faces, as on the command line.")] = "restore",
        user: Annotated[str, Form(description="Users take turns; the address by default.", max_length=100)] = "",
        mask: Annotated[UploadFile | None, File(description="White where to fill in: faces, mode inpaint.")] = None,
    ) -> dict[str, Any]:
        try:
            asked = json.loads(options or "{}")
        except (ValueError, RecursionError) as error:
            raise Refused(f"options: not JSON ({one_line(error)})") from error
        if not isinstance(asked, dict):
            raise Refused(f"options: a {type(asked).__name__} is given, expected an object of options")
        hole = None if mask is None else Upload(mask.filename or "", mask.file)
        whose = user or (request.client.host if request.client else "")
        with contextlib.ExitStack() as stack:
            given = [Upload(one.filename or "", one.file) for one in file or []]
            if url:
                given.append(fetched(url, service.limits))
                stack.callback(given[-1].content.close)
            job = service.submit(given, asked, command=command, user=whose, mask=hole)  # type: ignore[arg-type]
        return service.told(job)

    @app.get("/api/jobs", summary="All jobs, as they were accepted")
    def listed() -> list[dict[str, Any]]:
        return [service.told(job) for job in service.jobs()]

    @app.get("/api/jobs/{job_id}", summary="State and progress of a job")
    def told(job_id: str) -> dict[str, Any]:
        return service.told(service.job(job_id))

    @app.get("/api/jobs/{job_id}/events", summary="The same as it changes: server-sent events until the job ends")
    def events(job_id: str) -> StreamingResponse:
        job = service.job(job_id)
        return StreamingResponse(_events(service, job), media_type="text/event-stream")

    @app.get("/api/jobs/{job_id}/result", summary="The restored picture, or a zip of several")
    def result(job_id: str) -> FileResponse:
        path = service.result(service.job(job_id))
        return FileResponse(path, filename=f"restored{path.suffix}", headers={"cache-control": "no-store"})

    @app.delete("/api/jobs/{job_id}", summary="Cancel a job, or forget one that has ended")
    def cancelled(job_id: str) -> dict[str, Any]:
        job = service.job(job_id)
        service.cancel(job)
        return service.told(job)

    @app.get("/health", summary="Whether the server is up, and its model loaded")
    def health() -> dict[str, Any]:
        return {
            "status": "ok",
            "model": service.model_state.partition(":")[0],
            "page": "ready" if page.app is not None else "starting",
            "waiting": len(service.waiting()),
            "version": __version__,
        }

    @app.get("/metrics", summary="Numbers in the text format of Prometheus")
    def numbers() -> PlainTextResponse:
        return PlainTextResponse(metrics(service))

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return HTMLResponse(_docs(app.openapi()))

    @app.exception_handler(StableSRKitError)
    def refused(_: fastapi.Request, error: Exception) -> JSONResponse:
        status = error.status if isinstance(error, Refused) else 422
        headers = {"retry-after": str(error.retry_after_s)} if isinstance(error, QueueFull) else None
        return JSONResponse({"detail": one_line(error)}, status, headers)

    @app.exception_handler(RequestValidationError)
    def wrong(_: fastapi.Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("body", "path", "query"))
        return JSONResponse({"detail": one_line(f"{where}: {first['msg']}")}, 422)

    @app.exception_handler(OSError)
    def no_room(_: fastapi.Request, error: OSError) -> JSONResponse:
        logger.error("%s", one_line(error))
        return JSONResponse({"detail": f"the server cannot write ({error.strerror}); try again later"}, 507)


async def _events(service: Service, job: Job) -> AsyncIterator[str]:
    version, told = -1, time.monotonic()
    while True:
        if job.version != version:
            version, told = job.version, time.monotonic()
            values = service.told(job)
            yield f"data: {json.dumps(values)}\n\n"
            if values["state"] in ENDED:
                return
        elif time.monotonic() - told > KEPT_ALIVE_EVERY_S:
            told = time.monotonic()
            yield ": still here\n\n"
        await asyncio.sleep(TOLD_EVERY_S)


class _Page:
    """The page, and what stands in its place until it is built."""

    def __init__(self, service: Service, build: Callable[[Service], ASGIApp] | None) -> None:
        self.service = service
        self.build = build
        self.app: ASGIApp | None = None
        self.is_over = asyncio.Event()

    async def run(self) -> None:
        """Build the page first, and let the model be loaded then: people wait for the page."""
        try:
            if self.build is None:
                self.service.start()
                return
            app: Any = await run_in_threadpool(self.build, self.service)
            self.service.start()
            async with app.router.lifespan_context(app):
                self.app = app
                await self.is_over.wait()
        except Exception:
            logger.exception("the page cannot be built")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.app is not None and scope["type"] == "http":
            await self.app(scope, receive, send)
            return
        if self.build is not None and scope.get("path") in ("", "/") and scope.get("method") in ("GET", "HEAD"):
            await HTMLResponse(_STARTING, headers={"cache-control": "no-store"})(scope, receive, send)
            return
        raise HTTPException(404 if self.build is None else 503, "not found" if self.build is None else "still starting")


class Guard:
    """Lets in what may come in: from the right host and origin, with the token, of a size, in a time.

    Args:
        host: the server listens at.
        token: None asks for none.
        body_bytes: of one request.
    """

    def __init__(self, app: ASGIApp, host: str, token: str | None, body_bytes: int) -> None:
        self.app = app
        self.hosts = LOOPBACK if host in LOOPBACK else None
        self.token = token
        self.body_bytes = body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = Headers(scope=scope)
        try:
            self._check(scope, headers)
        except HTTPException as error:
            await self._answer(scope, error)(scope, receive, send)
            return
        if (answer := self._with_cookie(scope)) is not None:
            await answer(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    sent.setdefault(name, value)
            await send(message)

        await self.app(scope, self._limited(receive), send_with_headers)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raises HTTPException for what stays outside."""
        host = _host(headers.get("host", ""))
        if host is None or (self.hosts is not None and host not in self.hosts):
            raise HTTPException(400, "this server is not of that name; open it at 127.0.0.1")
        if sum(len(name) + len(value) for name, value in headers.raw) > HEAD_BYTES:
            raise HTTPException(431, f"the head of the request has more than {HEAD_BYTES >> 10} KB")
        path = scope["path"]
        if ".." in path or "\\" in path or "\0" in path:
            raise HTTPException(400, "a path that climbs is not followed")
        if scope["method"] not in ("GET", "HEAD"):
            origin = headers.get("origin")
            if origin is not None and urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
                raise HTTPException(403, "requests from other sites are not taken")
            if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
                raise HTTPException(403, "requests from other sites are not taken")
            length = headers.get("content-length", "0")
            if not length.isdecimal() or len(length) > 15 or int(length) > self.body_bytes:
                raise HTTPException(413, f"more than {self.body_bytes >> 20} MB are sent; send less")
        if not path.startswith(("/api/", "/health", "/metrics", "/docs", "/openapi.json")) and not any(
            path == one or (one.endswith(("/", "=")) and one != "/" and path.startswith(one)) for one in PAGE_PATHS
        ):
            raise HTTPException(404, "not found")
        if self.token is not None and path not in OPEN_PATHS and not self._has_token(scope, headers):
            raise HTTPException(
                401, "a token is needed: Authorization: Bearer TOKEN, or open the page with ?token=TOKEN"
            )

    def _has_token(self, scope: Scope, headers: Headers) -> bool:
        assert self.token is not None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        offered = [given.strip()] if scheme.lower() == "bearer" else []
        for part in headers.get("cookie", "").split(";"):
            name, _, value = part.strip().partition("=")
            offered += [value] if name == COOKIE else []
        offered += _token_in(scope) if scope["path"] == "/" else []
        return any(hmac.compare_digest(one.encode(), self.token.encode()) for one in offered)

    def _with_cookie(self, scope: Scope) -> ASGIApp | None:
        """For a page that was opened with the token in its address: the same address without it, and a cookie."""
        if self.token is None or scope["path"] != "/" or not _token_in(scope):
            return None
        answer = fastapi.responses.RedirectResponse("/", 303)
        answer.set_cookie(COOKIE, self.token, httponly=True, samesite="strict")
        return answer

    def _answer(self, scope: Scope, error: HTTPException) -> ASGIApp:
        if error.status_code == 401 and scope["path"] == "/":
            return HTMLResponse(_ASK_TOKEN, 401, HEADERS)
        headers = {"connection": "close"} if error.status_code == 413 else {}
        headers |= {"www-authenticate": "Bearer"} if error.status_code == 401 else {}
        return JSONResponse({"detail": error.detail}, error.status_code, headers)

    def _limited(self, receive: Receive) -> Receive:
        """Raises HTTPException where a body is too large or comes too slowly; what follows a body is not timed."""
        received, began, is_whole = 0, time.monotonic(), False

        async def limited() -> Message:
            nonlocal received, is_whole
            if is_whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), BODY_GAP_S)
            except TimeoutError as error:
                raise HTTPException(408, "the request came too slowly") from error
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                is_whole = not message.get("more_body", False)
                if received > self.body_bytes:
                    raise HTTPException(413, f"more than {self.body_bytes >> 20} MB are sent; send less")
                if not is_whole and time.monotonic() - began > BODY_S:
                    raise HTTPException(408, "the request came too slowly")
            return message

        return limited


def _token_in(scope: Scope) -> list[str]:
    return parse_qs(scope["query_string"].decode("latin-1")).get("token", [])


def _host(header: str) -> str | None:
    """The name in a Host header, without its port; None if it is none."""
    with contextlib.suppress(ValueError):
        parts = urlsplit(f"//{header}")
        return None if parts.hostname is None or parts.path or parts.username is not None else parts.hostname
    return None


def _docs(schema: Mapping[str, Any]) -> str:
    """The API on one page, which needs nothing from elsewhere."""
    rows = []
    for path, methods in schema["paths"].items():
        for method, one in methods.items():
            rows.append(
                f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{html.escape(one['summary'])}</p>"
            )
            for content in one.get("requestBody", {}).get("content", {}).values():
                name = content["schema"]["$ref"].rpartition("/")[2]
                fields = schema["components"]["schemas"][name]["properties"]
                rows += [
                    f"<li><b>{html.escape(field)}</b> {html.escape(str(about.get('description', '')))}</li>"
                    for field, about in fields.items()
                ]
    about = f"{html.escape(schema['info']['description'])} <a href=/openapi.json>openapi.json</a>"
    return _DOCS.format(about=about, rows="".join(rows))


_DOCS = """<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>API</title><style>body{{font:16px/1.5 system-ui;max-width:50em;margin:2em auto;padding:0 1em;
color-scheme:light dark}}</style><h1>API</h1><p>{about}</p>{rows}</html>"""
_STARTING = """<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>stablesr</title><style>body{font:18px/1.5 system-ui;display:grid;place-content:center;height:100vh;margin:0;
text-align:center;color-scheme:light dark}progress{width:16em}</style>
<main><h1>stablesr</h1><p role=status>The page is being prepared.</p><progress aria-label="Preparing"></progress></main>
<script>
const look = async () => {
  const told = await fetch("/health").then(answer => answer.json()).catch(() => ({}));
  if (told.page === "ready") location.reload(); else setTimeout(look, 300);
};
look();
</script></html>"""
_ASK_TOKEN = """<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>stablesr</title><style>body{font:18px/1.5 system-ui;display:grid;place-content:center;height:100vh;margin:0;
color-scheme:light dark}</style><form><label>Token of this server <input name=token type=password autofocus></label>
<button>Open</button></form></html>"""
