"""The names of the networks, and the notation of a network with options.

This module does not import torch, so that a configuration is checked before torch is loaded.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TypeAlias, cast

from polyfed.base.errors import ModelError
from polyfed.base.text import hint, nearest

#: The value of an option: a string, number, truth value, None, or a tuple of these.
Option: TypeAlias = "str | int | float | bool | tuple[Option, ...] | None"

#: name -> a line about the network; parameters are for 10 classes of 32x32 colour images.
MODELS: Mapping[str, str] = MappingProxyType(
    {
        "cnn1": "FedMRL's CNN-1, the largest: 2,621,558 parameters",
        "cnn2": "FedMRL's CNN-2: as CNN-1 with half the channels, 1,815,142 parameters",
        "cnn3": "FedMRL's CNN-3: dense layer of 1000, 1,320,558 parameters",
        "cnn4": "FedMRL's CNN-4: dense layer of 800, 1,060,358 parameters",
        "cnn5": "FedMRL's CNN-5, the smallest: dense layer of 500, 670,058 parameters",
        "resnet18": "ResNet-18 for small images (3x3 stem, no max-pooling): 11,173,962 parameters",
        "resnet8": "small relative of resnet18: one block per stage, 16-32-64 channels, 78,042 parameters",
        "in-resnet10": "ImageNet-style ResNet (7x7 stem, max-pooling), blocks 1-1-1-1: 4,910,922 parameters",
        "in-resnet14": "ImageNet-style ResNet, blocks 1-1-2-2: 10,812,234 parameters",
        "in-resnet18": "ImageNet-style ResNet, blocks 2-2-2-2: 11,181,642 parameters",
        "in-resnet22": "ImageNet-style ResNet, blocks 2-2-3-3: 17,082,954 parameters",
        "in-resnet26": "ImageNet-style ResNet, blocks 3-3-3-3: 17,452,362 parameters",
        "in-resnet10-small": "small relative of in-resnet10, same stem and head: 308,826 parameters",
        "in-resnet14-small": "small relative of in-resnet14, same stem and head: 678,234 parameters",
        "in-resnet18-small": "small relative of in-resnet18, same stem and head: 701,466 parameters",
        "in-resnet22-small": "small relative of in-resnet22, same stem and head: 1,070,874 parameters",
        "in-resnet26-small": "small relative of in-resnet26, same stem and head: 1,094,106 parameters",
        "in-resnet10-1d": "in-resnet10 for signals (C, T), 16 wide: 112,278 parameters for 9 channels, 6 classes",
        "in-resnet14-1d": "in-resnet14 for signals: 235,926 parameters",
        "in-resnet18-1d": "in-resnet18 for signals: 243,798 parameters",
        "in-resnet22-1d": "in-resnet22 for signals: 367,446 parameters",
        "in-resnet26-1d": "in-resnet26 for signals: 375,318 parameters",
        "cnn-1d": "residual convolutions for signals, 32 wide, 3 deep: 20,294 parameters for 9 channels, 6 classes",
        "gru-1d": "gated recurrent units for signals, 32 wide, 1 deep: 11,174 parameters",
        "vit-1d": "small transformer for signals, 32 wide, 2 blocks of 4 heads: 22,950 parameters for 128 steps",
        "vit": "small vision transformer: patches of 4x4, width 64, 4 blocks of 4 heads, 141,898 parameters",
        "text-transformer": "small transformer for tokens: 2 blocks of 4 heads, 64 wide; 595,716 parameters, 4 classes",
        "bilstm": "LSTM from each end for tokens: 64 wide, states of 64, 590,852 parameters for 4 classes",
        "roberta": "RoBERTa for sequence classification, by the package transformers: 124,648,708 parameters",
        "mlp": "dense layers with ReLU, for images or plain features",
    }
)


#: Networks for signals (C, T).
SIGNAL_MODELS = tuple(name for name in MODELS if name.endswith("-1d"))

#: Networks of one family of signals -> how many blocks they have where no option says it.
_DEPTHS: Mapping[str, int] = MappingProxyType({"cnn-1d": 3, "gru-1d": 1, "vit-1d": 2})


def _defaults(name: str) -> Mapping[str, Option]:
    if name in _DEPTHS:
        return {"width": 32, "depth": _DEPTHS[name], "rep_dim": 64}
    if name.startswith("cnn"):
        return {"rep_dim": 500}
    if name == "mlp":
        return {"hidden": (200, 100), "rep_dim": None, "columns": None}
    if name == "vit":
        return {"patch": 4, "width": 64, "depth": 4, "heads": 4}
    if name == "text-transformer":
        return {"vocabulary": 8192, "width": 64, "depth": 2, "heads": 4, "pool": "mean", "rep_dim": None}
    if name == "bilstm":
        return {"vocabulary": 8192, "width": 64, "state": 64, "pool": "mean", "rep_dim": None}
    if name == "roberta":
        sizes: dict[str, Option] = {"vocabulary": 50265, "width": 768, "depth": 12, "heads": 12, "ffn": 3072}
        return {**sizes, "places": 514, "dropout": 0.1}
    return {
        "norm": "batch",
        "width": 16 if name == "resnet8" or name.endswith(("-small", "-1d")) else 64,
        "cut": "stem",
    }


#: The ending of a file of weights: the value of the option ``weights``, which every network takes.
WEIGHTS = ".safetensors"

#: name -> the options of the network with their defaults.
OPTIONS: Mapping[str, Mapping[str, Option]] = MappingProxyType({name: _defaults(name) for name in MODELS})


@dataclass(frozen=True)
class ModelSpec:
    """The specification of a model: a name of the catalogue, or "package.module:attribute", with options.

    Args:
        name: a key of ``MODELS``, or the path of the user's own class or function.
        options: pairs of name and value, sorted by name.

    Example:
        >>> str(ModelSpec.parse({"name": "resnet18", "norm": "group"}))
        'resnet18(norm=group)'
        >>> ModelSpec.parse("mlp(hidden=(64,))").options
        (('hidden', (64,)),)
    """

    name: str
    options: tuple[tuple[str, Option], ...] = ()

    @classmethod
    def parse(cls, value: ModelSpec | str | Mapping[str, object]) -> ModelSpec:
        """Read "cnn5", "resnet18(norm=group)" or ``{"name": "resnet18", "norm": "group"}``.

        Raises:
            ModelError: the value has another form. ``check`` tests whether the name and the options exist.
        """
        if isinstance(value, ModelSpec):
            return value
        if isinstance(value, str):
            return _parse_text(value)
        if not isinstance(value, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ModelError(f"got {value!r} as a model; expected a name, or a table with a name")
        options = dict(value)
        name = options.pop("name", None)
        if not isinstance(name, str) or not name:
            raise ModelError(f'got {dict(value)!r} as a model; expected a name, such as name = "cnn5"')
        return cls(name, tuple((key, _option(name, key, options[key])) for key in sorted(options)))

    def __str__(self) -> str:
        """The name, with the options in brackets; ``parse`` reads it back."""
        options = ", ".join(f"{key}={_text(value)}" for key, value in self.options)
        return f"{self.name}({options})" if options else self.name

    def having(self, **options: Option) -> ModelSpec:
        """Return this specification with options added or replaced."""
        merged = {**dict(self.options), **options}  # an option may be called "name", so they are not one table
        return ModelSpec(self.name, tuple((key, _option(self.name, key, merged[key])) for key in sorted(merged)))

    def reading(self, columns: Sequence[tuple[str, int]]) -> ModelSpec:
        """Return this specification with positions of features in place of the names in its option ``columns``.

        Args:
            columns: name and number of features of each column of the table, in order; empty if the data are none.

        Raises:
            ModelError: a name or pattern fits no column, or is given twice.
        """
        wanted = None if self.own else dict(self.options).get("columns")
        if not isinstance(wanted, tuple) or not all(isinstance(name, str) for name in wanted):
            return self
        if twice := [name for place, name in enumerate(wanted) if name in wanted[:place]]:
            raise ModelError(f"model {str(self)!r}: option 'columns' has {twice[0]!r} twice; give each column once")
        names = [name for name, _ in columns]
        strangers = [
            str(name) for name in wanted if name not in names and not any(fnmatchcase(n, str(name)) for n in names)
        ]
        if strangers:
            known = f"{nearest(strangers[0], names)}; the data have {', '.join(names) or 'no columns with names'}"
            raise ModelError(f"model {str(self)!r}: option 'columns' names {strangers[0]!r}, which is no column{known}")
        read = [name in wanted or any(fnmatchcase(name, str(pattern)) for pattern in wanted) for name in names]
        each = [own for own, (_, width) in zip(read, columns, strict=True) for _ in range(width)]
        return self.having(columns=tuple(place for place, own in enumerate(each) if own))

    @property
    def weights(self) -> str | None:
        """The .safetensors file whose weights a client's network starts with; None if it starts with a draw.

        A class or function of the user's own with an argument ``weights`` gets the option itself.
        """
        value = dict(self.options).get("weights")
        if not isinstance(value, str) or not value.endswith(WEIGHTS):
            return None
        if self.own:
            from polyfed.models.signature import takes  # imports torch, and the user's code

            return None if takes(self.name, "weights") else value
        return value

    @property
    def architecture(self) -> ModelSpec:
        """This specification without the file of weights: networks that start differently are of one architecture."""
        if self.weights is None:
            return self
        return ModelSpec(self.name, tuple(pair for pair in self.options if pair[0] != "weights"))

    @property
    def own(self) -> bool:
        """Whether it names the user's own code instead of an entry of the catalogue."""
        return ":" in self.name

    def check(self) -> None:
        """Raise ModelError unless the name is known and takes these options; the user's own code is not read."""
        if self.own:
            module, _, attribute = self.name.partition(":")
            if not all(part.isidentifier() for part in (*module.split("."), *attribute.split("."))):
                raise ModelError(f"{self.name!r} does not name your own model; expected package.module:attribute")
            return
        if self.name not in OPTIONS:
            raise ModelError(
                f"unknown model {self.name!r}{hint(self.name, MODELS, 3)} Known: {', '.join(MODELS)}; give your own "
                "model as package.module:attribute"
            )
        takes = OPTIONS[self.name]
        for key, value in self.architecture.options:
            if key == "weights":
                raise ModelError(
                    f"model {self.name!r}: option 'weights' is {value!r}, expected the path of a {WEIGHTS} file"
                )
            if key not in takes:
                known = ", ".join(f"{k} (default {_text(v)})" for k, v in takes.items())
                raise ModelError(f"model {self.name!r} has no option {key!r}{hint(key, takes)} It takes: {known}")
            _check_value(self.name, key, value)


