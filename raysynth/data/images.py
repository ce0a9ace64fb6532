"""Encoded bytes -> the stored picture: one path for real and synthetic images.

Bytes are decoded (EXIF orientation, colour profile, 8 or 16 bit), brought to 0..255, resized with antialiasing to a
square and encoded as PNG. Knows no labels, files or tables. Input and output are bytes and uint8 (H, W, C) arrays.

The perceptual hash is the 64-bit DCT hash (Zauner 2010, `imagehash.phash`) of the decoded image, before resizing, so
that it does not depend on the stored size.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from raysynth.core.experiment import ImageSpec
from raysynth.core.identity import sha256_bytes
from raysynth.core.presets import resolve_image

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "PPM")
"""What is decoded. A short list on purpose: Pillow's other readers are rare here, and EPS runs a program."""

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".jp2", ".j2k", ".jpx", ".pgm",
     ".ppm", ".pnm"}
)  # fmt: skip
"""File name endings of those formats, lower case."""

PERCENTILES = (0.5, 99.5)


FULL_16_BIT = 65535.0


class BadImage(Exception):
    """These bytes are no usable image; `reason` goes to the quarantine table."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


@dataclass(frozen=True)
class Decoded:
    """A decoded image; `value_lo` and `value_hi` are the stored values that became 0 and 255."""

    array: np.ndarray
    """(H, W, C) uint8."""
    value_lo: float
    value_hi: float
    highest: float
    """The largest value stored in the file."""


@dataclass(frozen=True)
class Prepared:
    """An image as it is stored. `height` and `width` in pixels are those of the stored picture."""

    png: bytes
    height: int
    width: int
    sha256: str
    pixel_sha256: str
    value_lo: float
    value_hi: float
    highest: float
    phash: int
    """64 bits."""


def decode(data: bytes, spec: ImageSpec) -> Decoded:
    """Bytes of a PNG, JPEG, TIFF, BMP, GIF, WebP, JPEG 2000 or PGM/PPM file as uint8 pixels.

    Grey images keep their stored values whatever profile they carry: a film's values are measurements. Colour images
    are converted to sRGB where a profile is embedded; transparency is laid over black. Pillow reads 16-bit grey in
    full and 16-bit colour as 8 bits, and brings a PGM or PPM of any other largest value to 8 or 16 whole bits: there,
    stored values are those.

    Raises:
        BadImage: the bytes cannot be used, with the reason in words.
    """
    spec = resolve_image(spec)
    if not data:
        raise BadImage("zero bytes")
    bomb = f"decompression bomb: more than data.image.max_megapixels {spec.max_megapixels:g}"
    # Pillow warns above this and refuses above twice this; the check below is exact.
    Image.MAX_IMAGE_PIXELS = int(spec.max_megapixels * 1e6)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        megapixels = image.width * image.height / 1e6
        if megapixels > spec.max_megapixels:
            raise BadImage(f"{bomb} ({megapixels:.0f})")
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":
            raise BadImage(f"{frames} frames in one file")
        # Pillow reads a 16-bit PGM, which has no EXIF, into 32 bits.
        wide = image.format == "PPM" and image.mode == "I"
        shown = image.convert("I;16") if wide else ImageOps.exif_transpose(image)
        values = _values(shown, spec.channels == "rgb")
    except (BadImage, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(bomb) from error
    except UnidentifiedImageError as error:
        raise BadImage("undecodable: no known image format") from error
    except Exception as error:  # whatever a decoder raises is a property of these bytes
        text = " ".join(str(error).split())
        raise BadImage(f"{'truncated' if 'truncated' in text else 'undecodable'}: {text}") from error
    return _scaled(values, spec.value_range == "percentile")


def _values(image: Image.Image, rgb: bool) -> np.ndarray:
    """Stored values, (H, W, C): uint8, uint16, or float32 for formats without a natural range."""
    mode = image.mode
    if mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint16)
    elif mode in ("I", "F"):
        grey = np.asarray(image).astype(np.float32)
        if not np.isfinite(grey).all():
            raise BadImage("values that are not finite numbers")
    elif mode in ("1", "L"):
        grey = np.asarray(image.convert("L"))
    else:
        colour = _srgb(image)
        return np.asarray(colour) if rgb else np.asarray(colour.convert("L"))[..., None]
    return np.repeat(grey[..., None], 3 if rgb else 1, axis=2)


def _srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode in ("P", "PA", "LA", "RGBa", "RGBA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.new("RGB", image.size)
        image.paste(rgba, mask=rgba.getchannel("A"))
    if profile and image.mode in ("RGB", "CMYK", "LAB"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            return converted if converted is not None else image
        except (ImageCms.PyCMSError, OSError):
            pass  # An unreadable profile says nothing of the colours; read them as sRGB, as every viewer does.
    return image.convert("RGB")


def _scaled(values: np.ndarray, percentile: bool) -> Decoded:
    lowest, highest = float(values.min()), float(values.max())
    if lowest == highest:
        raise BadImage(f"blank: every pixel is {lowest:g}")
    lo, hi = {"uint8": (0.0, 255.0), "uint16": (0.0, FULL_16_BIT)}.get(values.dtype.name, (lowest, highest))
    if percentile:
        low, high = (float(v) for v in np.percentile(values, PERCENTILES))
        # A small mark on an empty film: its percentiles are one value.
        lo, hi = (low, high) if high > low else (lowest, highest)
    if values.dtype == np.uint8 and (lo, hi) == (0.0, 255.0):
        return Decoded(values, lo, hi, highest)
    if values.dtype == np.float32:
        return Decoded(_to_bytes(values, lo, hi), lo, hi, highest)
    table = _to_bytes(np.arange(np.iinfo(values.dtype).max + 1), lo, hi)
    return Decoded(table[values], lo, hi, highest)


def _to_bytes(values: np.ndarray, lo: float, hi: float) -> np.ndarray:
    return np.round(np.clip((values.astype(np.float64) - lo) / (hi - lo), 0, 1) * 255).astype(np.uint8)


def _picture(array: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[-1] == 1 else array))


def to_size(array: np.ndarray, size: int, fit: str) -> np.ndarray:
    """(H, W, C) uint8 -> (size, size, C) uint8 by antialiased bicubic resampling.

    Args:
        fit: `pad` brings the longest side to `size` and pads with black; `crop` cuts the centre square.
    """
    height, width, channels = array.shape
    if (height, width) == (size, size):
        return array
    picture = _picture(array)
    if fit == "crop":
        side = min(height, width)
        left, top = (width - side) / 2, (height - side) / 2
        cut = picture.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        return np.asarray(cut).reshape(size, size, channels)
    scale = size / max(height, width)
    inner = (max(1, round(width * scale)), max(1, round(height * scale)))
    canvas = np.zeros((size, size, channels), np.uint8)
    left, top = (size - inner[0]) // 2, (size - inner[1]) // 2
    resized = np.asarray(picture.resize(inner, Image.Resampling.BICUBIC)).reshape(inner[1], inner[0], channels)
    canvas[top : top + inner[1], left : left + inner[0]] = resized
    return canvas


def encode_png(array: np.ndarray, compress_level: int = 6, strategy: int = zlib.Z_RLE) -> bytes:
    """(H, W), (H, W, 1) or (H, W, 3) uint8 -> PNG bytes; equal arrays give equal bytes.

    Args:
        compress_level: zlib's; with run lengths all but 0 are one.
        strategy: zlib's. After PNG's filters a photograph holds hardly a repeated string: looking for runs alone
            takes a quarter of the time that Pillow's choice does; films come out 3 % smaller (jobs/bench/png.py).
    """
    if array.dtype != np.uint8:
        raise TypeError(f"pixels are {array.dtype}, not uint8")
    sink = io.BytesIO()
    _picture(array if array.ndim == 3 else array[..., None]).save(
        sink, "PNG", compress_level=compress_level, compress_type=strategy
    )
    return sink.getvalue()


def decode_png(data: bytes) -> np.ndarray:
    """PNG bytes of `encode_png` -> (H, W, C) uint8, C 1 or 3."""
    array = np.array(Image.open(io.BytesIO(data), formats=("PNG",)))
    return array if array.ndim == 3 else array[..., None]


def pixel_sha256(array: np.ndarray) -> str:
    """Hex sha256 of the shape and pixels of (H, W, C) uint8, whatever the encoding."""
    shape = "x".join(str(n) for n in array.shape)
    return hashlib.sha256(f"{shape}:".encode() + np.ascontiguousarray(array).tobytes()).hexdigest()


def perceptual_hash(array: np.ndarray) -> int:
    """64-bit DCT hash of (H, W, C) uint8; images alike differ in few bits."""
    import imagehash

    bits = imagehash.phash(_picture(array)).hash.flatten()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def prepare(data: bytes, spec: ImageSpec) -> Prepared:
    """Decodes, resizes and encodes one image. Raises BadImage."""
    spec = resolve_image(spec)
    decoded = decode(data, spec)
    array = to_size(decoded.array, spec.size, str(spec.fit))
    png = encode_png(array)
    return Prepared(
        png, array.shape[0], array.shape[1], sha256_bytes(png), pixel_sha256(array),
        decoded.value_lo, decoded.value_hi, decoded.highest, perceptual_hash(decoded.array),
    )  # fmt: skip
