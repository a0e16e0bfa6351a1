"""Networks for text: padding has no part in them, wherever they are cut, sliced, masked or stacked."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from safetensors.torch import save_file
from torch.nn import functional

from polyfed.base.errors import ModelError
from polyfed.base.rng import Rng
from polyfed.blocks.importance import competing
from polyfed.config import Config, load_algorithm
from polyfed.data.dataset import Dataset
from polyfed.models.catalogue import ModelSpec
from polyfed.models.channels import channels, narrowed
from polyfed.models.exits import each_depth, with_exits
from polyfed.models.flops import multiplications
from polyfed.models.split import SplitModel
from polyfed.models.text import Pool
from polyfed.models.weights import load_weights
from polyfed.models.zoo import build
from polyfed.rounds.federation import Federation
from polyfed.testing.compare import furthest

TRANSFORMER = "text-transformer(vocabulary=11, width=8, heads=2, depth=1)"
BILSTM = "bilstm(vocabulary=11, width=6, state=4)"
ROBERTA = "roberta(vocabulary=11, width=8, depth=1, heads=2, ffn=12, places=12, dropout=0)"
#: FIARSE's groups for AG News: places, words, and the encoder.
GROUPS = [["embed.places"], ["embed.words"], ["block", "fc"]]


def net(spec: str, length: int = 9) -> SplitModel:
    return build(spec, input_shape=(length,), num_classes=3, dtype=torch.int64)


def texts(rows: int, length: int = 9) -> torch.Tensor:
    """Tokens from 1 to 10, in rows of 1 to ``length``."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(1, 11, (rows, length), generator=draw)
    return x * (torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=draw))


def drawn(model: SplitModel) -> dict[str, torch.Tensor]:
    """Weights of the size of 1, so that what differs is seen."""
    draw = torch.Generator().manual_seed(1)
    return {n: 0.5 * torch.randn(v.shape, generator=draw).double() for n, v in model.init(Rng((0,))).items()}


@pytest.mark.parametrize(
    "spec", [TRANSFORMER, TRANSFORMER[:-1] + ", pool=last)", BILSTM, BILSTM[:-1] + ", pool=last, rep_dim=5)"]
)
def test_padding_has_no_part_in_a_text(spec: str) -> None:
    """Catches attention to padding, a mean over it, a state that it moves, and a last token that is padding."""
    model = net(spec)
    params = drawn(model)
    for row in (x := texts(8)):
        used = int((row != 0).sum())
        alone, whole = model(params, row[None, :used]), model(params, torch.stack([row, x[0]]))
        torch.testing.assert_close(alone[0], whole[0], rtol=1e-9, atol=1e-9)
        changed = row.clone()
        changed[used - 1] = row[used - 1] % 10 + 1
        assert not torch.allclose(model(params, changed[None]), alone, rtol=1e-4)
    assert bool(model(params, torch.zeros(1, 9, dtype=torch.int64)).isfinite().all())
    s_in = model.extract(params, x)
    assert torch.equal((s_in != 0).any(2), x != 0)  # what passes the cut carries the mask
    torch.testing.assert_close(model.classify(params, model.intermediate(params, s_in)), model(params, x))


@pytest.mark.parametrize("spec", [TRANSFORMER[:-2] + "3)", BILSTM])
def test_padding_has_no_part_in_a_classifier_behind_a_stage(spec: str) -> None:
    """Catches a mean over places of padding, of which there are as many as the longest row of a batch has tokens."""
    whole, x = each_depth(net(spec), (), "")[-1], texts(8)
    w = drawn(whole)
    assert whole.num_classes > 3
    for row in x:
        short = row[row != 0]
        torch.testing.assert_close(whole(w, short[None]), whole(w, row[None]), rtol=1e-9, atol=1e-9)
    first = with_exits(net(spec), ("embed",), 1)
    tokens = {name: w[name] if name in w else torch.ones(shape).double() for name, shape in first.shapes.items()}
    for padded in x:
        row = padded[padded != 0]
        h = w["net.embed.words.weight"][row]
        h = h + w["net.embed.places"][0, : len(row)] if "net.embed.places" in w else h
        expected = h.mean(0) @ tokens["heads.0.fc.weight"].T + tokens["heads.0.fc.bias"]
        torch.testing.assert_close(first(tokens, padded[None])[0], expected, rtol=1e-9, atol=1e-9)


