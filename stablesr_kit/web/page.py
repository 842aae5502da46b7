"""The page: pictures and clips are dropped, restored, compared and decoded again; many at once, faces, versions."""

import asyncio
import html
import io
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib import metadata, resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import fastapi
import numpy as np
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stablesr_kit.cli.messages import one_line
from stablesr_kit.cli.restore import PRESETS, Preset
from stablesr_kit.errors import ConfigError, StableSRKitError
from stablesr_kit.imaging.finding import SUFFIXES
from stablesr_kit.imaging.metadata import read_provenance
from stablesr_kit.imaging.reading import open_picture
from stablesr_kit.version import __version__
from stablesr_kit.video.clip import SUFFIXES as CLIP_SUFFIXES
from stablesr_kit.video.clip import Span, need_av
from stablesr_kit.video.writing import FORMATS
from stablesr_kit.web.jobs import CLIP_START, ENDED, Command, Job, Refused, Upload, check_clip, ending_for, size_of_clip
from stablesr_kit.web.service import Service

# Read when Gradio is imported. Nothing is told to anybody.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr

EXAMPLES = Path(str(resources.files("stablesr_kit"))) / "assets" / "examples"
LOOK_EVERY_S = 0.3
JOIN_BYTES = 2**22
"""Of what an event of the page sends; files are uploaded before."""
UPLOADS_KEPT_S = 6 * 3600
BROWSER_SECRET = "stablesr"  # what a browser remembers is the name of its own job
PICTURES = ["image", *sorted(SUFFIXES)]
CLIPS = ["video", *sorted(CLIP_SUFFIXES)]
STEADY = {
    "Frame by frame": "none",
    "The same noise": "noise",
    "Noise that moves along": "moving-noise",
    "Steps held to the frame before": "latents",
    "Fine detail held to the frame before": "bands",
    "All of it": "all",
}
"""What `--steady` means, by its values."""
CSS = """
.gradio-container {max-width: 1400px !important; width: 100%; margin: auto;}
.told progress {width: 100%; height: .8em;}
.told p {margin: .3em 0; font-size: 1rem;}
.told .wrong {border-left: .3em solid #c00; padding-left: .6em;}
.clips {display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 1em;}
.clips figure {margin: 0;}
.clips video {width: 100%; display: block;}
@media (max-width: 480px) {.tab-container button {padding: 0 .45em !important;}}
"""

Update = dict[Any, Any]


def build_page(service: Service) -> Any:
    """The page as an application. It keeps its files in the service's folder."""
    files = service.folder / "page"
    os.environ["GRADIO_TEMP_DIR"] = str(files)
    page = _Blocks(service).blocks
    page.queue(default_concurrency_limit=None, api_open=False)
    app = gr.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        allowed_paths=[str(service.folder / "jobs"), str(EXAMPLES)],
        show_error=True,
        max_file_size=service.limits.upload_bytes,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=gr.themes.Default(),
        css=CSS,
    )
    page.has_launched = True  # only then does Gradio check that a file was uploaded to it
    app.add_middleware(_OwnFiles, folder=files)
    return app


class _OwnFiles:
    """Refuses events that name a file which was not uploaded here: a path of this machine, or an address elsewhere."""

    def __init__(self, app: ASGIApp, folder: Path) -> None:
        self.app = app
        self.folder = folder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith("/queue/join"):
            await self.app(scope, receive, send)
            return
        body, is_whole = b"", False
        while not is_whole:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            is_whole = not message.get("more_body", False)
            if len(body) > JOIN_BYTES:
                await JSONResponse({"detail": "the event is too large"}, 413)(scope, receive, send)
                return
        try:
            foreign = [path for path in _paths_in(json.loads(body)) if not self._is_ours(path)]
        except (ValueError, RecursionError):
            await JSONResponse({"detail": "the event is not JSON"}, 400)(scope, receive, send)
            return
        if foreign:
            await JSONResponse({"detail": "a file that was not uploaded here is not opened"}, 403)(scope, receive, send)
            return
        sent = False

        async def again() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, again, send)

    def _is_ours(self, path: str) -> bool:
        with_links = Path(os.path.realpath(path))
        return with_links.is_relative_to(self.folder.resolve()) or with_links.is_relative_to(
            (self.folder.parent / "jobs").resolve()
        )


def _paths_in(value: Any) -> list[str]:
    """All that could be taken for a file in an event."""
    if isinstance(value, list):
        return [path for one in value for path in _paths_in(one)]
    if not isinstance(value, dict):
        return []
    own = [value["path"]] if isinstance(value.get("path"), str) else []
    return own + [path for one in value.values() for path in _paths_in(one)]