_CHOICES: Mapping[str, tuple[str, ...]] = {
    "norm": ("batch", "group", "static"),
    "cut": ("stem", "stage1", "stage2"),
    "pool": ("mean", "last"),
}


def _check_value(name: str, key: str, value: Option) -> None:
    """Check a value: the catalogue's options are choices, positive integers, or tuples of positive integers."""
    where = f"model {name!r}: option {key!r} is {_text(value)}, expected "
    if key in _CHOICES:
        if value not in _CHOICES[key]:
            raise ModelError(where + "one of " + ", ".join(_CHOICES[key]))
    elif key == "columns":
        kinds = {type(name) for name in value} if isinstance(value, tuple) else set[type]()
        if value is not None and kinds not in ({str}, {int}):
            raise ModelError(where + "names or patterns of columns, such as ('age', 'lab *'), or positions of features")
    elif key == "hidden":
        if not isinstance(value, tuple) or not all(map(_positive, value)):
            raise ModelError(where + "the widths of the hidden layers, such as (200, 100)")
    elif key == "dropout":
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
            raise ModelError(where + "a share from 0 to below 1")
    elif not _positive(value) and not (value is None is OPTIONS[name][key]):  # None: without a layer for it
        raise ModelError(where + "a positive integer")


def _positive(value: Option) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _parse_text(text: str) -> ModelSpec:
    name, bracket, rest = text.strip().partition("(")
    fault = f"cannot read the model {text!r}; expected a name, with options or without: resnet18(norm=group)"
    if not name or (bracket and not rest.endswith(")")):
        raise ModelError(fault)
    if not bracket:
        return ModelSpec(name)
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ModelError(fault)
        words = ((str(keyword.arg), keyword.value) for keyword in call.keywords)
        options = {  # a bare word is a string
            key: _option(name, key, value.id if isinstance(value, ast.Name) else ast.literal_eval(value))
            for key, value in words
        }
    except (SyntaxError, ValueError) as error:
        raise ModelError(fault) from error
    return ModelSpec(name, tuple(sorted(options.items())))


def _option(name: str, key: str, value: object) -> Option:
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(_option(name, key, item) for item in cast("list[object]", value))
    raise ModelError(
        f"model {name!r}: option {key!r} is {value!r}, expected a string, a number, true or false, or a list of these"
    )


def _text(value: Option) -> str:
    bare = isinstance(value, str) and value.isidentifier() and value not in ("True", "False", "None")
    return str(value) if bare else repr(value)
