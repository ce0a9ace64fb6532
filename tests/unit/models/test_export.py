"""The exported folder: the files it has, and what plain diffusers makes of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from raysynth.core.identity import sha256_bytes
from raysynth.data.conditions import ConditionSpec
from raysynth.models.ddpm import DDPMTraining
from raysynth.models.export import WEIGHTS, export_generator
from tests.generators import FACTS, SPEC, exported, small


def test_files_and_their_hashes(tmp_path: Path) -> None:
    training = DDPMTraining(small(), SPEC.null, 1)
    files = export_generator(tmp_path, training.generator, training.ema.module, SPEC, FACTS)
    assert sorted(files) == [
        "README.md", "condition.json", "generator.json", "scheduler/scheduler_config.json", "unet/config.json", WEIGHTS,
    ]  # fmt: skip
    assert all(sha256_bytes((tmp_path / name).read_bytes()) == sha for name, sha in files.items())
    facts = json.loads((tmp_path / "generator.json").read_text())
    assert facts["weights_sha256"] == files[WEIGHTS]
    assert facts["n_real_generator"] == 8
    assert ConditionSpec.from_json((tmp_path / "condition.json").read_bytes()) == SPEC


def test_equal_runs_export_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        exported(tmp_path / name)
    for file in (tmp_path / "a").rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes(), file


def test_plain_diffusers_loads_the_moving_average(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    training = exported(tmp_path)
    plain = UNet2DConditionModel.from_pretrained(tmp_path / "unet").state_dict()
    averaged, raw = training.ema.module.state_dict(), training.unet.state_dict()
    assert all(torch.equal(plain[k], averaged[k]) for k in plain)
    assert any(not torch.equal(plain[k], raw[k]) for k in plain)


def test_the_model_cards_loop_runs_as_printed(tmp_path: Path) -> None:
    exported(tmp_path)
    card = (tmp_path / "README.md").read_text()
    found = re.search(r"```python\n(.*?)```", card, re.S)
    assert found
    code = found[1].replace('folder = "."', f"folder = {str(tmp_path)!r}").replace("timesteps(50)", "timesteps(3)")
    assert code.count("\n") <= 18
    scope: dict = {}
    exec(code, scope)  # noqa: S102 - the card's own text
    assert scope["image"].shape == (1, 1, 8, 8)
    assert scope["image"].dtype == torch.uint8
    assert "| 0 | `label=0` |" in card
