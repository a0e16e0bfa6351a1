"""A picture of the classes that each client holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from polyfed.base.errors import DataError, StorageError
from polyfed.base.files import replacing
from polyfed.data.partition.partition import Partition


def picture(
    partition: Partition,
    y: ArrayLike,
    num_classes: int,
    path: Path,
    *,
    class_names: Sequence[str] = (),
    client_names: Sequence[str] = (),
) -> None:
    """Write a PNG of the class counts of each client, train and test rows together.

    Up to 20 classes are stacked bars, so that sizes and mixes show; more classes than can be told apart by
    colour are a map of clients by classes. Beyond 200 clients the first 200 are shown, as the title says.

    Args:
        partition: the partition.
        y: ``(N,)`` classes of all rows of the data set; rows of -1, without a label, are a grey bar, or a line of text.
        num_classes: number of classes.
        path: the file to write.
        class_names: the classes' names; numbers without.
        client_names: the clients' names, shown for up to 20 clients; numbers without.

    Raises:
        DataError: matplotlib is not installed.
        StorageError: the file cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise DataError(f"a picture needs matplotlib ({error}); run: pip install matplotlib") from error
    total = partition.num_clients
    shown = min(total, 200)  # with more clients the bars are thinner than a pixel or two
    counts = partition.counts(y, num_classes, first=shown) + partition.counts(y, num_classes, "test", first=shown)
    gone = partition.unlabelled(y, first=shown)
    # Figure with its own Agg canvas instead of pyplot: no window system, no global list of figures.
    figure = Figure(figsize=(min(16.0, 5.0 + 0.12 * shown), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if num_classes <= 20:
        colours = matplotlib.colormaps["tab10" if num_classes <= 10 else "tab20"]  # called with a whole number
        base = np.zeros(shown)
        for c, label in enumerate(class_names or map(str, range(num_classes))):
            axes.bar(np.arange(shown), counts[:, c], bottom=base, width=0.85, color=colours(c), label=label)
            base += counts[:, c]
        if gone.any():
            axes.bar(np.arange(shown), gone, bottom=base, width=0.85, color="lightgrey", label="(no label)")
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
    else:
        blank = np.ma.masked_equal(counts.T, 0)  # 0 rows are white
        image = axes.imshow(blank, aspect="auto", interpolation="nearest", cmap="viridis_r")
        axes.set_ylabel(f"class ({gone.sum():,} rows without a label are left out)" if gone.any() else "class")
        figure.colorbar(image, ax=axes, label="rows, train and test (white: none)")
    several = f"first {shown} of {total} clients" if shown < total else f"{total} clients"
    axes.set(
        title=f"{partition.about.get('dataset', '')}: {partition.about.get('kind', 'partition')}, {several}",
        xlabel="client",
        xlim=(-0.6, shown - 0.4),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if client_names and shown <= 20:
        axes.set_xticks(np.arange(shown), client_names[:shown], rotation=30, ha="right")
    try:
        with replacing(Path(path)) as handle:
            figure.savefig(handle, format="png", dpi=120)
    except OSError as error:
        raise StorageError(f"{path}: the picture could not be written ({error})") from error
