from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from polyfed.base.errors import ModelError
from polyfed.base.rng import Rng
from polyfed.core.algorithm import Task
from polyfed.models.catalogue import MODELS, ModelSpec
from polyfed.models.compatibility import check_cuts_fit, check_heads_fit
from polyfed.models.norm import groups
from polyfed.models.split import SplitModel
from polyfed.models.zoo import build, projector

DEPTHS = (10, 14, 18, 22, 26)
SMALL = ["cnn2", "cnn5", "resnet8", *(f"in-resnet{depth}-small" for depth in DEPTHS), "mlp"]
SIGNAL = [f"in-resnet{depth}-1d" for depth in DEPTHS]
KINDS = ["cnn-1d", "gru-1d", "vit-1d"]


def image(spec: str, num_classes: int = 10, shape: tuple[int, ...] = (3, 32, 32)) -> SplitModel:
    return build(spec, input_shape=shape, num_classes=num_classes)


def size(model: SplitModel) -> int:
    return sum(model.shapes[name].numel() for name in model.parameter_names)


@pytest.mark.parametrize(
    ("spec", "ten", "hundred"),
    [
        ("cnn1", 2_621_558, 2_666_648),
        ("cnn2", 1_815_142, 1_860_232),
        ("cnn3", 1_320_558, 1_365_648),
        ("cnn4", 1_060_358, 1_105_448),
        ("cnn5", 670_058, 715_148),
        ("cnn5(rep_dim=100)", 465_658, 474_748),
        ("vit", 141_898, 147_748),
        ("resnet18", 11_173_962, 11_220_132),
        ("resnet8", 78_042, 83_892),
        ("in-resnet10-small", 308_826, 320_436),
    ],
)
def test_sizes_of_fedmrl_and_fiarse(spec: str, ten: int, hundred: int) -> None:
    assert size(image(spec)) == ten
    assert size(image(spec, 100)) == hundred


def test_cnn_representation_is_after_the_relu_of_fc2() -> None:
    model = image("cnn5")
    params = model.init(Rng((0,)))
    r = model.represent(params, torch.randn(4, 3, 32, 32))
    assert r.shape == (4, 500)
    assert r.min() == 0
    assert model.s_in_shape == (32, 5, 5)
    assert model.classifier_names == {"fc3.weight", "fc3.bias"}


def test_the_masked_part_of_resnet18() -> None:
    model = image("resnet18")
    norms = sum(model.shapes[name].numel() for name in model.norm_names)
    assert (norms, size(model) - norms) == (9_600, 11_164_362)
    model = image("resnet18(norm=static)")
    assert size(model) == 11_173_962
    assert model.buffer_names == frozenset()


@pytest.mark.parametrize(
    ("name", "parameters", "statistics", "counters"),
    [
        ("in-resnet10", 4_910_922, 5_760, 12),
        ("in-resnet14", 10_812_234, 8_832, 16),
        ("in-resnet18", 11_181_642, 9_600, 20),
        ("in-resnet22", 17_082_954, 12_672, 24),
        ("in-resnet26", 17_452_362, 13_440, 28),
    ],
)
def test_sizes_of_fedin(name: str, parameters: int, statistics: int, counters: int) -> None:
    model = image(name)
    assert size(model) == parameters
    counts = [name for name in model.buffer_names if name.endswith("num_batches_tracked")]
    assert len(counts) == counters
    assert sum(model.shapes[name].numel() for name in model.buffer_names) - counters == statistics
    assert (model.s_in_shape, model.rep_dim) == ((64, 8, 8), 512)
    assert sum(model.shapes[name].numel() for name in model.extractor_names & model.parameter_names) == 9_536
    assert sum(model.shapes[name].numel() for name in model.classifier_names) == 5_130
    assert image(f"{name}(cut=stage1)").s_in_shape == (64, 8, 8)
    assert image(f"{name}(cut=stage2)").s_in_shape == (128, 4, 4)


