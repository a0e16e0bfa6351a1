"""A picture of the classes that each client holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from polyfed.base.errors import DataError, StorageError
from polyfed.base.files import replacing
from polyfed.data.partition.partition import Partition

_MOST_CLIENTS = 200  # with more clients the bars are thinner than a pixel or two
_MOST_COLOURS = 20


def picture(partition: Partition, y: ArrayLike, num_classes: int, path: Path) -> None:
    """Write a PNG of the class counts of each client, train and test rows together.

    Up to 20 classes are stacked bars, so that sizes and mixes show; more classes than can be told apart by
    colour are a map of clients by classes. Beyond 200 clients the first 200 are shown, as the title says.

    Args:
        partition: the partition.
        y: ``(N,)`` classes of all rows of the data set.
        num_classes: number of classes.
        path: the file to write.

    Raises:
        DataError: matplotlib is not installed.
        StorageError: the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise DataError(f"a picture needs matplotlib ({error}); run: pip install matplotlib") from error
    shown = min(partition.num_clients, _MOST_CLIENTS)
    train, test = (partition.counts(y, num_classes, which, first=shown) for which in ("train", "test"))
    counts = train + test
    # Figure with its own Agg canvas instead of pyplot: no window system, no global list of figures.
    figure = Figure(figsize=(min(16.0, 5.0 + 0.12 * shown), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if num_classes <= _MOST_COLOURS:
        _bars(axes, counts)
    else:
        _map(figure, axes, counts)
    total = partition.num_clients
    several = f"first {shown} of {total} clients" if shown < total else f"{total} clients"
    axes.set_title(f"{partition.about.get('dataset', '')}: {partition.about.get('kind', 'partition')}, {several}")
    axes.set_xlabel("client")
    axes.set_xlim(-0.6, shown - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    try:
        with replacing(Path(path)) as handle:
            figure.savefig(handle, format="png", dpi=120)
    except OSError as error:
        raise StorageError(f"{path}: the picture could not be written ({error})") from error


def _bars(axes: Any, counts: NDArray[np.int64]) -> None:
    import matplotlib

    colours = matplotlib.colormaps["tab10" if counts.shape[1] <= 10 else "tab20"]  # called with a whole number
    base = np.zeros(len(counts))
    for c in range(counts.shape[1]):
        axes.bar(np.arange(len(counts)), counts[:, c], bottom=base, width=0.85, color=colours(c), label=str(c))
        base += counts[:, c]
    axes.set_ylabel("rows, train and test")
    axes.legend(
        title="class",
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        fontsize="small",
        frameon=False,
        reverse=True,
    )
    axes.spines[["top", "right"]].set_visible(False)


def _map(figure: Any, axes: Any, counts: NDArray[np.int64]) -> None:
    blank = np.ma.masked_equal(counts.T, 0)  # 0 rows are white
    image = axes.imshow(blank, aspect="auto", interpolation="nearest", cmap="viridis_r")
    axes.set_ylabel("class")
    figure.colorbar(image, ax=axes, label="rows, train and test (white: none)")
