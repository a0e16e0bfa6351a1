"""What happens to features on their way: which rows, what veils them, whose they are, and how long they stay."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from polyfed.base.errors import MessageError, ModelError
from polyfed.base.rng import Rng
from polyfed.blocks.features import FeatureExchange, Features, Pinned, dealt, renewed
from polyfed.blocks.losses import distance_correlation, supervised
from polyfed.core.clients import ClientInfo, Cohort
from polyfed.core.net import Net
from polyfed.models.zoo import build

CNN = build("in-resnet10-small(width=4)", input_shape=(1, 20, 20), num_classes=4)  # s_in (4, 5, 5), s_out (32,)
CLIENT: Any = SimpleNamespace(rng=Rng((7, "client", 3)), round=5, train=range(30))


def made(rows: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    lengths = torch.arange(1.0, rows + 1)
    return {
        "s_in": torch.rand((rows, 4, 5, 5), generator=generator) * lengths[:, None, None, None],
        "s_out": torch.rand((rows, 32), generator=generator) * lengths.flip(0)[:, None],
    }


def pair(number: int, rows: int = 6) -> Features:
    return Features(
        torch.arange(rows * 2.0).reshape(rows, 2) + 100 * number, torch.arange(float(rows))[:, None], number
    )


def test_without_a_veil_features_are_sent_as_they_are() -> None:
    """Catches a default that changes what is sent, and a round that is not the client's."""
    plain = made()
    shown = FeatureExchange().veiled(plain, CLIENT)
    assert (shown.s_in, shown.s_out, shown.round) == (plain["s_in"], plain["s_out"], 5)
    read = FeatureExchange().read((shown,), CNN)
    assert read["s_in"].data_ptr() == plain["s_in"].data_ptr()
    assert FeatureExchange().read((), CNN) == {}


def test_clipped_features_have_at_most_the_median_norm_and_their_direction() -> None:
    """Catches one bound for both tensors, a bound of the mean, and examples that are lengthened."""
    plain = made(7)
    shown = FeatureExchange(clip=0.5).veiled(plain, CLIENT)
    for name, s in plain.items():
        before, after = s.flatten(1), getattr(shown, name).flatten(1)
        bound = 0.5 * sorted(float(row.norm()) for row in before)[3]
        for row, cut in zip(before, after, strict=True):
            assert float(cut.norm()) == pytest.approx(min(float(row.norm()), bound), rel=1e-5)
            assert float(row @ cut) == pytest.approx(float(row.norm() * cut.norm()), rel=1e-5)
    assert float(before.norm(dim=1).min()) < bound < float(before.norm(dim=1).max())


def test_clipping_nothing_but_zeros_is_no_division_by_zero() -> None:
    shown = FeatureExchange(clip=1.0).veiled({n: torch.zeros_like(s) for n, s in made().items()}, CLIENT)
    assert not shown.s_in.any()


def test_noise_has_the_size_that_is_asked_for_and_is_keyed() -> None:
    """Catches noise by the other tensor's size, the same noise in both, noise that repeats or cannot be redone."""
    draw = torch.Generator().manual_seed(0)
    big = {"s_in": torch.rand(50, 4, 5, 5, generator=draw) * 3, "s_out": torch.rand(50, 32, generator=draw)}
    exchange = FeatureExchange(noise=0.5)
    shown = exchange.veiled(big, CLIENT)
    noise = {n: getattr(shown, n) - s for n, s in big.items()}
    for n, s in big.items():
        assert float(noise[n].std()) == pytest.approx(0.5 * float(s.std()), rel=0.06)
        assert abs(float(noise[n].mean())) < 0.1 * float(s.std())
    assert not torch.allclose(noise["s_in"].flatten()[:9] / 3, noise["s_out"].flatten()[:9], rtol=0.05)
    assert torch.equal(exchange.veiled(big, CLIENT).s_in, shown.s_in)
    later = SimpleNamespace(**{**vars(CLIENT), "rng": Rng((7, "client", 4))})
    assert not torch.equal(exchange.veiled(big, later).s_in, shown.s_in)  # type: ignore[arg-type]


def test_features_are_clipped_before_they_are_noised() -> None:
    """Catches a clip that cuts the noise off, too."""
    both = FeatureExchange(clip=0.3, noise=2.0).veiled(made(), CLIENT)
    clipped = FeatureExchange(clip=0.3).veiled(made(), CLIENT)
    noised = FeatureExchange(noise=2.0).veiled({"s_in": clipped.s_in, "s_out": clipped.s_out}, CLIENT)
    assert torch.equal(both.s_in, noised.s_in)


