"""The server under load, under kill -9 and under attack: is nothing lost, nothing done twice, nothing let in?

    python -m benchmarks.service --json [--concurrent 50] [--in-a-row 200] [--kills 5] [--hostile 100]

`stablesr web` runs in a process of its own with mini and tiny pictures, and a tiny clip for each kill. The page is to
be there within 3 s and the first picture within 15 s. All that is accepted is to end once, with the bytes of `stablesr
restore`; resident memory after the first 20 pictures is to grow by less than 10 %; each hostile request is to cost a
4xx of one line, no traceback in the log and no file outside. Prints one JSON object; exit status 1 if not.
"""

import argparse
import io
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import psutil
from PIL import Image

OPTIONS = {"scale": 1, "steps": 2, "coarse": True}
SIDE_PX = 32
PATIENCE_S = 900.0
SETTLED_AFTER = 20
MOST_GROWTH = 0.1
MOST_PAGE_S, MOST_PICTURE_S = 3.0, 15.0
FRAMES = 6


class Server:
    """`stablesr web` in a process; it may be killed and started again on its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder.parent / "log.txt"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=120)
        self.start()

    def start(self) -> None:
        """Returns once it answers."""
        arguments = ("web", "--no-browser", "--port", str(self.port), "--folder", str(self.folder))
        self.began = time.perf_counter()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "stablesr_kit.cli", *arguments], stdout=log, stderr=subprocess.STDOUT
            )
        while True:
            try:
                self.client.get("/")
                break
            except httpx.TransportError:
                if time.perf_counter() - self.began > 120:
                    raise
                time.sleep(0.02)
        self.first_page_s = time.perf_counter() - self.began

    def kill(self) -> None:
        """At once, whatever it does."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def submit(self, content: bytes, name: str = "a.png") -> tuple[str, int]:
        """Name of a job, and how often the queue was full before it was taken."""
        refused = 0
        while True:
            answer = self.client.post(
                "/api/jobs", files={"file": (name, content)}, data={"options": json.dumps(OPTIONS)}
            )
            if answer.status_code == 202:
                return answer.json()["id"], refused
            if answer.status_code != 429 or not answer.headers["retry-after"].isdecimal():
                raise RuntimeError(f"{answer.status_code}: {answer.text}")
            refused += 1
            time.sleep(int(answer.headers["retry-after"]))

    def wait(self, job_id: str) -> dict[str, Any]:
        """What is told of a job that has ended."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            told: dict[str, Any] = self.client.get(f"/api/jobs/{job_id}").json()
            if told["state"] in ("done", "failed", "cancelled"):
                return told
            time.sleep(0.1)
        raise TimeoutError(f"{job_id} does not end")

    def is_right(self, job_id: str, expected: bytes) -> bool:
        """Whether it is done, with these bytes."""
        return (
            self.wait(job_id)["state"] == "done" and self.client.get(f"/api/jobs/{job_id}/result").content == expected
        )


def main() -> int:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrent", type=int, default=50)
    parser.add_argument("--in-a-row", type=int, default=200)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--hostile", type=int, default=100)
    parser.add_argument("--json", action="store_true", help="print one JSON object (there is no other output)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        content = picture()
        (folder / "a.png").write_bytes(content)
        expected = restored(folder / "a.png", folder / "expected.png")
        write_clip(folder / "a.mkv")
        clip = (folder / "a.mkv").read_bytes()
        of_clip = restored(folder / "a.mkv", folder / "expected.mkv")
        server = Server(folder / "served")
        try:
            report: dict[str, Any] = {"first_page_s": round(server.first_page_s, 2)}
            is_right = server.is_right(server.submit(content)[0], expected)
            report["first_picture_s"] = round(time.perf_counter() - server.began, 2)
            report["load"] = loaded(server, content, expected, options.concurrent, options.in_a_row)
            report["kills"] = killed(server, [(content, expected)] * 3 + [(clip, of_clip)], options.kills)
            before = set(folder.rglob("*"))
            report["hostile"] = attacked(server, options.hostile)
            outside = {
                path for path in set(folder.rglob("*")) - before if not path.is_relative_to(server.folder / "page")
            }
            is_right &= server.is_right(server.submit(content)[0], expected)
            report["tracebacks"] = server.log.read_text().count("Traceback")
            report["outside"] = sorted(str(path.relative_to(folder)) for path in outside)
        finally:
            server.kill()
    report["is_good"] = bool(
        is_right
        and report["first_page_s"] < MOST_PAGE_S
        and report["first_picture_s"] < MOST_PICTURE_S
        and report["load"]["is_good"]
        and report["kills"]["is_good"]
        and report["hostile"]["is_good"]
        and not report["tracebacks"]
        and not report["outside"]
    )
    sys.stdout.write(json.dumps(report) + "\n")
    return int(not report["is_good"])


def picture() -> bytes:
    """A file of the size that is sent."""
    content = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def restored(source: Path, target: Path) -> bytes:
    """What `stablesr restore` makes of it."""
    flags = ["--scale", "1", "--steps", "2", "--coarse"]
    command = [sys.executable, "-m", "stablesr_kit.cli", "restore", str(source), "-o", str(target), *flags]
    subprocess.run(command, check=True, capture_output=True)
    return target.read_bytes()


def loaded(server: Server, content: bytes, expected: bytes, concurrent: int, in_a_row: int) -> dict[str, Any]:
    """Many at once, then many one after the other: all served, memory flat."""
    with ThreadPoolExecutor(concurrent) as pool:
        submitted = list(pool.map(lambda _: server.submit(content), range(concurrent)))
    right = sum(server.is_right(job_id, expected) for job_id, _ in submitted)
    memory = psutil.Process(server.process.pid).memory_info
    resident = [memory().rss]
    for done in range(in_a_row):
        right += server.is_right(server.submit(content)[0], expected)
        if done >= SETTLED_AFTER:
            resident.append(memory().rss)
    growth = max(resident) / resident[0] - 1
    return {
        "requests": concurrent + in_a_row,
        "right": right,
        "told_to_wait": sum(refused for _, refused in submitted),
        "resident_mb": [round(resident[0] / 2**20), round(max(resident) / 2**20)],
        "growth": round(growth, 4),
        "is_good": right == concurrent + in_a_row and growth < MOST_GROWTH,
    }


def write_clip(path: Path) -> None:
    """Frames of the size that is sent."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = SIDE_PX, SIDE_PX, "yuv420p"
        for _ in range(FRAMES):
            pixels = rng.integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode(None))