def test_the_last_token_is_one_token() -> None:
    """Catches a sum over each token before a gap, as there is one where a mask took all numbers of a token."""
    h = torch.tensor([[[1.0], [0], [5], [0]], [[1], [2], [3], [0]], [[1], [2], [3], [4]], [[0], [0], [7], [8]]])
    assert Pool("last")(h).tolist() == [[5], [3], [4], [8]]
    assert Pool("last")(torch.zeros(1, 4, 2)).tolist() == [[0, 0]]
    assert Pool("mean")(h).tolist() == [[3], [2], [2.5], [7.5]]
    model = net(BILSTM[:-1] + ", pool=last)")
    params = drawn(model)
    params["embed.words.weight"][4] = 0
    gap, alone = (model.represent(params, torch.tensor([row])) for row in ([3, 4, 5], [5, 0, 0]))
    torch.testing.assert_close(gap, alone, rtol=1e-9, atol=1e-9)


def test_a_transformer_is_its_formula() -> None:
    """Catches scores that are not divided by the root of a head's width, norms elsewhere, and places that shift."""
    model = net("text-transformer(vocabulary=11, width=4, heads=1, depth=1)")
    w, x = drawn(model), texts(3)
    for row in x:
        row = row[row != 0]
        h = w["embed.words.weight"][row] + w["embed.places"][0, : len(row)]

        def norm(name: str, value: torch.Tensor) -> torch.Tensor:
            return functional.layer_norm(value, (4,), w[f"{name}.weight"], w[f"{name}.bias"])

        q, k, v = (norm("block1.norm1", h) @ w["block1.attention.qkv.weight"].T + w["block1.attention.qkv.bias"]).split(
            4, 1
        )
        mixed = (q @ k.T / 2).softmax(1) @ v
        h = h + mixed @ w["block1.attention.out.weight"].T + w["block1.attention.out.bias"]
        inner = functional.gelu(norm("block1.norm2", h) @ w["block1.fc1.weight"].T + w["block1.fc1.bias"])
        h = h + inner @ w["block1.fc2.weight"].T + w["block1.fc2.bias"]
        expected = norm("norm", h.mean(0)) @ w["fc.weight"].T + w["fc.bias"]
        torch.testing.assert_close(model(w, row[None])[0], expected, rtol=1e-9, atol=1e-9)


def test_a_bilstm_is_that_of_torch() -> None:
    """Catches gates in another order, and a backward direction that starts in the padding."""
    model = net(BILSTM)
    w, x = drawn(model), texts(4)
    own = torch.nn.LSTM(6, 4, batch_first=True, bidirectional=True).double()
    for way, end in (("forwards", ""), ("backwards", "_reverse")):
        for mine, theirs in (("inputs.weight", "weight_ih"), ("inputs.bias", "bias_ih"), ("state.weight", "weight_hh")):
            getattr(own, f"{theirs}_l0{end}").data = w[f"lstm.{way}.{mine}"]
        getattr(own, f"bias_hh_l0{end}").data.zero_()
    for row in x:
        row = row[row != 0]
        out = own(w["embed.words.weight"][row][None])[0][0]
        torch.testing.assert_close(
            model(w, row[None])[0], out.mean(0) @ w["fc.weight"].T + w["fc.bias"], rtol=1e-9, atol=1e-9
        )


def test_heads_units_and_gates_are_coupled() -> None:
    """Catches a gate of a state that stays without its others, and a head in pieces."""
    groups = channels(net(TRANSFORMER, 3)).groups
    assert dict(groups) == {"embed.places[2]": 8, "block1.attention.qkv.weight[0]": 2, "block1.fc1.weight[0]": 16}
    model = net(BILSTM, 3)
    found = channels(model)
    assert set(found.groups.values()) == {6, 4}
    assert len(found.groups) == 3
    own = found.positions["lstm.backwards.state.weight"][1].tolist()
    assert found.positions["lstm.backwards.inputs.weight"][0].tolist() == own * 4
    assert found.positions["fc.weight"][1].tolist()[4:] == own
    small, x = narrowed(model, tuple((group, 2) for group in found.groups)), texts(4, 3)
    kept = found.kept({group: torch.arange(2) for group in found.groups})
    full = drawn(model)
    part, zeroed = dict(full), {}
    for name, value in full.items():
        mask = torch.ones_like(value)
        for dim, stays in enumerate(kept[name]):
            if stays is not None:
                part[name] = part[name].index_select(dim, stays)
                mask *= (
                    torch.zeros(value.shape[dim])
                    .index_fill(0, stays, 1)
                    .reshape([-1 if at == dim else 1 for at in range(value.dim())])
                )
        zeroed[name] = value * mask
    torch.testing.assert_close(small(part, x), model(zeroed, x), rtol=1e-9, atol=1e-9)