class _Blocks:
    """The components of the page, and what happens between them."""

    def __init__(self, service: Service) -> None:
        self.service = service
        with gr.Blocks(title="stablesr", analytics_enabled=False, delete_cache=(600, UPLOADS_KEPT_S)) as self.blocks:
            gr.Markdown("# stablesr\nRestore and enlarge pictures and clips. Nothing leaves this machine.")
            with gr.Tabs():
                with gr.Tab("Restore"):
                    self._restore_tab()
                with gr.Tab("Batch"):
                    self._batch_tab()
                with gr.Tab("Video"):
                    self._video_tab()
                with gr.Tab("Faces"):
                    self._faces_tab()
                with gr.Tab("About"):
                    gr.Markdown(_about(service))

    # Restore

    def _main_options(self) -> dict[str, Any]:
        """What most people choose: the components by the names of their options."""
        models = list(self.service.models)
        model = gr.Dropdown(models, value=models[0], label="Model", visible=len(models) > 1)
        with gr.Row():
            scale = gr.Number(4, label="Scale", minimum=0.1, maximum=32, step=0.5, min_width=120)
            longest = gr.Number(0, label="Or longest side, px", minimum=0, precision=0, min_width=120)
        w = gr.Slider(0, 1.5, 0.5, step=0.05, label="w", info="0 looks most real, 1 stays closest to the input")
        with gr.Row():
            steps = gr.Number(0, label="Steps (0: the model's)", minimum=0, precision=0, min_width=120)
            seed = gr.Number(0, label="Seed", minimum=0, precision=0, min_width=120)
        color_fix = gr.Radio(["wavelet", "adain", "none"], value="wavelet", label="Colours of the input by")
        face = gr.Checkbox(False, label="Refine faces")
        face_w = gr.Slider(0, 1, 0.7, step=0.05, label="w of the faces", info="0 quality, 1 fidelity", visible=False)
        return {
            "model": model,
            "scale": scale,
            "longest": longest,
            "w": w,
            "steps": steps,
            "seed": seed,
            "color-fix": color_fix,
            "face": face,
            "face-w": face_w,
        }

    def _restore_tab(self) -> None:
        job = gr.State("")
        last = gr.BrowserState("", storage_key="stablesr_restore", secret=BROWSER_SECRET)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                picture = gr.File(label="Picture (drop it here)", file_types=PICTURES, height=120, elem_id="picture")
                example = gr.Button("Use the example", size="sm")
                preset = gr.Dropdown(list(PRESETS), value=None, label="Kind of picture (sets what suits it)")
                main = self._main_options()
                background = gr.Checkbox(
                    True, label="Restore the background as well", info="Off: only enlarged", visible=False
                )
                with gr.Accordion("Advanced", open=False):
                    coarse = gr.Checkbox(False, label="Coarse: faster below the model's scale, with less detail")
                    tile = gr.Textbox(
                        "auto", label="Tiles", info="auto, none, or a side in pixels of the result", elem_id="tile"
                    )
                    tile_overlap = gr.Number(0, label="Overlap of tiles, px (0: a quarter)", minimum=0, precision=0)
                    max_memory = gr.Textbox("", label="Memory at most", placeholder="what is free; 6GB for instance")
                    mode = gr.Radio(["exact", "approximate"], value="exact", label="Coding of tiles")
                    attention = gr.Radio(["global", "windowed"], value="global", label="Attention of coding")
                    start = gr.Textbox("lq", label="Start", info="lq, noise, or a timestep such as 600")
                    prompt = gr.Textbox("", label="Prompt", info="needs a model with a text encoder")
                    negative = gr.Textbox("", label="Negative prompt")
                    guidance = gr.Number(1, label="Guidance scale", step=0.5)
            with gr.Column(scale=2, min_width=300):
                plan = gr.Markdown("", elem_id="plan")
                with gr.Row():
                    go = gr.Button("Restore", variant="primary", elem_id="go", min_width=120)
                    stop = gr.Button("Cancel", elem_id="stop", interactive=False, min_width=120)
                told = gr.HTML(_told("Drop a picture, then press Restore."), elem_id="told")
                preview = gr.Image(
                    label="Preview", visible=False, interactive=False, elem_id="preview", buttons=[], alt_text="Preview"
                )
                slider = gr.ImageSlider(
                    label="Before and after", type="filepath", interactive=False, elem_id="slider", max_height=900
                )
                download = gr.DownloadButton("Download the result", interactive=False, elem_id="download")
        w, color_fix, face, face_w = (main[name] for name in ("w", "color-fix", "face", "face-w"))
        options = {
            **main,
            "background": background,
            "coarse": coarse,
            "tile": tile,
            "tile-overlap": tile_overlap,
            "max-memory": max_memory,
            "mode": mode,
            "attention": attention,
            "start": start,
            "prompt": prompt,
            "negative-prompt": negative,
            "guidance-scale": guidance,
        }
        self.options = options
        names, parts = list(options), list(options.values())
        shown = (job, last, told, stop, preview, slider, download)

        def chosen(values: tuple[Any, ...], path: str) -> tuple[Command, dict[str, Any]]:
            return _options(dict(zip(names, values, strict=True)), lambda: _size_of_picture(path))

        async def take(path: str | None) -> AsyncIterator[Update]:
            """A picture was dropped: show it, and set the parameters it was made with, if it is a result."""
            yield {job: "", plan: "", download: gr.update(value=None, interactive=False), slider: None}
            shown_path, line = await self._taken(path, "picture")
            yield {told: line, slider: shown_path and (shown_path, shown_path)}
            if not shown_path or not path:
                return
            provenance = await run_in_threadpool(read_provenance, Path(path))
            if provenance:
                restored = _parameters_of(provenance, self.service)
                yield {options[name]: value for name, value in restored.items()}
                is_result = "This picture is a result: its parameters are set. Drop the picture it was made of to "
                yield {told: _told(f"{is_result}repeat it.")}

        async def tell_plan(path: str | None, *values: Any) -> str:
            def plan_of_picture(path: str) -> str:
                command, asked = chosen(values, path)
                size = open_picture(Path(path), max_pixels=self.service.limits.pixels)
                return "" if command == "faces" else self.service.plan(asked, size.height, size.width)

            return await self._plan(path, plan_of_picture)

        async def restore(request: gr.Request, path: str | None, *values: Any) -> AsyncIterator[Update]:
            if not path:
                yield {told: _told("There is no picture yet; drop one.", is_wrong=True)}
                return
            try:
                command, asked = chosen(values, path)
                accepted = await run_in_threadpool(self._submit, [path], asked, command, request, is_kept=True)
            except StableSRKitError as error:
                yield {told: _told(_line(error, path), is_wrong=True)}
                return
            async for update in self._followed(accepted, *shown):
                yield update

        async def again(job_id: str, new_w: float, new_fix: str, new_face_w: float) -> AsyncIterator[Update]:
            """Another w, colour fix or face strength: the last result is decoded again."""
            accepted = self.service.known(job_id)
            if accepted is None or accepted.state != "done":
                yield {told: gr.skip()}  # a generator without a yield empties its outputs
                return
            began = time.perf_counter()
            yield {told: _told("Decoding again.")}
            try:
                result = await run_in_threadpool(self.service.redecode, accepted, new_w, new_fix, new_face_w)
            except StableSRKitError as error:
                yield {told: _told(_line(error, ""), is_wrong=True)}
                return
            passed_s = time.perf_counter() - began
            yield {
                slider: (str(accepted.folder / "shown.jpg"), str(result)),
                download: gr.update(value=str(result), interactive=True),
                told: _told(f"Decoded again in {passed_s:.1f} s; nothing was sampled."),
            }

        async def go_on(job_id: str) -> AsyncIterator[Update]:
            """The page was opened again: follow the job that this browser handed in last."""
            accepted = self.service.known(job_id or "")
            yield {told: gr.skip()}
            if accepted is not None and accepted.command == "restore" and len(accepted.names) == 1:
                async for update in self._followed(accepted, *shown):
                    yield update

        def preset_values(kind: Preset) -> list[Any]:
            chosen_values = PRESETS[kind]
            has_faces = chosen_values.get("face") == "codeformer"
            return [chosen_values["w"], chosen_values["color_fix"], has_faces, chosen_values.get("face_w", gr.skip())]

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        taken = picture.change(
            take, picture, [job, plan, download, slider, told, *parts], trigger_mode="always_last", **quiet
        )
        taken.then(tell_plan, [picture, *parts], plan, **quiet)
        planned = [main[name] for name in ("scale", "longest", "steps", "model")]
        for part in (*planned, tile, tile_overlap, max_memory, mode, attention, guidance, coarse):
            part.change(tell_plan, [picture, *parts], plan, trigger_mode="always_last", **quiet)
        example.click(lambda: str(EXAMPLES / "portrait.jpg"), None, picture, **quiet)
        preset.input(preset_values, preset, [w, color_fix, face, face_w], **quiet)
        face.change(lambda on: [gr.update(visible=on)] * 2, face, [face_w, background], **quiet)
        go.click(restore, [picture, *parts], list(shown), trigger_mode="multiple", **quiet)
        stop.click(self._cancel, job, told, **quiet)
        for moved in (w, color_fix, face_w):
            moved.input(
                again, [job, w, color_fix, face_w], [slider, download, told], trigger_mode="always_last", **quiet
            )
        self.blocks.load(go_on, last, list(shown), **quiet)

    # Batch

    def _batch_tab(self) -> None:
        job = gr.State("")
        last = gr.BrowserState("", storage_key="stablesr_batch", secret=BROWSER_SECRET)
        gr.Markdown("Pictures, or zips of pictures, with the settings of the Restore tab. The results come as one zip.")
        pictures = gr.File(
            label="Pictures (drop them here)",
            file_count="multiple",
            file_types=[*PICTURES, ".zip"],
            height=200,
            elem_id="pictures",
        )
        with gr.Row():
            go = gr.Button("Restore all", variant="primary", elem_id="batch_go", min_width=120)
            stop = gr.Button("Cancel", interactive=False, elem_id="batch_stop", min_width=120)
        told = gr.HTML(_told(""), elem_id="batch_told")
        errors = gr.Dataframe(
            headers=["Picture", "Why it failed"], label="Failures", visible=False, interactive=False, wrap=True
        )
        download = gr.DownloadButton("Download the results", interactive=False, elem_id="batch_download")
        names, parts = list(self.options), list(self.options.values())
        shown = (job, last, told, stop, None, None, download)
        outputs = [part for part in shown if part is not None] + [errors]

        async def follow(accepted: Job) -> AsyncIterator[Update]:
            async for update in self._followed(accepted, *shown):
                lines = [[accepted.names[index], line] for index, line in sorted(accepted.errors.items())]
                yield update | {errors: gr.update(value=lines, visible=bool(lines))}

        async def restore(request: gr.Request, paths: list[str] | None, *values: Any) -> AsyncIterator[Update]:
            if not paths:
                yield {told: _told("There are no pictures yet; drop some.", is_wrong=True)}
                return
            try:
                command, asked = _options(dict(zip(names, values, strict=True)), None)
                accepted = await run_in_threadpool(self._submit, paths, asked, command, request)
            except StableSRKitError as error:
                yield {told: _told(_line(error, ""), is_wrong=True)}
                return
            async for update in follow(accepted):
                yield update

        async def go_on(job_id: str) -> AsyncIterator[Update]:
            accepted = self.service.known(job_id or "")
            yield {told: gr.skip()}
            if accepted is not None:
                async for update in follow(accepted):
                    yield update

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        go.click(restore, [pictures, *parts], outputs, trigger_mode="multiple", **quiet)
        stop.click(self._cancel, job, told, **quiet)
        self.blocks.load(go_on, last, outputs, **quiet)

    # Video

    def _video_tab(self) -> None:
        try:
            need_av()
        except ConfigError:
            gr.Markdown("Clips need PyAV, which is not installed: `pip install 'stablesr-kit[video]'`")
            return
        job = gr.State("")
        last = gr.BrowserState("", storage_key="stablesr_video", secret=BROWSER_SECRET)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                clip = gr.File(label="Clip (drop it here)", file_types=CLIPS, height=120, elem_id="clip")
                options = self._main_options()
                options["steady"] = gr.Dropdown(
                    list(STEADY.items()), value="bands", label="Steadiness", info="What holds a frame to those before"
                )
                options["container"] = gr.Dropdown(
                    [("as the clip", ""), *((ending, ending) for ending in FORMATS)], value="", label="Result as"
                )
                options["leave-out"] = gr.Checkbox(
                    False, label="Leave out what the result cannot hold", info="Subtitles in an .mp4, for instance"
                )
                with gr.Accordion("Advanced", open=False):
                    with gr.Row():
                        options["from"] = gr.Textbox("", label="From", placeholder="1:02:03.5", min_width=120)
                        options["to"] = gr.Textbox("", label="To", placeholder="the end", min_width=120)
                    with gr.Row():
                        options["frames"] = gr.Number(0, label="Frames (0: all)", minimum=0, precision=0, min_width=120)
                        options["chunk"] = gr.Number(4, label="Frames at once", minimum=1, precision=0, min_width=120)
                    options["deinterlace"] = gr.Checkbox(False, label="Make whole frames of interlaced ones")
                    options["crf"] = gr.Textbox(
                        "", label="Quality of the file (CRF)", info="lower is better", placeholder="16 to 20"
                    )
                    options["tile"] = gr.Textbox("auto", label="Tiles", info="auto, none, or a side in pixels")
                    options["max-memory"] = gr.Textbox("", label="Memory at most", placeholder="what is free")
            with gr.Column(scale=2, min_width=300):
                plan = gr.Markdown("", elem_id="video_plan")
                with gr.Row():
                    go = gr.Button("Restore", variant="primary", elem_id="video_go", min_width=120)
                    stop = gr.Button("Cancel", interactive=False, elem_id="video_stop", min_width=120)
                told = gr.HTML(_told("Drop a clip, then press Restore."), elem_id="video_told")
                preview = gr.Image(
                    label="Last frame that is done",
                    visible=False,
                    interactive=False,
                    elem_id="video_preview",
                    buttons=[],
                    alt_text="Last frame that is done",
                )
                result = gr.HTML("", elem_id="video_result")
                download = gr.DownloadButton("Download the result", interactive=False, elem_id="video_download")
        names, parts = list(options), list(options.values())
        shown = (job, last, told, stop, preview, result, download)

        def chosen(values: tuple[Any, ...], path: str) -> dict[str, Any]:
            return _options(dict(zip(names, values, strict=True)), lambda: _size_of_clip(path))[1]

        async def take(path: str | None) -> Update:
            """A clip was dropped: say at once if it cannot be one."""
            line = _told("Drop a clip, then press Restore." if not path else "Ready.")
            try:
                if path:
                    await run_in_threadpool(check_clip, Path(path), Path(path).name, Span(), 1, self.service.limits)
            except StableSRKitError as error:
                line = _told(_line(error, path or ""), is_wrong=True)
            nothing = gr.update(value=None, interactive=False)
            return {job: "", plan: "", told: line, download: nothing, result: ""}

        async def tell_plan(path: str | None, *values: Any) -> str:
            def plan_of_clip(path: str) -> str:
                return self.service.plan_of_clip(chosen(values, path), Path(path))

            return await self._plan(path, plan_of_clip)

        async def restore(request: gr.Request, path: str | None, *values: Any) -> AsyncIterator[Update]:
            if not path:
                yield {told: _told("There is no clip yet; drop one.", is_wrong=True)}
                return
            try:
                asked = await run_in_threadpool(chosen, values, path)
                accepted = await run_in_threadpool(self._submit, [path], asked, "restore", request)
            except StableSRKitError as error:
                yield {told: _told(_line(error, path), is_wrong=True)}
                return
            async for update in self._followed(accepted, *shown):
                yield update

        async def go_on(job_id: str) -> AsyncIterator[Update]:
            accepted = self.service.known(job_id or "")
            yield {told: gr.skip()}
            if accepted is not None:
                async for update in self._followed(accepted, *shown):
                    yield update

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        taken = clip.change(take, clip, [job, plan, told, download, result], trigger_mode="always_last", **quiet)
        taken.then(tell_plan, [clip, *parts], plan, **quiet)
        for name in ("scale", "longest", "steps", "model", "from", "to", "frames", "chunk", "tile", "max-memory"):
            options[name].change(tell_plan, [clip, *parts], plan, trigger_mode="always_last", **quiet)
        face, face_w = options["face"], options["face-w"]
        face.change(lambda on: gr.update(visible=on), face, face_w, **quiet)
        go.click(restore, [clip, *parts], list(shown), trigger_mode="multiple", **quiet)
        stop.click(self._cancel, job, told, **quiet)
        self.blocks.load(go_on, last, list(shown), **quiet)

    # Faces

    def _faces_tab(self) -> None:
        models = list(self.service.face_models)
        job = gr.State("")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                picture = gr.File(
                    label="Photo or face (drop it here)", file_types=PICTURES, height=120, elem_id="faces_picture"
                )
                mode = gr.Radio(
                    [
                        ("Whole photo", "whole"),
                        ("One aligned face", "aligned"),
                        ("Fill in a face", "inpaint"),
                        ("Colour a face", "colorize"),
                    ],
                    value="whole",
                    label="What to do",
                )
                model = gr.Dropdown(models, value=models[0], label="Face model", visible=len(models) > 1)
                w = gr.Slider(0, 1, 0.5, step=0.05, label="w of the faces", info="0 quality, 1 fidelity")
                with gr.Column() as of_whole:
                    upscale = gr.Number(2, label="Scale", minimum=0.1, maximum=8, step=0.5)
                    background = gr.Checkbox(True, label="Restore the background as well", info="Off: only enlarged")
                    upsampled = gr.Checkbox(
                        False, label="Enlarge the faces by the model as well", info="For large faces; off: only resized"
                    )
                    draw_box = gr.Checkbox(False, label="Outline the faces in the result")
                    find = gr.Button("Find the faces", size="sm", elem_id="find")
                    boxes = gr.Dataframe(
                        headers=["left", "top", "right", "bottom"],
                        datatype="number",
                        type="array",
                        label="Boxes in pixels; correct, remove or add rows, or leave it empty to find them",
                        interactive=True,
                        column_count=4,
                    )
            with gr.Column(scale=2, min_width=300):
                found = gr.AnnotatedImage(label="Faces", visible=False)
                painted = gr.ImageEditor(
                    label="Paint over what is to be filled in",
                    type="pil",
                    sources=(),
                    transforms=(),
                    brush=gr.Brush(colors=["#ffffff"], color_mode="fixed", default_size=24),
                    visible=False,
                    elem_id="painted",
                )
                with gr.Row():
                    go = gr.Button("Restore", variant="primary", elem_id="faces_go", min_width=120)
                    stop = gr.Button("Cancel", interactive=False, elem_id="faces_stop", min_width=120)
                told = gr.HTML(_told("Drop a photo, then press Restore."), elem_id="faces_told")
                slider = gr.ImageSlider(
                    label="Before and after", type="filepath", interactive=False, elem_id="faces_slider", max_height=900
                )
                download = gr.DownloadButton("Download the result", interactive=False, elem_id="faces_download")
        shown = (job, None, told, stop, None, slider, download)

        async def take(path: str | None, what: str) -> AsyncIterator[Update]:
            yield {found: gr.update(visible=False), boxes: [], job: "", slider: None}
            shown_path, line = await self._taken(path, "photo")
            yield {
                slider: shown_path and (shown_path, shown_path),
                painted: gr.update(value=shown_path, visible=bool(shown_path) and what == "inpaint"),
                told: line,
            }

        def of_mode(what: str) -> list[Any]:
            usual = {"inpaint": 1.0, "colorize": 0.0}.get(what, 0.5)
            shown_of = [gr.update(visible=one) for one in (what == "whole", what == "inpaint", False)]
            return [*shown_of, usual]

        async def look(path: str | None) -> Update:
            if not path:
                return {told: _told("There is no photo yet; drop one.", is_wrong=True)}
            try:
                photo = open_picture(Path(path), max_pixels=self.service.limits.pixels)
                pixels = await run_in_threadpool(lambda: photo.rgb)
                rows = await run_in_threadpool(self.service.find_faces, photo)
            except StableSRKitError as error:
                return {told: _told(_line(error, path), is_wrong=True)}
            corners = [[round(edge) for edge in row] for row in rows]
            labels = [(tuple(row), f"face {number}") for number, row in enumerate(corners, 1)]
            line = f"{len(rows)} faces found." if len(rows) != 1 else "One face found."
            return {boxes: corners, found: gr.update(value=(pixels, labels), visible=True), told: _told(line)}

        async def restore(
            path: str | None,
            what: str,
            name: str,
            strength: float,
            times: float,
            is_enhanced: bool,
            is_upsampled: bool,
            is_drawn: bool,
            rows: list[list[Any]] | None,
            editor: dict[str, Any] | None,
            request: gr.Request,
        ) -> AsyncIterator[Update]:
            if not path:
                yield {told: _told("There is no photo yet; drop one.", is_wrong=True)}
                return
            asked: dict[str, Any] = {"mode": what, "model": name, "w": strength}
            mask = None
            try:
                if what == "whole":
                    asked |= {"upscale": times, "background": "stablesr" if is_enhanced else "none"}
                    asked |= {"draw-box": is_drawn} | ({"face-upsampler": "stablesr"} if is_upsampled else {})
                    given = [row for row in rows or [] if any(cell not in (None, "") for cell in row)]
                    if given:
                        asked["faces"] = [{"box": [float(cell) for cell in row]} for row in given]
                elif what == "inpaint":
                    mask = await run_in_threadpool(_mask_of, editor, Path(path))
                accepted = await run_in_threadpool(self._submit, [path], asked, "faces", request, mask=mask)
            except ValueError:
                line = "A box is four numbers: left, top, right, bottom."
                yield {told: _told(line, is_wrong=True)}
                return
            except StableSRKitError as error:
                yield {told: _told(_line(error, path), is_wrong=True)}
                return
            async for update in self._followed(accepted, *shown):
                yield update

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        picture.change(take, [picture, mode], [found, boxes, job, slider, painted, told], **quiet)
        mode.change(of_mode, mode, [of_whole, painted, found, w], **quiet)
        find.click(look, picture, [boxes, found, told], **quiet)
        inputs = [picture, mode, model, w, upscale, background, upsampled, draw_box, boxes, painted]
        outputs = [part for part in shown if part is not None]
        go.click(restore, inputs, outputs, trigger_mode="multiple", **quiet)
        stop.click(self._cancel, job, told, **quiet)

    # What the tabs share

    def _submit(
        self,
        paths: list[str],
        options: Mapping[str, Any],
        command: Command,
        request: gr.Request,
        is_kept: bool = False,
        mask: Upload | None = None,
    ) -> Job:
        with ExitStack() as stack:
            uploads = [Upload(Path(path).name, stack.enter_context(Path(path).open("rb"))) for path in paths]
            return self.service.submit(
                uploads, options, command=command, user=str(request.session_hash), mask=mask, is_kept=is_kept
            )

    async def _followed(
        self,
        accepted: Job,
        job: Any,
        last: Any,
        told: Any,
        stop: Any,
        preview: Any,
        slider: Any,
        download: Any,
    ) -> AsyncIterator[Update]:
        """What the components show while a job waits, runs and ends; parts that a tab lacks are None."""

        def known(update: Update) -> Update:
            return {part: value for part, value in update.items() if part is not None}

        # Told again with all that follows: the browser may leave out one of two updates that come close together.
        running = {job: accepted.id, last: accepted.id, stop: gr.update(value="Cancel", interactive=True)}
        yield known(running)
        version, picture = -1, None
        while accepted.state not in ENDED:
            if accepted.version != version or accepted.state == "queued":
                version = accepted.version
                update: Update = running | {told: _progress(self.service.told(accepted))}
                if preview is not None and accepted.preview is not None and accepted.preview is not picture:
                    picture = accepted.preview
                    update[preview] = gr.update(value=picture, visible=True)
                yield known(update)
            await asyncio.sleep(LOOK_EVERY_S)
        ended: Update = {
            stop: gr.update(value="Cancel", interactive=False),
            preview: gr.update(visible=False, value=None),
        }
        if accepted.state != "done":
            line = next(iter(accepted.errors.values()), "failed") if accepted.state == "failed" else "Cancelled."
            yield known(ended | {told: _told(line, is_wrong=accepted.state == "failed")})
            return
        try:
            result = await run_in_threadpool(self.service.result, accepted)
            if accepted.clip:
                ended[slider] = _clips(accepted, result)
            elif slider is not None:
                before = await run_in_threadpool(_shown_picture, accepted.source(0), result, self.service)
                ended[slider] = (before, str(result))
        except (StableSRKitError, OSError) as error:
            yield known(ended | {told: _told(_line(error, ""), is_wrong=True)})
            return
        passed_s = (accepted.ended or accepted.accepted) - accepted.accepted
        failed = f", {len(accepted.errors)} failed" if accepted.errors else ""
        line = f"Done in {passed_s:.1f} s{failed}."
        yield known(
            ended | {told: _told(line, notes=accepted.notes), download: gr.update(value=str(result), interactive=True)}
        )

    async def _plan(self, path: str | None, plan_of: Callable[[str], str]) -> str:
        """The line that says before the start what will be made of a file, and what it takes."""
        if not path or self.service.engine == "ray":  # where the model is not here
            return ""
        if self.service.model_state != "ready" or self.service.is_busy:
            return "The plan is told when the model is free."
        try:
            line = await run_in_threadpool(plan_of, path)
        except StableSRKitError as error:
            return f"**{_line(error, path)}**"
        return line and f"**Result:** {line}"

    async def _cancel(self, job_id: str) -> str:
        accepted = self.service.known(job_id)
        if accepted is not None and accepted.state not in ENDED:
            await run_in_threadpool(self.service.cancel, accepted)
        return _told("Cancelling.")

    async def _taken(self, path: str | None, kind: str) -> tuple[str | None, str]:
        """Of a picture that was dropped: a copy that any browser shows, None if there is none, and what is told."""
        if not path:
            return None, _told(f"Drop a {kind}, then press Restore.")
        try:
            return await run_in_threadpool(_shown_picture, path, None, self.service), _told("Ready.")
        except StableSRKitError as error:
            return None, _told(_line(error, path), is_wrong=True)


