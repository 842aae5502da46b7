"""The service and its HTTP API: what is accepted is done, once, fairly, and to the bytes of the command line."""

import io
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from stablesr_kit import CodeFormerPipeline
from stablesr_kit.errors import JobError, StableSRKitError
from stablesr_kit.imaging.metadata import read_provenance
from stablesr_kit.web.api import COOKIE, build_app
from stablesr_kit.web.jobs import ENDED, Job, Limits, QueueFull, Refused, Upload
from stablesr_kit.web.service import Service, metrics
from tests.helpers.cli_runs import stablesr
from tests.helpers.clips import moving, write_clip
from tests.helpers.tiny import tiny_codeformer
from tests.helpers.web_server import png, served

OPTIONS = {"scale": 2, "steps": 3}


def upload(content: bytes | None = None, name: str = "photo.png") -> Upload:
    return Upload(name, io.BytesIO(png() if content is None else content))


def wait(service: Service, *jobs: Job) -> None:
    end = time.monotonic() + 120
    while not all(job.state in ENDED for job in jobs):
        assert time.monotonic() < end, [service.told(job) for job in jobs]
        time.sleep(0.02)


@pytest.fixture
def make(tmp_path: Path, model: Path) -> Iterator[Callable[..., Service]]:
    """make(**): a service with the tiny model in one folder, not at work yet."""
    made: list[Service] = []

    def service(**options: Any) -> Service:
        made.append(Service(tmp_path / "served", models={"tiny": str(model)}, device="cpu", **options))
        return made[-1]

    yield service
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Service]]:
    """A client of a server at work, and its service."""
    limits = Limits(upload_bytes=2**20, pixels=100_000, result_pixels=1_000_000, pictures=20)
    service = Service(tmp_path_factory.mktemp("server"), models={"tiny": str(model)}, device="cpu", limits=limits)
    with served(service) as address, httpx.Client(base_url=address, timeout=60) as client:
        yield client, service


def test_a_result_has_the_bytes_of_the_command_line(server: tuple[Any, Service], model: Path, tmp_path: Path) -> None:
    client, _ = server
    answer = client.post("/api/jobs", files={"file": ("a.png", png())}, data={"options": json.dumps(OPTIONS)})
    assert answer.status_code == 202
    job_id = answer.json()["id"]
    told = []
    with client.stream("GET", f"/api/jobs/{job_id}/events") as events:
        told = [json.loads(line[6:]) for line in events.iter_lines() if line.startswith("data: ")]
    assert told[-1]["state"] == "done"
    assert [one["progress"] for one in told] == sorted(one["progress"] for one in told)
    assert {"encoding", "sampling", "decoding"} >= {one["doing"] for one in told} - {""}
    result = client.get(f"/api/jobs/{job_id}/result")
    (tmp_path / "a.png").write_bytes(png())
    arguments = ("--scale", 2, "--steps", 3, "--model", model, "--device", "cpu")
    assert stablesr("restore", tmp_path / "a.png", "-o", tmp_path / "b.png", *arguments).exit_code == 0
    assert result.content == (tmp_path / "b.png").read_bytes()
    assert job_id in [one["id"] for one in client.get("/api/jobs").json()]
    assert client.delete(f"/api/jobs/{job_id}").status_code == 200
    assert client.get(f"/api/jobs/{job_id}").status_code == 404


def test_several_pictures_and_archives_come_back_as_one_zip_with_a_line_for_each_failure(
    server: tuple[Any, Service],
) -> None:
    client, service = server
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("../../../evil.png", png(seed=1))
        packed.writestr("sub/photo.png", png(seed=2))
        packed.writestr("notes.txt", "no picture")
        packed.writestr("broken.png", png()[:40])
    files = [("file", ("photo.png", png())), ("file", ("more.zip", archive.getvalue()))]
    job = service.job(client.post("/api/jobs", files=files, data={"options": json.dumps(OPTIONS)}).json()["id"])
    wait(service, job)
    told = client.get(f"/api/jobs/{job.id}").json()
    assert (told["state"], told["pictures"]) == ("done", 5)
    assert [one["name"] for one in told["errors"]] == ["notes.txt", "broken.png"]
    with zipfile.ZipFile(io.BytesIO(client.get(f"/api/jobs/{job.id}/result").content)) as results:
        assert sorted(results.namelist()) == ["errors.txt", "evil.png", "photo.png", "photo_2.png"]
        assert b"notes.txt: the file is no picture" in results.read("errors.txt")
    assert not list(service.folder.parent.rglob("evil.png"))


