"""Builds the networks of the catalogue and the user's own networks as :class:`SplitModel`."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch

from polyfed.base.errors import ModelError
from polyfed.models import cnn, custom, mlp, resnet, roberta, signals, text, vit
from polyfed.models.catalogue import OPTIONS, ModelSpec, Option
from polyfed.models.split import SplitModel

#: The networks that take tokens.
TEXT = ("text-transformer", "bilstm", "roberta")


def build(
    spec: ModelSpec | str,
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    dtype: torch.dtype | None = None,
    empty: bool = False,
) -> SplitModel:
    """Build a model; equal arguments return the same object.

    Args:
        spec: a name, a name with options, or a :class:`ModelSpec`, whose file of weights is not read.
        input_shape: shape of one sample, ``(C, H, W)``, ``(C, T)`` or ``(F,)``.
        num_classes: number of logits.
        dtype: type of the input: int64 for tokens; None for the type of new tensors, such as float32.
        empty: whether it has no values, as of :class:`SplitModel`.

    Raises:
        ModelError: the name or an option is unknown, the input is too small, or the user's own code fails.

    Example:
        >>> build("cnn5(rep_dim=100)", input_shape=(3, 32, 32), num_classes=10)
        SplitModel('cnn5(rep_dim=100)', (3, 32, 32) -> 10, 465,658 parameters)
    """
    spec = ModelSpec.parse(spec)
    spec.check()
    spec = spec.architecture
    options = {**({} if spec.own else OPTIONS[spec.name]), **dict(spec.options)}
    # With the defaults filled in, "resnet18" and "resnet18(norm=batch)" are the same model.
    return _build(spec.name, tuple(sorted(options.items())), tuple(input_shape), num_classes, dtype, empty)


@lru_cache(maxsize=256)
def projector(d_in: int, d_out: int, kind: str = "linear") -> SplitModel:
    """A map from representations ``(B, d_in)`` to ``(B, d_out)``.

    Args:
        d_in: width of the input.
        d_out: width of the output.
        kind: "linear": one layer with bias; "mlp": two layers with a ReLU between them, ``d_out`` wide.
    """
    if kind not in ("linear", "mlp"):
        raise ModelError(f"unknown kind of projector {kind!r}; expected linear or mlp")
    return SplitModel(
        f"projector({d_in}, {d_out}, {kind})",
        partial(mlp.Projector, d_in, d_out, kind=kind),
        input_shape=(d_in,),
        classifier=None,
        signature=("projector", d_in, d_out, kind),
    )


@lru_cache(maxsize=256)
def _build(
    name: str,
    options: tuple[tuple[str, Option], ...],
    input_shape: tuple[int, ...],
    num_classes: int,
    dtype: torch.dtype | None,
    empty: bool,
) -> SplitModel:
    tokens = dtype == torch.int64
    if ":" not in name and (name in TEXT) != tokens:
        took, got, others = ("numbers", "int64", TEXT) if tokens else ("tokens", "float", ("mlp",))
        flat = not tokens and len(input_shape) == 1
        read = ', or set the option kind = "tokens" if the numbers are tokens' if flat else ""
        raise ModelError(
            f"model {name!r} fails on an input of shape {input_shape} and type {got}, as it takes {took}; choose "
            f"{' or '.join(others)}{read}"
        )
    # Any: the catalogue has checked the types of the options.
    given: dict[str, Any] = dict(options)
    classifier: str | None
    extractor: str | None
    if ":" in name:
        classifier, extractor = given.pop("classifier", None), given.pop("extractor", None)
        factory = custom.load(name, given, input_shape=input_shape, num_classes=num_classes)
    elif name in cnn.SIZES:
        channels2, width1 = cnn.SIZES[name]
        factory = partial(cnn.CNN, input_shape, channels2=channels2, width1=width1, num_classes=num_classes, **given)
        classifier, extractor = "fc3", "pool2"
    elif name in resnet.SIZES:
        stem, blocks = resnet.SIZES[name]
        ends = {"stem": "relu" if stem == "plain" else "maxpool", "stage1": "layer1", "stage2": "layer2"}
        classifier, extractor = "fc", ends[given.pop("cut")]
        factory = partial(resnet.ResNet, input_shape, stem=stem, blocks=blocks, num_classes=num_classes, **given)
    elif name == "vit":
        factory = partial(vit.ViT, input_shape, num_classes=num_classes, **given)
        classifier, extractor = "fc", "patches"
    elif name == "text-transformer":
        factory = partial(text.TextTransformer, input_shape, num_classes=num_classes, **given)
        classifier, extractor = "fc", "embed"
    elif name == "bilstm":
        factory = partial(text.BiLSTM, input_shape, num_classes=num_classes, **given)
        classifier, extractor = "fc", "embed"
    elif name == "roberta":
        factory = partial(roberta.new, input_shape, num_classes=num_classes, **given)
        classifier, extractor = "classifier.out_proj", None
    elif name in signals.KINDS:
        factory = partial(signals.Signal, input_shape, kind=name, num_classes=num_classes, **given)
        classifier, extractor = "fc2", "stem"
    else:
        rep_dim: int | None = given["rep_dim"]
        columns: tuple[int, ...] | None = given["columns"]
        hidden = given["hidden"] if rep_dim is None else (*given["hidden"][:-1], rep_dim)
        factory = partial(mlp.MLP, input_shape, hidden=hidden, num_classes=num_classes, columns=columns)
        classifier, extractor = f"fc{len(hidden) + 1}", "act1" if hidden else None
    shown = tuple((key, value) for key, value in options if OPTIONS.get(name, {}).get(key, ...) != value)
    model = SplitModel(
        str(ModelSpec(name, shown)),
        factory,
        input_shape=input_shape,
        classifier=classifier,
        extractor=extractor,
        signature=(name, options, input_shape, num_classes, dtype),
        dtype=dtype,
        empty=empty,
    )
    if model.num_classes != num_classes:
        what = "the prediction of a regression" if num_classes == 1 else "one per class"
        raise ModelError(
            f"model {model.name!r} returns {model.num_classes} columns, expected {num_classes}, {what}; give its "
            "constructor an argument num_classes, or the option that sets its width"
        )
    return model
