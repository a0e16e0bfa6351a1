"""FedRolex: windows that roll or are drawn, what no window holds, and tests of other windows."""

from typing import Any

import pytest
import torch
import toy

from polyfed.algorithms.fedrolex import FedRolex
from polyfed.base.rng import Rng
from polyfed.blocks.submodel import Layout, Slice
from polyfed.core.clients import ClientInfo, Cohort
from polyfed.models.zoo import build

RESNET = "resnet8(width=4)"


def federation(algorithm: FedRolex, sizes: tuple[float, ...]) -> Any:
    return toy.federation(algorithm, models=(toy.MLP,), shape=(7,), clients={"capacities": list(sizes)})


@pytest.mark.parametrize("window", ["rolling", "random", "static"])
def test_what_no_client_holds_stays_bitwise(window: Any) -> None:
    """Catches a mean over nobody, and windows that are not those of the round."""
    game = toy.play(federation(FedRolex(window=window, own_rows=False), (0.25, 0.25, 0.25)))
    for number in (1, 2, 3):
        before = game.server.model
        cohort = Cohort(
            tuple(map(game.federation.info, range(3))), number, 3, game.federation.rng.at("round", number, "server")
        )
        held = game.federation.algorithm.slices(game.server.layout, cohort)
        game.round()
        covered = [part.coverage() for part in held.values()]
        for name, value in game.server.model.items():
            somewhere = torch.stack([one[name] for one in covered]).any(0)
            assert torch.equal(value[~somewhere], before[name][~somewhere])
            assert not torch.equal(value[somewhere], before[name][somewhere])


def rounds(algorithm: FedRolex, count: int, capacity: float = 0.25) -> list[Slice]:
    layout = Layout.of(build(RESNET, input_shape=(1, 8, 8), num_classes=4))
    clients = (ClientInfo(0, capacity), ClientInfo(1, capacity))
    return [
        algorithm.slices(layout, Cohort(clients, j + 1, count, Rng(("r", j))))[client.id]
        for j in range(count)
        for client in clients
    ]


def test_a_window_passes_over_every_channel_equally_often() -> None:
    """Catches windows that do not wrap around, and offsets that differ between layers of one residual stream."""
    found = rounds(FedRolex(), 16)
    for group, n in found[0].layout.groups.items():
        times = torch.zeros(n)
        for part in found:
            times[part.chosen[group]] += 1
        assert len(set(times.tolist())) == 1
    for part in found:
        by_size: dict[int, list[int]] = {}
        for group, n in part.layout.groups.items():
            assert by_size.setdefault(n, part.chosen[group].tolist()) == part.chosen[group].tolist()


def test_drawn_windows_differ_by_client_and_round_and_not_within_a_residual_stream() -> None:
    """Catches one draw for all, and the released code's independent draws of layers whose outputs are added."""
    found = rounds(FedRolex(window="random"), 3)
    assert len({str({g: c.tolist() for g, c in part.chosen.items()}) for part in found}) == len(found)
    for part in found:
        rows = {name: axes[0] for name, axes in part.kept.items() if name.endswith("weight") and len(axes) == 4}
        streams: dict[int, list[Any]] = {}
        for name, axis in rows.items():
            if "conv1" not in name or name == "conv1.weight":  # the stem, last convolutions, and shortcuts
                assert axis is not None
                streams.setdefault(len(axis), []).append(axis.tolist())
        assert sum(len(stream) > 1 for stream in streams.values()) >= 2
        assert all(one == stream[0] for stream in streams.values() for one in stream)


def test_windows_can_be_tested_elsewhere() -> None:
    """Catches offsets that change nothing."""
    game = toy.play(federation(FedRolex(test_offsets=(2,), unseen_capacities=()), (1.0, 0.25, 0.25)), 1)
    found = game.federation.algorithm.global_nets(game.server, game.federation.task)
    assert list(found) == ["capacity 1", "capacity 0.25", "capacity 1, offset 2", "capacity 0.25, offset 2"]
    w = game.server.model["fc1.weight"]
    assert torch.equal(found["capacity 0.25"]["model"].params["fc1.weight"], w[:6])
    assert torch.equal(found["capacity 0.25, offset 2"]["model"].params["fc1.weight"], w[2:8])
