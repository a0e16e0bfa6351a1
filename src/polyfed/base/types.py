"""Aliases that say what a value is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, TypeAlias

from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

#: The weights and buffers of one module: "layer1.0.conv1.weight" -> tensor. A value: never written in place.
Params: TypeAlias = Mapping[str, Tensor]

#: Several modules under short names, such as FedMRL's {"G": ..., "F": ..., "P": ...}.
Parts: TypeAlias = Mapping[str, Params]

#: A client's number, 0 to count - 1. In a deployment the number the federation gave it.
ClientId: TypeAlias = int

#: Ranges of hyper-parameters; the configuration checks them.
Positive: TypeAlias = Annotated[int, Gt(0)]
Count: TypeAlias = Annotated[int, Ge(0)]
Rate: TypeAlias = Annotated[float, Gt(0)]
NonNegative: TypeAlias = Annotated[float, Ge(0)]
Fraction: TypeAlias = Annotated[float, Ge(0), Le(1)]
Capacity: TypeAlias = Annotated[float, Gt(0), Le(1)]
Share: TypeAlias = Annotated[float, Gt(0), Lt(1)]