def _options(values: dict[str, Any], size: Callable[[], tuple[int, int]] | None) -> tuple[Command, dict[str, Any]]:
    """Command and options of a tab's components. size: gives height and width of the input, for a longest side."""
    numbers = ("w", "face-w", "seed")  # of which 0 is one like any other
    options = {name: value for name, value in values.items() if name in numbers or value not in (None, "", 0)}
    longest = options.pop("longest", None)
    if longest:
        if size is None:
            raise Refused("a longest side is for one picture; give a scale")
        options["scale"] = longest / max(size())
    has_faces, is_enhanced = options.pop("face", False), options.pop("background", "background" not in values)
    face_w = options.pop("face-w", None)
    if has_faces and not is_enhanced:
        scale = options.get("scale", 4)
        return "faces", {"mode": "whole", "background": "none", "upscale": scale, "w": face_w}
    if has_faces:
        options |= {"face": "codeformer", "face-w": face_w}
    if options.get("guidance-scale") == 1:
        del options["guidance-scale"]
    if options.get("start") == "lq":
        del options["start"]
    return "restore", options


def _size_of_picture(path: str) -> tuple[int, int]:
    picture = open_picture(Path(path))
    return picture.height, picture.width


def _size_of_clip(path: str) -> tuple[int, int]:
    size = size_of_clip(Path(path), Span(count=1))
    return size.height, size.width


