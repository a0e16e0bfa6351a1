"""Type aliases that name the purpose of a value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from torch import Tensor

#: The weights and buffers of one module: "layer1.0.conv1.weight" -> tensor. A value: never written in place.
Params: TypeAlias = Mapping[str, Tensor]

#: Several modules under short names, such as FedMRL's {"G": ..., "F": ..., "P": ...}.
Parts: TypeAlias = Mapping[str, Params]

#: A client's number, 0 to count - 1. In a deployment it is the number in the client's node.toml.
ClientId: TypeAlias = int
