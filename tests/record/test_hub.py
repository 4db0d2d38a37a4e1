"""A run's model on the hub: against a stand-in that answers as the hub does, and refuses what it refuses."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

import fedray
from fedray.presets import PRESETS
from fedray.record.card import model_card
from fedray.record.hub import push
from fedray.record.provenance import without_secrets

TOKEN = "hf_secret"
SHORT = "--rounds 1 --local-steps 1 --evaluate-samples 0 --actors 0"


class StandIn(ThreadingHTTPServer):
    """Repositories as files by name; large ones go the way of git LFS."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.repositories, self.objects, self.private, self.asked = {}, {}, {}, []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_PUT(self):
        data = self.body()
        self.server.objects[self.path.rpartition("/")[2]] = data
        assert hashlib.sha256(data).hexdigest() == self.path.rpartition("/")[2]
        self.answer({})

    def do_POST(self):
        server, data = self.server, self.body()
        server.asked.append(self.path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked['organization'] or 'somebody'}/{asked['name']}"
            if name in server.repositories:
                return self.answer({"url": f"{server.url}/{name}"}, 409)
            server.repositories[name] = {}
            server.private[name] = asked.get("visibility") == "private" or asked.get("private") is True
            return self.answer({"url": f"{server.url}/{name}", "name": name})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = json.loads(data)["files"]
            large = {file["path"]: file["path"].endswith(("safetensors", "png")) for file in files}
            modes = {path: "lfs" if is_large else "regular" for path, is_large in large.items()}
            told = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            return self.answer({"files": told})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(data)["objects"]
            return self.answer({"transfer": "basic", "objects": [
                each | {"actions": {"upload": {"href": f"{server.url}/objects/{each['oid']}"}}} for each in objects
            ]})  # fmt: skip
        name = "/".join(self.path.split("/")[3:5])
        for line in map(json.loads, data.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                server.repositories[name][value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                server.repositories[name][value["path"]] = server.objects[value["oid"]]
        return self.answer({"commitOid": "0" * 40, "commitUrl": f"{server.url}/{name}/commit/{'0' * 40}"})


@pytest.fixture
def hub():
    server = StandIn()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    from dataclasses import replace

    config = replace(
        PRESETS["digits"], rounds=1, local_epochs=None, local_steps=1, evaluate_samples=32, sampling_steps=2,
        kid_subset_size=16, actors=0,
    )  # fmt: skip
    return fedray.run(config, tmp_path_factory.mktemp("runs") / "digits")


def command(hub, *arguments, cwd=None):
    here = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0"}
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    line = [sys.executable, "-m", "fedray", *map(str, arguments)]
    return subprocess.run(line, env=environment | here, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_run_is_pushed_and_loads_again(digits, hub, tmp_path):
    flags = ["--hub-model-id", "somebody/digits", "--license", "apache-2.0", "--hub-token", TOKEN, "--hub-private-repo"]
    done = command(hub, "push", digits.directory, *flags)
    assert done.returncode == 0, done.stderr
    assert f"pushed    {hub.url}/somebody/digits" in done.stdout
    assert hub.private == {"somebody/digits": True}
    files = hub.repositories["somebody/digits"]
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    from diffusers import DDPMPipeline

    ours, theirs = digits.model().unet.state_dict(), DDPMPipeline.from_pretrained(tmp_path).unet.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert files["samples.png"] == (digits.directory / "samples.png").read_bytes()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.widget[0]["output"]["url"] == "samples.png"
    assert "![Which client holds what](partition.png)" in card.text
    assert "no noise was added" in card.text
    assert command(hub, "push", digits.directory, *flags).returncode == 0  # again, into the same repository


def test_the_card_has_the_scores_as_the_hub_reads_them(digits):
    card = ModelCard((digits.directory / "model/README.md").read_text())
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("diffusers", "unconditional-image-generation", None)
    found = {result.metric_name: result for result in data.eval_results}
    scores = digits.result["scores"]
    assert set(found) == {name for name in scores if not name.endswith("/real")}
    assert found["fd[digits]"].metric_value == scores["fd[digits]"]["value"]
    assert found["fd[digits]"].metric_type == "fd"
    assert found["fd[digits]"].metric_args["n"] == 32
    assert found["fd[digits]"].metric_args["features"].startswith("digits ")
    assert found["fd[digits]"].dataset_name == "digits"
    np.testing.assert_allclose(found["kid[digits]"].metric_args["std"], scores["kid[digits]"]["std"])


def test_the_card_names_a_base_of_the_hub_and_what_noise_proves(digits):
    settings = digits.saved["config"]
    task = settings["task"] | {"pretrained_model_name_or_path": "somebody/sd", "validation_prompt": ["a dog"]}
    spent = {"epsilon": 8.0, "delta": 1e-5, "repeatable": False, "neighbours": "clients", "accountant": "RDP"}
    result = digits.result | {"privacy": spent, "stopped": "enough"}
    text = model_card(settings | {"task": task}, result, ["fedray", "finetune"], "mit", ["validation.png"])
    data = ModelCard(text).data
    assert (data.base_model, data.pipeline_tag, data.license) == ("somebody/sd", "text-to-image", "mit")
    assert data.widget == [{"text": "a dog", "output": {"url": "validation.png"}}]
    assert "lora" in data.tags
    assert "ε = 8 at δ = 1e-05 for clients" in text
    assert "| ended early | enough |" in text


@pytest.mark.slow
def test_training_ends_with_the_push_and_the_token_is_written_nowhere(hub, tmp_path):
    done = command(hub, "train", *SHORT.split(), "--out", "mine", "--push-to-hub", f"--hub-token={TOKEN}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "README.md" in hub.repositories["somebody/mine"]
    written = [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert not written
    assert not any(TOKEN.encode() in content for content in hub.repositories["somebody/mine"].values())


@pytest.mark.slow
def test_what_is_refused(digits, hub, tmp_path):
    done = command(hub, "push", digits.directory, "--hub-model-id", "somebody/digits", "--hub-token", "wrong")
    assert done.returncode == 1
    assert done.stderr.startswith("fedray: somebody/digits could not be pushed to the hub: ")
    assert "Traceback" not in done.stderr
    shutil.copytree(digits.directory, tmp_path / "run")
    (tmp_path / "run/result.json").unlink()
    before = list(hub.asked)
    done = command(hub, "push", tmp_path / "run", "--hub-token", TOKEN)
    assert done.returncode == 2
    assert "is not complete" in done.stderr
    flags = ["train", "--rounds", "1", "--out", "new", "--push-to-hub", "--hub-model-id", "a/b/c"]
    done = command(hub, *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("fedray: --hub-model-id a/b/c: ")
    assert not (tmp_path / "new").exists()
    assert hub.asked == before


def test_a_hub_that_cannot_be_reached(digits, monkeypatch):
    from huggingface_hub import HfApi

    def away(*arguments, **named):
        raise ConnectionError("no network")

    monkeypatch.setattr(HfApi, "create_repo", away)
    with pytest.raises(fedray.RunError, match="x/y could not be pushed to the hub: no network; the run is kept"):
        push(digits, "x/y")


@pytest.mark.parametrize("name", ["model/unet/more.json", "model/more", "partition.png"])
def test_no_link_is_followed(digits, tmp_path, name):
    """A run directory may come from anyone: what it links to on this machine is not published."""
    shutil.copytree(digits.directory, tmp_path / "run")
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "run" / name).unlink(missing_ok=True)
    (tmp_path / "run" / name).symlink_to(tmp_path / "secret")
    with pytest.raises(fedray.UserError, match="is a link, and what it leads to is not pushed"):
        push(fedray.Run.open(tmp_path / "run"), "x/y")


def test_secrets_are_left_out_of_a_command():
    words = ["fedray", "train", "--hub-token", "a", "--hub_token=b", "--hub-token=c", "--rounds", "2"]
    assert without_secrets(words) == [
        "fedray", "train", "--hub-token", "…", "--hub-token=…", "--hub-token=…", "--rounds", "2"
    ]  # fmt: skip