def killed(server: Server, given: list[tuple[bytes, bytes]], kills: int) -> dict[str, Any]:
    """SIGKILL while jobs are in work and waiting: each accepted one ends once.

    given: what is sent before each kill, and what is to come of it.
    """
    known = {job["id"] for job in server.client.get("/api/jobs").json()}
    rng = random.Random(0)
    accepted: dict[str, bytes] = {}
    unfinished: list[int] = []
    for _ in range(kills):
        accepted |= {server.submit(content)[0]: expected for content, expected in given}
        time.sleep(rng.uniform(0.2, 6))
        server.kill()
        saved = [json.loads((server.folder / "jobs" / job_id / "job.json").read_bytes()) for job_id in accepted]
        unfinished.append(sum(one["state"] == "queued" for one in saved))
        server.start()
    right = sum(server.is_right(job_id, expected) for job_id, expected in accepted.items())
    now = [job["id"] for job in server.client.get("/api/jobs").json() if job["id"] not in known]
    return {
        "kills": kills,
        "accepted": len(accepted),
        "unfinished_at_each_kill": unfinished,
        "right": right,
        "jobs": len(now),
        "is_good": right == len(accepted) and sorted(now) == sorted(accepted) and sum(unfinished) > 0,
    }


def attacked(server: Server, count: int) -> dict[str, Any]:
    """Each request is to be answered with a 4xx of one line."""
    rng = random.Random(1)
    kinds = list(attacks(server, rng).items())
    sent = [kinds[number % len(kinds)] for number in range(count)]
    faults = []
    statuses: dict[str, int] = {}

    def send(one: tuple[str, Callable[[], tuple[int, str]]]) -> tuple[str, int, str]:
        try:
            return one[0], *one[1]()
        except (httpx.TransportError, OSError) as error:
            return one[0], 0, f"{type(error).__name__}: {error}"

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(send, sent))
    for kind, status, text in answers:
        statuses[str(status)] = statuses.get(str(status), 0) + 1
        if not 400 <= status < 500 or "Traceback" in text or len(text.strip().splitlines()) > 1:
            faults.append(f"{kind}: {status} {text[:200]}")
    return {"requests": count, "kinds": len(kinds), "statuses": statuses, "faults": faults, "is_good": not faults}