@pytest.mark.parametrize(
    ("content", "options", "status", "line"),
    [
        (b"", {}, 415, "an empty file; expected AVIF, BMP"),
        (b"hello", {}, 415, "the file is no picture of a known format"),
        (png()[:20], {}, 422, "photo.png: truncated or damaged"),
        (png(400, 300), {}, 422, "photo.png: 300x400 is 0 million pixels, more than the limit of 0.1"),
        (png(300, 300), {"scale": 4}, 422, "the result would have 1 million pixels, 1 at most; give a smaller scale"),
        (bytes(2**20 + 1), {}, 413, "the file has more than 1 MB; scale it first"),
        (None, {"scale": 0}, 422, "--scale 0.0 must be a positive number"),
        (None, {"sclae": 2}, 422, "option 'sclae' is not known; did you mean scale?"),
        (None, {"w": "much"}, 422, "Invalid value for '--w'"),
        (None, {"w": [1]}, 422, "option w: a list is given"),
        (None, {"model": "/etc"}, 422, "model '/etc' is not here; give tiny"),
        (None, {"output": "/tmp/x.png"}, 422, "option 'output' is not known"),
        (None, {"tile": "--help"}, 422, "--tile '--help' is not known"),
        (None, [1], 422, "options: a list is given, expected an object"),
    ],
    ids=range(14),
)
def test_what_cannot_be_done_is_refused_in_one_line(
    server: tuple[Any, Service], content: bytes | None, options: Any, status: int, line: str
) -> None:
    client, service = server
    before = len(service.jobs())
    files = {"file": ("photo.png", png() if content is None else content)}
    answer = client.post("/api/jobs", files=files, data={"options": json.dumps(options)})
    assert answer.status_code == status, answer.text
    assert answer.json()["detail"].startswith(line)
    assert "\n" not in answer.json()["detail"]
    assert str(service.folder) not in answer.text
    assert len(service.jobs()) == before
    assert not [path for path in (service.folder / "jobs").iterdir() if path.name.startswith(".")]


def test_the_door_is_shut_to_other_hosts_sites_and_paths(server: tuple[Any, Service]) -> None:
    client, _ = server
    files = {"file": ("photo.png", png())}
    host = client.base_url.netloc.decode()
    cases = [
        (400, "GET", "/api/jobs", {"host": "evil.example"}, None),
        (400, "GET", "/api/jobs", {"host": "127.0.0.1.evil.example"}, None),
        (403, "POST", "/api/jobs", {"origin": "http://evil.example"}, files),
        (403, "POST", "/api/jobs", {"origin": "null"}, files),
        (403, "POST", "/api/jobs", {"sec-fetch-site": "cross-site"}, files),
        (404, "GET", "/gradio_api/proxy=http://evil.example", {}, None),
        (404, "GET", "/nothing", {}, None),
        (400, "GET", "/gradio_api/file=%2e%2e/%2e%2e/etc/passwd", {}, None),
        (404, "GET", "/api/jobs/x/result", {}, None),
        (404, "PUT", "/api/jobs", {}, None),
    ]
    for status, method, path, headers, sent in cases:
        answer = client.request(method, path, headers=headers, files=sent)
        assert (answer.status_code, list(answer.json())) == (status, ["detail"]), path
    same = client.get("/api/jobs", headers={"origin": f"http://{host}"})
    assert same.status_code == 200
    assert "default-src 'self'" in same.headers["content-security-policy"]
    assert client.get("/docs").text.count("/api/jobs") >= 6
    assert client.get("/health").json()["status"] == "ok"
    assert "/api/jobs/{job_id}/events" in client.get("/openapi.json").json()["paths"]
    assert "stablesr_queue_length 0" in client.get("/metrics").text


