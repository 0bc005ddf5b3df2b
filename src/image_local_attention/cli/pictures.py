"""Picture files to arrays and back: every mode of Pillow that has a noise to remove, and its metadata."""

import math
import os
import secrets
import shutil
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from .errors import UserError

# What Pillow's decoders raise on damaged files, found by truncating and corrupting files of its formats.
DAMAGED = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, RuntimeError),
    *(struct.error, zlib.error),
)

# JPEG's default of 75 would put back about as much error as was removed.
SAVE_OPTIONS = {"quality": 95}


class Layout(NamedTuple):
    channels: int
    has_alpha: bool
    white: int
    dtype: str


LAYOUTS = {
    "L": Layout(1, False, 255, "u1"),
    "LA": Layout(1, True, 255, "u1"),
    "RGB": Layout(3, False, 255, "u1"),
    "RGBA": Layout(3, True, 255, "u1"),
    "CMYK": Layout(4, False, 255, "u1"),
    "YCbCr": Layout(3, False, 255, "u1"),
    "I;16": Layout(1, False, 65535, "<u2"),
    # 32-bit integers: how some formats and older Pillows hand out 16 bits.
    "I": Layout(1, False, 65535, "<i4"),
    "F": Layout(1, False, 1, "<f4"),
}


@dataclass(frozen=True)
class Picture:
    mode: str  # a key of LAYOUTS
    colours: np.ndarray  # [H, W, channels]
    alpha: np.ndarray | None = None  # [H, W]
    orientation: int = 1  # of EXIF: the pixels stay as they lie in the file
    metadata: dict = field(default_factory=dict)  # for Image.save
    notes: tuple[str, ...] = ()  # what of the file is not in here

    @property
    def white(self) -> int:
        return LAYOUTS[self.mode].white

    @property
    def size(self) -> str:
        height, width = self.colours.shape[:2]
        return f"{width}x{height}"


def read_picture(path: Path) -> Picture:
    """Decode a file, its first frame only. Raises UserError where it is not a whole picture that we take."""
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if not path.is_file():
        raise UserError(f"{path}: is {'a directory' if path.is_dir() else 'not a regular file'}")
    try:
        with warnings.catch_warnings():
            # Pillow warns from half of its hard limit on, and of odd metadata that we do not read.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                return _decode(image, path)
    except PermissionError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{path}: not a picture in a format that Pillow reads") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: too large, {error}") from error
    except MemoryError as error:
        raise UserError(f"{path}: does not fit into memory") from error
    except DAMAGED as error:
        raise UserError(f"{path}: damaged or truncated picture ({error})") from error


def _decode(image: Image.Image, path: Path) -> Picture:
    notes = []
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        notes.append(f"{path}: has {frames} frames, only the first is read")
    deep = any(";16" in str(tile) for tile in image.tile)
    image.load()
    orientation = _orientation(image)
    metadata = _metadata(image.info)
    if image.mode in ("P", "PA") or (image.mode in ("L", "RGB") and "transparency" in image.info):
        colour = "L" if image.mode == "L" else "RGB"
        image = image.convert(colour + "A" if image.has_transparency_data else colour)
    # Big-endian and native 16 bits differ only in the file.
    mode = "I;16" if image.mode.startswith("I;16") else image.mode
    if mode not in LAYOUTS:
        raise UserError(f"{path}: mode {image.mode} is not supported, only {', '.join(LAYOUTS)} and palettes")
    layout = LAYOUTS[mode]
    if deep and layout.white == 255:
        notes.append(f"{path}: has 16 bits per channel, Pillow reads 8 of them")
    pixels = np.asarray(image).astype(layout.dtype, copy=False)
    pixels = pixels.reshape(image.height, image.width, -1)
    if pixels.size == 0:
        raise UserError(f"{path}: has no pixels")
    colours = pixels[..., : layout.channels]
    low, high = colours.min(), colours.max()
    if not (low >= 0 and high <= layout.white):
        raise UserError(f"{path}: values of mode {mode} must lie in 0..{layout.white}, got {low}..{high}")
    alpha = pixels[..., -1] if layout.has_alpha else None
    return Picture(mode, colours, alpha, orientation, metadata, tuple(notes))


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except DAMAGED:
        # Broken EXIF is no reason to refuse whole pixels.
        return 1


def _metadata(info: dict) -> dict:
    """What Image.save takes in every format that has a place for it, and ignores in the others."""
    kept = {name: info[name] for name in ("icc_profile", "exif") if info.get(name)}
    dpi = info.get("dpi")
    # Absent, zero and absurd resolutions occur in the wild and cannot be written.
    if dpi and len(dpi) == 2 and all(math.isfinite(d) and 0 < d < 2**16 for d in map(float, dpi)):
        kept["dpi"] = tuple(map(float, dpi))
    return kept


def to_image(picture: Picture) -> Image.Image:
    pixels = picture.colours
    if picture.alpha is not None:
        pixels = np.concatenate([pixels, picture.alpha[..., None]], axis=-1)
    height, width = pixels.shape[:2]
    return Image.frombytes(picture.mode, (width, height), np.ascontiguousarray(pixels).data)


def check_output(path: Path, mode: str) -> None:
    """Raise UserError, before any work is done, where a picture of this mode cannot be written to `path`."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is {'a directory' if path.is_dir() else 'not a regular file'}")
    file_format = _format_of(path)
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise UserError(f"{path}: there is no directory {folder}")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{path}: cannot write into the directory {folder}")
    try:
        Image.new(mode, (16, 16)).save(BytesIO(), format=file_format, **SAVE_OPTIONS)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: {error}") from error


def _format_of(path: Path) -> str:
    file_format = Image.registered_extensions().get(path.suffix.lower())
    if file_format not in Image.SAVE:
        raise UserError(f"{path}: Pillow writes no format of suffix {path.suffix!r}; try .png, .jpg or .tif")
    return file_format


def write_image(image: Image.Image, path: Path, metadata: dict | None = None) -> None:
    """Write the whole picture or nothing."""
    file_format = _format_of(path)
    try:
        with _replacing(path) as file:
            image.save(file, format=file_format, **SAVE_OPTIONS, **(metadata or {}))
    except (OSError, ValueError, struct.error) as error:
        raise UserError(f"{path}: cannot be written ({error})") from error


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path` that takes its place at the end, or goes when anything stops the writing."""
    # Through a symbolic link, the file that it names is replaced, not the link.
    target = Path(os.path.realpath(path))
    part = target.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with open(part, "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