def attacks(server: Server, rng: random.Random) -> dict[str, Callable[[], tuple[int, str]]]:
    """Name of a hostile request -> what sends one."""

    def post(content: bytes, name: str = "a.png", headers: dict[str, str] | None = None, **data: str) -> Any:
        def send() -> tuple[int, str]:
            answer = server.client.post("/api/jobs", files={"file": (name, content)}, data=data, headers=headers)
            return answer.status_code, answer.text

        return send

    def get(path: str, headers: dict[str, str] | None = None, method: str = "GET") -> Any:
        def send() -> tuple[int, str]:
            answer = server.client.request(method, path, headers=headers)
            return answer.status_code, answer.text

        return send

    def raw(request: bytes, pause_s: float = 0.0, blocks: int = 0) -> Any:
        def send() -> tuple[int, str]:
            with socket.create_connection(("127.0.0.1", server.port), timeout=120) as connection:
                connection.sendall(request)
                try:
                    for _ in range(blocks):
                        time.sleep(pause_s)
                        connection.sendall(b"x")
                except OSError:
                    pass  # the server has closed it
                answer = b""
                while block := connection.recv(65536):
                    answer += block
                    if b"\r\n\r\n" in answer and b"connection: close" not in answer.lower():
                        break
            head, _, body = answer.partition(b"\r\n\r\n")
            return int(head.split(b" ")[1]), body.decode("latin-1")

        return send

    good = picture()
    host = f"127.0.0.1:{server.port}".encode()
    huge = good[:16] + struct.pack(">II", 60000, 60000) + good[24:29]
    huge = huge + struct.pack(">I", zlib.crc32(huge[12:29])) + good[33:]
    event = {
        "data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}],
        "fn_index": 0,
        "session_hash": "a",
    }

    def post_event() -> tuple[int, str]:
        answer = server.client.post("/gradio_api/queue/join", json=event)
        return answer.status_code, answer.text

    noise = rng.randbytes(5000)
    return {
        "noise": post(noise),
        "text": post(b"hello", "a.png"),
        "script": post(b"<svg onload='alert(1)'/>", "a.svg"),
        "empty": post(b""),
        "cut": post(good[:20]),
        "huge picture": post(huge),
        "zip-slip": post(archive({"../../evil.png": b"x", "/etc/evil.png": noise})),
        "zip bomb": post(archive({f"{number}.png": bytes(250 * 2**20) for number in range(2)})),
        "broken zip": post(b"PK\x03\x04" + noise),
        "name with a path": post(noise, "../../../etc/passwd"),
        "not JSON": post(good, options="{"),
        "deep JSON": post(good, options="[" * 100_000),
        "foreign option": post(good, options='{"output": "/tmp/x"}'),
        "foreign model": post(good, options='{"model": "../../secret"}'),
        "option as flag": post(good, options='{"tile": "--output=/tmp/x"}'),
        "huge scale": post(good, options='{"scale": 1e9}'),
        "other origin": post(good, headers={"origin": "http://evil.example"}),
        "other site": post(good, headers={"sec-fetch-site": "cross-site"}),
        "other host": get("/api/jobs", {"host": "evil.example"}),
        "climbing": raw(b"GET /../../etc/passwd HTTP/1.1\r\nhost: " + host + b"\r\nconnection: close\r\n\r\n"),
        "climbing, coded": raw(
            b"GET /static/%2e%2e/%2e%2e/x HTTP/1.1\r\nhost: " + host + b"\r\nconnection: close\r\n\r\n"
        ),
        "file of Gradio": get("/gradio_api/file=/etc/passwd"),
        "proxy of Gradio": get("/gradio_api/proxy=http://127.0.0.1/"),
        "event with a path": post_event,
        "no such job": get("/api/jobs/%00", method="DELETE"),
        "large headers": raw(b"GET / HTTP/1.1\r\nhost: " + host + b"\r\nx: " + b"a" * 40_000 + b"\r\n\r\n"),
        "huge headers": raw(b"GET / HTTP/1.1\r\nhost: " + host + b"\r\nx: " + b"a" * 200_000 + b"\r\n\r\n"),
        "playlist": post(b"ffconcat version 1.0\nfile /etc/passwd\n", "a.mp4"),
        "cut clip": post(b"\x1aE\xdf\xa3" + noise, "a.mkv"),
        "address": post(good, url="http://127.0.0.1/a.png"),
        "address of a file": post(good, url="file:///etc/passwd"),
        "no HTTP": raw(noise + b"\r\n\r\n"),
        "long body": raw(b"POST /api/jobs HTTP/1.1\r\nhost: " + host + b"\r\ncontent-length: 999999999999\r\n\r\n"),
        "slow body": raw(
            b"POST /api/jobs HTTP/1.1\r\nhost: " + host + b"\r\ncontent-type: multipart/form-data; boundary=x\r\n"
            b"content-length: 1000\r\nconnection: close\r\n\r\n--x",
            pause_s=30,
            blocks=2,
        ),
        "slow head": raw(b"GET / HTTP/1.1\r\nhost: " + host, pause_s=30, blocks=2),
    }


def archive(files: dict[str, bytes]) -> bytes:
    """A zip of them."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in files.items():
            packed.writestr(name, data)
    return content.getvalue()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