def test_a_head_that_is_too_large_is_answered_and_not_reset(server: tuple[Any, Service]) -> None:
    client, _ = server
    for size in (40_000, 200_000, 2_000_000):
        with socket.create_connection((client.base_url.host, client.base_url.port), timeout=20) as connection:
            head = f"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\nx: {'a' * size}\r\n\r\n"
            connection.sendall(head.encode())
            answer = b""
            while block := connection.recv(65536):
                answer += block
        assert answer.split(b" ")[1] in (b"400", b"431"), answer
        assert len(answer.partition(b"\r\n\r\n")[2].splitlines()) == 1


def test_a_token_is_asked_for_everywhere_but_health(make: Callable[..., Service]) -> None:
    client = TestClient(build_app(make(), host="0.0.0.0", token="secret"), follow_redirects=False)
    for path in ("/api/jobs", "/metrics", "/docs", "/openapi.json", "/"):
        assert client.get(path).status_code == 401, path
        assert client.get(path, headers={"authorization": "Bearer wrong"}).status_code == 401, path
    assert client.get("/health").status_code == 200
    assert client.get("/api/jobs", headers={"authorization": "Bearer secret"}).json() == []
    opened = client.get("/?token=secret")
    assert (opened.status_code, opened.headers["location"]) == (303, "/")
    assert "HttpOnly" in opened.headers["set-cookie"]
    assert client.get("/api/jobs", headers={"cookie": f"{COOKIE}=secret"}).json() == []
    client.cookies.clear()
    assert client.get("/?token=wrong").status_code == 401


def test_users_take_turns_and_a_full_queue_says_when_to_come_back(make: Callable[..., Service]) -> None:
    service = make(limits=Limits(queue=4))
    jobs = [service.submit([upload()], OPTIONS, user=user) for user in ("ann", "ann", "ann")]
    with pytest.raises(QueueFull, match="3 of yours wait, no more are taken now") as full:
        service.submit([upload()], OPTIONS, user="ann")
    assert (full.value.status, full.value.retry_after_s) == (429, 1)
    jobs.append(service.submit([upload()], OPTIONS, user="bob"))
    with pytest.raises(QueueFull, match="4 jobs wait"):
        service.submit([upload()], OPTIONS, user="eve")
    assert service.waiting() == [jobs[0], jobs[3], jobs[1], jobs[2]]
    service.cancel(jobs[1])
    assert (jobs[1].state, jobs[1].source(0).exists()) == ("cancelled", False)
    service.start()
    wait(service, *jobs)
    ends = [job.ended or 0 for job in (jobs[0], jobs[3], jobs[2])]
    assert ends == sorted(ends)
    assert 'stablesr_jobs_ended_total{state="done"} 3' in metrics(service)


def test_what_was_accepted_is_done_once_by_the_next_server(make: Callable[..., Service]) -> None:
    first = make()
    jobs = [first.submit([upload(png(seed=seed)) for seed in range(2)], OPTIONS) for _ in range(2)]
    whole = first.submit([upload()], {**OPTIONS, "steps": 40})
    with pytest.raises(JobError, match="another server has this folder"):
        make()
    first.start()
    while whole.progress < 0.3:
        time.sleep(0.01)
    first.close()
    assert [job.state for job in jobs] == ["done", "done"]
    written = [(job.folder / "job.json").read_bytes() for job in jobs]
    assert list((whole.folder / "out").glob(".stablesr/*.job/sampling.pt")), "stopped in the middle"
    (first.folder / "jobs" / ".half.part").mkdir()
    second = make()
    assert [job.state for job in second.jobs()] == ["done", "done", "queued"]
    again = second.submit([upload()], {**OPTIONS, "steps": 40})
    second.start()
    wait(second, *second.jobs())
    assert second.result(second.job(whole.id)).read_bytes() == second.result(again).read_bytes()
    assert [(job.folder / "job.json").read_bytes() for job in jobs] == written
    assert [job.number for job in second.jobs()] == [1, 2, 3, 4]
    assert not list(second.folder.rglob(".*"))


