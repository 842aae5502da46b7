"""Files are untrusted: what is read, what is refused, and that nothing in a file is ever run."""

import os
import pickle
import random
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from stablesr_kit.checkpoints.reading import read_checkpoint
from stablesr_kit.errors import CheckpointError, UnsafeCheckpointError

WEIGHTS = {"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.bias": torch.ones(2, dtype=torch.float16)}


class Calls:
    """Pickles to a call of `function(*arguments)` when it is loaded."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call

    def __call__(self) -> None:
        """Only so that pickle takes the result of a call as a function."""


def leave_a_trace(path: str) -> None:
    """What a hostile file would do; importable by its name, as a real exploit is."""
    Path(path).write_text("run")


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for the Lightning of the official runs."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module: Any = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setitem(sys.modules, name, module)
    return module


def assert_weights(content: Any) -> None:
    assert content.keys() == WEIGHTS.keys()
    for name, tensor in WEIGHTS.items():
        assert torch.equal(content[name], tensor) and content[name].dtype == tensor.dtype, name


@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_is_read_from_either_torch_format(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "weights.ckpt"
    torch.save({"state_dict": WEIGHTS, "epoch": 117}, path, _use_new_zipfile_serialization=zipped)
    raw = read_checkpoint(path)
    assert_weights(raw.content["state_dict"])
    assert raw.content["epoch"] == 117 and raw.placeholders == ()


def test_safetensors_are_recognised_by_content_not_by_name(tmp_path: Path) -> None:
    path = tmp_path / "weights.ckpt"
    save_file(WEIGHTS, path)
    assert_weights(read_checkpoint(path).content)


def test_a_lightning_file_is_read_with_its_bookkeeping_replaced(
    tmp_path: Path, lightning: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    callback = lightning.ModelCheckpoint
    content = {
        "state_dict": WEIGHTS,
        "callbacks": {callback: {"best_model_score": np.float64(0.25), "dirpath": tmp_path}},
        "optimizer_states": [{"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}}],
        "hyper_parameters": callback(),
    }
    torch.save(content, path)
    monkeypatch.delitem(sys.modules, lightning.__name__)
    raw = read_checkpoint(path)
    assert lightning.__name__ not in sys.modules
    assert_weights(raw.content["state_dict"])
    assert "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint" in raw.placeholders
    assert any(name.startswith("numpy") for name in raw.placeholders)


def test_a_pickle_that_calls_the_system_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "evil.ckpt"
    torch.save({"state_dict": WEIGHTS, "x": Calls(os.system, f"touch {trace}")}, path)
    for tensors_only in (False, True):
        with pytest.raises(UnsafeCheckpointError, match=r"(posix|nt)\.system.*do not use") as caught:
            read_checkpoint(path, tensors_only=tensors_only)
        assert "\n" not in str(caught.value)
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["function", "eval", "call of a call"])
def test_unknown_objects_are_refused_by_default_and_inert_on_request(tmp_path: Path, kind: str) -> None:
    trace, path = tmp_path / "trace", tmp_path / "own.ckpt"
    code = f"open({str(trace)!r}, 'w').close()"
    hostile, name = {
        "function": (Calls(leave_a_trace, str(trace)), "leave_a_trace"),
        "eval": (Calls(eval, code), "builtins.eval"),
        "call of a call": (Calls(Calls(getattr, Calls(__import__, "builtins"), "exec"), code), "builtins.getattr"),
    }[kind]
    torch.save({"state_dict": WEIGHTS, "x": hostile}, path)
    with pytest.raises(UnsafeCheckpointError, match="tensors_only=True") as caught:
        read_checkpoint(path)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    if kind == "call of a call":
        with pytest.raises(UnsafeCheckpointError, match="unrecognized function"):
            read_checkpoint(path, tensors_only=True)
    else:
        assert_weights(read_checkpoint(path, tensors_only=True).content["state_dict"])
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the file of this test must be a working exploit"


def test_the_list_of_safe_names_is_as_before_after_reading(tmp_path: Path, lightning: Any) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": WEIGHTS, "callbacks": lightning.ModelCheckpoint()}, path)
    before = set(torch.serialization.get_safe_globals())
    read_checkpoint(path)
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
def test_plain_pickles_and_torchscript_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"weights": np.ones(3)}))
    with pytest.raises(UnsafeCheckpointError, match="pickle"):
        read_checkpoint(path)
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    with pytest.raises(UnsafeCheckpointError, match="TorchScript"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5214865159\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>Access denied</body></html>", "web page"),
        (b"\n  <html>", "web page"),
        (b'{"model": 1}', "JSON"),
        (b"GGUF\x03\0\0\0", "GGUF"),
        (b"\x1f\x8b\x08\0", "unpack"),
        (b"hello world, this is text", "not a weight file"),
        (bytes(64), "not a weight file"),
    ],
)
def test_a_file_of_another_kind_is_named_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "weights.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value) and "weights.ckpt" in str(caught.value)


@pytest.mark.parametrize("kind", ["torch", "torch before 1.6", "safetensors"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_a_truncated_file_is_named_in_one_line(tmp_path: Path, kind: str, share: float) -> None:
    path = tmp_path / "weights.ckpt"
    big = {"layer.weight": torch.randn(64, 64)}
    if kind == "safetensors":
        save_file(big, path)
    else:
        torch.save(big, path, _use_new_zipfile_serialization=kind == "torch")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["torch", "torch before 1.6", "safetensors"])
def test_damage_anywhere_is_one_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "weights.ckpt"
    small = {f"layer.{i}": torch.ones(2, 2) for i in range(8)}
    if kind == "safetensors":
        save_file(small, path)
    else:
        torch.save({"state_dict": small}, path, _use_new_zipfile_serialization=kind == "torch")
    whole, generator = path.read_bytes(), random.Random(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(generator.choice((1, 3, 20))):
            damaged[generator.randrange(min(len(damaged), 1500))] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            assert "\n" not in str(error)


def test_missing_files_folders_archives_and_bare_tensors_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_checkpoint(tmp_path / "absent.ckpt")
    with pytest.raises(CheckpointError, match="folder"):
        read_checkpoint(tmp_path)
    archive = tmp_path / "models.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("stablesr.ckpt", b"x")
    with pytest.raises(CheckpointError, match=r"stablesr\.ckpt; unpack it"):
        read_checkpoint(archive)
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    with pytest.raises(CheckpointError, match="holds a Tensor"):
        read_checkpoint(tmp_path / "tensor.pt")
