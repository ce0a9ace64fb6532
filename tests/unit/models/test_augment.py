"""Augmentation and mixing: what each modality allows, and draws that belong to a place in the global batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from raysynth.models.augment import RANGES, augment, dropout_mask, mix
from tests.classifiers import BATCH, tiny
from tests.digits import digit_images

PLACES = np.arange(BATCH)
PART = np.array([4, 5, 10, 11])
EVERY = sorted({(modality, strength) for modality, strength in RANGES})


def digits(size: int = 8) -> torch.Tensor:
    images = torch.from_numpy(digit_images()[0][:BATCH]).permute(0, 3, 1, 2).float() / 255
    return torch.nn.functional.interpolate(images, size=(size, size), mode="bilinear")


@pytest.mark.parametrize(("modality", "strength"), EVERY)
def test_draws_belong_to_step_and_place(modality: str, strength: str) -> None:
    classifier, images = tiny(augmentation=strength, mixup=0.4, cutmix=1.0, dropout=0.5), digits()
    whole = augment(images, classifier, modality, 3, PLACES)
    assert torch.equal(augment(images[PART], classifier, modality, 3, PART), whole[PART])
    assert not torch.equal(augment(images, classifier, modality, 4, PLACES), whole)
    mixed, kept = mix(images, classifier, 3, PLACES)
    part, share = mix(images[PART], classifier, 3, PART)
    assert kept is not None
    assert share is not None
    torch.testing.assert_close(part, mixed[PART])
    torch.testing.assert_close(share, kept[PART])
    masks = [dropout_mask(classifier, 9, 3, places) for places in (PLACES, PART)]
    assert masks[0] is not None
    assert masks[1] is not None
    assert (masks[0][PART] == masks[1]).all()


def test_none_leaves_images_as_they_are() -> None:
    assert augment(digits(), tiny(augmentation="none"), "chest", 0, PLACES) is not None
    assert torch.equal(augment(digits(), tiny(augmentation="none"), "chest", 0, PLACES), digits())


def left_brighter(modality: str, strength: str) -> list[bool]:
    """Whether the brighter left half of an image is still on the left, over many draws."""
    classifier = tiny(augmentation=strength, batch_size=64)
    images = torch.zeros(64, 1, 32, 32)
    images[..., :16] = 0.6
    found = augment(images, classifier, modality, 0, np.arange(64))
    return (found[..., 4:28, 4:16].mean((1, 2, 3)) > found[..., 4:28, 16:28].mean((1, 2, 3))).tolist()


@pytest.mark.parametrize("strength", ["standard", "heavy"])
def test_chest_and_general_images_are_never_mirrored_and_skin_is(strength: str) -> None:
    for modality in ("chest", "general"):
        assert all(left_brighter(modality, strength))
    assert 16 < sum(left_brighter("skin", strength)) < 48


@pytest.mark.parametrize("strength", ["standard", "heavy"])
def test_skin_keeps_its_hue(strength: str) -> None:
    classifier = tiny(augmentation=strength, batch_size=64)
    images = torch.tensor([0.6, 0.4, 0.5]).view(1, 3, 1, 1).expand(64, 3, 16, 16)
    found = augment(images, classifier, "skin", 0, np.arange(64))
    # Without noise and erased rectangles, the middle channel stays in the middle: one hue.
    r, g, b = found.mean((2, 3)).T
    ratio = (r - b) / (r - g)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.5), atol=0.05 if strength == "heavy" else 1e-3, rtol=0)


@pytest.mark.parametrize(("modality", "strength"), EVERY)
def test_images_stay_in_range_and_change_within_their_table(modality: str, strength: str) -> None:
    images = digits(24)
    found = augment(images, tiny(augmentation=strength), modality, 0, PLACES)
    assert found.shape == images.shape
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    changed = (found - images).abs().mean((1, 2, 3))
    assert float(changed.min()) > 0
    noisy = RANGES[modality, strength].noise > 0
    # A black image shows brightness (even) and noise (not even).
    black = augment(torch.zeros_like(images) + 0.5, tiny(augmentation=strength), modality, 0, PLACES)
    inner = black[..., 10:14, 10:14].flatten(1)
    assert bool((inner.std(1) > 1e-3).any()) == noisy or RANGES[modality, strength].erase > 0


def test_an_image_is_turned_shifted_and_scaled_by_its_draws() -> None:
    # One bright spot right of the centre: where it lands tells rotation, scale and shift.
    classifier = tiny(augmentation="standard", batch_size=256)
    images = torch.zeros(256, 1, 65, 65)
    images[:, :, 31:34, 52:55] = 1.0
    found = augment(images, classifier, "general", 0, np.arange(256))[:, 0]
    spot = (found - found.amin((1, 2), keepdim=True)).clamp(min=0)
    spot = torch.where(spot > 0.5 * spot.amax((1, 2), keepdim=True), spot, 0.0)
    axis = torch.arange(65.0) - 32
    x = (spot.sum(1) * axis).sum(1) / spot.sum((1, 2))
    y = (spot.sum(2) * axis).sum(1) / spot.sum((1, 2))
    # 21 px out, +-.10 of that, +-.08 of 65 px; 10 degrees of 21 px and .08 of 65 px.
    assert 21 - 2.1 - 5.2 - 1.5 < float(x.min()) < 18
    assert 24 < float(x.max()) < 21 + 2.4 + 5.8 + 1.5
    assert 5 < float(y.abs().max()) < 3.7 + 5.8 + 1.5
    assert abs(float(y.mean())) < 1


def test_mixup_is_beta_distributed_and_blends_pairs() -> None:
    classifier = tiny(mixup=0.4, batch_size=512)
    images = torch.rand(512, 1, 4, 4)
    shares = []
    for step in range(4):
        mixed, kept = mix(images, classifier, step, np.arange(512))
        assert kept is not None
        assert torch.equal(kept[::2], kept[1::2])
        weight = kept[:, None, None, None]
        partner = images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        torch.testing.assert_close(mixed, weight * images + (1 - weight) * partner)
        shares.append(kept[::2].numpy())
    assert stats.kstest(np.concatenate(shares), stats.beta(0.4, 0.4).cdf).pvalue > 0.01


def test_cutmix_shares_are_the_area_that_is_left() -> None:
    classifier = tiny(cutmix=1.0, batch_size=64)
    images = torch.arange(64.0).view(64, 1, 1, 1).expand(64, 1, 16, 16)
    mixed, kept = mix(images, classifier, 0, np.arange(64))
    assert kept is not None
    torch.testing.assert_close((mixed == images).float().mean((1, 2, 3)), kept)
    assert float(kept.min()) < 0.3
    assert float(kept.max()) > 0.7
    partner = images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    assert bool(((mixed == images) | (mixed == partner)).all())


def test_a_pair_is_mixed_by_its_coin_and_by_one_of_both_ways() -> None:
    classifier = tiny(mixup=0.4, cutmix=1.0, mix_probability=0.5, batch_size=512)
    images = torch.arange(512.0).view(512, 1, 1, 1).expand(512, 1, 16, 16)
    mixed, kept = mix(images, classifier, 0, np.arange(512))
    assert kept is not None
    untouched = (mixed == images).all(-1).all(-1).all(-1)
    constant = (mixed == mixed[..., :1, :1]).all(-1).all(-1).all(-1)
    assert 0.4 < float(untouched.float().mean()) < 0.65
    assert 0.1 < float((constant & ~untouched).float().mean()) < 0.4
    assert 0.1 < float((~constant).float().mean()) < 0.4
    assert bool((kept[untouched] > 0.99).all())


@pytest.mark.parametrize("places", [[1, 2], [0, 2], [0, 1, 2]])
def test_shares_that_split_a_pair_are_refused(places: list[int]) -> None:
    with pytest.raises(ValueError, match="whole pairs"):
        mix(digits()[: len(places)], tiny(mixup=0.2), 0, np.array(places))


def test_dropout_keeps_the_mean_and_its_share() -> None:
    mask = dropout_mask(tiny(dropout=0.25, batch_size=64), 200, 0, np.arange(64))
    assert mask is not None
    assert sorted(np.unique(mask).tolist()) == pytest.approx([0, 4 / 3])
    assert mask.mean() == pytest.approx(1, abs=0.03)