def test_attention_counts_as_if_it_were_written_out() -> None:
    """Catches products of scores that a fused attention hides, and places at which padding is left out."""
    counted = multiplications(net(TRANSFORMER))
    assert counted["block1.attention.qkv.weight"] == counted["block1.fc2.weight"] == 9
    assert counted["fc.weight"] == 1
    assert not [name for name in counted if name.startswith("embed")]


@pytest.mark.parametrize(
    ("name", "spec", "keys"),
    [
        ("fiarse", TRANSFORMER, {"scope": "groups", "groups": GROUPS, "unseen_capacities": []}),
        ("fiarse-neuron", TRANSFORMER, {"unseen_capacities": []}),
        ("heterofl", BILSTM, {}),
        ("fedmrl", TRANSFORMER, {"rep_dim": 4, "auxiliary": BILSTM}),
        ("fedin", TRANSFORMER, {"feature_batch": 4}),
        ("depthfl", TRANSFORMER[:-2] + "2)", {}),
        ("scalefl", TRANSFORMER[:-2] + "2)", {}),
    ],
)
def test_stacked_training_is_that_of_one_after_another(name: str, spec: str, keys: dict[str, Any]) -> None:
    """Catches a mask that leaks between the clients of a stack, whose batches are as long as the longest of all."""
    algorithm = load_algorithm(name, keys)
    tables: dict[str, Any] = {
        "run": {"rounds": 2, "threads": 1},
        "clients": {"count": 3, "models": [spec]},
        "train": {"epochs": 1, "batch_size": 4, "lr": 0.2},
        "algorithm": {"name": name},
    }
    if name not in ("fedmrl", "fedin"):
        tables["clients"]["capacities"] = [0.6]
    x = texts(24)
    data = Dataset("texts", x, x[:, 0] % 3, ("a", "b", "c"), (), (), declared="tokens", bucket=2)
    fed = Federation(Config.parse(tables), data, toy.partition((6, 6, 6), 2, 3), algorithm)
    one, many = (toy.play(fed, 2, driver=driver, precision="fp64") for driver in ("sequential", "batched"))
    assert many.driver.paths["stacked"] >= 4
    gap, where = furthest(one.server, many.server)
    assert gap < 1e-9, where
    flops = [[r.work.flops for played in game.played for r in played.reports.values()] for game in (one, many)]
    assert flops[0] == flops[1]
    assert all(math.isfinite(count) and count > 0 for count in flops[0])


def test_pairs_of_text_have_one_shape() -> None:
    """Catches features as long as a batch's longest row: nobody can mix them, and a server refuses them."""
    x = texts(24)
    x[:8, 4:] = 0
    data = Dataset("texts", x, x[:, 0] % 3, ("a", "b", "c"), (), (), declared="tokens", bucket=2)
    tables = {
        "run": {"rounds": 2, "threads": 1},
        "clients": {"count": 3, "models": [TRANSFORMER]},
        "train": {"epochs": 1, "batch_size": 4, "lr": 0.2},
        "algorithm": {"name": "fedin"},
    }
    algorithm = load_algorithm("fedin", {"feature_batch": 4, "mix": 2})
    fed = Federation(Config.parse(tables), data, toy.partition((6, 6, 6), 2, 3), algorithm)
    game = toy.play(fed, 2)
    bank = game.server.bank
    assert {tuple(pair.s_in.shape) for pair in bank.values()} == {(4, 9, 8)}
    assert bool((bank[0].s_in[:, 4:] == 0).all())
    model = fed.local(0, 1).models["model"]
    algorithm.check_pairs(model, tuple(bank.values()))


