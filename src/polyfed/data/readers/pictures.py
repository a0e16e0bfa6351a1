"""Image files as pixels: decoded by Pillow, checked, and brought to one shape."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from polyfed.base.errors import DataError
from polyfed.data.images import check_image_size, resize
from polyfed.data.readers.cache import Arrays, cached_arrays

#: Pillow's modes of 8 bits per channel -> channels. "P" is a palette of colours.
_MODES = {"1": 1, "L": 1, "LA": 1, "RGB": 3, "RGBA": 3, "P": 3, "CMYK": 3, "YCbCr": 3}
_NAMES = {1: "grey", 3: "in colour"}


def read_pictures(
    sources: Iterable[tuple[str, Path | bytes]], count: int, *, channels: int | None, side: int | None, cache: Path
) -> NDArray[np.uint8]:
    """Return the pixels of image files, ``(N, C, H, W)``; they are cached, as decoding takes long.

    Args:
        sources: of each image a name for messages, and its file or the content of its file.
        count: number of images, N.
        channels: 1 for grey or 3 for colour, to which all are converted; None takes what all images are.
        side: width and height to which all are resized, in pixels; None takes the size of all images.
        cache: file of the cached pixels; its name must change with the content of the images.

    Raises:
        DataError: Pillow is not installed, an image is damaged or has more than 8 bits or visible transparency, or two
            images differ in size or colour; the text names them.
    """
    if side is not None:
        check_image_size(side, side)

    def build() -> dict[str, NDArray[np.uint8]]:
        found = decoded(sources, channels, side)
        first, pixels = next(found)
        shape = tuple(pixels.shape)
        out = np.empty((count, *shape), np.uint8)
        out[0] = pixels
        for row, (where, pixels) in enumerate(found, start=1):
            if pixels.shape[0] != shape[0]:
                raise DataError(
                    f"{where} is {_NAMES[pixels.shape[0]]}, and {first} is {_NAMES[shape[0]]}; set the option channels "
                    "to 1 (grey) or 3 (colour), to which all are converted"
                )
            if pixels.shape != shape:
                got, other = (f"{size[2]}x{size[1]}" for size in (pixels.shape, shape))
                raise DataError(
                    f"{where} has {got} pixels, and {first} has {other}; set data.image_size, to which all are "
                    "resized, or crop the images to one size"
                )
            out[row] = pixels
        return {"x": out}

    def usable(arrays: Arrays) -> bool:
        x = arrays.get("x", np.empty(0))
        return set(arrays) == {"x"} and x.dtype == np.uint8 and x.ndim == 4 and len(x) == count

    return cached_arrays(cache, build, usable)["x"]


def decoded(
    sources: Iterable[tuple[str, Path | bytes]], channels: int | None, side: int | None
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Yield the name and the pixels ``(C, H, W)`` of each image; arguments and errors are those of `read_pictures`."""
    try:
        pillow, ops = import_module("PIL.Image"), import_module("PIL.ImageOps")
    except ImportError as error:
        raise DataError("reading image files needs Pillow; run: pip install 'polyfed[images]'") from error
    for where, source in sources:
        try:
            with pillow.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
                # A telephone's MPO is a JPEG that holds smaller versions of itself behind the first.
                if (frames := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":
                    raise DataError(f"{where} holds {frames} pictures; expected one; save each as a file of its own")
                upright = ops.exif_transpose(image)  # as a viewer shows it
                pixels = channels_of(upright, channels, where)
        except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:  # SyntaxError: broken PNG
            raise DataError(
                f"{where} does not decode ({error}); the file is damaged or no image, replace or remove it"
            ) from error
        yield where, pixels if side is None else resize(torch.from_numpy(pixels)[None], side)[0].numpy()


def channels_of(image: Any, channels: int | None, where: str) -> NDArray[np.uint8]:
    """Pixels ``(C, H, W)`` of one image."""
    own = _MODES.get(image.mode)
    if own is None:
        raise DataError(
            f"{where} has mode {image.mode}; expected 8 bits per channel, grey or colour; convert the image, or save "
            "arrays as .npz, which may hold floating-point images"
        )
    if image.mode in ("LA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            raise DataError(f"{where} has transparent pixels, which have no colour; flatten it on a background")
    mode = {1: "L", 3: "RGB"}[channels or own]
    pixels = np.array(image if image.mode == mode else image.convert(mode), dtype=np.uint8)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
