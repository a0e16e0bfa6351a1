"""Checks that networks fit together: equal cuts, equal heads, equal layers of the same name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from polyfed.base.errors import ModelError
from polyfed.base.rng import Rng
from polyfed.models.split import SplitModel


def check_cuts_fit(
    models: Mapping[str, SplitModel],
    *,
    extractor: bool = True,
    representation: bool = True,
    classifier: bool = True,
) -> None:
    """Raise unless the features of each model fit into the others.

    Args:
        models: by the name that a message shall use.
        extractor: the extractors' outputs must have one shape per sample.
        representation: the representations must have one width.
        classifier: the classifiers must have the same parameters and buffers, of the same shapes.

    Raises:
        ModelError: they do not fit; the text names both models and both shapes.
    """
    names = list(models)
    for other in names[1:]:
        first, a, b = names[0], models[names[0]], models[other]
        if extractor:
            _same("extractor output per sample", first, a.s_in_shape, other, b.s_in_shape)
        if representation:
            _same("representation width", first, a.rep_dim, other, b.rep_dim)
        if classifier:
            _same("classifier", first, _classifier_shapes(a), other, _classifier_shapes(b))


def check_heads_fit(models: Mapping[str, SplitModel]) -> None:
    """Raise unless all classifiers have equal tensors, by `SplitModel.head`'s names; their modules' names may differ.

    Args:
        models: by the name that a message shall use.

    Raises:
        ModelError: they differ; the text names both models and both classifiers.
    """
    heads = {name: model.head_shapes for name, model in models.items()}
    for other in list(heads)[1:]:
        first = next(iter(heads))
        _same("classifier", first, heads[first], other, heads[other])


def check_head_linear(model: SplitModel) -> None:
    """Raise unless the classifier is a single linear layer, which computes ``r @ weight.T + bias``.

    For servers that compute with heads and have no networks.

    Raises:
        ModelError: the classifier has other tensors, or computes another function of them.
    """
    rng = Rng(("polyfed.models", "head"))
    params, r = model.init(rng), torch.randn((3, model.rep_dim), generator=rng.torch())
    head = model.head(params)
    fits = model.head_shapes.get("weight") == (model.num_classes, model.rep_dim)
    if fits and head.keys() <= {"weight", "bias"}:
        model.train(False)
        with torch.no_grad():
            expected = nn.functional.linear(r, head["weight"], head.get("bias"))
            if torch.allclose(model.classify(params, r), expected, rtol=1e-4, atol=1e-5):
                return
    raise ModelError(
        f"model {model.name!r} has a classifier with the tensors {model.head_shapes} that is not one linear layer on "
        f"the representation, of width {model.rep_dim}; cut it before its last linear layer (classifier = ...)"
    )


def check_layers_fit(models: Mapping[str, SplitModel]) -> None:
    """Raise unless the models can share layers by name: all cuts fit, and a name has the same shape in all models.

    Args:
        models: by the name that a message shall use.

    Raises:
        ModelError: the text names both models, the layer and both shapes; or a model has no extractor cut.
    """
    for name, model in models.items():
        _ = model.s_in_shape
        if not model.intermediate_names & model.parameter_names:
            raise ModelError(f"model {name!r} has nothing to train between its cuts; move the extractor's cut forward")
    check_cuts_fit(models)
    check_names_fit(models)


def check_names_fit(models: Mapping[str, SplitModel]) -> None:
    """Raise unless the models can be averaged by name: names mean one thing, and each model shares one.

    A name has one shape, and dense networks that read some columns of a table read the same ones.

    Args:
        models: by the name that a message shall use.

    Raises:
        ModelError: the text names the layer, both models and both shapes or columns; or which shares nothing.
    """
    owner: dict[str, str] = {}
    for name, model in models.items():
        for layer, shape in model.shapes.items():
            first = owner.setdefault(layer, name)
            _same(f"layer {layer!r}", first, tuple(models[first].shapes[layer]), name, tuple(shape))
    readers = [(name, model.columns) for name, model in models.items() if model.columns]
    for name, columns in readers[1:]:
        _same("what the first layer reads", *readers[0], name, columns)
    for name, model in models.items():
        others = [other for other in models if other != name]
        if others and not any(model.shapes.keys() & models[other].shapes.keys() for other in others):
            raise ModelError(
                f"model {name!r} shares no layer by name with {', '.join(map(repr, others))}, so there is nothing to "
                "average between them; choose models of one family, whose layers have equal names"
            )


def _classifier_shapes(model: SplitModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(model.shapes[name]) for name in sorted(model.classifier_names)}


def _same(what: str, first: str, a: object, second: str, b: object) -> None:
    if a != b:
        raise ModelError(
            f"models {first!r} and {second!r} do not fit: {what} is {a} in {first!r} but {b} in {second!r}; "
            "choose models, or cuts, where they are equal"
        )