@pytest.mark.parametrize(("ending", "shape"), [("", (3, 32, 32)), ("-small", (3, 32, 32)), ("-1d", (9, 128))])
def test_which_network_of_fedin_owns_which_block(ending: str, shape: tuple[int, ...]) -> None:
    family = DEPTHS
    models = {depth: image(f"in-resnet{depth}{ending}", shape=shape) for depth in family}
    names = {depth: set(model.shapes) for depth, model in models.items()}

    def owners(prefix: str) -> list[int]:
        return [depth for depth in family if any(name.startswith(f"{prefix}.") for name in names[depth])]

    for prefix in (
        "conv1",
        "bn1",
        "fc",
        "layer1.0",
        "layer2.0",
        "layer3.0",
        "layer4.0",
        "layer4.0.downsample",
    ):
        assert owners(prefix) == list(family)
    for stage in (1, 2):
        assert owners(f"layer{stage}.1") == [18, 22, 26]
        assert owners(f"layer{stage}.2") == [26]
    for stage in (3, 4):
        assert owners(f"layer{stage}.1") == [14, 18, 22, 26]
        assert owners(f"layer{stage}.2") == [22, 26]
    for shallow, deep in pairwise(family):
        assert names[shallow] < names[deep]
        a, b = models[shallow].shapes, models[deep].shapes
        assert all(a[name] == b[name] for name in a)


@pytest.mark.parametrize(
    ("depth", "small", "signal"),
    [
        (10, 308_826, 112_278),
        (14, 678_234, 235_926),
        (18, 701_466, 243_798),
        (22, 1_070_874, 367_446),
        (26, 1_094_106, 375_318),
    ],
)
def test_sizes_and_cuts_of_the_relatives(depth: int, small: int, signal: int) -> None:
    """Catches a stem or blocks of another depth or dimension, and cuts at which the family does not fit together."""
    assert size(image(f"in-resnet{depth}-small")) == small
    assert size(image(f"in-resnet{depth}-1d", 6, (9, 128))) == signal
    for cut, shape in (("stem", (16, 32)), ("stage1", (16, 32)), ("stage2", (32, 16))):
        model = image(f"in-resnet{depth}-1d(cut={cut})", 6, (9, 128))
        assert (model.s_in_shape, model.rep_dim) == (shape, 128)
        assert image(f"in-resnet{depth}-small(cut={cut})").s_in_shape == (
            *shape[:1],
            *{32: (8, 8), 16: (4, 4)}[shape[1]],
        )
    assert image(f"in-resnet{depth}-1d(width=4)", 6, (9, 128)).rep_dim == 32