def _clips(job: Job, result: Path) -> str:
    """A clip and its result beside each other; the first follows the second."""
    with job.source(0).open("rb") as source:
        before = job.folder / f"shown{ending_for(source.read(CLIP_START), None)}"
    if not before.exists():
        before.hardlink_to(job.source(0))  # under a name by which a browser knows what it is
    addresses = [f"/gradio_api/file={quote(str(path))}" for path in (before, result)]
    follow = "const one = this.closest('.clips').querySelector('video'); one.currentTime = this.currentTime;"
    return (
        f'<div class="clips"><figure><video src="{addresses[0]}" muted playsinline preload="auto" aria-label="Before" '
        'onerror="this.parentElement.hidden = true"></video><figcaption>Before</figcaption></figure>'
        f'<figure><video src="{addresses[1]}" controls playsinline preload="auto" aria-label="After" '
        f'onplay="{follow} one.play()" onpause="{follow} one.pause()" onseeked="{follow}"></video>'
        "<figcaption>After</figcaption></figure></div>"
    )


def _parameters_of(provenance: Mapping[str, Any], service: Service) -> dict[str, Any]:
    """Values of the Restore tab's components that a result was made with."""
    names = {
        "scale": "scale",
        "w": "w",
        "steps": "steps",
        "seed": "seed",
        "color_fix": "color-fix",
        "face_w": "face-w",
        "vae_mode": "mode",
        "vae_attention": "attention",
        "overlap_px": "tile-overlap",
        "guidance_scale": "guidance-scale",
        "coarse": "coarse",
    }
    values = {name: provenance[key] or 0 for key, name in names.items() if key in provenance}
    values |= {"longest": 0, "face": provenance.get("face") == "codeformer"}
    texts = {"tile_px": "tile", "start": "start", "prompt": "prompt", "negative_prompt": "negative-prompt"}
    for key, name in texts.items():
        if key in provenance:
            values[name] = "" if provenance[key] is None else str(provenance[key])
    if provenance.get("model") in service.models:
        values["model"] = provenance["model"]
    return values