def test_cancelling_stops_a_picture_in_work(make: Callable[..., Service]) -> None:
    service = make()
    service.start()
    job = service.submit([upload()], {"scale": 2, "steps": 1000})
    while job.progress < 0.1:
        time.sleep(0.01)
    began = time.monotonic()
    service.cancel(job)
    wait(service, job)
    assert time.monotonic() - began < 2
    assert job.state == "cancelled"
    while (job.folder / "out").exists():  # removed right after
        assert time.monotonic() - began < 10
    with pytest.raises(Refused, match="the job is cancelled; there is no result"):
        service.result(job)
    assert job.preview is None


def test_decoding_again_gives_the_pixels_of_a_whole_restoration_and_samples_nothing(
    make: Callable[..., Service],
) -> None:
    service = make()
    service.start()
    kept = service.submit([upload()], {**OPTIONS, "w": 0}, is_kept=True)
    whole = service.submit([upload()], {**OPTIONS, "w": 0.7, "color-fix": "adain"})
    wait(service, kept, whole)
    calls: list[Any] = []
    service._loaded[1].unet.register_forward_pre_hook(lambda *_: calls.append(None))
    again = service.redecode(kept, 0.7, "adain", 0.7)
    assert not calls
    pixels = [np.asarray(Image.open(path)) for path in (again, service.result(whole), service.result(kept))]
    assert np.array_equal(pixels[0], pixels[1])
    assert not np.array_equal(pixels[0], pixels[2])
    made = read_provenance(again)
    assert made is not None
    assert (made["w"], made["color_fix"], made["seed"]) == (0.7, "adain", 0)
    with pytest.raises(Refused, match="is not kept any more; restore it again"):
        service.redecode(whole, 0.1, "wavelet", 0.7)
    assert service.plan(OPTIONS, 12, 16).startswith("32 x 24 pixels; plan: latents as a whole")


def test_old_jobs_go_by_age_and_by_size(make: Callable[..., Service]) -> None:
    service = make(limits=Limits(keep_s=3600, keep_bytes=10**9))
    service.start()
    jobs = [service.submit([upload()], OPTIONS) for _ in range(3)]
    wait(service, *jobs)
    jobs[0].ended = time.time() - 4000
    service._cleaned = 0
    service._clean()
    assert [job.id for job in service.jobs()] == [job.id for job in jobs[1:]]
    object.__setattr__(service.limits, "keep_bytes", 1)
    service._cleaned = 0
    service._clean()
    assert service.jobs() == []
    assert list((service.folder / "jobs").iterdir()) == []


def test_a_service_restores_faces_as_well(make: Callable[..., Service]) -> None:
    service = make()
    service.start()
    options = {"mode": "whole", "upscale": 1, "background": "none", "faces": [{"box": [2, 2, 30, 30]}]}
    job = service.submit([upload(png(40, 40))], options, command="faces")
    hopeless = service.submit([upload(png(40, 40))], {**options, "faces": [{"box": [90, 90, 99, 99]}]}, command="faces")
    wait(service, job, hopeless)
    assert Image.open(service.result(job)).size == (40, 40)
    (note,) = service.told(job)["notes"]
    assert note.startswith("photo.png: face 1 of 1 at (2, 2) to (30, 30), given")
    assert "lies outside the picture" in service.told(hopeless)["error"]
    with pytest.raises(Refused, match="--mode inpaint needs --model"):
        service.submit([upload()], {"mode": "inpaint"}, command="faces")
    with pytest.raises(Refused, match="command 'convert' is not known"):
        service.submit([upload()], {}, command="convert")


CLIP = {"scale": 2, "steps": 2, "chunk": 2}


def a_clip(folder: Path, name: str = "in.mp4", frames: int = 6) -> Path:
    return write_clip(folder / name, moving(frames, 10, 14), audio_seconds=0.2)