@pytest.mark.parametrize("norm", ["batch", "group", "static"])
def test_a_network_of_signals_is_that_of_images_on_one_line(norm: str) -> None:
    """Catches a layer, a norm or a mean over another axis: kernels on the middle row compute the same for one row."""
    signal = image(f"in-resnet14-1d(norm={norm}, width=4)", 6, (3, 64))
    like = image(f"in-resnet14(norm={norm}, width=4)", 6, (3, 1, 64))
    params = signal.init(Rng((0,)))
    flat = {}
    for name, shape in like.shapes.items():
        flat[name] = params[name]
        if len(shape) == 4:
            flat[name] = torch.zeros(shape)
            flat[name][:, :, shape[2] // 2] = params[name]
    x = torch.randn(5, 3, 64, generator=Rng((1,)).torch())
    for mode in (False, True):
        signal.train(mode), like.train(mode)
        assert torch.allclose(signal(params, x), like(flat, x[:, :, None]), atol=1e-6)
    signal.train(False), like.train(False)


def test_heads_are_shared_whatever_they_are_called() -> None:
    """Catches heads that fit but are refused for their modules' names, or put where they do not belong."""
    models = {name: image(name) for name in ("cnn5(rep_dim=20)", "resnet8(width=5)", "mlp(hidden=(9, 20))")}
    check_heads_fit(models)
    cnn, resnet, _ = models.values()
    theirs, own = cnn.init(Rng((0,))), resnet.init(Rng((1,)))
    head = cnn.head(theirs)
    assert head.keys() == {"weight", "bias"}
    joined = resnet.with_head(own, head)
    assert joined.keys() == own.keys()
    assert joined["fc.weight"] is theirs["fc3.weight"]
    body = {name: value for name, value in own.items() if name not in resnet.classifier_names}
    assert resnet.with_head(body, head).keys() == own.keys()
    assert all(joined[name] is value for name, value in body.items())
    with pytest.raises(ModelError, match=r"'resnet8.*got a head \{'weight': \(10, 500\).*\(10, 20\)"):
        resnet.with_head(own, image("cnn5").head(image("cnn5").init(Rng((0,)))))
    with pytest.raises(ModelError, match=r"'cnn5' and 'mlp' do not fit: classifier is .*\(10, 500\).*\(10, 100\)"):
        check_heads_fit({"cnn5": image("cnn5"), "mlp": image("mlp")})


def test_the_small_family_fits_together() -> None:
    check_cuts_fit({name: image(name) for name in SMALL if name.startswith("in-")})
    check_cuts_fit({name: image(name, shape=(9, 128)) for name in SIGNAL})
    with pytest.raises(ModelError, match=r"'cnn' and 'mlp' do not fit: extractor output .*\(32, 5, 5\)"):
        check_cuts_fit({"cnn": image("cnn5"), "mlp": image("mlp")})


@pytest.mark.parametrize(
    "spec", [*SMALL, *SIGNAL, *KINDS, "resnet8(norm=group)", "resnet8(norm=static)", "mlp(hidden=())"]
)
def test_each_small_model_trains_and_its_pieces_are_the_whole(spec: str) -> None:
    shape = (9, 32) if "-1d" in spec else (1, 16, 16)
    model = image(spec, 7, shape)
    params = model.init(Rng((0,)))
    for name in model.parameter_names:
        params[name].requires_grad_()
    x = torch.randn(4, *shape, generator=Rng((1,)).torch())
    model.train(True)
    model(params, x).logsumexp(1).sum().backward()
    assert all(params[name].grad is not None for name in model.parameter_names)
    model.train(False)
    with torch.no_grad():
        assert torch.equal(model.classify(params, model.represent(params, x)), model(params, x))
    assert model.num_classes == 7
    assert not model.random


def test_group_norm_never_has_one_channel_to_a_group() -> None:
    assert [groups(channels) for channels in (1, 3, 6, 16, 32, 64, 512)] == [1, 1, 1, 8, 16, 32, 32]


def test_static_norm_uses_the_batch_in_evaluation_too() -> None:
    model = image("resnet8(norm=static)")
    params, x = model.init(Rng((0,))), torch.randn(6, 3, 32, 32)
    evaluated = model(params, x)
    assert not torch.allclose(evaluated[:3], model(params, x[:3]))
    model.train(True)
    assert torch.equal(model(params, x), evaluated)
    model.train(False)


def test_other_inputs() -> None:
    assert image("cnn5", shape=(1, 28, 28)).s_in_shape == (32, 4, 4)
    assert image("cnn1", shape=(1, 16, 20)).s_in_shape == (32, 1, 2)
    assert image("mlp", shape=(12,)).rep_dim == 100
    with pytest.raises(ModelError, match=r"at least 16x16 pixels, got \(1, 15, 32\)"):
        image("cnn1", shape=(1, 15, 32))
    with pytest.raises(ModelError, match=r"images \(C, H, W\), got samples of shape \(12,\)"):
        image("resnet8", shape=(12,))
    with pytest.raises(ModelError, match=r"got samples of shape \(9, 128\).* -1d"):
        image("in-resnet10-small", shape=(9, 128))
    for wrong in ((128, 9), (3, 32, 32), (128,)):
        with pytest.raises(ModelError, match=r"\(C, T\) of at least 16 steps, got .*channels come last"):
            image("in-resnet10-1d", shape=wrong)
    with pytest.raises(ModelError, match=r"at least 16x16 pixels, got \(12,\)"):
        image("cnn1", shape=(12,))
    with pytest.raises(ModelError, match=r"got \(3, 62\); cut or pad them to 60 or 64 steps"):
        image("cnn-1d", shape=(3, 62))
    with pytest.raises(ModelError, match=r"got samples of shape \(45,\); choose an mlp"):
        image("gru-1d", shape=(45,))


def test_another_kind_of_data_is_told_which_networks_take_it() -> None:
    """Catches advice to take a network that then fails on the type."""
    tokens, numbers = Task((32,), 3, dtype=torch.int64), Task((32,), 3)
    for name in ("cnn5", "mlp", "in-resnet10-1d", "vit"):
        with pytest.raises(ModelError, match=r"takes numbers; choose text-transformer or .*such as .text-transformer"):
            tokens.auxiliary(name)
    with pytest.raises(ModelError, match=r"takes tokens; choose mlp, or set .*; name another network, such as .mlp"):
        numbers.auxiliary("bilstm")


def test_a_dense_network_reads_the_columns_that_it_names() -> None:
    """Catches features of another column, and weights whose places depend on the order of the names."""
    task = Task((6,), 3, columns=(("age", 1), ("sex", 2), ("lab a", 1), ("lab b", 1), ("bmi", 1)))
    one = task.build("mlp(hidden=(4,), columns=('lab *', 'age'))")
    assert one is task.build(ModelSpec.parse("mlp(hidden=(4,), columns=('age', 'lab b', 'lab a'))"))
    params, x = one.init(Rng((0,))), torch.randn(3, 6)
    whole = build("mlp(hidden=(4,))", input_shape=(3,), num_classes=3)
    assert torch.equal(one(params, x), whole(params, x[:, [0, 3, 4]]))
    assert task.build("mlp(columns=('sex',))").shapes["fc1.weight"] == (200, 2)
    for wrong, fault in (
        ("('aeg',)", "names 'aeg', which is no column; did you mean 'age'.; the data have age, sex"),
        ("()", "expected names or patterns of columns"),
        ("('age', 'lab *', 'age')", "option 'columns' has 'age' twice"),
        ("(3, 1)", "expected ascending positions below 6"),
        ("(5, 6)", "expected ascending positions below 6"),
    ):
        with pytest.raises(ModelError, match=fault):
            task.build(f"mlp(columns={wrong})")


def test_the_name_of_a_column_is_no_pattern() -> None:
    """Catches "smoker?" that is "smokers" too, and a bracket in a pattern that is a set of letters."""
    columns = tuple((name, 1) for name in ("smoker?", "smokers", "lab [a]", "lab a", "lab*", "lab [b]"))
    for wanted, places in {"smoker?": (0,), "lab [a]": (2,), "lab*": (4,), "lab [*": (2, 5), "*": range(6)}.items():
        assert ModelSpec("mlp", (("columns", (wanted,)),)).reading(columns).options == (("columns", tuple(places)),)
    with pytest.raises(ModelError, match=r"names 'lab \?', which is no column"):
        ModelSpec("mlp", (("columns", ("lab ?",)),)).reading(columns)


def test_equal_requests_share_one_model() -> None:
    assert image("resnet8") is image("resnet8(norm=batch)") is image("resnet8(cut=stem, norm=batch)")
    assert image("resnet8") is build(ModelSpec("resnet8"), input_shape=(3, 32, 32), num_classes=10)
    assert image("resnet8").signature != image("resnet8(norm=group)").signature
    assert image("resnet8").name == "resnet8"
    assert image("resnet8(norm=group)").name == "resnet8(norm=group)"
    assert projector(600, 500) is projector(600, 500)


def test_projector() -> None:
    linear, mlp = projector(6, 5), projector(6, 5, "mlp")
    assert (size(linear), size(mlp)) == (35, 65)
    params, r = linear.init(Rng((0,))), torch.randn(3, 6)
    expected = torch.nn.functional.linear(r, params["fc1.weight"], params["fc1.bias"])
    assert torch.equal(linear(params, r), expected)
    assert mlp(mlp.init(Rng((0,))), r).shape == (3, 5)
    assert linear.input_shape == (6,)
    with pytest.raises(ModelError, match="unknown kind of projector 'cubic'; expected linear or mlp"):
        projector(6, 5, "cubic")


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28)])
def test_a_vision_transformer(shape: tuple[int, ...]) -> None:
    """Catches a cut in another place, tokens that are mixed up, and sides that leave a part of the image out."""
    model = image("vit(depth=1)", shape=shape)
    params = model.init(Rng((0,)))
    x = torch.randn(2, *shape)
    tokens = (shape[1] // 4) ** 2
    assert (model.s_in_shape, model.rep_dim) == ((tokens, 64), 64)
    assert model.classifier_names == {"fc.weight", "fc.bias"}
    places = params["patches.places"]
    moved = x.clone()
    moved[..., :4, :4], moved[..., :4, 4:8] = x[..., :4, 4:8], x[..., :4, :4]  # two patches change places, and
    swapped = {**params, "patches.places": places[:, [1, 0, *range(2, tokens)]]}  # so do their vectors
    assert torch.allclose(model(params, x), model(swapped, moved), atol=1e-5)
    assert not torch.allclose(model(params, x), model(params, moved), atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        ("vit", (3, 30, 32), r"multiples of 4, got samples of shape \(3, 30, 32\); set data.image_size"),
        ("vit", (7,), "takes images"),
        ("vit(heads=5)", (3, 32, 32), "set heads to a divisor of width"),
    ],
)
def test_images_that_a_vision_transformer_does_not_take(spec: str, shape: tuple[int, ...], message: str) -> None:
    """Catches pixels that are left out in silence."""
    with pytest.raises(ModelError, match=message):
        image(spec, shape=shape)


