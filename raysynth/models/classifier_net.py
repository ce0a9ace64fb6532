"""The classifier's network: a timm backbone without its classes, input normalisation, and a head of our own.

    images -> (images / 255 - mean) / std -> backbone -> features -> [Linear - ReLU]* -> dropout -> Linear -> logits

From scratch the normalisation maps pixels to [-1, 1]; pretrained weights bring the mean and standard deviation they
were trained with (for grey images the mean of the three), and their first convolution is adapted as timm does (the sum
over input channels). Input: a `core.evidence.Classifier`; output: a torch module. Knows nothing of losses or data.
"""

from __future__ import annotations

import difflib
from itertools import pairwise
from typing import Any

import timm
import torch
from timm.models import load_state_dict

from raysynth.core.errors import ConfigError, EnvironmentFault, require
from raysynth.core.evidence import Classifier

BACKBONE = "backbone."


class ClassifierNet(torch.nn.Module):
    """Backbone and head behind one input normalisation.

    Args:
        backbone: (B, C, H, W) float -> (B, features).
        features: width of the backbone's output.
        hidden: widths of the head's hidden layers.
        n_classes: width of the last layer.
        mean: of every channel, of pixels in [0, 1]; one value, or one a channel.
        std: likewise.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, backbone: torch.nn.Module, features: int, hidden: list[int], n_classes: int, mean: Any, std: Any
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = make_head(features, hidden, n_classes)
        # In the state, so that weights and the scale of their input cannot be parted.
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, images: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, L) of images (B, C, H, W) float in [0, 1].

        Args:
            keep: (B, width) factors of the last layer's input, the dropout; None: none.
        """
        features = self.head[:-1](self.backbone((images - self.mean) / self.std))
        return self.head[-1](features if keep is None else features * keep)


def make_head(features: int, hidden: list[int], n_classes: int) -> torch.nn.Sequential:
    """Linear-ReLU for every hidden width, then Linear, freshly drawn from torch's global stream."""
    layers: list[torch.nn.Module] = []
    for before, width in pairwise([features, *hidden]):
        layers += [torch.nn.Linear(before, width), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear([features, *hidden][-1], n_classes))


def build_classifier(classifier: Classifier, n_classes: int, channels: int, weights: bool = True) -> ClassifierNet:
    """The network with its initial weights, which depend on `classifier.seed` and `classifier.init` alone.

    Args:
        classifier: resolved.
        n_classes: classes or findings.
        channels: 1 for grey, 3 for RGB.
        weights: False leaves `init` aside: the weights are loaded later.

    Raises:
        ConfigError: no such architecture, arguments it does not take, images too small for it, weights that do not fit.
        EnvironmentFault: the hub that has the weights cannot be reached.
    """
    name, init = classifier.architecture, classifier.init if weights else "scratch"
    _check_name(name)
    arguments = _arguments(classifier, channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(classifier.seed)
        mean: Any = 0.5
        std: Any = 0.5
        try:
            if init == "scratch":
                backbone = timm.create_model(name, num_classes=0, **arguments)
            elif init == "pretrained" or init.startswith("hf-hub:"):
                backbone = _from_hub(classifier, arguments)
                mean, std = _scale(backbone, channels)
            else:
                backbone, scale = _from_file(classifier, channels, arguments)
                mean, std = scale or _scale(backbone, channels)
        except TypeError as e:
            raise ConfigError(
                "classifier.arguments", {**classifier.arguments, "drop_path": classifier.drop_path},
                f"arguments that {name} takes", str(e),
            ) from e  # fmt: skip
        features = _features(backbone, classifier, channels)
        return ClassifierNet(backbone, features, list(classifier.head), n_classes, mean, std)


def check_classifier(classifier: Classifier, channels: int) -> None:
    """Raises the ConfigError that `build_classifier` would, before there is anything to train on.

    The network is drawn on paper only (torch's meta device): a quarter of a second, no memory, nothing fetched. Whether
    a hub can be reached and whether a file's weights fit is known when they are loaded.
    """
    _check_name(classifier.architecture)
    if classifier.weights_file is None and classifier.init != "scratch":  # a file is there
        _check_hub(classifier)
    with torch.device("meta"):
        build_classifier(classifier, 2, channels, weights=False)


def _check_name(name: str) -> None:
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=3)
        raise ConfigError(
            "classifier.architecture", name, "a timm model", f"Did you mean {', '.join(near)}?" if near else ""
        )
    known = timm.list_models(f"{base}.*", pretrained=True)
    if tag and name not in known:
        raise ConfigError(
            "classifier.architecture", name, f"{base}, or with weights {', '.join(known) or 'none'}",
            "What follows the dot names pretrained weights.",
        )  # fmt: skip


def _check_hub(classifier: Classifier) -> None:
    name = classifier.architecture
    if classifier.init != "pretrained":
        require("/" in classifier.init, "classifier.init", classifier.init, "hf-hub:OWNER/NAME")
        return
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise ConfigError(
            "classifier.init", "pretrained", f"scratch, hf-hub:ID or a weights file for {name}",
            "timm has no weights for it.",
        )  # fmt: skip


