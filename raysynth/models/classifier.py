"""Training of the classifier: one optimizer step, its random draws, its one or two phases, and its whole state.

Loss: softmax cross entropy, or binary cross entropy over the known findings (models.classifier_loss), divided by the
count of known labels of the global batch. With synchronised batch norm, any number of processes gives the gradient of
one; augmentation, mixing and dropout before the last layer are functions of (seed, step, place in the global batch).
Only stochastic depth and dropout inside the backbone are outside that promise; resumed runs repeat them too.

Input: uint8 images and labels. Knows nothing of Ray, storage or where images come from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from raysynth.core.evidence import Classifier, Pretrain
from raysynth.models.augment import HEAD, NETWORK, augment, dropout_mask, mix, stream
from raysynth.models.batchnorm import synchronise
from raysynth.models.classifier_loss import Kind, loss_sums, soft_labels
from raysynth.models.classifier_net import ClassifierNet, build_classifier
from raysynth.models.device import PRECISIONS, deterministic, full_precision
from raysynth.models.optim import learning_rate, make_ema, make_optimizer


class ClassifierTraining:
    """Network, moving average and optimizer of one training run.

    Call `distribute` (if there are several processes), then `load` or `begin`, then `update` for every step.

    Args:
        classifier: resolved (core.presets.resolve_classifier).
        n_classes: classes or findings.
        channels: of the images, 1 or 3.
        kind: single (softmax) or multi (a sigmoid a finding).
        modality: `data.image.preset`: general, chest or skin.
        class_weights: (L,) weight of each class (single), or of each finding's positives (multi).
        device: torch device; mixed precision is used on CUDA only, a CPU trains in float32.
    """

    def __init__(
        self, classifier: Classifier, n_classes: int, channels: int, kind: Literal["single", "multi"], modality: str,
        class_weights: np.ndarray | None = None, device: str = "cpu",
    ) -> None:  # fmt: skip
        self.classifier, self.n_classes, self.channels = classifier, n_classes, channels
        self.kind: Kind = kind
        self.modality, self.device = modality, torch.device(device)
        deterministic(self.device)
        self.class_weights = None if class_weights is None else torch.as_tensor(class_weights, device=self.device)
        network = build_classifier(classifier, n_classes, channels).to(self.device)
        self.network: Any = network.to(memory_format=torch.channels_last)
        self.ema: AveragedModel | None = self._fresh_ema()
        self.optimizer = make_optimizer(classifier, self.network.parameters())
        half = PRECISIONS.get(classifier.precision) if self.device.type == "cuda" else None
        self.half = half
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half is torch.float16)
        self.net: torch.nn.Module = self.network
        """What is called: the network, or its distributed wrapper."""
        self.world = 1
        self.step = 0
        """Optimizer steps done, over all phases."""
        self.phase, self.phase_step = 0, 0
        self.schedule: dict[str, Any] = {"start": 0, "steps": classifier.steps, "lr": classifier.lr}
        """Of the learning rate: its first step, its length, its highest value."""
        self.frozen = False
        """Only the head is trained."""

    def _fresh_ema(self) -> AveragedModel | None:
        if self.classifier.ema_decay is None:
            return None
        return make_ema(self.network, self.classifier.ema_decay, buffers=True).eval()

    def distribute(self) -> None:
        """Shares every batch over the initialised process group: DDP, batch norm synchronised."""
        self.world = dist.get_world_size()
        self.network = synchronise(self.network, self.device)
        self._wrap()

    def _wrap(self) -> None:
        if self.world > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self.net = DistributedDataParallel(
                self.network, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def begin(self, phase: int, steps: int, pretrain: Pretrain | None = None) -> None:
        """Starts a phase; never called for one that is resumed.

        Args:
            phase: 0, or 1 for fine-tuning.
            steps: optimizer steps of this phase.
            pretrain: of a strategy of two phases, given at both. Without `reset_optimizer` one schedule of
                `classifier.steps` runs through both.
        """
        self.phase, self.phase_step = phase, 0
        restarts = pretrain is None or pretrain.reset_optimizer
        lr = pretrain.lr if phase and pretrain is not None else None
        self.schedule = {
            "start": self.step if restarts else 0, "steps": steps if restarts else self.classifier.steps,
            "lr": self.classifier.lr if lr is None else lr,
        }  # fmt: skip
        if not phase or pretrain is None:
            return
        if pretrain.reset_optimizer:
            self.optimizer = make_optimizer(self.classifier, self.network.parameters())
        if pretrain.head == "reset":
            self._reset_head()
        if pretrain.reset_ema:
            self.ema = self._fresh_ema()
        self._freeze(pretrain.freeze == "backbone")

    def _reset_head(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(stream(self.classifier.seed, self.step, HEAD).integers(2**62)))
            for module in self.network.head.modules():
                if isinstance(module, torch.nn.Linear):
                    # Drawn on the CPU, so that every device starts from the same numbers.
                    drawn = torch.nn.Linear(module.in_features, module.out_features)
                    module.load_state_dict(drawn.state_dict())
        for parameter in self.network.head.parameters():
            self.optimizer.state.pop(parameter, None)
        if self.ema is not None:
            self.ema.module.head.load_state_dict(self.network.head.state_dict())  # type: ignore[union-attr]

    def _freeze(self, frozen: bool) -> None:
        if frozen == self.frozen:
            return
        self.frozen = frozen
        for parameter in self.network.backbone.parameters():
            parameter.requires_grad_(not frozen)
        self.optimizer.zero_grad()
        self._wrap()  # DDP counts the gradients it waits for when it is made

    def update(self, images: np.ndarray, labels: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """One optimizer step on this process's equal share of the global batch.

        Args:
            images: (B, H, W, C) uint8.
            labels: (B, L) float32, NaN = unknown.
            positions: (B,) places of these samples in the global batch; with mixup or CutMix whole pairs
                (2k, 2k + 1), side by side.

        Returns:
            The mean loss of the global batch, the same in every process, a scalar on the device.
        """
        loss = self.backward(images, labels, positions)
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.classifier.grad_clip)
        lr = learning_rate(
            self.classifier, self.step - self.schedule["start"], self.schedule["steps"], self.schedule["lr"]
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.network)
        self.step += 1
        self.phase_step += 1
        return loss

    def backward(self, images: np.ndarray, labels: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """Leaves the (scaled) gradient of the global batch in the parameters; arguments and result as of `update`."""
        self.optimizer.zero_grad()
        self.network.train()
        if self.frozen:
            # Its batch norm keeps the statistics that its weights were trained with.
            self.network.backbone.eval()
        positions = np.asarray(positions)
        kind = next(self.network.parameters()).dtype
        pixels = to_pixels(images, self.device, kind)
        pixels = augment(pixels, self.classifier, self.modality, self.step, positions)
        pixels, kept = mix(pixels, self.classifier, self.step, positions)
        told = torch.from_numpy(labels).to(self.device, kind)
        positive, known = soft_labels(told, self.kind, self.classifier.label_smoothing, kept)
        mask = dropout_mask(self.classifier, self.network.head[-1].in_features, self.step, positions)
        keep = None if mask is None else torch.from_numpy(mask).to(self.device, kind)
        half = torch.autocast(self.device.type, self.half, enabled=self.half is not None)
        with self._network_seed(positions), half:
            logits = self.net(pixels.contiguous(memory_format=torch.channels_last), keep)
        weights = None if self.class_weights is None else self.class_weights.to(kind)
        total, count = loss_sums(logits.to(kind), positive, known, self.kind, weights)
        summed = torch.stack([total.detach(), count])
        if self.world > 1:
            dist.all_reduce(summed)
        everyone = summed[1].clamp(min=1)
        # DDP averages over the processes; each one's part is of the whole batch.
        self.scaler.scale(total * (self.world / everyone)).backward()
        return summed[0] / everyone

    @contextlib.contextmanager
    def _network_seed(self, positions: np.ndarray) -> Iterator[None]:
        # What the backbone draws comes from torch's global stream: seeded here, so that a resumed run repeats it.
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            keys = stream(self.classifier.seed, self.step, NETWORK).integers(2**62, size=self.classifier.batch_size)
            torch.manual_seed(int(keys[positions[0]]))
            yield

    @property
    def best(self) -> ClassifierNet:
        """The network that is validated and exported: the moving average where there is one."""
        return self.network if self.ema is None else self.ema.module  # type: ignore[return-value]

    def predict(self, images: np.ndarray, batch_size: int = 256) -> np.ndarray:
        """Probabilities of images by the moving average (or the network), in eval mode, without augmentation.

        Args:
            images: (N, H, W, C) uint8.

        Returns:
            (N, L) float32: of each class, adding up to 1 (single), or of each finding (multi).
        """
        return predict(self.best, images, self.kind, batch_size)

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs: tensors and plain values only."""
        return {
            "network": self.network.state_dict(), "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), "step": self.step,
            "phase": self.phase, "phase_step": self.phase_step, "schedule": self.schedule, "frozen": self.frozen,
        }  # fmt: skip

    def save(self, path: str) -> None:
        """Writes the state; `load` reads it."""
        torch.save(self.state(), path)

    def load(self, path: str) -> None:
        """Continues from a saved state, within its phase."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.network.load_state_dict(state["network"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for name in ("step", "phase", "phase_step", "schedule"):
            setattr(self, name, state[name])
        self._freeze(state["frozen"])


def to_pixels(images: np.ndarray, device: torch.device, kind: torch.dtype = torch.float32) -> torch.Tensor:
    """(B, H, W, C) uint8 -> (B, C, H, W) float in [0, 1] on the device."""
    return torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).to(kind) / 255


def predict(network: ClassifierNet, images: np.ndarray, kind: str, batch_size: int) -> np.ndarray:
    """Probabilities (N, L) float32 of (N, H, W, C) uint8 images; leaves the network in eval mode.

    In full float32 whatever it was trained in: thresholds chosen on validation images are those of test images.
    """
    network.eval()
    first = next(network.parameters())
    last: Any = network.head[-1]
    found = [np.zeros((0, last.out_features), np.float32)]
    with torch.inference_mode(), full_precision():
        for start in range(0, len(images), batch_size):
            pixels = to_pixels(images[start : start + batch_size], first.device, first.dtype)
            logits = network(pixels.contiguous(memory_format=torch.channels_last)).float()
            probabilities = logits.softmax(1) if kind == "single" else logits.sigmoid()
            found.append(probabilities.cpu().numpy())
    return np.concatenate(found)