def test_networks_of_three_kinds_for_signals_have_equal_cuts() -> None:
    """Catches a block of another width or name, a GRU that is not PyTorch's, and steps that are left out."""
    family = {name: image(name, 6, (9, 128)) for name in (*KINDS, "cnn-1d(depth=1)", "gru-1d(depth=2)")}
    check_cuts_fit(family)
    assert [size(family[name]) for name in KINDS] == [20_294, 11_174, 22_950]
    shared = {*family["cnn-1d"].shapes} & {*family["gru-1d"].shapes}
    assert shared == {f"{name}.{kind}" for name in ("stem.conv", "fc1", "fc2") for kind in ("weight", "bias")}
    params, x = family["gru-1d"].init(Rng((0,))), torch.randn(2, 32, 32)
    gru = torch.nn.GRU(32, 32, batch_first=True)
    for ours, theirs in (("inputs", "ih"), ("state", "hh")):
        for kind in ("weight", "bias"):
            gru.get_parameter(f"{kind}_{theirs}_l0").data = params[f"gru1.{ours}.{kind}"]
    after = torch.nn.functional.linear((x + gru(x)[0]).mean(1), params["fc1.weight"], params["fc1.bias"]).relu()
    assert torch.allclose(family["gru-1d"].intermediate(params, x), after, atol=1e-6)
    with pytest.raises(ModelError, match=r"multiple of 4 steps, got .*\(9, 30\)"):
        image("cnn-1d", shape=(9, 30))
    with pytest.raises(ModelError, match="width to a multiple of 4"):
        image("vit-1d(width=6)", shape=(9, 32))


def test_every_model_of_the_catalogue_is_tested_above() -> None:
    tested = {"cnn1", "cnn3", "cnn4", "resnet18", "vit", *(f"in-resnet{depth}" for depth in DEPTHS)}
    text = {"text-transformer", "bilstm", "roberta"}  # in test_text.py
    assert tested | {*SMALL, *SIGNAL, *KINDS} | text == set(MODELS)
