"""A server in a thread of this process, and pictures to send it."""

import io
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import uvicorn
from PIL import Image

from stablesr_kit.web.api import build_app, config_of
from stablesr_kit.web.service import Service


@contextmanager
def served(service: Service, build_page: Callable[[Service], Any] | None = None) -> Iterator[str]:
    """The address at which a service answers while the block runs; then the service is closed."""
    listening = socket.create_server(("127.0.0.1", 0))
    app = build_app(service, build_page=build_page)
    running = uvicorn.Server(config_of(app))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join(20)


def png(height: int = 12, width: int = 16, seed: int = 0) -> bytes:
    """The content of a file with a picture of noise."""
    content = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()