def test_flops_of_training_are_of_full_length() -> None:
    """Catches a count that depends on which rows the counter's own step took, so on who was trained first."""
    counts: list[float] = []
    for bucket in (0, 1):
        x = texts(6).clamp(max=9) * (torch.arange(9) < 3)
        data = Dataset("texts", x, x[:, 0] % 3, ("a", "b", "c"), (), (), declared="tokens", bucket=bucket)
        tables = {
            "run": {"threads": 1},
            "clients": {"count": 2, "models": [TRANSFORMER]},
            "algorithm": {"name": "fedavg"},
        }
        fed = Federation(Config.parse(tables), data, toy.partition((2, 2), 1, 2), load_algorithm("fedavg", {}))
        counts.append(toy.play(fed, 1).played[0].reports[0].work.flops)
    assert counts[0] == counts[1] > 0


def test_the_groups_of_fiarse_for_ag_news() -> None:
    """Catches names of the network that the groups of the example no longer cover."""
    algorithm: Any = load_algorithm("fiarse", {"scope": "groups", "groups": GROUPS})
    names = [n for n in net(TRANSFORMER).shapes if "norm" not in n]
    assert len({*competing(names, algorithm.scope, algorithm.groups)}) == 3


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        ("text-transformer", (3, 8, 8), "takes tokens"),
        ("bilstm", (3, 8), "takes tokens"),
        ("text-transformer(heads=5)", (8,), "divisor of width"),
        ("roberta", (3, 8), "takes tokens"),
        ("roberta(places=8)", (8,), "for texts of up to 6 tokens, got 8"),
        ("roberta(heads=5)", (8,), "divisor of width"),
        ("roberta(dropout=1.0)", (8,), "a share from 0 to below 1"),
        ("bilstm(pool=max)", (8,), "one of mean, last"),
    ],
)
def test_what_networks_of_text_refuse(spec: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build(spec, input_shape=shape, num_classes=3, dtype=torch.int64)


# -------------------------------------------------------------------------------------------------------- RoBERTa


def test_without_the_package_roberta_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match=r"pip install 'polyfed\[text\]'"):
        net("roberta(depth=1, width=8, heads=2)")


@pytest.fixture
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="transformers is not installed (the extra text)")


def test_roberta_starts_with_a_pretrained_checkpoint(transformers: Any, tmp_path: Path) -> None:
    """Catches padding that is not the checkpoint's, names that do not fit, and a head that no seed decides."""
    model = net(ROBERTA)
    assert not model.buffer_names
    assert {"roberta.encoder.layer.0.attention.self.query.weight[0]"} <= set(channels(model).groups)
    config = transformers.RobertaConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, num_labels=3,
        max_position_embeddings=12, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.RobertaForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path, safe_serialization=True)
    path = tmp_path / "model.safetensors"
    w = load_weights(path, model)
    x = texts(4)
    own = torch.where(x == 0, 1, torch.where(x == 1, 0, x))
    expected = theirs(own, attention_mask=(own != 1).long()).logits.detach()
    torch.testing.assert_close(model(w, x), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(w, functional.pad(x[:, :9], (0, 0))), model(w, x))
    masked = {n: v for n, v in theirs.state_dict().items() if not n.startswith("classifier.")}
    save_file({**masked, "lm_head.bias": torch.zeros(11)}, path)  # as of the task of the pretraining
    again = load_weights(path, model)
    assert all(torch.equal(again[n], w[n]) for n in masked)
    assert again.keys() == w.keys()
    save_file({n: v for n, v in masked.items() if "query" not in n}, path)
    with pytest.raises(ModelError, match=r"query\.weight: missing"):
        load_weights(path, model)


def test_roberta_trains(transformers: Any) -> None:
    """Catches a network of the package that cannot be stacked."""
    x = texts(12)
    data = Dataset("texts", x, x[:, 0] % 3, ("a", "b", "c"), (), (), declared="tokens", bucket=2)
    config = Config.parse(
        {"run": {"threads": 1}, "clients": {"count": 2, "models": [ROBERTA]},
         "train": {"epochs": 1, "batch_size": 4, "lr": 0.2}, "algorithm": {"name": "fedavg"}}
    )  # fmt: skip
    fed = Federation(config, data, toy.partition((4, 4), 2, 2), load_algorithm("fedavg", {}))
    one, many = (toy.play(fed, 1, driver=driver, precision="fp64") for driver in ("sequential", "batched"))
    assert many.driver.paths["stacked"] == 2
    # Not by their norms: a key's bias changes no softmax, so its gradient is rounding alone.
    torch.testing.assert_close(dict(one.server.model), dict(many.server.model), rtol=1e-9, atol=1e-12)
    assert net(str(ModelSpec.parse(ROBERTA).having(dropout=0.1))).random