def test_a_clip_has_the_bytes_of_the_command_line(server: tuple[Any, Service], model: Path, tmp_path: Path) -> None:
    client, _ = server
    content = a_clip(tmp_path).read_bytes()
    asked = {**CLIP, "frames": 5, "steady": "latents"}
    answer = client.post("/api/jobs", files={"file": ("holiday", content)}, data={"options": json.dumps(asked)})
    assert (answer.status_code, answer.json()["is_clip"]) == (202, True), answer.text
    job_id = answer.json()["id"]
    with client.stream("GET", f"/api/jobs/{job_id}/events") as events:
        told = [json.loads(line[6:]) for line in events.iter_lines() if line.startswith("data: ")]
    assert told[-1]["state"] == "done", told[-1]
    assert [one["progress"] for one in told] == sorted(one["progress"] for one in told)
    assert told[-1]["notes"][0].startswith("holiday: 5 frames, ")
    result = client.get(f"/api/jobs/{job_id}/result")
    assert 'filename="restored.mp4"' in result.headers["content-disposition"]
    arguments = ("--scale", 2, "--steps", 2, "--chunk", 2, "--frames", 5, "--steady", "latents", "--model", model)
    target = tmp_path / "out.mp4"
    assert stablesr("restore", tmp_path / "in.mp4", "-o", target, *arguments, "--device", "cpu").exit_code == 0
    assert result.content == target.read_bytes()