def test_windows_have_their_mean_and_are_read_at_full_size() -> None:
    """Catches windows at the edge that count zeros from outside, and maps that come back shifted or too large."""
    exchange, plain = FeatureExchange(pool=2), made()
    shown = exchange.veiled(plain, CLIENT)
    assert exchange.wire_shape(CNN) == (4, 3, 3) == tuple(shown.s_in.shape[1:])
    assert torch.allclose(shown.s_in[:, :, 2, 2], plain["s_in"][:, :, 4, 4])  # a window of one
    assert torch.allclose(shown.s_in[:, :, 0, 2], plain["s_in"][:, :, 0:2, 4].mean(2))
    assert torch.equal(shown.s_out, plain["s_out"])
    read = exchange.read((shown,), CNN)
    assert read["s_in"].shape == plain["s_in"].shape
    assert torch.equal(read["s_in"][:, :, 3, 1], shown.s_in[:, :, 1, 0])
    assert torch.equal(read["s_in"][:, :, 4, 4], shown.s_in[:, :, 2, 2])


def test_features_without_positions_cannot_be_pooled() -> None:
    dense = build("mlp(hidden=(12, 6))", input_shape=(7,), num_classes=4)
    assert FeatureExchange().wire_shape(dense) == (12,)
    with pytest.raises(ModelError, match=r"pool = 2.*\(12,\)"):
        FeatureExchange(pool=2).wire_shape(dense)


def test_half_precision_is_half_the_bytes_and_never_infinite() -> None:
    """Catches features that travel in single precision, are trained on in half, or overflow and are refused."""
    exchange, plain = FeatureExchange(half=True), made()
    plain["s_out"][0, 0], plain["s_out"][1, 0] = 1e6, -1e6
    shown = exchange.veiled(plain, CLIENT)
    assert shown.s_in.dtype == shown.s_out.dtype == torch.float16
    assert bool(torch.isfinite(shown.s_out).all())
    read = exchange.read((shown,), CNN)
    assert read["s_in"].dtype == torch.float32
    assert torch.allclose(read["s_in"], plain["s_in"], rtol=1e-3)
    assert read["s_out"][:2, 0].tolist() == [65504.0, -65504.0]
    exchange.check_pairs(CNN, (shown,))
    with pytest.raises(MessageError, match="float16"):
        FeatureExchange().check_pairs(CNN, (shown,))
    with pytest.raises(MessageError, match="float32"):
        exchange.check_pairs(CNN, (FeatureExchange().veiled(made(), CLIENT),))


def test_pairs_of_another_size_are_refused() -> None:
    shown = FeatureExchange(pool=2).veiled(made(), CLIENT)
    FeatureExchange(pool=2, feature_batch=6).check_pairs(CNN, (shown,))
    with pytest.raises(MessageError, match=r"\(1 to 64, 4, 5, 5\)"):
        FeatureExchange().check_pairs(CNN, (shown,))
    with pytest.raises(MessageError, match=r"1 to 5"):
        FeatureExchange(pool=2, feature_batch=5).check_pairs(CNN, (shown,))


def test_rows_are_new_at_each_participation_unless_they_are_pinned() -> None:
    """Catches a pinned choice that is drawn anew, and rows that repeat without one."""
    exchange = FeatureExchange(feature_batch=8)
    first = exchange.rows(Pinned(torch.tensor([4, 2])), CLIENT)
    assert first.tolist() == [4, 2]
    drawn = exchange.rows(Features(first, first, 1), CLIENT)  # any state but Pinned
    later = exchange.rows(Features(first, first, 1), SimpleNamespace(**{**vars(CLIENT), "rng": Rng((8,))}))  # type: ignore[arg-type]
    assert len(set(drawn.tolist())) == 8
    assert drawn.tolist() != later.tolist()


def test_the_bank_keeps_the_latest_pair_of_each_client_for_a_time() -> None:
    """Catches ages that are off by one, a round that the client chose, and old pairs that stay beside new ones."""
    bank = {k: pair(k) for k in (3, 4, 5)}
    new = renewed(bank, {4: (replace(pair(9), round=99),), 7: ()}, 6, 3)
    assert {k: p.round for k, p in new.items()} == {4: 6, 5: 5}
    assert new[5] is bank[5]
    assert torch.equal(new[4].s_in, pair(9).s_in)
    assert set(renewed({3: pair(3)}, {}, 4, 1)) == set()


