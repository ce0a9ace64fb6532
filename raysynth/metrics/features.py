"""Images -> the features that real and synthetic images are compared in.

Knows no labels, files of images, or what is done with the features. Input: uint8 images; output: float32 features.
Only `pixels` needs no torch, which is why torch is imported where it is used.

* `pixels`: area-resized to at most 16 px a side, flattened, in [0, 1]. Sees no detail: 120 chest films of 224 px
  blurred to 32 px are as near to 120 others as sharp ones are (Frechet .73, floor .83); EfficientNet-Lite0 puts them
  at 5.5 times its floor.
* `inception`: clean-fid's InceptionV3 with clean-fid's resizing (Parmar 2022, 2104.11222). The Frechet distance of
  these features, and of no others, is called FID (Heusel 2017, 1706.08500).
* `timm:NAME`: the pooled features of a pretrained timm model; `timm:NAME@FILE` with weights of one's own.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raysynth.core.errors import ConfigError, EnvironmentFault
from raysynth.core.identity import file_digest

if TYPE_CHECKING:
    import torch

KEY = "evaluation.fidelity.extractor"
PIXELS_SIDE = 16
INCEPTION = "Inception, clean-fid"
INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_SIDE = 299
REMEDY = "Use `timm:NAME@/weights.safetensors` with weights of your own, or `pixels`."


@dataclass(frozen=True)
class Extractor:
    """What turns images into features. Call it: (B, H, W, C) uint8, C 1 or 3 -> (B, D) float32."""

    name: str
    """For people; part of every result."""
    weights: str
    """sha256 of the weights in use, empty where there are none."""
    features: Callable[[np.ndarray], np.ndarray]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self.features(images)


def blind_spot(kind: str, size: int) -> str:
    """What an extractor cannot see of images of a size, in words for a note; empty where nothing was found."""
    if kind != "pixels" or size <= PIXELS_SIDE:
        return ""
    return f"{PIXELS_SIDE} px of {size}: blur and other detail do not count"


def extractor_identity(kind: str) -> dict[str, str]:
    """What decides the features, without loading a model or asking a network.

    A weights file counts by its content, wherever it lies. Weights that a library fetches count by the library's
    version; the sha256 of what was fetched is known once it is loaded (`Extractor.weights`).

    Args:
        kind: `evaluation.fidelity.extractor`.

    Raises:
        ConfigError: the weights file is not there; no such kind.
    """
    if kind == "pixels":
        return {"extractor": kind, "weights": f"at most {PIXELS_SIDE} px"}
    if kind == "inception":
        return {"extractor": kind, "weights": f"clean-fid {version('clean-fid')}"}
    name, file = _timm_parts(kind)
    weights = _file_digest(file) if file else f"timm {version('timm')}"
    return {"extractor": f"timm:{name}", "weights": weights}


def check_extractor(kind: str) -> None:
    """Raises the ConfigError that `make_extractor` would, without loading weights. Arguments as there."""
    extractor_identity(kind)
    if kind.startswith("timm:"):
        _check_timm(_timm_parts(kind)[0])


def make_extractor(kind: str, cache: str, device: str = "cpu") -> Extractor:
    """The extractor of a configuration's name, with its weights loaded.

    Args:
        kind: `pixels`, `inception`, `timm:NAME`, `timm:NAME@FILE`.
        cache: local folder for the Inception weights; `~` is expanded.
        device: torch device.

    Raises:
        ConfigError: no such kind or timm model; the weights file is not there or is not that model's.
        EnvironmentFault: weights that a library would fetch cannot be had here.
    """
    if kind == "pixels":
        return Extractor("pixels", "", pixel_features)
    if kind == "inception":
        return _inception(Path(cache).expanduser() / "inception", device)
    return _timm(*_timm_parts(kind), device)


def pixel_features(images: np.ndarray) -> np.ndarray:
    """Area-resized pixels: (B, H, W, C) uint8 -> (B, min(H, 16) * min(W, 16) * C) float32 in [0, 1]."""
    rows, columns = (_area_weights(side) for side in images.shape[1:3])
    small = np.einsum("ih,bhwc,jw->bijc", rows, images.astype(np.float32), columns, optimize=True)
    return (small / 255).reshape(len(images), -1).astype(np.float32)


def _area_weights(side: int) -> np.ndarray:
    """(S, side): the share of each old pixel in each of S = min(side, 16) new ones."""
    edges = np.linspace(0, side, min(side, PIXELS_SIDE) + 1)
    old = np.arange(side)
    overlap = np.minimum(edges[1:, None], old + 1) - np.maximum(edges[:-1, None], old)
    return (np.clip(overlap, 0, None) / (edges[1] - edges[0])).astype(np.float32)


def _inception(folder: Path, device: str) -> Extractor:
    import torch
    from cleanfid.inception_torchscript import InceptionV3W
    from cleanfid.resize import build_resizer

    file = _inception_file(folder)
    try:
        model = InceptionV3W(str(folder), download=False).to(device).eval()
    except RuntimeError as error:
        raise EnvironmentFault(
            f"{KEY}: {file} is not the Inception network ({str(error).splitlines()[0]}). Delete it and run again."
        ) from error
    resize = build_resizer("clean")

    def features(images: np.ndarray) -> np.ndarray:
        batch = np.stack([resize(image) for image in _rgb(images)])
        with torch.inference_mode():
            found = model(torch.from_numpy(batch).permute(0, 3, 1, 2).to(device))
        return found.float().cpu().numpy()

    return Extractor(INCEPTION, _file_digest(str(file)), features)


def _inception_file(folder: Path) -> Path:
    """The Inception weights, fetched by clean-fid on first use: whole or not at all."""
    from cleanfid.downloads_helper import check_download_inception, inception_url

    file = folder / INCEPTION_FILE
    if file.is_file():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        try:
            os.replace(check_download_inception(fpath=scratch), file)
        except OSError as error:
            raise EnvironmentFault(
                f"{KEY}: the Inception weights cannot be fetched here ({error}). Put {inception_url} at {file} on "
                f"every node. {REMEDY}"
            ) from error
    return file


def _timm_parts(kind: str) -> tuple[str, str]:
    """`timm:NAME@FILE` -> NAME and FILE; FILE is empty for weights from the hub."""
    prefix, _, name = kind.partition(":")
    if prefix != "timm" or not name:
        raise ConfigError(KEY, kind, "pixels, inception, timm:NAME or timm:NAME@FILE")
    if name.startswith("hf-hub:"):  # whose own `@` is a revision
        return name, ""
    name, _, file = name.partition("@")
    return name, str(Path(file).expanduser()) if file else ""


def _check_timm(name: str) -> None:
    import timm

    if not name.startswith("hf-hub:") and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        raise ConfigError(KEY, f"timm:{name}", "the name of a timm model", f"Did you mean {near[0]}?" if near else "")


def _timm(name: str, file: str, device: str) -> Extractor:
    import timm
    import torch

    _check_timm(name)
    model = _model_from_file(name, file) if file else _model_from_hub(name)
    model = model.to(device).eval()
    data: dict[str, Any] = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(data[k], device=device)[:, None, None] for k in ("mean", "std"))
    mode = data["interpolation"] if data["interpolation"] in ("bilinear", "bicubic") else "bicubic"

    def features(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            batch = torch.from_numpy(_rgb(images)).to(device).permute(0, 3, 1, 2).float() / 255
            # The whole image, not the centre crop of ImageNet's protocol: findings lie at the border, too.
            batch = torch.nn.functional.interpolate(batch, data["input_size"][1:], mode=mode, antialias=True)
            return model((batch.clamp(0, 1) - mean) / std).flatten(1).float().cpu().numpy()

    weights = _file_digest(file) if file else _state_digest(model)
    return Extractor(f"{name}, {Path(file).name} {weights[:8]}" if file else name, weights, features)


def _model_from_hub(name: str) -> torch.nn.Module:
    import timm
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return timm.create_model(name, pretrained=True, num_classes=0)
    except (OSError, HfHubHTTPError) as error:
        raise EnvironmentFault(
            f"{KEY}: timm's weights of {name} cannot be fetched here ({str(error).splitlines()[0]}). {REMEDY}"
        ) from error
    except RuntimeError as error:
        raise ConfigError(KEY, f"timm:{name}", "a timm model that has pretrained weights", str(error)) from error


def _model_from_file(name: str, file: str) -> torch.nn.Module:
    """The model without its head, every weight of it from the file: a missing one would stay random."""
    import timm
    from timm.models import load_state_dict

    model = timm.create_model(name, pretrained=False, num_classes=0)
    if not Path(file).is_file():
        raise ConfigError(KEY, file, "a weights file", "It must be at this path on every node.")
    try:
        missing = model.load_state_dict(load_state_dict(file, weights_only=True), strict=False).missing_keys
    except Exception as error:  # safetensors, torch and timm each have errors of their own
        raise ConfigError(
            KEY, file, f"weights of timm's {name} as safetensors or a plain state dict", str(error).splitlines()[0]
        ) from error
    if missing:
        raise ConfigError(
            KEY, file, f"every weight of timm's {name}", f"{len(missing)} are not in the file, such as {missing[0]}."
        )
    return model


def _rgb(images: np.ndarray) -> np.ndarray:
    return images if images.shape[3] == 3 else np.repeat(images, 3, axis=3)


def _file_digest(file: str) -> str:
    try:
        return file_digest(file)
    except FileNotFoundError:
        raise ConfigError(KEY, file, "a weights file", "It must be at this path on every node.") from None


def _state_digest(model: torch.nn.Module) -> str:
    import torch

    whole = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        whole.update(name.encode() + value.cpu().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
