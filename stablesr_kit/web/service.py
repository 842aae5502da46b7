"""The jobs of a server: kept on disk, queued fairly, done one after the other by the very code of the commands.

A job is accepted once its folder has its final name, and ended once its `job.json` says so: a server that is killed and
started again goes on with all others, where they stood.
"""

import difflib
import functools
import io
import json
import logging
import math
import secrets
import shutil
import threading
import time
import zipfile
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import psutil
import typer
from filelock import FileLock, Timeout
from PIL import Image

from stablesr_kit.cli.clips import clip_settings, run_clip, span_of
from stablesr_kit.cli.faces import check_options as check_faces_options
from stablesr_kit.cli.faces import work_of
from stablesr_kit.cli.jobs import Job as PictureJob
from stablesr_kit.cli.jobs import Report, Told
from stablesr_kit.cli.journal import JOBS_FOLDER, Journal
from stablesr_kit.cli.messages import UsageError, one_line
from stablesr_kit.cli.restore import check_components, restoring_of, with_preset
from stablesr_kit.cli.restore import check_options as check_restore_options
from stablesr_kit.errors import JobError, OutputError, StableSRKitError
from stablesr_kit.imaging.reading import Picture, Pixels, open_picture
from stablesr_kit.storage import replacing_file, replacing_folder, sha256
from stablesr_kit.web.jobs import (
    CLIP_START,
    ENDED,
    Command,
    Job,
    Limits,
    QueueFull,
    Refused,
    State,
    Upload,
    check_clip,
    check_container,
    check_picture,
    check_result,
    copy,
    ending_for,
    is_clip,
    names_in_zip,
    shown_name,
    size_of_clip,
    take_in,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from stablesr_kit import CodeFormerPipeline, OneStepPipeline, StableSRPipeline
    from stablesr_kit.cli.restorer import Restoring
    from stablesr_kit.pipelines.face_parts import Background
    from stablesr_kit.pipelines.job import Bar
    from stablesr_kit.pipelines.stablesr import Sampled

logger = logging.getLogger(__name__)

OPTIONS: Mapping[Command, Sequence[str]] = {
    "restore": (
        "model preset scale w steps seed color-fix start prompt negative-prompt guidance-scale lambda-pix lambda-sem "
        "coarse tile tile-overlap mode attention max-memory face face-w "
        "steady chunk from to frames codec crf pix-fmt deinterlace on-damage leave-out container"
    ).split(),
    "faces": (
        "mode model w only-center only-largest min-eye-distance max-identity-distance max-enlargement upscale "
        "background face-upsampler draw-box faces"
    ).split(),
}
"""What may be asked for; the commands' other options name files or belong to whoever runs the server."""

MASK, GIVEN = "mask", "faces.json"
KEPT_FOR_REDECODING = 4
PREVIEW_EVERY_S = 0.5
PREVIEW_PX = 640
CLEAN_EVERY_S = 300.0
TURN_S = 30.0
"""After which a clip lets other jobs have their turn."""
# Of a call's time, where its parts begin: a guess, good enough for a bar. And likewise of a clip.
PARTS = {"encoding": (0.0, 0.06), "sampling": (0.06, 0.85), "decoding": (0.85, 0.99)}
FACES_FROM = 0.8  # of a photo's time, where its background is enlarged
CLIP_PARTS = {"reading": (0.0, 0.01), "restoring": (0.01, 0.98), "writing": (0.98, 0.99)}


class Stopped(Exception):
    """What is in work is given up: its job was cancelled, it is another's turn, or the server ends."""


class Kept(NamedTuple):
    """What a job's picture was decoded of, and with what."""

    sampled: "Sampled"
    restoring: "Restoring"
    pipeline: Any


class Service:
    """A queue on disk and the worker that empties it.

    Args:
        folder: of everything that is kept; of one server at a time.
        models: names that people may ask for -> what `--model` takes; the first is the default.
        face_models: likewise of CodeFormer.
        device, dtype: as of `stablesr restore`.
        engine, workers: likewise, of pictures; with "ray" the pictures of a job go to the cluster together. Clips and
            the command faces are done here.

    Raises:
        JobError: another server has the folder.
        OutputError: it cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        models: Mapping[str, str] | None = None,
        face_models: Mapping[str, str] | None = None,
        device: str = "auto",
        dtype: str = "auto",
        limits: Limits | None = None,
        engine: Literal["here", "ray"] = "here",
        workers: int | None = None,
    ) -> None:
        self.folder = folder
        self.models = dict(models or {"mini": "mini"})
        self.face_models = dict(face_models or {"mini": "mini"})
        self.device, self.dtype = device, dtype
        self.limits = limits or Limits()
        self.engine, self.workers = engine, workers
        self.model_state = "not loaded"
        self.counts: dict[str, float] = dict.fromkeys(("accepted", "refused", "pictures", "seconds", *ENDED), 0)
        self.started = time.time()
        self._jobs: dict[str, Job] = {}
        self._queues: OrderedDict[str, deque[Job]] = OrderedDict()
        self._reserved: dict[str, int] = {}
        self._urgent: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread: threading.Thread | None = None
        self._loaded: tuple[Any, Any] | None = None
        self._loaded_faces: tuple[Any, Any] | None = None
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._cleaned = 0.0
        self._turn_began = 0.0
        self._number = 0
        try:
            self._places = folder / "jobs"
            self._places.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / "server.lock", blocking=False)
            self._lock.acquire()
        except Timeout as error:
            raise JobError(f"{folder}: another server has this folder; stop it, or give another --folder") from error
        except OSError as error:
            raise OutputError(f"{folder}: cannot be written ({error.strerror}); give another --folder") from error
        self._take_over()

    # What people ask for

    def submit(
        self,
        uploads: Sequence[Upload],
        options: Mapping[str, Any] | None = None,
        *,
        command: Command = "restore",
        user: str = "",
        mask: Upload | None = None,
        is_kept: bool = False,
    ) -> Job:
        """Accept a job: when this returns, it is on disk and will be done, whatever happens to the server.

        options: by the command's names. mask: of `faces` with mode inpaint. is_kept: `redecode` may follow.

        Raises:
            Refused: the options or the files are not acceptable.
            QueueFull: too many jobs wait.
        """
        self._reserve(user)
        try:
            job = self._accept(uploads, dict(options or {}), command, user, mask, is_kept)
        except (StableSRKitError, OSError):
            self.counts["refused"] += 1
            raise
        finally:
            self._release(user)
        with self._changed:
            self.counts["accepted"] += 1
            self._jobs[job.id] = job
            self._enqueue(job)
        return job

    def _accept(
        self,
        uploads: Sequence[Upload],
        options: dict[str, Any],
        command: Command,
        user: str,
        mask: Upload | None,
        is_kept: bool,
    ) -> Job:
        """A new job, on disk. Raises Refused."""
        asked = self.asked(command, options)
        job_id = secrets.token_hex(16)
        folder = self._places / job_id
        with replacing_folder(folder) as part:
            (part / "in").mkdir()
            (part / "out").mkdir()
            clip, names, errors = "", list[str](), dict[int, str]()
            if command == "restore" and len(uploads) == 1:
                clip = self._take_in_clip(part / "in" / "0000", uploads[0], asked, options.get("container"))
                names = [shown_name(uploads[0].name)]
            if not clip:
                names, errors = take_in(part / "in", uploads, _scale(command, asked), self.limits)
            if mask is not None:
                copy(mask, part / MASK, self.limits)
                check_picture(part / MASK, mask.name, 1, self.limits)
            if faces := options.get("faces"):
                if len(names) > 1:
                    raise Refused("option faces is of one picture, and several are given; send one job for each")
                (part / GIVEN).write_text(json.dumps({"0000": faces}))
            with self._changed:
                self._number += 1
            job = Job(
                id=job_id,
                number=self._number,
                user=user,
                command=command,
                options=options,
                names=names,
                clip=clip,
                folder=folder,
                accepted=time.time(),
                errors=errors,
                is_kept=is_kept,
            )
            (part / "job.json").write_text(json.dumps(job.saved()))
        return job

    def _take_in_clip(self, path: Path, upload: Upload, asked: Mapping[str, Any], container: str | None) -> str:
        """How the name of a clip's result ends; empty if this is none, which is left alone. Raises Refused."""
        start = upload.content.read(CLIP_START)
        upload.content.seek(0)
        if not is_clip(start):
            return ""
        copy(upload, path, self.limits)
        check_clip(path, shown_name(upload.name), span_of(asked), asked["scale"], self.limits)
        return ending_for(start, container)

    def asked(self, command: Command, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a command by its parameters' names, read by the command's own parser. Raises Refused."""
        known = OPTIONS.get(command)
        if known is None:
            raise Refused(f"command {command!r} is not known; give restore or faces")
        arguments = ["input", "-o", "output"]
        models = self.models if command == "restore" else self.face_models
        for key, value in options.items():
            name = str(key).replace("_", "-")
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]}?" if near else f"; give some of {', '.join(known)}"
                raise Refused(one_line(f"option {str(key)[:80]!r} is not known{hint}"))
            if name == "faces":
                _check_faces(value)
            elif value is None or value is False:
                continue
            elif value is True:
                arguments.append(f"--{name}")
            elif not isinstance(value, str | int | float):
                raise Refused(f"option {name}: a {type(value).__name__} is given, expected a number or a text")
            elif name == "model":
                if str(value) not in models:
                    raise Refused(one_line(f"model {str(value)[:80]!r} is not here; give {' or '.join(models)}"))
                arguments.append(f"--model={models[str(value)]}")
            elif name == "container":
                check_container(value)
            elif name == "background" and value not in ("stablesr", "none"):
                raise Refused("option background: give stablesr or none")
            elif name == "face-upsampler" and value != "stablesr":
                raise Refused("option face-upsampler: give stablesr, or leave it out")
            else:
                arguments.append(f"--{name}={value}")
        if "model" not in options and (command == "restore" or next(iter(models)) != "mini"):
            arguments.append(f"--model={next(iter(models.values()))}")
        try:
            context = _parser(command).make_context(command, arguments)
            asked = with_preset(context) if command == "restore" else dict(context.params)
            asked |= {"device": self.device, "resume": True}
            if command == "restore":
                asked["dtype"] = self.dtype
                check_restore_options(asked)
                clip_settings(asked)
            else:
                check_faces_options(asked)
        except typer.BadParameter as error:
            raise Refused(one_line(error.format_message())) from error
        return asked

    def job(self, job_id: str) -> Job:
        """The job of that name. Raises Refused."""
        job = self.known(job_id)
        if job is None:
            raise Refused("there is no such job; it may have been removed", 404)
        return job

    def jobs(self) -> list[Job]:
        """All of them, as they were accepted."""
        return sorted(self._jobs.values(), key=lambda job: job.number)

    def told(self, job: Job) -> dict[str, Any]:
        """What a client is told of a job, as plain values."""
        waiting = self.waiting() if job.state == "queued" else []
        told: dict[str, Any] = {
            "id": job.id,
            "state": job.state,
            "progress": round(job.progress, 4),
            "doing": job.doing,
            "eta_s": None if job.eta_s is None else round(job.eta_s, 1),
            "command": job.command,
            "options": dict(job.options),
            "pictures": len(job.names),
            "is_clip": bool(job.clip),
            "done": job.done,
            "errors": [{"name": job.names[index], "error": line} for index, line in sorted(job.errors.items())],
            "notes": list(job.notes),
            "accepted": job.accepted,
            "ended": job.ended,
        }
        if job in waiting:
            told["before_it"] = waiting.index(job)
        if job.state == "failed":
            told["error"] = next(iter(job.errors.values()), "failed")
        return told

    def result(self, job: Job) -> Path:
        """The file of a job that is done: the picture, or a zip of several. Raises Refused."""
        if job.state != "done":
            status = {"failed": 410, "cancelled": 410}.get(job.state, 409)
            reason = f": {next(iter(job.errors.values()))}" if job.state == "failed" and job.errors else ""
            raise Refused(f"the job is {job.state}{reason}; there is no result", status)
        if len(job.names) == 1:
            return job.target(0)
        path = job.folder / "results.zip"
        if not path.is_file():
            with replacing_file(path) as part, zipfile.ZipFile(part, "w") as archive:
                for index, name in zip(job.results, names_in_zip([job.names[i] for i in job.results]), strict=True):
                    archive.write(job.target(index), name)
                if job.errors:
                    lines = [f"{job.names[index]}: {line}\n" for index, line in sorted(job.errors.items())]
                    archive.writestr("errors.txt", "".join(lines))
        return path

    def cancel(self, job: Job) -> None:
        """End a job that has not ended, and remove its files; one that has is forgotten as well."""
        with self._changed:
            if job.state in ENDED:
                self._forget(job)
                return
            job.is_cancelled = True
            queue = self._queues.get(job.user, deque())
            is_waiting = job in queue
            if is_waiting:
                queue.remove(job)
        if is_waiting:
            self._end(job, "cancelled")

    def known(self, job_id: str) -> Job | None:
        """The job of that name, if there is one."""
        return self._jobs.get(job_id)

    @property
    def is_busy(self) -> bool:
        """Whether the worker has more to do than answer at once."""
        return any(job.state not in ENDED for job in self._jobs.copy().values())

    def waiting(self) -> list[Job]:
        """The jobs that wait, in the order in which their turn comes."""
        with self._changed:
            queues = [list(queue) for queue in self._queues.values()]
        rounds = max((len(queue) for queue in queues), default=0)
        return [queue[turn] for turn in range(rounds) for queue in queues if turn < len(queue)]

    def redecode(self, job: Job, w: float | None, color_fix: str, face_w: float) -> Path:
        """The picture of a job again, with another w, colour fix or face strength; nothing is sampled.

        Raises:
            Refused: what it was decoded of is not kept any more.
            StableSRKitError: as restoring.
        """
        path: Path = self._soon(lambda: self._redecode(job, w, color_fix, face_w))
        return path

    def plan(self, options: Mapping[str, Any], height: int, width: int) -> str:
        """What restoring a picture of height x width will take, in a line. Raises Refused, or as restoring."""
        asked = self.asked("restore", options)
        line: str = self._soon(lambda: self._plan(asked, height, width))
        return line

    def plan_of_clip(self, options: Mapping[str, Any], path: Path) -> str:
        """Likewise, of a clip."""
        asked = self.asked("restore", options)
        size = size_of_clip(path, span_of(asked))
        line: str = self._soon(lambda: self._plan(asked, size.height, size.width, size.frames))
        return line

    def find_faces(self, picture: Picture) -> list[tuple[float, float, float, float]]:
        """The boxes (x1, y1, x2, y2) of the faces in a picture. Raises as restoring."""
        boxes: list[tuple[float, float, float, float]] = self._soon(lambda: _boxes_in(picture))
        return boxes

    # The worker

    def start(self) -> None:
        """Begin to work, in a thread of its own."""
        self._thread = threading.Thread(target=self._work, name="worker", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop working; what is in progress goes on when the next server starts."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(30)
        self._lock.release()

    def _work(self) -> None:
        try:
            self.model_state = "loading"
            if self.engine == "here":
                asked = self.asked("restore", {})
                self._pipeline(restoring_of(self.folder, asked, _digest))
            self.model_state = "ready"
        except Exception as error:
            self.model_state = f"failed: {self._line(error)}"
            logger.error("the model cannot be loaded: %s", self._line(error))
        while True:
            with self._changed:
                while not (self._urgent or any(self._queues.values()) or self._is_closing):
                    self._changed.wait(CLEAN_EVERY_S)
                    self._clean()
                if self._is_closing:
                    break
                urgent = self._urgent.popleft() if self._urgent else None
                job = None if urgent else self._next()
            if urgent is not None:
                _fulfil(*urgent)
            elif job is not None:
                self._turn_began = time.monotonic()
                try:
                    self._do_next_picture(job)
                except Exception as error:  # a fault of ours: the job waits for the next server
                    logger.error("%s: %s", job.id, self._line(error))
            self._clean()
        for future, _ in self._urgent:
            future.set_exception(Refused("the server ends", 503))

    def _next(self) -> Job:
        """The job whose turn it is; users take turns."""
        user = next(user for user, queue in self._queues.items() if queue)
        job = self._queues[user].popleft()
        self._queues.move_to_end(user)
        if not self._queues[user]:
            del self._queues[user]
        return job

    def _do_next_picture(self, job: Job) -> None:
        """One picture of a job, which is then ended or waits for its next turn; on a cluster, all that are left."""
        left = [index for index in range(job.done, len(job.names)) if index not in job.errors]
        if left:
            job.state, job.done = "running", left[0]
            began = time.perf_counter()
            try:
                if self.engine == "ray" and job.command == "restore" and not job.clip:
                    self._do_on_ray(job, left)
                    left = left[-1:]
                else:
                    self._do(job, left[0])
            except Stopped:
                if not job.is_cancelled:
                    self._put_back(job)
                    return
            except Exception as error:
                job.errors[left[0]] = self._line(error, job, left[0])
            if job.is_cancelled:
                self._end(job, "cancelled")
                return
            self.counts["pictures"] += 1
            self.counts["seconds"] += time.perf_counter() - began
            job.done = left[0] + 1
            self._tell(job, progress=job.done / len(job.names))
        if len(left) <= 1:
            job.done = len(job.names)
            self._end(job, "done" if job.results else "failed")
        else:
            self._put_back(job)

    def _put_back(self, job: Job) -> None:
        """At the head of its user's line, which is behind those of others."""
        with self._changed:
            self._queues.setdefault(job.user, deque()).appendleft(job)

    def between_chunks(self) -> None:
        """A clip is at a place from which it goes on as well later. Raises Stopped if it is another's turn."""
        while self._urgent:
            _fulfil(*self._urgent.popleft())
        if self._queues and time.monotonic() - self._turn_began > TURN_S:
            raise Stopped

    def _do(self, job: Job, index: int) -> None:
        """Restore a picture, unless its result is there from before a kill."""
        picture_job = PictureJob(
            source=job.source(index), target=job.target(index), companion=None, folder=job.folder / "out"
        )
        asked = self.asked(job.command, job.options)
        if job.clip:
            self._do_clip(job, asked)
            return
        if job.command == "faces":
            if not picture_job.target.is_file():
                self._do_faces(job, index, picture_job, asked)
            return
        restoring = restoring_of(picture_job.folder, asked, _digest)
        try:
            journal = Journal(picture_job.folder, restoring.settings)
            journal.remove_stale_locks()
            if not journal.is_finished(picture_job.source, picture_job.results):
                self._restore(job, index, picture_job, restoring)
        except JobError as error:  # begun by another version, or with a model that has changed
            logger.warning("%s; it begins again", self._line(error, job, index))
            shutil.rmtree(picture_job.folder / JOBS_FOLDER, ignore_errors=True)
            picture_job.target.unlink(missing_ok=True)
            self._restore(job, index, picture_job, restoring)

    def _do_on_ray(self, job: Job, left: list[int]) -> None:
        """Restore pictures of a job on the cluster, but for those whose results are there."""
        from stablesr_kit.cli.restorer import run_on_ray

        folder = job.folder / "out"
        jobs = {
            index: PictureJob(source=job.source(index), target=job.target(index), companion=None, folder=folder)
            for index in left
        }
        restoring = restoring_of(folder, self.asked(job.command, job.options), _digest)
        journal = Journal(folder, restoring.settings)
        journal.remove_stale_locks()
        report = _RayReport("restored", service=self, job=job)
        todo = [one for one in jobs.values() if not journal.is_finished(one.source, one.results)]
        report.left = len(todo)
        if todo:
            run_on_ray(todo, restoring, report, self.workers)

    def _do_clip(self, job: Job, asked: dict[str, Any]) -> None:
        """Restore a clip as the command does, from where it stood before a kill or another's turn."""
        from stablesr_kit.cli.restorer import Restorer, Watch

        bars = _ClipBars(self, job, asked["chunk"])
        watch = Watch(progress=bars, on_frame=bars.preview)

        def load(restoring: "Restoring") -> "Restorer":
            pipeline = self._pipeline(restoring)
            check_components(pipeline, restoring.options)
            network = None if restoring.face_model is None else self._faces(restoring.face_model, restoring.device)
            return Restorer(restoring, watch=watch, pipeline=pipeline, face_network=network)

        def run() -> Told | None:
            return run_clip(job.source(0), job.target(0), asked, partial(restoring_of, digest=_digest), load, watch)

        try:
            told = run()
        except (JobError, UsageError) as error:  # begun by another version, or with a model that has changed
            logger.warning("%s; it begins again", self._line(error, job))
            shutil.rmtree(job.folder / "out" / JOBS_FOLDER, ignore_errors=True)
            job.target(0).unlink(missing_ok=True)
            told = run()
        if told is not None:
            self._note(job, 0, Told([*told.lines, *told.values["notes"]], {}))

    def _restore(self, job: Job, index: int, picture_job: PictureJob, restoring: "Restoring") -> None:
        from stablesr_kit.cli.restorer import Restorer, Watch

        pipeline = self._pipeline(restoring)
        check_components(pipeline, restoring.options)
        network = None if restoring.face_model is None else self._faces(restoring.face_model, restoring.device)
        bars = _Bars(self, job, index)
        watch = Watch(progress=bars, on_step=_preview_for(self, job, picture_job.source, pipeline), is_kept=job.is_kept)
        restorer = Restorer(restoring, watch=watch, pipeline=pipeline, face_network=network)
        self._note(job, index, restorer(picture_job))
        if watch.sampled is not None:
            self._kept[job.id] = Kept(watch.sampled, restoring, pipeline)
            while len(self._kept) > KEPT_FOR_REDECODING:
                self._kept.popitem(last=False)

    def _do_faces(self, job: Job, index: int, picture_job: PictureJob, asked: dict[str, Any]) -> None:
        mask, given = job.folder / MASK, job.folder / GIVEN
        asked |= {"mask": mask if mask.is_file() else None, "given": given if given.is_file() else None}
        bars = _Bars(self, job, index)
        bars.check()

        def enlarging(name: str, _device: "torch.device") -> "Background":
            from stablesr_kit.imaging.resizing import resize_bicubic
            from stablesr_kit.pipelines.face_parts import StableSRBackground

            if name == "none":
                return resize_bicubic
            pipeline = self._pipeline(restoring_of(picture_job.folder, self.asked("restore", {}), _digest))
            pipeline.set_progress_bar_config(disable=True)
            return StableSRBackground(pipeline, progress=bars)

        def on_face() -> None:
            bars.begin, bars.end = FACES_FROM, 1.0  # what is restored from here on are faces that are enlarged
            bars.show("faces", 0)

        bars.end = FACES_FROM
        work = work_of([picture_job], asked, self._faces, enlarging, on_face)
        self._note(job, index, work(picture_job))

    def _redecode(self, job: Job, w: float | None, color_fix: str, face_w: float) -> Path:
        from stablesr_kit.cli.restorer import refinement
        from stablesr_kit.imaging.writing import output_dtype, write_bands
        from stablesr_kit.pipelines.pictures import pixel_bands

        kept = self._kept.get(job.id)
        if kept is None or job.state != "done":
            raise Refused("what this picture was decoded of is not kept any more; restore it again", 410)
        self._kept.move_to_end(job.id)
        restoring = kept.restoring
        w = restoring.options["w"] if w is None else w
        stages = []
        changed: dict[str, Any] = {"w": w, "color_fix": color_fix}
        if restoring.face_model is not None:
            stages.append(refinement(self._faces(restoring.face_model, restoring.device), face_w))
            changed["face_w"] = face_w
        try:
            (image,) = kept.pipeline.redecode(kept.sampled, w, color_fix, stages, "canvas").images
        except ValueError as error:
            raise Refused(one_line(error)) from error
        path = job.folder / "out" / f"again-{secrets.token_hex(4)}.png"
        picture = open_picture(job.source(0), max_pixels=self.limits.pixels)
        steps = restoring.options["num_inference_steps"] or kept.pipeline.default_steps
        said = {"software": "stablesr-kit", "model": Path(restoring.model).name, "steps": steps}
        provenance = said | {**restoring.settings, **changed, "source": sha256(job.source(0))}
        _, height, width = image.shape
        write_bands(
            path, pixel_bands(image, output_dtype(path, picture)), height, width, picture, provenance=provenance
        )
        return path

    def _plan(self, asked: dict[str, Any], height: int, width: int, frames: int = 0) -> str:
        """frames: of a clip; 0 is a picture."""
        from stablesr_kit.pipelines.pictures import result_size

        restoring = restoring_of(self.folder, asked, _digest)
        pipeline = self._pipeline(restoring)
        options = restoring.options
        size = result_size(height, width, options["scale"])
        check_result(size[0] * size[1], self.limits)
        planned = {name: options[name] for name in ("w", "num_inference_steps", "guidance_scale") if name in options}
        worked_at = restoring.tiling.working_size((height, width), size, pipeline.config.working_scale)
        at = "" if worked_at == size else f", made at {worked_at[1]} x {worked_at[0]} and reduced"
        if not frames:
            plan = pipeline.plan(*worked_at, tiling=restoring.tiling, **planned)
            return f"{size[1]} x {size[0]} pixels{at}; {plan}"
        plan = pipeline.plan(*worked_at, tiling=restoring.tiling, batch_size=asked["chunk"], **planned)
        plan = replace(plan, seconds=plan.seconds * frames / asked["chunk"])
        return f"{frames} frames of {size[1]} x {size[0]} pixels{at}; {plan}"

    def _pipeline(self, restoring: "Restoring") -> "StableSRPipeline | OneStepPipeline":
        """The model in memory, which takes the place of another one."""
        from stablesr_kit.cli.restorer import load_pipeline

        key = (restoring.model, str(restoring.device), restoring.dtype, restoring.has_text)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None
            self._kept.clear()
            loaded = load_pipeline(restoring.model, restoring.device, restoring.dtype, restoring.has_text)
            self._loaded = (key, loaded)
        pipeline: StableSRPipeline | OneStepPipeline = self._loaded[1]
        return pipeline

    def _faces(self, model: str, device: "torch.device") -> "CodeFormerPipeline":
        from stablesr_kit.cli.face_stage import load_face_model

        if self._loaded_faces is None or self._loaded_faces[0] != (model, str(device)):
            self._loaded_faces = None
            self._loaded_faces = ((model, str(device)), load_face_model(model, device))
        network: CodeFormerPipeline = self._loaded_faces[1]
        return network

    def _soon(self, call: Callable[[], Any]) -> Any:
        """What a call gives that needs the model: the worker does it before its next picture."""
        future: Future[Any] = Future()
        with self._changed:
            if self._is_closing:
                raise Refused("the server ends", 503)
            self._urgent.append((future, call))
            self._changed.notify_all()
        return future.result()

    # Queue and disk

    def _reserve(self, user: str) -> None:
        """Room for one more job of a user. Raises QueueFull."""
        with self._changed:
            theirs = len(self._queues.get(user, ())) + self._reserved.get(user, 0)
            all_of_them = sum(map(len, self._queues.values())) + sum(self._reserved.values())
            mean_s = self.counts["seconds"] / max(self.counts["pictures"], 1)
            if all_of_them >= self.limits.queue or theirs >= max(self.limits.queue * 3 // 4, 1):
                whose = f"{all_of_them} jobs wait" if all_of_them >= self.limits.queue else f"{theirs} of yours wait"
                self.counts["refused"] += 1
                raise QueueFull(f"{whose}, no more are taken now; try again later", max(math.ceil(mean_s), 1))
            self._reserved[user] = self._reserved.get(user, 0) + 1

    def _release(self, user: str) -> None:
        with self._changed:
            self._reserved[user] -= 1
            if not self._reserved[user]:
                del self._reserved[user]

    def _enqueue(self, job: Job) -> None:
        with self._changed:
            if job.is_cancelled:
                return
            self._queues.setdefault(job.user, deque()).append(job)
            self._changed.notify_all()

    def _take_over(self) -> None:
        """Go on with what an earlier server has accepted and not ended."""
        for folder in self._places.iterdir():
            if folder.name.startswith("."):  # was never accepted, or never removed
                shutil.rmtree(folder, ignore_errors=True)
                continue
            try:
                job = Job.load(folder)
            except JobError as error:
                logger.warning("%s", error)
                continue
            self._jobs[job.id] = job
            self._number = max(self._number, job.number)
        for job in self.jobs():
            if job.state not in ENDED:
                self._enqueue(job)

    def _end(self, job: Job, state: State) -> None:
        """Give a job its last state, once, on disk first."""
        with self._changed:
            if job.state in ENDED:
                return
            ended = replace(job, state=state, ended=time.time())
            try:
                with replacing_file(job.folder / "job.json") as part:
                    part.write_text(json.dumps(ended.saved()))
            except OutputError as failure:  # the next server does what is not recorded
                logger.error("%s", self._line(failure))
            shutil.rmtree(job.folder / "out" / JOBS_FOLDER, ignore_errors=True)
            job.state, job.ended, job.preview, job.eta_s = state, ended.ended, None, None
            job.progress = 1.0 if state == "done" else job.progress
            job.version += 1
            self.counts[state] += 1
        if state == "cancelled":
            for name in ("in", "out"):
                shutil.rmtree(job.folder / name, ignore_errors=True)

    def _forget(self, job: Job) -> None:
        self._jobs.pop(job.id, None)
        self._kept.pop(job.id, None)
        gone = job.folder.with_name(f".{job.folder.name}.gone")
        if job.folder.is_dir():
            job.folder.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)

    def _clean(self) -> None:
        """Remove ended jobs that are old, and the oldest ones while all take too much room."""
        if time.time() - self._cleaned < CLEAN_EVERY_S:
            return
        self._cleaned = time.time()
        ended = sorted((job for job in self.jobs() if job.ended is not None), key=lambda job: job.ended or 0)
        sizes = {job.id: _bytes_in(job.folder) for job in self.jobs()}
        total = sum(sizes.values())
        for job in ended:
            if time.time() - (job.ended or 0) > self.limits.keep_s or total > self.limits.keep_bytes:
                total -= sizes[job.id]
                with self._changed:
                    self._forget(job)

    def _note(self, job: Job, index: int, told: Told) -> None:
        job.notes += [line.replace(str(job.source(index)), job.names[index]) for line in told.lines]

    def _tell(self, job: Job, **values: Any) -> None:
        for name, value in values.items():
            setattr(job, name, value)
        job.version += 1

    def _line(self, error: Exception, job: Job | None = None, index: int = 0) -> str:
        """What went wrong, on one line and without paths of this machine; what nobody foresaw is logged as well."""
        text = error.format_message() if isinstance(error, typer.BadParameter) else str(error)
        if not isinstance(error, StableSRKitError | typer.BadParameter):
            logger.error("unforeseen", exc_info=error)
            text = f"{type(error).__name__}: {text}"
        if job is not None:
            for path in (job.source(index), job.target(index)):
                text = text.replace(str(path), job.names[index])
            text = text.removeprefix(f"{job.names[index]}: ")
        return one_line(text.replace(str(self.folder), "").replace(str(Path.home()), "~"))


@dataclass
class _RayReport(Report):
    """Tells a job what became of its pictures, as they come from the cluster."""

    service: Service = field(kw_only=True)
    job: Job = field(kw_only=True)
    left: int = 0

    def finish(self, job: PictureJob, told: Told | None = None, seconds: float | None = None) -> None:  # noqa: ARG002
        """Count a picture that is done. Raises Stopped."""
        self.service._note(self.job, int(job.source.name), told or Told([], {}))
        self._count()

    def fail(self, error: StableSRKitError, source: Path | None = None) -> None:
        """Keep the line for a picture that failed. Raises Stopped."""
        assert source is not None
        index = int(source.name)
        self.job.errors[index] = self.service._line(error, self.job, index)
        self._count()

    def _count(self) -> None:
        if self.job.is_cancelled or self.service._is_closing:
            raise Stopped
        self.left -= 1
        count = len(self.job.names)
        self.service._tell(self.job, doing=f"restoring {self.left} on the cluster", progress=1 - self.left / count)


class _Bars:
    """Bars for a pipeline's call, which tell a job's progress and stop it where it is cancelled.

    begin, end: shares of the picture's time in which the call is.
    """

    def __init__(self, service: Service, job: Job, index: int = 0) -> None:
        self.service, self.job, self.index = service, job, index
        self.began = time.perf_counter()
        self.begin, self.end = 0.0, 1.0

    def __call__(self, doing: str, total: int, unit: str) -> "Bar":
        from stablesr_kit.pipelines.job import Bar

        return Bar(doing, total, unit, self.show)

    def show(self, doing: str, share: float) -> None:
        """Tell how much of a part is done. Raises Stopped."""
        self.check()
        first, last = PARTS.get(doing, (0.0, 0.99))
        fraction = self.begin + (self.end - self.begin) * (first + (last - first) * min(share, 1.0))
        passed_s = time.perf_counter() - self.began
        eta_s = passed_s * (1 - fraction) / fraction if fraction > PARTS["sampling"][0] else None
        count = len(self.job.names)
        self.service._tell(
            self.job,
            doing=doing if count == 1 else f"{doing}, picture {self.index + 1} of {count}",
            progress=max(self.job.progress, (self.index + fraction) / count),
            eta_s=eta_s,
        )

    def check(self) -> None:
        """Raises Stopped if the job is to stop."""
        if self.job.is_cancelled or self.service._is_closing:
            raise Stopped


class _ClipBars(_Bars):
    """Likewise of a clip, in which calls restore a chunk of frames each."""

    def __init__(self, service: Service, job: Job, chunk: int) -> None:
        super().__init__(service, job)
        self.chunk, self.total, self.done, self.shown = chunk, 1, 0.0, 0.0
        self.begun_at: float | None = None

    def __call__(self, doing: str, total: int, unit: str) -> "Bar":
        if doing == "restoring":
            self.total = total
        return super().__call__(doing, total, unit)

    def show(self, doing: str, share: float) -> None:
        """As of a picture, in which the parts of a chunk's call count as parts of its frames."""
        self.check()
        share = min(share, 1.0)
        if doing == "restoring":
            is_begin, self.done = self.begun_at is None, share
            if not is_begin and share < 1:
                self.service.between_chunks()
        elif doing in PARTS:
            first, last = PARTS[doing]
            share = min(self.done + (first + (last - first) * share) * self.chunk / self.total, 1.0)
            doing = "restoring"
        first, last = CLIP_PARTS[doing]
        fraction = first + (last - first) * share
        if doing == "restoring" and self.begun_at is None:
            self.begun_at, self.began = fraction, time.perf_counter()
        gained = 0.0 if self.begun_at is None else fraction - self.begun_at
        passed_s = time.perf_counter() - self.began
        of_frames = f", {round(self.done * self.total)} of {self.total} frames done" if doing == "restoring" else ""
        self.service._tell(
            self.job,
            doing=f"{doing}{of_frames}",
            progress=max(self.job.progress, fraction),
            eta_s=passed_s * (1 - fraction) / gained if gained > 0 else None,
        )

    def preview(self, pixels: Pixels) -> None:
        """Show the last frame that is done."""
        if time.monotonic() - self.shown >= PREVIEW_EVERY_S:
            small = Image.fromarray(pixels)
            small.thumbnail((PREVIEW_PX, PREVIEW_PX))
            self.service._tell(self.job, preview=small)
            self.shown = time.monotonic()


def _preview_for(
    service: Service, job: Job, source: Path, pipeline: "StableSRPipeline | OneStepPipeline"
) -> "Callable[[Tensor], None]":
    """What shows how a picture comes into being: its latent, in the colours that fit the input best.

    The colours are linear in the latent's channels, by least squares against the input: no network is run, and what
    noise is left shows as noise.
    """
    picture = open_picture(source, max_pixels=service.limits.pixels)
    small = np.zeros((0, 0, 3), np.float32)
    shown = 0.0

    def show(latents: "Tensor") -> None:
        nonlocal shown, small
        if time.monotonic() - shown < PREVIEW_EVERY_S:
            return
        values = latents[0].float().cpu().numpy()
        margin = int(getattr(pipeline.config, "margin_px", 0)) // pipeline.vae_scale_factor
        _, height, width = values.shape
        # The canvas is continued to what the networks can halve; the picture keeps its own proportions on it.
        ratio = min((height - 2 * margin) / picture.height, (width - 2 * margin) / picture.width)
        size = max(round(picture.height * ratio), 1), max(round(picture.width * ratio), 1)
        values = values[:, margin : margin + size[0], margin : margin + size[1]]
        if small.shape[:2] != values.shape[1:]:
            reduced = picture.rgb.resize((values.shape[2], values.shape[1]), Image.Resampling.BOX)
            small = np.asarray(reduced, np.float32)
        channels = np.concatenate([values.reshape(len(values), -1), np.ones((1, values[0].size), np.float32)]).T
        colours, *_ = np.linalg.lstsq(channels, small.reshape(-1, 3), rcond=None)
        pixels = (channels @ colours).reshape(small.shape).round().clip(0, 255).astype(np.uint8)
        large = Image.fromarray(pixels).resize((4 * size[1], 4 * size[0]), Image.Resampling.BICUBIC)
        service._tell(job, preview=large)
        shown = time.monotonic()

    return show


@functools.cache
def _parser(command: Command) -> Any:
    from stablesr_kit.cli import app

    return typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]


@functools.lru_cache(8)
def _digest(path: Path) -> str:
    """Of a model, which does not change while a server runs."""
    return sha256(path)


def _scale(command: Command, asked: Mapping[str, Any]) -> float:
    if command == "restore":
        return float(asked["scale"])
    return float(asked["upscale"]) if asked["mode"] == "whole" else 1.0


def _fulfil(future: "Future[Any]", call: Callable[[], Any]) -> None:
    try:
        future.set_result(call())
    except Exception as error:
        future.set_exception(error)


def _boxes_in(picture: Picture) -> list[tuple[float, float, float, float]]:
    from stablesr_kit.faces.detectors import MTCNNDetector

    found = MTCNNDetector().detect(np.asarray(picture.rgb))
    return [(face.box.x1, face.box.y1, face.box.x2, face.box.y2) for face in found]


def _check_faces(faces: Any) -> None:
    """Refuse faces that are no list of boxes or landmarks; where they lie is checked in the picture."""
    is_list = isinstance(faces, list) and len(faces) <= 1000
    if not (is_list and all(isinstance(one, dict) and one.keys() <= {"box", "landmarks"} for one in faces)):
        raise Refused('option faces: expected a list such as [{"box": [x1, y1, x2, y2]}]')


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # gone meanwhile
            continue
    return total


def metrics(service: Service) -> str:
    """Numbers of a service in the text format of Prometheus."""
    waiting = service.waiting()
    counts = service.counts
    values = {
        "stablesr_jobs_accepted_total": counts["accepted"],
        "stablesr_jobs_refused_total": counts["refused"],
        **{f'stablesr_jobs_ended_total{{state="{state}"}}': counts[state] for state in ENDED},
        "stablesr_pictures_total": counts["pictures"],
        "stablesr_picture_seconds_total": round(counts["seconds"], 3),
        "stablesr_queue_length": len(waiting),
        "stablesr_jobs_running": sum(job.state == "running" and job not in waiting for job in service.jobs()),
        "stablesr_resident_bytes": psutil.Process().memory_info().rss,
        "stablesr_uptime_seconds": round(time.time() - service.started, 1),
    }
    out = io.StringIO()
    for name, value in values.items():
        out.write(f"{name} {value:g}\n" if isinstance(value, float) else f"{name} {value}\n")
    return out.getvalue()