def test_controls_are_ones_own_pair_another_order_and_noise() -> None:
    """Catches a control that is the method itself: outputs beside their inputs, or inputs that are somebody's."""
    bank = {k: pair(k) for k in range(4)}
    rng = Rng((0, "round", 2))
    assert dealt(bank, 2, "own", rng) == (bank[2],)
    assert dealt({1: bank[1]}, 2, "own", rng) == ()
    (foreign,) = dealt(bank, 2, "foreign", rng)
    (shuffled,) = dealt(bank, 2, "shuffled", rng)
    (noise,) = dealt(bank, 2, "random", rng)
    assert torch.equal(shuffled.s_in, foreign.s_in)
    for control in (shuffled, noise):
        assert sorted(control.s_out[:, 0].tolist()) == foreign.s_out[:, 0].tolist()
        assert not (control.s_out == foreign.s_out).any()
        assert control.round == foreign.round
    inputs = torch.rand(400, 5, generator=torch.Generator().manual_seed(0)) * 4 + 7
    big = {1: Features(inputs, torch.zeros(400, 3), 1)}
    (noise,) = dealt(big, 2, "random", rng)
    assert float(noise.s_in.mean()) == pytest.approx(9.0, abs=0.2)
    assert float(noise.s_in.std()) == pytest.approx(4 / 12**0.5, rel=0.1)
    assert float(noise.s_in.max()) > 11.5  # uniform numbers end at 11
    assert dealt({}, 2, "shuffled", rng) == ()
    single = {1: Features(torch.zeros(1, 2), torch.ones(1, 3), 1)}
    assert torch.equal(dealt(single, 2, "shuffled", rng)[0].s_out, torch.ones(1, 3))


def test_a_mixed_batch_is_of_several_donors_and_every_output_stays_beside_its_input() -> None:
    """Catches a batch of one donor, of all examples, of one's own, or whose halves are mixed apart."""
    bank = {k: Features(torch.arange(6.0)[:, None] + 10 * k, torch.arange(6.0)[:, None] - 10 * k, k) for k in range(5)}
    rng = Rng((0, "round", 2))
    (mixed,) = dealt(bank, 2, "foreign", rng, mix=3)
    whose = (mixed.s_in[:, 0] // 10).long()
    assert len(mixed.s_in) == 6
    assert torch.equal(mixed.s_in[:, 0] - 10 * whose, mixed.s_out[:, 0] + 10 * whose)
    drawn = rng.at("pair", 2).numpy().permutation([0, 1, 3, 4])[:3].tolist()
    assert 1 < len(set(whose.tolist())) <= 3
    assert set(whose.tolist()) <= set(drawn)
    assert mixed.round == min(drawn)
    (few,) = dealt({0: bank[0], 2: bank[2]}, 2, "foreign", rng, mix=3)
    assert few is bank[0]  # one donor's batch is not reordered
    (shuffled,) = dealt(bank, 2, "shuffled", rng, mix=3)
    assert torch.equal(shuffled.s_in, mixed.s_in)
    assert not torch.equal(shuffled.s_out, mixed.s_out)


@pytest.mark.parametrize(("wanted", "donors"), [("any", {1, 2, 3}), ("same", {2}), ("other", {1, 3})])
def test_donors_are_of_the_architecture_that_is_asked_for(wanted: Any, donors: set[int]) -> None:
    """Catches the other architectures' pairs, one's own pair, and a client that is given another's architecture."""
    exchange = FeatureExchange(donor_architecture=wanted)
    clients = tuple(ClientInfo(k, architecture=name) for k, name in enumerate(("a", "b", "a", "c")))
    known = exchange.noted({9: "z"}, Cohort(clients, 1, 9, Rng((0,))))
    assert known == ({9: "z"} if wanted == "any" else {9: "z", 0: "a", 1: "b", 2: "a", 3: "c"})
    server = SimpleNamespace(bank={k: pair(k) for k in range(4)}, architectures=known)
    drawn = [
        exchange.draw(server, clients[0], Cohort(clients, n, 9, Rng((0, "round", n))))[0].round for n in range(1, 20)
    ]
    assert set(drawn) == donors
    if wanted == "same":
        assert exchange.draw(server, clients[1], Cohort(clients, 2, 9, Rng((0,)))) == ()


def test_nopeek_adds_the_distance_correlation_of_inputs_and_features() -> None:
    """Catches another weight, another tensor, statistics that move twice, and a default that costs or changes bits."""
    params, x = CNN.init(Rng((1,))), torch.rand(8, 1, 20, 20, generator=torch.Generator().manual_seed(3))
    batch = (x, torch.arange(8) % 4)
    CNN.train(True)
    try:
        nets = [{"model": Net(CNN, params).still()} for _ in range(3)]
        plain = supervised(nets[0], batch)
        assert torch.equal(FeatureExchange().local_loss(nets[1], batch), plain)
        loss = FeatureExchange(nopeek=0.3).local_loss(nets[2], batch)
        correlation = distance_correlation(x, Net(CNN, params).still().extract(x))
    finally:
        CNN.train(False)
    assert float(loss) == pytest.approx(float(plain + 0.3 * correlation), rel=1e-5)
    assert 0.1 < float(correlation) < 1
    for name in CNN.buffer_names:
        assert torch.allclose(nets[2]["model"].params[name], nets[0]["model"].params[name], rtol=1e-5)
