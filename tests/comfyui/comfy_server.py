"""A real ComfyUI with the pack installed as a user installs it: start, post workflows, fetch pictures, stop."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from comfy_install import Comfy
from PIL import Image

ROOT = Path(__file__).parents[2]
PACK = "instruct-pix2pix"
SHIPPED = (
    "__init__.py",
    "pyproject.toml",
    "requirements.txt",
    "nodes",
    "ip2p_engine",
    "web",
    "workflows",
    "subgraphs",
    "locales",
)
START_SECONDS, RUN_SECONDS = 600, 900
NOT_OFFERED = "Value not in list"  # ComfyUI's own words for a choice that is not there


@dataclass
class Run:
    """What one posted workflow did."""

    status: str
    """success, error or interrupted."""
    outputs: dict[str, Any]
    executed: list[str]
    """Node ids that ran; the others came from the cache."""
    error: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, list[Image.Image]] = field(default_factory=dict)
    """By node id."""
    seconds: float = 0.0

    @property
    def message(self) -> str:
        """The first line of the error, which is what the artist sees."""
        return str(self.error.get("exception_message", "")).strip().splitlines()[0] if self.error else ""

    def texts(self, node: str) -> list[str]:
        return [str(text) for text in self.outputs.get(node, {}).get("text", ())]


class Refused(Exception):
    """The server's validation said no; the argument is its JSON."""


class ComfyServer:
    """One ComfyUI process on a free port, with a base folder of its own."""

    def __init__(self, comfyui: Comfy, base: Path, *, pack: Path = ROOT, options: tuple[str, ...] = ()) -> None:
        self.comfyui, self.base, self.options = comfyui, base, options
        self.log = base / "server.log"
        install(pack, base)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> ComfyServer:
        command = [
            self.comfyui.python,
            "main.py",
            "--cpu",
            "--port",
            str(self.port),
            "--base-directory",
            str(self.base),
        ]
        command += ["--preview-method", "latent2rgb", "--disable-api-nodes", "--database-url", "sqlite:///:memory:"]
        command += self.options
        quiet = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        own = {"IP2P_CACHE": str(self.base / "cache")}
        environment = {**os.environ, **quiet, **own, **self.comfyui.environment}
        self.process = subprocess.Popen(
            command, cwd=self.comfyui.path, env=environment, stdout=self.log.open("w"), stderr=subprocess.STDOUT
        )
        started = time.monotonic()
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() - started > START_SECONDS:
                self.stop()
                raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.2)
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _answers(self) -> bool:
        try:
            self.get("/system_stats")
        except OSError:
            return False
        return True

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=60) as answer:
            body = answer.read()
        return json.loads(body) if "json" in answer.headers.get("Content-Type", "") else body

    def post(self, path: str, body: Any) -> Any:
        request = urllib.request.Request(
            f"{self.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise Refused(json.loads(error.read())) from error
        return json.loads(text) if text else None

    def object_info(self) -> dict[str, Any]:
        return self.get("/object_info")

    def submit(self, prompt: dict[str, Any], workflow: dict[str, Any] | None = None, client: str = "") -> str:
        extra = {} if workflow is None else {"extra_data": {"extra_pnginfo": {"workflow": workflow}}}
        body = {"prompt": prompt, "client_id": client or uuid.uuid4().hex, **extra}
        return self.post("/prompt", body)["prompt_id"]

    def run(self, prompt: dict[str, Any], workflow: dict[str, Any] | None = None, *, fetch: bool = True) -> Run:
        """Post a workflow in the API format, wait, and fetch its pictures."""
        started = time.monotonic()
        return self.wait(self.submit(prompt, workflow), started=started, fetch=fetch)

    def wait(self, prompt_id: str, *, started: float | None = None, fetch: bool = True) -> Run:
        started = time.monotonic() if started is None else started
        while time.monotonic() - started < RUN_SECONDS:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history and history[prompt_id].get("status", {}).get("status_str"):
                run = self._read(history[prompt_id], fetch)
                run.seconds = time.monotonic() - started
                return run
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI died:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.05)
        raise TimeoutError(f"{prompt_id} did not finish in {RUN_SECONDS} s:\n{self.log.read_text()[-4000:]}")

    def _read(self, entry: dict[str, Any], fetch: bool) -> Run:
        messages = dict(entry["status"]["messages"])
        error = messages.get("execution_error", {})
        status = "interrupted" if "execution_interrupted" in messages else entry["status"]["status_str"]
        cached = set(messages.get("execution_cached", {}).get("nodes", ()))
        run = Run(
            status=status,
            outputs=entry["outputs"],
            executed=[node for node in entry["prompt"][2] if node not in cached],
            error=error,
        )
        for node, output in entry["outputs"].items() if fetch else ():
            run.pictures[node] = [self.picture(image) for image in output.get("images", ())]
        return run

    def raw_picture(self, image: dict[str, str]) -> bytes:
        return self.get("/view?" + urllib.parse.urlencode(image))

    def picture(self, image: dict[str, str]) -> Image.Image:
        picture = Image.open(io.BytesIO(self.raw_picture(image)))
        picture.load()
        return picture

    def upload(self, picture: Image.Image, name: str) -> str:
        """Put a picture into the input folder, as the upload button does."""
        folder = self.base / "input"
        folder.mkdir(exist_ok=True)
        picture.save(folder / name)
        return name

    def memory(self) -> int:
        """Resident bytes of the server."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("the system does not tell a process's memory")


def install(pack: Path, base: Path) -> Path:
    """Copy what a user gets into custom_nodes."""
    target = base / "custom_nodes" / PACK
    if target.exists():
        return target
    target.mkdir(parents=True)
    for name in SHIPPED:
        source = pack / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, target / name)
    return target


def succeed(run: Run) -> Run:
    """The run, if it ended well."""
    assert run.status == "success", run.message
    return run


def complaint(server: ComfyServer, prompt: dict[str, Any]) -> str:
    """What the artist is told of a workflow that cannot run: by its node, or, of choices in newer versions, before."""
    try:
        run = server.run(prompt)
    except Refused as refusal:
        errors = [error for node in refusal.args[0]["node_errors"].values() for error in node["errors"]]
        return f"{errors[0]['message']}: {errors[0]['details']}"
    assert run.status == "error"
    return run.message


def difference(one: Image.Image, two: Image.Image) -> float:
    """Mean absolute difference in levels of 255."""
    return float(np.abs(np.asarray(one.convert("RGB"), float) - np.asarray(two.convert("RGB"), float)).mean())
