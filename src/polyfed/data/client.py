"""The data of one client: its own rows of the data set, as normalised batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from polyfed.base.errors import DataError
from polyfed.base.rng import Rng
from polyfed.data.dataset import Dataset
from polyfed.data.partition.partition import Partition

_PIECE = 65_536  # rows whose statistics are computed at once, so that millions of rows need little memory
_PAD = 4  # pixels that a random crop may shift an image by


def send(value: Tensor, device: torch.device | str) -> Tensor:
    """Return ``value`` on the device. A copy to a GPU is queued: one that blocks waits for all work that is queued."""
    return value.to(device, non_blocking=torch.device(device).type == "cuda")


@dataclass(frozen=True, eq=False)
class Standardise:
    """Standardisation of features, or of the channels of series, ``(x - mean) * inverse``, by training rows only.

    Args:
        mean: ``(F,)`` float64, or ``(C,)``, or ``(C, 1)`` for series with channels first; a missing value becomes it.
        inverse: the same shape, 1 / standard deviation; 0 for a constant column, which therefore becomes 0.
    """

    mean: Tensor
    inverse: Tensor

    @classmethod
    def fit(cls, x: Tensor, *, channels_first: bool = False) -> Standardise:
        """Statistics of the columns of ``x`` ``(n, F)``, or of the channels of ``x`` ``(n, T, C)``, ignoring NaN.

        A column without a value has mean 0.

        Args:
            x: the training rows.
            channels_first: whether ``x`` is ``(n, C, T)``.
        """
        if x.dim() == 3:
            found = cls.fit((x.transpose(1, 2) if channels_first else x).flatten(0, 1))
            return cls(found.mean[:, None], found.inverse[:, None]) if channels_first else found
        pieces = x.split(_PIECE)
        zero = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        count = sum(((~piece.isnan()).sum(dim=0) for piece in pieces), zero).clamp(min=1)
        mean = sum((piece.double().nan_to_num(0).sum(dim=0) for piece in pieces), zero) / count
        std = (
            sum(((piece.double() - mean).nan_to_num(0).square().sum(dim=0) for piece in pieces), zero) / count
        ).sqrt()
        # A spread below the resolution of the type (24 or 53 bits) is rounding, not information.
        constant = std <= (1e-6 if x.dtype == torch.float32 else 1e-14) * mean.abs()
        return cls(mean, torch.where(constant, 0, 1 / torch.where(constant, 1, std)))

    def apply(self, x: Tensor) -> Tensor:
        """``x`` ``(B, F)``, ``(B, T, C)`` or ``(B, C, T)`` imputed and standardised, as float64."""
        values = x.double()
        mean = self.mean.to(x.device)
        return (torch.where(torch.isnan(values), mean, values) - mean) * self.inverse.to(x.device)


class ClientData:
    """One client's rows of a data set: a view by row number, without a copy of the pixels.

    Args:
        dataset: the data set, on any device.
        rows: ``(n,)`` int64 row numbers of this client.
        augment: whether batches drawn with a generator are augmented (images only).
        stats: how features or series are standardised; None fits on ``rows``. Not used for images, which are
            normalised with the data set's mean and std, and for tokens, which stay as they are.

    Raises:
        DataError: no rows, or a row number out of range.
    """

    def __init__(
        self,
        dataset: Dataset,
        rows: NDArray[np.int64] | Tensor,
        *,
        augment: bool,
        stats: Standardise | None = None,
    ) -> None:
        """Check the rows against the data set."""
        self.dataset = dataset
        # a copy: rows may be a read-only view of a partition, which torch cannot share safely
        self.rows = rows.cpu().clone() if isinstance(rows, Tensor) else torch.tensor(np.asarray(rows))
        if self.rows.dim() != 1 or self.rows.dtype != torch.int64 or len(self.rows) == 0:
            raise DataError(
                f"rows of a client: shape {tuple(self.rows.shape)}, type {self.rows.dtype}; expected (n,) "
                "torch.int64 with at least one row; was the partition made for another data set?"
            )
        low, high = int(self.rows.min()), int(self.rows.max())
        if low < 0 or high >= len(dataset):
            raise DataError(
                f"rows of a client run from {low} to {high}; expected 0 to {len(dataset) - 1} for "
                f"{dataset.name!r}; was the partition made for another data set?"
            )
        self.augment = augment and dataset.is_image
        self.stats = _fitted(dataset, self.rows) if stats is None else stats

    def __len__(self) -> int:
        """Number of rows, n."""
        return self.rows.shape[0]

    @property
    def labels(self) -> Tensor:
        """``(n,)`` class numbers, -1 without a label, or targets in the unit of the data, on the CPU."""
        return self.dataset.y[self.rows.to(self.dataset.y.device)].cpu()

    def labelled(self) -> ClientData:
        """Those of these rows that have a label, standardised as these rows are."""
        rows = self.rows[self.labels >= 0] if self.dataset.num_unlabelled else self.rows
        return ClientData(self.dataset, rows, augment=self.augment, stats=self.stats)

    @property
    def channels_first(self) -> bool:
        """Whether series are ``(C, T)``; else ``(T, C)``."""
        return self.dataset.channels_first

    def normalised(self, x: Tensor) -> Tensor:
        """Pixels ``(B, C, H, W)`` with the data set's mean and deviation taken out."""
        mean, std = (send(value, x.device) for value in self.dataset.channels)
        if x.is_floating_point():
            return (x - mean).div_(std)
        # Not the number 255: a GPU would multiply by its inverse, and pixels would differ from the CPU's.
        most = torch.full((), 255.0, device=x.device)
        return x.float().div_(most).sub_(mean).div_(std)

    def hold_out(self, share: float, rng: Rng) -> tuple[ClientData, ClientData | None]:
        """Split these rows in two: the rows to train on, and ``max(1, round(share * n))`` rows that are held out.

        The same ``rng`` gives the same parts, so a row that is held out once is held out always. Both parts standardise
        features as these rows do.

        Args:
            share: share of the rows that is held out, in [0, 1); 0 holds out no row.
            rng: chooses the rows; it must not depend on the round.

        Raises:
            DataError: there is a single row, which cannot be split.
        """
        if not share:
            return self, None
        if len(self) < 2:
            raise DataError(
                "a client has 1 training example, and this algorithm holds out examples for validation; expected at "
                "least 2: set partition.min_samples, or deal to fewer clients"
            )
        count = min(len(self) - 1, max(1, round(share * len(self))))
        held, rest = torch.randperm(len(self), generator=rng.torch()).split([count, len(self) - count])
        train = ClientData(self.dataset, self.rows[rest], augment=self.augment, stats=self.stats)
        return train, ClientData(self.dataset, self.rows[held], augment=False, stats=self.stats)

    def batch(
        self,
        positions: Tensor,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> tuple[Tensor, Tensor]:
        """Normalised inputs and labels of some of the client's rows.

        With a generator, and if the client augments, each image is shifted by up to 4 pixels each way (pixels that
        enter are 0 after normalisation) and, where the data set allows it, mirrored with probability 1/2.
        Without a generator nothing is random: use that for evaluation.

        Args:
            positions: ``(B,)`` int64, from 0 to n - 1, into this client's rows.
            generator: where the augmentation's randomness comes from; None means no augmentation.
            dtype: floating type of the inputs.
            device: the device of the batch; pixels are transferred as they are stored.

        Returns:
            x ``(B, C, H, W)``, ``(B, F)``, ``(B, T, C)`` or ``(B, C, T)`` of ``dtype``, or tokens ``(B, T)`` int64; and
            y ``(B,)`` int64; both on ``device``. The targets of a regression are of ``dtype``, less the data set's
            offset and divided by its scale.
        """
        return together([self], [positions], [generator], dtype=dtype, device=device)


def together(
    clients: Sequence[ClientData],
    positions: Sequence[Tensor],
    generators: Sequence[torch.Generator | None],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """Return the batches of several clients of one data set, one after another: as `ClientData.batch`, in one call.

    Args:
        clients: clients with equal ``augment``; for features and series a single client, as each has statistics of its
            own.
        positions: ``(B,)`` int64 for each client.
        generators: a generator or None for each client.
        dtype: floating type of the inputs.
        device: the device of the batch.
    """
    first = clients[0]
    dataset, flip = first.dataset, first.dataset.flip
    rows = torch.cat([client.rows[some.cpu()] for client, some in zip(clients, positions, strict=True)])
    cut = used(dataset, rows) if dataset.kind == "tokens" else None
    rows = send(rows, dataset.x.device)
    x, y = dataset.x[rows], send(dataset.y[rows], device)
    x = send(x if cut is None else x[:, :cut], device)
    if dataset.task == "regression":
        y = ((y - dataset.target_offset) / dataset.target_scale).to(dtype)
    if first.stats is not None and dataset.is_standardised:
        return first.stats.apply(x).to(dtype), y
    if dataset.kind == "tokens":
        return x, y
    x = first.normalised(x)
    if first.augment and generators[0] is not None:
        draws = [
            draw_shifts(len(some), generator, flip=flip)
            for some, generator in zip(positions, generators, strict=True)
            if generator is not None
        ]
        x = shifted(x, *(send(torch.cat(column), x.device) for column in zip(*draws, strict=True)))
    return x.to(dtype), y


def used(dataset: Dataset, rows: Tensor) -> int | None:
    """Columns of tokens that a batch keeps: those of its longest row, up to a multiple of ``bucket``; None is all.

    Which rows make a batch does not depend on lengths, so neither does their order. The padding that is left out has no
    part in what a network computes, but sums over fewer terms may round differently: a stack, which is as long as the
    longest row of all its clients, agrees with one client after another up to rounding.

    Args:
        dataset: the data set.
        rows: ``(B,)`` rows of the batch, on the CPU as lengths are, so that no batch waits for a GPU.
    """
    bucket = dataset.bucket
    return -(-max(1, int(dataset.lengths[rows].max())) // bucket) * bucket if bucket else None


def draw_shifts(count: int, generator: torch.Generator, *, flip: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Draw for ``count`` images the shift down and across, ``(count, 1)`` each, and whether each is mirrored.

    Args:
        count: number of images.
        generator: the source of randomness.
        flip: whether images are mirrored with probability 1/2.
    """
    shape, device = (count, 1), generator.device
    dy, dx = (torch.randint(0, 2 * _PAD + 1, shape, generator=generator, device=device) for _ in range(2))
    mirrored = torch.randint(0, 2, shape, generator=generator, device=device) if flip else torch.zeros_like(dx)
    return dy, dx, mirrored.bool()


def shifted(x: Tensor, dy: Tensor, dx: Tensor, mirrored: Tensor) -> Tensor:
    """Images ``(B, C, H, W)`` each shifted by up to 4 pixels, filled with 0, and perhaps mirrored.

    The whole batch is one gather: row ``i`` of an output image is row ``i + dy`` of its padded input, and so
    on; this is several times faster on a CPU than indexing with lists of rows and columns.

    Args:
        x: the batch; it is not written to.
        dy: ``(B, 1)``, from 0 to 8; 4 leaves an image where it is.
        dx: the same, across.
        mirrored: ``(B, 1)`` bool.
    """
    batch, channels, height, width = x.shape
    down = torch.arange(height, device=x.device) + dy  # (B, H)
    across = torch.arange(width, device=x.device).expand(batch, width)  # (B, W)
    across = torch.where(mirrored, width - 1 - across, across) + dx
    padded = functional.pad(x, (_PAD, _PAD, _PAD, _PAD)).reshape(batch, channels, -1)  # (B, C, (H+8)(W+8))
    flat = (down[:, :, None] * (width + 2 * _PAD) + across[:, None, :]).reshape(batch, 1, -1)  # (B, 1, HW)
    return padded.gather(2, flat.expand(batch, channels, -1)).reshape(x.shape)  # (B, C, H, W)


class FederatedData:
    """A data set together with the rows of each client.

    Args:
        dataset: the data set.
        partition: the rows of each client; made for this data set.
        augment: whether training batches drawn with a generator are augmented.

    Raises:
        DataError: the partition was made for a data set of another size.
    """

    def __init__(self, dataset: Dataset, partition: Partition, *, augment: bool) -> None:
        """Check that the partition fits the data set."""
        rows = partition.about.get("rows", len(dataset))
        if rows != len(dataset):
            raise DataError(
                f"the partition was made for {rows} rows of {partition.about.get('dataset')!r}, but "
                f"{dataset.name!r} has {len(dataset)}; make the partition again or load the data set it was "
                "made for"
            )
        self.dataset = dataset
        self.partition = partition
        self.augment = augment

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return self.partition.num_clients

    def train_size(self, client: int) -> int:
        """Number of training rows of a client."""
        return len(self.partition.train(client))

    def train(self, client: int) -> ClientData:
        """A client's training rows; features are standardised with their own statistics."""
        return ClientData(self.dataset, self.partition.train(client), augment=self.augment)

    def test(self, client: int) -> ClientData:
        """A client's test rows, never augmented; features are standardised as its training rows are."""
        return self.evaluated(client, final=True)

    def evaluated(self, client: int, *, final: bool) -> ClientData:
        """The rows of `Partition.evaluated`, as `test` has them."""
        return ClientData(
            self.dataset,
            self.partition.evaluated(client, final=final),
            augment=False,
            stats=self.stats(client),
        )

    def stats(self, client: int | None) -> Standardise | None:
        """How a client's rows are standardised, or those of all clients together; None if the kind is not.

        Args:
            client: number of the client; None for the training rows of all clients together.
        """
        return self._everyones if client is None else self._stats(self.partition.train(client))

    def global_test(
        self, clients: Sequence[int], *, final: bool = True
    ) -> tuple[ClientData, NDArray[np.int64], NDArray[np.int64]]:
        """The test rows of some clients together, each row once, in the order of the data set, never augmented.

        Without ``final``, validation rows take the place of test rows, as in `Partition.evaluated`.

        Features are standardised with the statistics of the training rows of ALL clients together. No single client
        knows these: read a global test on features as an observer's bound, not as a result that a client could get.

        Returns:
            The rows; for each client in turn, the positions of its test rows in these, ascending; and their numbers.
        """
        held = [self.partition.evaluated(client, final=final) for client in clients]
        rows, positions = np.unique(np.concatenate(held), return_inverse=True)
        every = ClientData(self.dataset, rows, augment=False, stats=self._everyones)
        return every, positions, np.array([len(r) for r in held])

    @cached_property
    def _everyones(self) -> Standardise | None:
        return self._stats(self.partition.train_rows)

    def _stats(self, rows: NDArray[np.int64]) -> Standardise | None:
        return _fitted(self.dataset, torch.tensor(rows))


def _fitted(dataset: Dataset, rows: Tensor) -> Standardise | None:
    """Return the statistics of these rows; None for a kind that is not standardised by client."""
    if not dataset.is_standardised:
        return None
    return Standardise.fit(dataset.x[rows.to(dataset.x.device)], channels_first=dataset.channels_first)
