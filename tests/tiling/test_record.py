"""Encoding and decoding that are stopped anywhere go on from there to the same bits."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from stablesr_kit import Job, Tiling
from stablesr_kit.errors import JobError
from stablesr_kit.imaging.canvas import Canvas, View, assembled
from stablesr_kit.tiling.autoencoder import TiledAutoencoder
from stablesr_kit.tiling.scratch import Record
from tests.helpers.tiny import tiny_cfw, tiny_pipeline, tiny_vae, unit_noise

LEVELS = (1, 2)


@contextmanager
def counted_writes(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> Iterator[list[None]]:
    """The tiles written to disk meanwhile; the one numbered `stop_at` ends the process, as far as a test can."""
    writes: list[None] = []
    write = Canvas.write

    def counted(canvas: Canvas, *arguments: Any) -> None:
        if canvas.folder is not None:
            if len(writes) == stop_at:
                raise KeyboardInterrupt
            writes.append(None)
        write(canvas, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Canvas, "write", counted)
        yield writes


@pytest.mark.parametrize("mode", ["exact", "approximate"])
@torch.no_grad()
def test_a_walk_that_is_stopped_anywhere_repeats_one_tile(
    mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = tiny_vae(mid_block_add_attention=True)
    image = View(unit_noise(1, 3, 44, 52).clamp(-1, 1))
    autoencoder = TiledAutoencoder(vae, tiny_cfw(vae), tile_px=24 if mode == "exact" else 80, mode=mode)

    def code(record: Path | None) -> tuple[torch.Tensor, torch.Tensor]:
        moments, features = autoencoder.encode_with_features(
            image, LEVELS, None if record is None else record / "encode"
        )
        z = moments.to_tensor()[:, :4]
        return z, autoencoder.decode(z, features, 0.5, None if record is None else record / "decode").to_tensor()

    expected = code(None)
    with counted_writes(monkeypatch) as whole:
        assert all(torch.equal(*pair) for pair in zip(code(tmp_path / "whole"), expected, strict=True))
    stops = sorted({1, len(whole) // 5, len(whole) // 2, len(whole) - 1})
    done = 0
    for stop in stops:
        with counted_writes(monkeypatch, stop - done) as writes, pytest.raises(KeyboardInterrupt):
            code(tmp_path / "stopped")
        done += len(writes)
    with counted_writes(monkeypatch) as last:
        assert all(torch.equal(*pair) for pair in zip(code(tmp_path / "stopped"), expected, strict=True))
    repeated = done + len(last) - len(whole)
    assert 0 <= repeated <= (0 if mode == "exact" else 2 * len(stops))  # features of a tile are several writes
    with counted_writes(monkeypatch) as nothing:
        assert all(torch.equal(*pair) for pair in zip(code(tmp_path / "stopped"), expected, strict=True))
    assert not nothing


@pytest.mark.parametrize("mode", ["exact", "approximate"])
@torch.no_grad()
def test_tiles_are_counted_before_they_are_computed_and_told_when_they_are_done(mode: Any, tmp_path: Path) -> None:
    vae = tiny_vae(mid_block_add_attention=True)
    image = View(unit_noise(1, 3, 44, 52).clamp(-1, 1))
    autoencoder = TiledAutoencoder(vae, tiny_cfw(vae), tile_px=24 if mode == "exact" else 80, mode=mode)
    for record in (None, tmp_path, tmp_path):  # the last finds all of them done
        told: list[int] = []
        autoencoder.on_tiles = told.append
        moments, features = autoencoder.encode_with_features(image, LEVELS, record and record / "encode")
        assert sum(told) == autoencoder.encoding_tiles(image, LEVELS) > 1
        z = View(moments.to_tensor()[:, :4])
        told.clear()
        autoencoder.decode(z, features, 0.5, record and record / "decode")
        assert sum(told) == autoencoder.decoding_tiles(z, features, 0.5) > 1


def test_canvases_nobody_reads_any_more_are_deleted(tmp_path: Path) -> None:
    vae = tiny_vae()
    TiledAutoencoder(vae, tile_px=24).encode_with_features(unit_noise(1, 3, 48, 48), LEVELS, tmp_path / "record")
    left = sum(path.stat().st_size for path in tmp_path.rglob("*.canvas"))
    assert left < 4 * (48 * 48 * 8 * 4)  # the largest map


def test_a_record_of_other_tiles_or_of_before_a_crash_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record(tmp_path / "record", {"tile_px": 24})
    record.begin().done = 3
    record.save()
    assert Record(tmp_path / "record", {"tile_px": 24}).begin().done == 3
    assert Record(tmp_path / "record", {"tile_px": 12}).begin().done == 0
    record.folder.mkdir(exist_ok=True)
    record.save()
    booted = psutil.boot_time()
    monkeypatch.setattr(psutil, "boot_time", lambda: booted + 3600)
    assert Record(tmp_path / "record", {"tile_px": 24}).begin().done == 0
    assert list((tmp_path / "record").iterdir()) == []


def test_a_damaged_record_is_one_line(tmp_path: Path) -> None:
    Record(tmp_path / "record", {}).save()
    for content in (b"", b"text"):
        (tmp_path / "record" / "record.pt").write_bytes(content)
        with pytest.raises(JobError, match=r"record\.pt: the record cannot be read .*; start again") as caught:
            Record(tmp_path / "record", {})
        assert "\n" not in str(caught.value)


def test_a_call_goes_on_where_another_was_stopped_while_it_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = tiny_pipeline(with_text=False)
    image = View(unit_noise(1, 3, 9, 12).clamp(-1, 1))

    def call(record: Path | None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return assembled(
            pipeline(
                image,
                generator=generator,
                tiling=Tiling(tile_px=32, vae_tile_px=24),
                job=Job(record=record),
                output_type="canvas",
            ).images[0]
        )

    expected = call(None)
    with counted_writes(monkeypatch) as whole:
        assert torch.equal(call(tmp_path / "whole"), expected)
    with counted_writes(monkeypatch, len(whole) - 2), pytest.raises(KeyboardInterrupt):
        call(tmp_path / "stopped")
    with counted_writes(monkeypatch) as last:
        assert torch.equal(call(tmp_path / "stopped"), expected)
    assert len(last) == 2