def test_a_clip_lets_others_have_their_turn_and_goes_on_after_a_stop_to_the_same_bytes(
    make: Callable[..., Service], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = a_clip(tmp_path, frames=8).read_bytes()
    first = make()
    clip = first.submit([upload(content, "in.mp4")], {**CLIP, "container": "mkv"}, user="ann")
    other = first.submit([upload()], OPTIONS, user="bob")
    monkeypatch.setattr("stablesr_kit.web.service.TURN_S", 0.0)
    first.start()
    wait(first, other)
    assert clip.state == "running"
    assert clip.progress > 0
    first.close()
    assert len((clip.folder / "out" / ".stablesr" / "0000.mkv.job" / "clip.jsonl").read_text().splitlines()) < 4
    second = make()
    second.start()
    wait(second, *second.jobs())
    target = tmp_path / "out.mkv"
    arguments = ("--scale", 2, "--steps", 2, "--chunk", 2, "--model", model, "--device", "cpu")
    assert stablesr("restore", tmp_path / "in.mp4", "-o", target, *arguments).exit_code == 0
    assert second.result(second.job(clip.id)).read_bytes() == target.read_bytes()
    assert not list(second.folder.rglob(".*"))


def test_cancelling_stops_a_clip(make: Callable[..., Service], tmp_path: Path) -> None:
    service = make()
    service.start()
    job = service.submit([upload(a_clip(tmp_path).read_bytes())], {**CLIP, "steps": 1000})
    while job.progress < 0.02:
        time.sleep(0.01)
    assert job.doing == "restoring, 0 of 6 frames done"
    began = time.monotonic()
    service.cancel(job)
    wait(service, job)
    assert (job.state, time.monotonic() - began < 2) == ("cancelled", True)


@pytest.mark.parametrize(
    ("options", "status", "line"),
    [
        ({"container": "gif"}, 422, "option container: 'gif' is given; give .mp4, .m4v, .mov, .mkv, .webm"),
        ({"scale": 8}, 422, "the result would have 6 frames of 112x80, 5e-05 billion pixels in all are the most"),
        ({"scale": 50}, 422, "the result would have 0 million pixels, 0 at most"),
        ({"steady": "very"}, 422, "Invalid value for '--steady'"),
        ({"from": "noon"}, 422, "--from 'noon' is no time"),
        ({"flow": "/etc/passwd"}, 422, "option 'flow' is not known"),
    ],
)
def test_a_clip_that_cannot_be_restored_is_refused_before_it_is_decoded(
    make: Callable[..., Service], tmp_path: Path, options: dict[str, Any], status: int, line: str
) -> None:
    service = make(limits=Limits(clip_pixels=50_000, pixels=1000, result_pixels=300_000))
    with pytest.raises(Refused) as refused:
        service.submit([upload(a_clip(tmp_path).read_bytes())], options)
    assert (refused.value.status, str(refused.value)[: len(line)]) == (status, line)
    assert service.jobs() == []


def test_what_is_no_clip_for_this_server_is_refused(
    make: Callable[..., Service], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = a_clip(tmp_path).read_bytes()
    service = make(limits=Limits(pixels=1000))
    large = write_clip(tmp_path / "large.mkv", moving(2, 40, 60)).read_bytes()
    with pytest.raises(Refused, match="frames of 60x40 are given, expected up to 0 million pixels"):
        service.submit([upload(large)], CLIP)
    with pytest.raises(Refused, match=r"photo\.png: .*; get a whole copy of it"):
        service.submit([upload(clip[:200])], CLIP)
    with pytest.raises(Refused, match="a clip is given among pictures; send it alone, to the command restore"):
        service.submit([upload(clip)], {}, command="faces")
    playlist = b"ffconcat version 1.0\nfile " + bytes(tmp_path / "in.mp4")
    with pytest.raises(Refused, match="the file is no picture of a known format"):
        service.submit([upload(playlist)], CLIP)
    job = service.submit([upload(png()), upload(clip, "a.mp4")], OPTIONS)
    assert job.errors == {1: "a clip is given among pictures; send it alone, to the command restore"}
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(StableSRKitError, match=r"clips need PyAV; install stablesr-kit\[video\]"):
        service.submit([upload(clip)], CLIP)


def test_the_background_of_a_photo_and_its_faces_are_enlarged_with_progress_and_can_be_stopped(
    make: Callable[..., Service], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CodeFormerPipeline(tiny_codeformer()).save_pretrained(tmp_path / "faces")
    service = make(face_models={"tiny": str(tmp_path / "faces")})
    told: list[tuple[str, float]] = []
    tell = service._tell

    def listening(job: Job, **values: Any) -> None:
        tell(job, **values)
        told.append((job.doing, job.progress))

    monkeypatch.setattr(service, "_tell", listening)
    service.start()
    options = {"upscale": 2, "faces": [{"box": [2, 2, 38, 38]}], "max-identity-distance": "inf"}
    plain, whole = (
        service.submit([upload(png(40, 40))], {**options, **more}, command="faces")
        for more in ({}, {"face-upsampler": "stablesr"})
    )
    wait(service, plain, whole)
    assert [job.state for job in (plain, whole)] == ["done", "done"], service.told(whole)
    assert {"encoding", "sampling", "decoding", "faces"} <= {doing for doing, _ in told}
    made = [np.asarray(Image.open(service.result(job))) for job in (plain, whole)]
    assert made[0].shape == made[1].shape == (80, 80, 3)
    assert not np.array_equal(*made)
    slow = service.submit([upload(png(200, 200))], {**options, "upscale": 8}, command="faces")
    while slow.doing != "sampling":
        time.sleep(0.01)
    began = time.monotonic()
    service.cancel(slow)
    wait(service, slow)
    assert (slow.state, time.monotonic() - began < 10) == ("cancelled", True)
    with pytest.raises(Refused, match="option face-upsampler: give stablesr, or leave it out"):
        service.submit([upload()], {"face-upsampler": "/etc/passwd"}, command="faces")


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """The origin of another server: a picture, a redirect to it, what is large and what is packed."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            statuses = {"/there": 302, "/nothing": 404}
            self.send_response(statuses.get(self.path, 200))
            if self.path == "/there":
                self.send_header("location", "/a%20photo.png")
            if self.path == "/packed":
                self.send_header("content-encoding", "gzip")
            self.end_headers()
            self.wfile.write(bytes(3 * 2**20) if self.path == "/large" else png())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def test_an_address_is_opened_only_where_that_is_allowed(make: Callable[..., Service], elsewhere: str) -> None:
    service = make(limits=Limits(upload_bytes=2**20, origins=(elsewhere,)))
    client = TestClient(build_app(service), base_url="http://127.0.0.1")

    def submitted(address: str) -> Any:
        return client.post("/api/jobs", data={"url": address, "options": json.dumps(OPTIONS)})

    taken = submitted(f"{elsewhere}/a%20photo.png")
    assert taken.status_code == 202, taken.text
    job = service.job(taken.json()["id"])
    assert (job.names, job.source(0).read_bytes()) == (["a photo.png"], png())
    port = elsewhere.rpartition(":")[2]
    for address, status, line in (
        (f"{elsewhere}/there", 422, "the address answers 302; redirects are not followed, give where it leads to"),
        (f"{elsewhere}/nothing", 422, "the address answers 404"),
        (f"{elsewhere}/large", 413, "the file has more than 1 MB"),
        (f"{elsewhere}/packed", 422, "the address sends packed content"),
        (f"http://localhost:{port}/a.png", 403, "that address is not opened here; give one of http://127.0.0.1:"),
        (f"http://127.0.0.1:{port}@evil.example/a.png", 403, "that address is not opened here"),
        (f"http://me:secret@127.0.0.1:{port}/a.png", 403, "that address is not opened here"),
        (f"https://127.0.0.1:{port}/a.png", 403, "that address is not opened here"),
        ("http://127.0.0.1:1/a.png", 403, "that address is not opened here"),
        ("file:///etc/passwd", 403, "that address is not opened here"),
        ("http://[", 403, "that address is not opened here"),
    ):
        refused = submitted(address)
        assert (refused.status_code, refused.json()["detail"][: len(line)]) == (status, line), address
    shut = Limits()
    object.__setattr__(service, "limits", shut)
    assert "this server opens no addresses; send the file" in submitted(f"{elsewhere}/a%20photo.png").text
    assert len(service.jobs()) == 1


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--allow-url", "file:///tmp"), "--allow-url file:///tmp must be such as http://127.0.0.1:8000"),
        (("--allow-url", "http://127.0.0.1/x"), "--allow-url http://127.0.0.1/x must be such as"),
        (("--allow-url", "http://127.0.0.1", "--host", "0.0.0.0"), "and --host on loopback"),
        (("--workers", "2"), "--workers 2 must be at least 1, with --engine ray"),
    ],
)
def test_a_server_that_cannot_be_is_refused_in_one_line(options: tuple[str, ...], line: str) -> None:
    result = stablesr("web", "--no-browser", *options)
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert line in result.stderr


def test_a_job_on_a_cluster_has_the_bytes_of_the_command_line(
    make: Callable[..., Service], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray", reason="pip install 'stablesr-kit[ray]'")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    service = make(engine="ray", workers=1)
    job = service.submit([upload(), upload(png(9, 9, seed=1)), upload(b"no picture")], OPTIONS)
    service.start()
    try:
        wait(service, job)
    finally:
        ray.shutdown()
    assert (job.state, list(job.errors), job.progress) == ("done", [2], 1)
    assert service._loaded is None
    for index in (0, 1):
        (tmp_path / "a.png").write_bytes(job.source(index).read_bytes())
        arguments = ("--scale", 2, "--steps", 3, "--model", model, "--device", "cpu")
        assert stablesr("restore", tmp_path / "a.png", "-o", tmp_path / "b.png", *arguments).exit_code == 0
        assert job.target(index).read_bytes() == (tmp_path / "b.png").read_bytes()
    with pytest.raises(Refused, match="not kept any more"):
        service.redecode(job, 1, "none", 0)


def test_the_examples_of_the_documentation_run(
    server: tuple[Any, Service], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, service = server
    page = (Path(__file__).parents[2] / "docs" / "web.md").read_text()
    page = page.replace("http://127.0.0.1:7860", str(client.base_url).rstrip("/"))
    monkeypatch.chdir(tmp_path)
    Image.open(io.BytesIO(png())).save("photo.jpg")
    (python,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(python, "docs/web.md", "exec"), {})
    assert Image.open("restored.png").size == (32, 24)
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    submit, events, result = re.findall(r"^curl .*$", page, re.MULTILINE)
    told = json.loads(subprocess.run(shlex.split(submit), check=True, capture_output=True).stdout)
    lines = subprocess.run(shlex.split(events.replace("ID", told["id"])), check=True, capture_output=True).stdout
    assert json.loads(lines.splitlines()[-2].removeprefix(b"data: "))["state"] == "done"
    Path("restored.png").unlink()
    subprocess.run(shlex.split(result.replace("ID", told["id"])), check=True)
    assert Path("restored.png").read_bytes() == service.result(service.job(told["id"])).read_bytes()