def _shown_picture(source: str | Path, result: Path | None, service: Service) -> str:
    """A copy of a picture that any browser shows, at the size of its result: what the slider compares with."""
    source = Path(source)
    path = source.with_name(f"{source.stem}_shown.jpg") if result is None else result.parent.parent / "shown.jpg"
    pixels = open_picture(source, max_pixels=service.limits.pixels).rgb
    if result is not None:
        made = open_picture(result, max_pixels=service.limits.result_pixels)
        pixels = pixels.resize((made.width, made.height), Image.Resampling.BICUBIC)
    pixels.save(path, quality=92)
    return str(path)


def _mask_of(editor: dict[str, Any] | None, path: Path) -> Upload:
    """White where the editor's layers are painted, at the picture's size. Raises Refused."""
    layers = (editor or {}).get("layers") or []
    painted = [np.asarray(layer.convert("RGBA"))[..., 3] > 0 for layer in layers]
    if not painted or not any(one.any() for one in painted):
        raise Refused("nothing is painted yet; paint over what is to be filled in")
    picture = open_picture(path)
    hole = Image.fromarray(np.any(painted, axis=0)).convert("L")
    content = io.BytesIO()
    hole.resize((picture.width, picture.height), Image.Resampling.NEAREST).save(content, "PNG")
    content.seek(0)
    return Upload("mask.png", content)