def _arguments(classifier: Classifier, channels: int) -> dict[str, Any]:
    found: dict[str, Any] = {"in_chans": channels}
    if classifier.drop_path:
        found["drop_path_rate"] = classifier.drop_path
    config = timm.get_pretrained_cfg(classifier.architecture)
    # Models of a fixed input size (most ViTs) make their position embeddings for the size they are told.
    if config is not None and config.fixed_input_size:
        found["img_size"] = classifier.size
    return {**found, **classifier.arguments}


def _from_hub(classifier: Classifier, arguments: dict[str, Any]) -> torch.nn.Module:
    name = classifier.architecture
    _check_hub(classifier)
    source = name if classifier.init == "pretrained" else classifier.init
    try:
        with torch.random.fork_rng(devices=[]):
            # Only with the classes it was trained for does timm insist on every layer.
            timm.create_model(source, pretrained=True, **arguments)
        backbone = timm.create_model(source, pretrained=True, num_classes=0, **arguments)
    except OSError as e:
        raise EnvironmentFault(
            f"classifier.init: the weights of {source} could not be fetched ({type(e).__name__}: {e}). Where there is "
            "no network, download them elsewhere and give classifier.init the file."
        ) from e
    except RuntimeError as e:
        raise ConfigError(
            "classifier.init", classifier.init, f"weights of {name} in every layer", str(e)[:1000]
        ) from e
    found = getattr(backbone, "pretrained_cfg", {}).get("architecture")
    if found != name.partition(".")[0]:
        raise ConfigError(
            "classifier.architecture", name, f"the architecture of {source}", f"Set classifier.architecture={found}."
        )
    return backbone


def _from_file(
    classifier: Classifier, channels: int, arguments: dict[str, Any]
) -> tuple[torch.nn.Module, tuple[Any, Any] | None]:
    """The backbone with the weights of a local file, and the normalisation where the file has it (our own export)."""
    name, file = classifier.architecture, classifier.weights_file
    try:
        state = load_state_dict(str(file), weights_only=True)
    except Exception as e:  # every format's reader has errors of its own for a file that is not one
        raise ConfigError("classifier.init", str(file), "a .safetensors file or tensors saved by torch", str(e)) from e
    scale = None
    if "mean" in state and "std" in state:
        scale = tuple(_for_channels(state[k].flatten(), channels) for k in ("mean", "std"))
        state = {k.removeprefix(BACKBONE): v for k, v in state.items() if k.startswith(BACKBONE)}
    config = timm.get_pretrained_cfg(name)
    last = config.classifier if config is not None else None
    lasts = [last] if isinstance(last, str) else list(last or [])
    weight = next((state[f"{k}.weight"] for k in lasts if f"{k}.weight" in state), None)
    # Told as many classes as the file has, timm loads strictly; our own head comes in place of them.
    classes = 0 if weight is None else len(weight)
    overlay: dict[str, Any] = {
        "state_dict": state, "num_classes": classes, "label_offset": 0, "custom_load": False,
    }  # fmt: skip
    first = config.first_conv if config is not None else None
    conv = state.get(f"{first}.weight") if isinstance(first, str) else None
    if conv is not None and conv.ndim == 4 and conv.shape[1] in (1, 3) and config is not None:
        overlay["input_size"] = (conv.shape[1], *(config.input_size or (3, 224, 224))[1:])
    try:
        backbone = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes, **arguments
        )
    except (RuntimeError, KeyError, AssertionError) as e:
        raise ConfigError("classifier.init", str(file), f"weights of {name} in every layer", str(e)[:1000]) from e
    if classes:
        strip: Any = backbone.reset_classifier
        strip(0)
    return backbone, scale  # type: ignore[return-value]


def _scale(backbone: torch.nn.Module, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    config: Any = backbone.pretrained_cfg
    return tuple(_for_channels(torch.tensor(config[k]), channels) for k in ("mean", "std"))  # type: ignore[return-value]


def _for_channels(values: torch.Tensor, channels: int) -> torch.Tensor:
    return values if len(values) in (1, channels) else values.mean(0, keepdim=True)


def _features(backbone: torch.nn.Module, classifier: Classifier, channels: int) -> int:
    # timm's own numbers name the width before or after a last convolution, by architecture: a forward tells.
    size = classifier.size or 0
    try:
        with torch.no_grad():
            output = backbone.eval()(torch.zeros(1, channels, size, size))
    except (RuntimeError, AssertionError, ValueError) as e:
        raise ConfigError(
            "classifier.size", size, f"an image side that {classifier.architecture} takes", str(e)[:500]
        ) from e
    if output.dim() != 2 or not output.numel():
        raise ConfigError(
            "classifier.architecture", classifier.architecture, f"a model that pools images of {size} pixels to a "
            "vector", f"Its output has the shape {tuple(output.shape)}.",
        )  # fmt: skip
    return int(output.shape[1])
