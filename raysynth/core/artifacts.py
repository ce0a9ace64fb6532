"""An artifact: the folder one stage writes, `<root>/<stage>/<name>-<fp12>/`, complete when `_SUCCESS` is there.

Its identity is (stage version, the stage's own config, content digests of its inputs). `run.json` says how it came
to be; `_SUCCESS` holds the content digest that later stages use as their input. Nothing is deleted on start.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from raysynth.core.errors import NotReady
from raysynth.core.identity import canonical_json, content_digest, fp12, plain, sha256_bytes
from raysynth.core.storage import Storage

STAGES = (
    "ingest", "view", "train-generator", "plan", "generate", "train-classifier", "predictions", "fidelity", "sweep",
    "evaluate", "report",
)  # fmt: skip
"""Folders of artifacts below a root, in the order they are made. What lies beside them is not ours to list or delete.
"""

RECORDED_PACKAGES = (
    "raysynth", "ray", "torch", "diffusers", "timm", "transformers", "pyarrow", "numpy", "pillow", "s3fs",
)  # fmt: skip


@dataclass
class Artifact:
    """Handle on one stage's folder. Create with `Artifact.at`; write with `put`/`register`, end with `commit`."""

    storage: Storage
    stage: str
    name: str
    identity: dict[str, Any]
    """`{"version", "config", "inputs"}`: what the folder's fp12 is made of."""
    outputs: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"{self.stage} is none of {', '.join(STAGES)}")

    @classmethod
    def at(
        cls, storage: Storage, stage: str, name: str, version: int, config: Any, inputs: dict[str, str]
    ) -> Artifact:
        """The artifact of this identity, whether or not it exists yet.

        Where another experiment under the same root has made it already, it is that one, under that one's name: two
        experiments share a generator, an arm or a view without training or decoding it twice.

        Args:
            version: the stage's version, bumped when its output changes for the same config and inputs.
            config: the stage's own part of the experiment (a dataclass or mapping), without `compute`.
            inputs: content digests by input name.
        """
        identity = {"version": version, "config": plain(config, "config"), "inputs": dict(inputs)}
        own = cls(storage, stage, name, identity)
        if not own.complete:
            for folder in storage.folders(stage):
                other = cls(storage, stage, folder.removesuffix(f"-{own.fp}"), identity)
                if other.path == f"{stage}/{folder}" and other.complete:
                    return other
        return own

    @classmethod
    def open(cls, storage: Storage, path: str) -> Artifact:
        """A complete artifact by its folder, relative to the root. Raises NotReady if it is not complete."""
        stage, _, folder = path.partition("/")
        found = cls(storage, stage, folder.rpartition("-")[0], {})
        try:
            run = json.loads(storage.get(f"{path}/run.json"))
        except FileNotFoundError:
            raise NotReady(f"{storage.url(path)} is not complete. Run `raysynth run` first.") from None
        found.identity = {k: run[k] for k in ("version", "config", "inputs")}
        return found

    @property
    def fp(self) -> str:
        """12 hex digits of this artifact's identity."""
        return fp12(self.identity)

    @property
    def path(self) -> str:
        """Folder, relative to the storage root."""
        return f"{self.stage}/{self.name}-{self.fp}"

    def file(self, name: str) -> str:
        """Path of one of this artifact's files, relative to the storage root."""
        return f"{self.path}/{name}"

    @property
    def complete(self) -> bool:
        """Whether the stage finished."""
        return self.storage.exists(self.file("_SUCCESS"))

    def digest(self) -> str:
        """Content digest, for the identity of what is built on this artifact. Raises if it is not complete."""
        try:
            return json.loads(self.storage.get(self.file("_SUCCESS")))["digest"]
        except FileNotFoundError:
            raise NotReady(
                f"{self.storage.url(self.path)} is not complete. Run `raysynth {self.stage}` or `raysynth run` first."
            ) from None

    def run_info(self) -> dict[str, Any]:
        """The stored `run.json`."""
        return json.loads(self.storage.get(self.file("run.json")))

    def put(self, name: str, data: bytes) -> None:
        """Writes an output file and records its hash."""
        self.storage.put(self.file(name), data)
        self.outputs[name] = sha256_bytes(data)

    def register(self, name: str, sha256: str) -> None:
        """Records an output that a worker wrote."""
        self.outputs[name] = sha256

    def commit(self, counts: dict[str, Any], gpu_seconds: float = 0.0, **more: Any) -> None:
        """Writes `config.yaml`, `run.json` and, last, `_SUCCESS`."""
        from omegaconf import OmegaConf

        digest = content_digest(self.outputs.items())
        self.storage.put(
            self.file("config.yaml"), OmegaConf.to_yaml(OmegaConf.create(self.identity["config"])).encode()
        )
        record = {
            "stage": self.stage,
            "name": self.name,
            "fp": self.fp,
            **self.identity,
            "command": sys.argv,
            "git": git_state(),
            "versions": package_versions(),
            "hardware": hardware(),
            "counts": counts,
            "seconds": round(time.time() - self.started, 3),
            "gpu_seconds": round(gpu_seconds, 3),
            **more,
            "outputs": dict(sorted(self.outputs.items())),
            "digest": digest,
        }
        self.storage.put(self.file("run.json"), (json.dumps(record, indent=1, default=str) + "\n").encode())
        self.storage.put(self.file("_SUCCESS"), canonical_json({"digest": digest}).encode())


def git_state() -> dict[str, Any]:
    """Commit and dirty flag of the working directory, or nulls outside a checkout."""

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = ask("status", "--porcelain")
    return {"commit": ask("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that shape results."""
    found = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """This machine, in words: where the driver ran. What rendered is in `render.json`."""
    import os

    return {"machine": platform.machine(), "system": platform.system(), "cpus": os.cpu_count()}