def _told(line: str, is_wrong: bool = False, notes: Sequence[str] = ()) -> str:
    """A line that screen readers speak, and what there is to say beside it."""
    role, kind = ("alert", "wrong") if is_wrong else ("status", "")
    more = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return f'<div class="told"><p role="{role}" class="{kind}">{html.escape(line)}</p>{more}</div>'


def _progress(told: Mapping[str, Any]) -> str:
    """A bar, what is done, and how long it will take."""
    if told["state"] == "queued":
        before = told.get("before_it", 0)
        return _told("Waiting for the model." if not before else f"Waiting; {before} before this one.")
    share = told["progress"]
    left = "" if told["eta_s"] is None else f", about {told['eta_s']:.0f} s left"
    line = html.escape(f"{told['doing'].capitalize()}: {share:.0%}{left}")
    bar = f'<progress max="1" value="{share:.3f}" aria-label="Progress"></progress>'
    return f'<div class="told">{bar}<p role="status">{line}</p></div>'


def _line(error: Exception, path: str) -> str:
    """What is wrong, without where files lie on this machine."""
    return one_line(str(error).replace(path, Path(path).name) if path else error)


def _about(service: Service) -> str:
    """Versions and models, and whose they are."""
    versions = {name: metadata.version(name) for name in ("stablesr-kit", "torch", "diffusers", "gradio")}
    lines = [
        f"stablesr-kit {__version__}, Apache-2.0. It restores by StableSR (Wang et al. 2024) and CodeFormer (Zhou et "
        "al. 2022).",
        "",
        "| part | version |",
        "|---|---|",
        *(f"| {name} | {version} |" for name, version in versions.items()),
        "",
        f"Models: {', '.join(service.models)}. Face models: {', '.join(service.face_models)}.",
        "",
        "The HTTP API of this server is described at [/docs](/docs).",
    ]
    return "\n".join(lines)
