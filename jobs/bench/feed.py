"""Our feed against torch's DataLoader over the same images, in turn in one run: ratios of medians.

    uv run python jobs/bench/feed.py [--images 8192] [--size 64] [--seconds 1] [--repeats 5] [--workers 2]

Everyone hands out uint8 batches and labels as tensors, in random order, from digits resized to `size`:
- feed: `raysynth.data.feed` over two views (a quarter real, the rest synthetic), with and without `real_fraction`;
- array: a DataLoader over one mapped array, one index an image, in the process and with workers;
- array_batched: the same with one index a batch, which is as fast as a DataLoader gets;
- png: a DataLoader whose workers decode PNG files, which is what a feed without training views would do.
Steady state: the first batch, with which workers start, is not timed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from raysynth.core.schemas import members_schema, to_parquet
from raysynth.data.feed import Feed
from raysynth.data.images import encode_png
from raysynth.data.views import View, npy_bytes

CLASSES = [str(c) for c in range(10)]
CHUNK = 256


def write(folder: Path, images: int, size: int) -> np.ndarray:
    """Views `real` and `synthetic`, `all.npy` and `png/`: the same images. Returns labels (N,)."""
    digits = load_digits()
    at = np.arange(images) % len(digits.target)
    shown = [Image.fromarray((d * (255 / 16)).astype(np.uint8)).resize((size, size)) for d in digits.images]
    pixels = np.stack([np.asarray(i) for i in shown])[at][..., None]
    labels = digits.target[at]
    np.save(folder / "all.npy", pixels)
    (folder / "png").mkdir()
    for i, image in enumerate(pixels):
        (folder / "png" / f"{i}.png").write_bytes(encode_png(image))
    for name, part in (("real", slice(0, images // 4)), ("synthetic", slice(images // 4, images))):
        mine, n = pixels[part], len(pixels[part])
        (folder / name / "chunks").mkdir(parents=True)
        for start in range(0, n, CHUNK):
            (folder / name / "chunks" / f"{start // CHUNK}.npy").write_bytes(npy_bytes(mine[start : start + CHUNK]))
        index = {
            "image_id": [f"{name}{i}" for i in range(n)], "chunk": [f"{i // CHUNK}.npy" for i in range(n)],
            "row": np.arange(n) % CHUNK, **{f"label_{c}": (labels[part] == int(c)).astype(np.int8) for c in CLASSES},
        }  # fmt: skip
        (folder / name / "index.parquet").write_bytes(to_parquet(pa.table(index)))
    return labels


def feed(folder: Path, batch_size: int, real_fraction: float | None) -> Callable[[], Iterator[Any]]:
    """Batches of our feed, for ever; each call starts where the last one ended, as a resumed run does."""
    views = {name: View(folder / name) for name in ("real", "synthetic")}
    ids = [(name, i) for name, view in views.items() for i in view.index["image_id"].to_pylist()]
    rows = [(0, name, i, i) for name, i in ids]
    members = pa.table([list(column) for column in zip(*rows)], schema=members_schema())
    source, step = Feed(members, 0, views, CLASSES, batch_size, 0, real_fraction=real_fraction), 0

    def batches() -> Iterator[Any]:
        nonlocal step
        while True:
            batch = source.batch(step)
            step += 1
            yield torch.from_numpy(batch.images), torch.from_numpy(batch.labels)

    return batches


class Arrays(Dataset):
    """Images of one mapped array, by one index or by a list of them."""

    def __init__(self, folder: Path, labels: np.ndarray) -> None:
        self.images = np.load(folder / "all.npy", mmap_mode="r")
        self.labels = np.eye(len(CLASSES), dtype=np.float32)[labels]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        return torch.from_numpy(np.array(self.images[index])), torch.from_numpy(self.labels[index])


class Files(Arrays):
    """The same images, decoded from PNG files at every use."""

    def __init__(self, folder: Path, labels: np.ndarray) -> None:
        super().__init__(folder, labels)
        self.folder = folder / "png"

    def __getitem__(self, index: Any) -> Any:
        image = Image.open(io.BytesIO((self.folder / f"{index}.png").read_bytes()))
        return torch.from_numpy(np.array(image)[..., None]), torch.from_numpy(self.labels[index])


def loader(dataset: Arrays, batch_size: int, workers: int, batched: bool = False) -> Callable[[], Iterator[Any]]:
    """Batches of a DataLoader, epoch after epoch, its workers kept."""
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
    if batched:
        # The sampler hands a whole batch of indices to the data set.
        sampler = BatchSampler(RandomSampler(dataset), batch_size, drop_last=True)
        found: DataLoader = DataLoader(dataset, batch_size=None, sampler=sampler, **options)
    else:
        found = DataLoader(dataset, batch_size, shuffle=True, drop_last=True, **options)

    def batches() -> Iterator[Any]:
        while True:
            yield from found

    return batches


def rate(batches: Callable[[], Iterator[Any]], seconds: float) -> float:
    """Images/s of the batches after the first."""
    stream = batches()
    next(stream)
    images, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        images += len(next(stream)[0])
    return images / spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"images": 8192, "size": 64, "batch-size": 64, "repeats": 5, "workers": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--seconds", type=float, default=1.0, help="of every measurement")
    parser.add_argument("--out", default="", help="JSON file for the result")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        labels = write(folder, a.images, a.size)
        arrays, files = Arrays(folder, labels), Files(folder, labels)
        runners = {
            "feed": feed(folder, a.batch_size, None), "feed_real_fraction": feed(folder, a.batch_size, 0.5),
            "array": loader(arrays, a.batch_size, 0), "array_workers": loader(arrays, a.batch_size, a.workers),
            "array_batched": loader(arrays, a.batch_size, 0, batched=True),
            "array_batched_workers": loader(arrays, a.batch_size, a.workers, batched=True),
            "png_workers": loader(files, a.batch_size, a.workers),
        }  # fmt: skip
        runs: dict[str, list[float]] = {key: [] for key in runners}
        for i in range(a.repeats):
            for key, runner in runners.items():
                runs[key].append(rate(runner, a.seconds))
            print(f"{i + 1}: " + ", ".join(f"{k} {v[-1]:,.0f}" for k, v in runs.items()) + " images/s", flush=True)
    medians = {k: statistics.median(v) for k, v in runs.items()}
    ratios = {k: medians["feed"] / v for k, v in medians.items() if k != "feed"}
    result = {
        "hardware": f"{platform.machine()}, {os.cpu_count()} CPU cores", "torch": torch.__version__,
        "load_average": os.getloadavg()[0], "arguments": vars(a) | {"out": None}, "runs": runs, "median": medians,
        "ratio": ratios,
    }  # fmt: skip
    for key, ratio in ratios.items():
        print(f"feed / {key}: {ratio:.2f}")
    if a.out:
        Path(a.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
