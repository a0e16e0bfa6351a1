"""Image data sets as parquet files in the layout of the Hugging Face hub.

Files are called ``train-00000-of-00002.parquet``; a row has an image column ``{bytes, path}`` holding a JPEG
or PNG file, and an integer label column.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyfed.base.errors import DataError

_SHARD = re.compile(r"(train|test)-(\d+)-of-(\d+)\.parquet")


def find_parquet(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the train and test files of a folder, or of a known subfolder, in order; empty lists if there are none.

    Raises:
        DataError: a numbered file of a split is missing.
    """
    for place in (folder, folder / "data", folder / "plain_text", folder / "cifar100"):
        shards = [(m, path) for path in sorted(place.glob("*.parquet")) if (m := _SHARD.fullmatch(path.name))]
        if shards:
            found = {split: [path for m, path in shards if m[1] == split] for split in ("train", "test")}
            for split, paths in found.items():
                count = max((int(m[3]) for m, _ in shards if m[1] == split), default=1)
                if len(paths) != count:
                    raise DataError(
                        f"{place}: {len(paths)} {split} parquet files "
                        f"({', '.join(p.name for p in paths) or 'none'}); expected {count}; fetch the missing files"
                    )
            return found["train"], found["test"]
    return [], []


def read_images(path: Path, label: str, shape: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pixels ``(N, 3, H, W)`` and labels ``(N,)`` of one parquet file.

    Args:
        path: the file.
        label: name of the label column.
        shape: the ``(H, W)`` that every image must have, in pixels.

    Raises:
        DataError: Pillow is not installed, the file is damaged, a column is missing, or an image
            does not decode to the expected size.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            f"{path}: decoding images needs Pillow, which is not installed; run: pip install 'polyfed[images]'"
        ) from error
    try:
        with pq.ParquetFile(path) as file:
            names: list[str] = list(file.schema_arrow.names)
            image = next((name for name in ("img", "image") if name in names), None)
            if image is None or label not in names:
                raise DataError(
                    f"{path}: has columns {', '.join(names)}; expected 'img' or 'image', and {label!r}; is "
                    "it another data set?"
                )
            cells = (
                cell
                for batch in file.iter_batches(batch_size=1024, columns=[image, label])
                for cell in zip(batch.column(image).to_pylist(), batch.column(label).to_pylist(), strict=True)
            )
            rows = [
                (_decode(Image, cell, f"{path}, row {row}", shape), _label(value, f"{path}, row {row}"))
                for row, (cell, value) in enumerate(cells)
            ]
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet ({error}); the file is damaged, fetch it again") from error
    if not rows:
        raise DataError(f"{path}: has no rows; expected images with labels; fetch it again")
    return (
        np.stack([pixels for pixels, _ in rows]).transpose(0, 3, 1, 2).copy(),  # NHWC -> NCHW
        np.asarray([value for _, value in rows], dtype=np.int64),
    )


def _decode(image_module: Any, cell: Any, where: str, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """One image file as ``(H, W, 3)`` uint8."""
    content = cell.get("bytes") if isinstance(cell, dict) else None
    if not isinstance(content, bytes):
        raise DataError(f"{where}: the image cell holds no bytes; expected a JPEG or PNG file under 'bytes'")
    try:
        with image_module.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
            if (image.height, image.width) != shape or image.mode != "RGB":
                raise DataError(
                    f"{where}: image of {image.width}x{image.height} pixels in mode {image.mode}; expected "
                    f"{shape[1]}x{shape[0]} in mode RGB"
                )
            return np.asarray(image, dtype=np.uint8)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises SyntaxError on broken PNG chunks
        raise DataError(f"{where}: the image does not decode ({error}); the file is damaged") from error


def _label(value: object, where: str) -> int:
    if not isinstance(value, int):
        raise DataError(f"{where}: label {value!r}; expected a whole number")
    return value
