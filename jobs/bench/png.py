"""PNG by zlib's strategy and level: KB and milliseconds a picture, on real pictures.

    uv run python jobs/bench/png.py [--images FOLDER] [--channels grey] [--size 256] [--n 24] [--repeats 7]
                                    [--out FILE.json]

CPU time of one thread, in turn in one run, medians. Without a folder: scikit-learn's two photographs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, features

from raysynth.core.experiment import ImageSpec
from raysynth.data.images import BadImage, decode, encode_png, to_size

STRATEGIES = {"filtered": zlib.Z_FILTERED, "any string": zlib.Z_DEFAULT_STRATEGY, "Huffman": zlib.Z_HUFFMAN_ONLY,
              "run lengths": zlib.Z_RLE}  # fmt: skip
"""`filtered` is what Pillow takes unless told otherwise."""
CHOICES = [*(("filtered", level) for level in range(10)), ("any string", 6), ("Huffman", 6), ("run lengths", 6)]


def pictures(folder: str, channels: Any, size: int, n: int) -> list[np.ndarray]:
    """Real pictures as ingest stores them: (size, size, C) uint8."""
    if not folder:
        from sklearn.datasets import load_sample_images

        shown = [Image.fromarray(p).resize((size, size)) for p in load_sample_images().images]
        return [np.atleast_3d(np.asarray(p.convert("L" if channels == "grey" else "RGB"))) for p in shown]
    found: list[np.ndarray] = []
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        try:
            whole = decode(path.read_bytes(), ImageSpec(channels=channels, size=size))
        except BadImage:
            continue
        found.append(to_size(whole.array, size, "pad"))
        if len(found) == n:
            break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"size": 256, "n": 24, "repeats": 7}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--images", default="", help="folder of pictures")
    parser.add_argument("--channels", default="grey", choices=["grey", "rgb"])
    parser.add_argument("--out", default="", help="JSON file for the result")
    a = parser.parse_args()
    shown = pictures(a.images, a.channels, a.size, a.n)
    tried = {f"{name}, level {level}": (shown, level, STRATEGIES[name]) for name, level in CHOICES}
    if a.channels == "grey":
        thrice = [np.repeat(p, 3, axis=2) for p in shown]
        tried["grey as three channels, run lengths, level 6"] = (thrice, 6, zlib.Z_RLE)
    spent: dict[str, list[float]] = {name: [] for name in tried}
    for _ in range(a.repeats):
        for name, (these, level, strategy) in tried.items():
            began = time.process_time()
            for picture in these:
                encode_png(picture, level, strategy)
            spent[name].append(1000 * (time.process_time() - began) / len(these))
    sizes = {k: sum(len(encode_png(p, level, s)) for p in these) / len(these) for k, (these, level, s) in tried.items()}
    result: dict[str, Any] = {
        "hardware": f"{platform.machine()}, {os.cpu_count()} CPU cores", "clock": "CPU time, 1 thread",
        "load_average": round(os.getloadavg()[0], 2), "pillow": PIL.__version__, "zlib": features.version("zlib"),
        "zlib_ng": features.version("zlib_ng"), "pictures": len(shown), "of": Path(a.images).name or "scikit-learn",
        "arguments": vars(a) | {"out": None, "images": None},
        "table": {k: {"kb": round(sizes[k] / 1024, 2), "ms": round(statistics.median(spent[k]), 3)} for k in tried},
    }  # fmt: skip
    for name, row in result["table"].items():
        print(f"{name:46} {row['kb']:8.2f} KB {row['ms']:8.3f} ms")
    if a.out:
        Path(a.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
