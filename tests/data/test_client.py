"""Batches of one client: normalisation, augmentation, standardisation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from data_helpers import feature_dataset, image_dataset

from polyfed.base.errors import DataError
from polyfed.base.rng import Rng
from polyfed.data.client import ClientData, FederatedData, Standardise, draw_shifts, shifted, together
from polyfed.data.dataset import Dataset
from polyfed.data.partition.make import make_partition
from polyfed.data.partition.partition import Partition


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def partition_of(train: list[list[int]], test: list[list[int]]) -> Partition:
    def flat(parts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        rows = np.array([row for part in parts for row in part], dtype=np.int64)
        return rows, np.cumsum([0, *map(len, parts)], dtype=np.int64)

    return Partition(*flat(train), *flat(test), {})


def test_batch_is_normalised_and_by_position() -> None:
    dataset = image_dataset()
    client = ClientData(dataset, np.array([30, 3, 17]), augment=True)
    x, y = client.batch(torch.tensor([2, 0]))
    mean, std = torch.tensor(dataset.mean), torch.tensor(dataset.std)
    expected = (dataset.x[[17, 30]].float() / 255 - mean[:, None, None]) / std[:, None, None]
    assert torch.allclose(x, expected, atol=1e-6)
    assert y.tolist() == [1, 2]
    assert len(client) == 3
    assert client.labels.tolist() == [2, 3, 1]
    assert client.batch(torch.tensor([0]), dtype=torch.float64)[0].dtype == torch.float64


def test_augmentation_only_with_generator_and_only_when_asked() -> None:
    dataset = image_dataset(flip=True)
    on, off = (ClientData(dataset, np.arange(40), augment=flag) for flag in (True, False))
    every = torch.arange(40)
    plain = off.batch(every)[0]
    assert torch.equal(on.batch(every)[0], plain)
    assert torch.equal(off.batch(every, generator=generator())[0], plain)
    first, again = (on.batch(every, generator=generator(1))[0] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, plain)
    assert not torch.equal(first, on.batch(every, generator=generator(2))[0])
    assert torch.equal(on.batch(every)[0], plain)  # nothing was written in place


@pytest.mark.parametrize("augment", [True, False])
def test_batches_of_several_clients_are_those_of_each(augment: bool) -> None:
    """Catches randomness that depends on who else is in the batch."""
    dataset = image_dataset(flip=True)
    clients = [ClientData(dataset, np.arange(k, 40, 3), augment=augment) for k in range(3)]
    rows = [torch.tensor([4, k]) for k in range(3)]
    alone = [c.batch(r, generator=generator(k)) for k, (c, r) in enumerate(zip(clients, rows, strict=True))]
    x, y = together(clients, rows, [generator(k) for k in range(3)], dtype=torch.float32, device="cpu")
    assert torch.equal(x, torch.cat([a for a, _ in alone]))
    assert torch.equal(y, torch.cat([b for _, b in alone]))


def test_shifts_are_uniform_and_half_of_the_images_are_mirrored() -> None:
    """Catches a shift that is rarer than others, one direction only, and mirroring with another probability."""
    dy, dx, mirrored = draw_shifts(18_000, generator(), flip=True)
    for shift in (dy, dx):
        counts = shift.flatten().bincount()
        assert len(counts) == 9
        assert bool(((counts - 2000).abs() < 200).all())  # 4.7 standard deviations
    assert abs(int(mirrored.sum()) - 9000) < 320


@pytest.mark.parametrize("flip", [True, False])
def test_augmented_images_are_shifted_copies(flip: bool) -> None:
    x = torch.randn(200, 2, 8, 10, generator=generator()) + 10
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    out = shifted(x, *draw_shifts(len(x), generator(3), flip=flip))
    assert out.shape == x.shape
    seen: set[tuple[int, int, bool]] = set()
    for image, frame in zip(out, padded, strict=True):
        matches = [
            (dy, dx, mirrored)
            for dy in range(9)
            for dx in range(9)
            for mirrored in (False, True)
            if torch.equal(image.flip(2) if mirrored else image, frame[:, dy : dy + 8, dx : dx + 10])
        ]
        assert len(matches) == 1
        seen.update(matches)
    for axis in (0, 1):
        assert {match[axis] for match in seen} == set(range(9))  # all shifts from -4 to 4 occur
    assert {match[2] for match in seen} == ({True, False} if flip else {False})


def test_what_enters_at_the_border_is_zero_after_normalisation() -> None:
    dataset = image_dataset(rows=40)
    bright = ClientData(dataset, np.arange(40), augment=True).batch(torch.arange(40), generator=generator())[0]
    assert (bright == 0).any()
    edge = -0.5 / 0.2  # what a black pixel, the other choice of padding, would be in channel 0
    assert (bright[:, 0] == edge).float().mean() < 0.02


def test_features_use_training_rows_only() -> None:
    x = [[1.0, 5.0, float("nan")], [3.0, 5.0, 2.0], [100.0, 9.0, float("nan")], [float("nan"), 5.0, 8.0]]
    data = FederatedData(feature_dataset(x, [0, 1, 0, 1]), partition_of([[0, 1]], [[2, 3]]), augment=True)
    train, _ = data.train(0).batch(torch.arange(2), generator=generator())
    test, _ = data.test(0).batch(torch.arange(2))
    assert train.tolist() == [[-1, 0, 0], [1, 0, 0]]  # the constant column is 0, a missing value is the mean
    assert test.tolist() == [[98, 0, 0], [0, 0, 0]]
    assert data.train(0).batch(torch.arange(2))[0].dtype == torch.float32


def test_global_test_uses_all_training_rows() -> None:
    x = [[0.0], [2.0], [4.0], [6.0], [3.0], [5.0]]
    dataset = feature_dataset(x, [0, 1, 0, 1, 0, 1])
    data = FederatedData(dataset, partition_of([[0, 1], [2, 3]], [[5], [4]]), augment=False)
    both, positions, sizes = data.global_test([0, 1])
    assert both.rows.tolist() == [4, 5]
    assert (positions.tolist(), sizes.tolist()) == ([1, 0], [1, 1])
    assert both.batch(torch.arange(2))[0].flatten().tolist() == pytest.approx([0, 2 / 5**0.5])
    assert data.test(0).batch(torch.tensor([0]))[0].item() == 4  # (5 - 1) / 1: its own statistics


def test_tiny_spread_counts_as_constant() -> None:
    stats = Standardise.fit(torch.tensor([[1e6], [1e6]]).float())
    assert stats.apply(torch.tensor([[2e6]])).item() == 0
    assert Standardise.fit(torch.full((5000, 1), 0.1, dtype=torch.float64)).inverse.item() == 0
    assert Standardise.fit(torch.tensor([[1.7e9], [1.7e9 + 0.01]], dtype=torch.float64)).inverse.item() > 0
    assert Standardise.fit(torch.full((2, 1), float("nan"))).apply(torch.tensor([[3.0]])).item() == 0
    small = Standardise.fit(torch.tensor([[1e-9], [3e-9]]))  # small numbers are not constant numbers
    assert small.apply(torch.tensor([[3e-9]])).item() == pytest.approx(1, rel=1e-5)


def test_federated_data() -> None:
    dataset = image_dataset(rows=60, official=10)
    partition = make_partition(dataset, kind="iid", num_clients=3, rng=Rng((0,)))
    data = FederatedData(dataset, partition, augment=True)
    assert (data.num_clients, data.train_size(1), len(data.test(1))) == (3, 16, 4)
    assert data.train(2).augment
    assert not data.test(2).augment
    assert data.global_test(range(3))[0].rows.tolist() == sorted(partition.test_rows.tolist())
    assert data.global_test([1])[0].rows.tolist() == partition.test(1).tolist()
    with pytest.raises(DataError, match="made for 60 rows of 'tiny'"):
        FederatedData(image_dataset(rows=50), partition, augment=True)


def test_rows_are_checked() -> None:
    for rows in (np.array([40]), np.array([-1]), np.array([], dtype=np.int64), np.array([0.5])):
        with pytest.raises(DataError, match="rows of a client"):
            ClientData(image_dataset(), rows, augment=False)
    with pytest.raises(IndexError):
        FederatedData(image_dataset(), partition_of([[0]], [[1]]), augment=False).train(-1)


def test_pixels_are_not_copied() -> None:
    dataset = image_dataset()
    client = ClientData(dataset, np.arange(4), augment=False)
    assert client.dataset.x.data_ptr() == dataset.x.data_ptr()


def test_held_out_rows_are_taken_from_training_and_the_same_each_time() -> None:
    """Catches rows that are both trained on and held out, rows that get lost, and halves that change with the call."""
    dataset = feature_dataset(np.random.default_rng(0).normal(size=(30, 3)), [k % 4 for k in range(30)])
    client = ClientData(dataset, np.arange(4, 24), augment=False)
    train, held = client.hold_out(0.25, Rng((1, "client", 3, "held")))
    assert held is not None
    assert (len(train), len(held)) == (15, 5)
    assert sorted([*train.rows.tolist(), *held.rows.tolist()]) == list(range(4, 24))
    again = client.hold_out(0.25, Rng((1, "client", 3, "held")))[1]
    other = client.hold_out(0.25, Rng((1, "client", 4, "held")))[1]
    assert again is not None
    assert other is not None
    assert torch.equal(held.rows, again.rows)
    assert not torch.equal(held.rows, other.rows)
    assert held.stats is train.stats is client.stats  # one standardisation for both
    assert client.hold_out(0.0, Rng((0,))) == (client, None)


@pytest.mark.parametrize(("rows", "share", "expected"), [(2, 0.01, 1), (4, 0.99, 3), (18, 0.2, 4)])
def test_at_least_one_row_is_held_out_and_one_is_not(rows: int, share: float, expected: int) -> None:
    """Catches empty halves of small clients."""
    held = ClientData(image_dataset(), np.arange(rows), augment=True).hold_out(share, Rng((0,)))[1]
    assert held is not None
    assert len(held) == expected
    assert not held.augment


def test_a_single_row_cannot_be_halved() -> None:
    with pytest.raises(DataError, match=r"1 training example.*partition\.min_samples"):
        ClientData(image_dataset(), np.arange(1), augment=False).hold_out(0.1, Rng((0,)))


def sequences(*, channels_first: bool = False) -> Dataset:
    """Series of two channels of other scales, one with a gap; rows 2 and 3 are for testing."""
    x = torch.randn(4, 5, 2, generator=generator()) * torch.tensor([1.0, 100.0]) + torch.tensor([5.0, -300.0])
    x[0, 1, 0] = float("nan")
    x[2:] += 1000
    return Dataset(
        "s",
        x.transpose(1, 2).contiguous() if channels_first else x,
        torch.tensor([0, 1, 0, 1]),
        ("a", "b"),
        (),
        (),
        declared="series",
        channels_first=channels_first,
    )


def test_series_are_standardised_by_channel_of_the_training_rows() -> None:
    """Catches statistics of each time step, of test rows, or of the wrong axis; and a gap that is 0 before scaling."""
    data = sequences()
    fed = FederatedData(data, partition_of([[0, 1]], [[2, 3]]), augment=True)
    x, _ = fed.train(0).batch(torch.arange(2))
    known = data.x[:2].double()
    for channel in range(2):
        values = known[:, :, channel]
        there = values[~values.isnan()]
        expected = ((values - there.mean()) / there.std(correction=0)).nan_to_num(0)
        assert torch.allclose(x[:, :, channel], expected.float(), atol=1e-6)
    assert x.shape == (2, 5, 2)
    assert fed.test(0).batch(torch.arange(2))[0].mean() > 5
    assert fed.global_test([0])[0].batch(torch.arange(2))[0].equal(fed.test(0).batch(torch.arange(2))[0])
    first = FederatedData(sequences(channels_first=True), fed.partition, augment=True)
    assert torch.allclose(first.train(0).batch(torch.arange(2))[0], x.transpose(1, 2))


def test_tokens_stay_as_they_are() -> None:
    """Catches tokens that are standardised, rounded or augmented, and padding that changes."""
    x = torch.tensor([[5, 0, 0], [2**24 + 1, 3, 0], [1, 1, 1]])
    data = Dataset("t", x, torch.tensor([0, 1, 0]), ("a", "b"), (), (), declared="tokens")
    client = ClientData(data, np.array([2, 1]), augment=True)
    got, y = client.batch(torch.tensor([1, 0]), generator=generator(), dtype=torch.float64)
    assert got.dtype == torch.int64
    assert (got.tolist(), y.tolist()) == (x[[1, 2]].tolist(), [1, 0])
    assert data.extremes.tolist() == [[5, 0, 0], [2**24 + 1, 3, 0]]  # real rows, none of them padding alone


def test_floating_images_are_normalised_and_augmented_as_bytes_are() -> None:
    """Catches a division by 255, and a crop that is filled with black before normalisation."""
    bytes_ = image_dataset(flip=True)
    floats = replace(bytes_, x=bytes_.x.float() / 255, declared="image")
    clients = [ClientData(data, np.arange(40), augment=True) for data in (bytes_, floats)]
    for draws in (None, 3):
        one, other = (
            client.batch(torch.arange(40), generator=None if draws is None else generator(draws))[0]
            for client in clients
        )
        assert torch.allclose(one, other, atol=1e-6)
    deep = replace(floats, x=floats.x.double() + 1e7, mean=tuple(m + 1e7 for m in floats.mean))
    x, _ = ClientData(deep, np.arange(40), augment=False).batch(torch.arange(40))
    assert torch.allclose(x, clients[0].batch(torch.arange(40))[0], atol=1e-5)


def test_the_labelled_rows_of_a_client_are_standardised_as_all_of_its_rows() -> None:
    """Catches statistics of a few rows, which are those of no other part of the client."""
    data = feature_dataset([[0.0], [1.0], [5.0], [9.0]], [0, 1, 1, 0])
    some = ClientData(replace(data, y=torch.tensor([0, -1, 1, -1]), unlabelled=True), np.arange(1, 4), augment=False)
    known = some.labelled()
    assert (known.rows.tolist(), known.labels.tolist()) == ([2], [1])
    assert torch.equal(known.batch(torch.tensor([0]))[0], some.batch(torch.tensor([1]))[0])
    whole = ClientData(data, np.arange(1, 4), augment=False)
    assert whole.labelled().rows.tolist() == [1, 2, 3]
