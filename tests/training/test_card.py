"""A run leaves a model card beside its results, and uploads both where it is asked to."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard

from stablesr_kit.errors import ConfigError
from stablesr_kit.training.run.command_line import load_config
from stablesr_kit.training.run.config import RunConfig
from stablesr_kit.training.run.reporting import means_of, open_repository, read_records
from stablesr_kit.training.run.state import MANIFEST
from stablesr_kit.version import __version__
from tests.helpers.photo_files import save_photos
from tests.helpers.training_runs import run_program, tiny


class TinyHub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files needs; what was sent is in `server.received`."""

    def do_GET(self) -> None:
        self.reply({"name": "somebody", "type": "user", "orgs": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        received = self.server.received  # type: ignore[attr-defined]
        if self.path == "/api/repos/create":
            received["repository"] = json.loads(body)
            self.reply({"url": f"{huggingface_hub.constants.ENDPOINT}/somebody/{json.loads(body)['name']}"})
        elif self.path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            self.reply({"files": [{"path": file, "uploadMode": "regular", "shouldIgnore": False} for file in files]})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            received["files"] = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            url = f"{huggingface_hub.constants.ENDPOINT}/somebody/tiny/commit/{'0' * 40}"
            self.reply({"commitUrl": url, "commitOid": "0" * 40})

    def reply(self, content: object) -> None:
        encoded = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), TinyHub)
    server.received = {}  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_tiny")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_photos(tmp_path / "photos", 2, 32, 32)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRAIN_DATA", "photos")
    return tmp_path


def test_a_finished_run_is_uploaded_with_its_card(folder: Path, hub: ThreadingHTTPServer) -> None:
    call = tiny("train_autoencoder", "autoencoder", "--output_dir", "results/tiny", "--lr_scheduler", "constant")
    run_program(*call, "--max_train_steps", "2")
    manifest = Path("results/tiny/checkpoint-2", MANIFEST)
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"seconds": 1000}))
    shown = ["--validation_steps", "3", "--validation_hq_dir", "photos"]
    run_program(*call, "--max_train_steps", "3", *shown, "--push_to_hub", "true", "--hub_private", "true")
    received = hub.received  # type: ignore[attr-defined]
    assert received["repository"]["name"] == "tiny" and received["repository"]["visibility"] == "private"
    names = {"README.md", "config.yaml", "losses.jsonl", "log.txt", "vae/config.json", "validation/metrics.jsonl"}
    names |= {"vae/diffusion_pytorch_model.safetensors", "validation/step-000003/000.png"}
    assert names <= received["files"].keys()
    assert not [name for name in received["files"] if "checkpoint" in name or ".part" in name]

    card = ModelCard(received["files"]["README.md"].decode())
    data = card.data.to_dict()
    assert data["library_name"] == "diffusers" and "train_autoencoder" in data["tags"]
    assert f"Trained by `train_autoencoder` of stablesr-kit {__version__}" in card.text
    assert "| vae | AutoencoderKL |" in card.text
    assert "Started from nothing; trained on train_data_dir `photos`" in card.text
    assert "3 steps of 2 samples" in card.text and "training/train_autoencoder.py --config" in card.text
    records = read_records(folder / "results" / "tiny" / "losses.jsonl")[-2:]  # logging_steps
    assert f"| pixel | {means_of(records)['pixel']:.5g} |" in card.text
    *_, validation = read_records(folder / "results" / "tiny" / "validation" / "metrics.jsonl")
    assert f"| 3 | {validation['grid']:.5g} | {validation['psnr']:.5g} | {validation['ssim']:.5g} |" in card.text
    options = yaml.safe_load(card.text.partition("```yaml")[2].partition("```")[0])
    assert options == yaml.safe_load((folder / "results" / "tiny" / "config.yaml").read_text())
    assert float(card.text.partition(" samples in ")[2].partition(" s,")[0]) >= 1000  # of both calls


def test_without_a_login_or_a_hub_nothing_is_trained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(RunConfig, ["--output_dir", "run", "--max_train_steps", "1", "--push_to_hub", "true"])
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(folder / "no_token"))
    with pytest.raises(ConfigError, match=r"push_to_hub needs a login .* run `hf auth login`"):
        open_repository(config)
    monkeypatch.setenv("HF_TOKEN", "hf_tiny")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"push_to_hub cannot make the repository at http://127\.0\.0\.1:9"):
        open_repository(config)
    with pytest.raises(SystemExit, match="2"):
        run_program(*tiny("train_autoencoder", "autoencoder", "--output_dir", "run", "--push_to_hub", "true"))
    assert not (folder / "run" / "losses.jsonl").exists()
    with pytest.raises(ConfigError, match="hub_model_id=tiny is given without push_to_hub"):
        load_config(RunConfig, ["--output_dir", "run", "--max_train_steps", "1", "--hub_model_id", "tiny"])
