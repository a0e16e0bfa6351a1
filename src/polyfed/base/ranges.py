"""Ranges of settings and hyper-parameters, which reading a configuration checks. No float is infinite or NaN."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

#: 1, 2, 3, ...
Positive: TypeAlias = Annotated[int, Field(gt=0)]
#: 0, 1, 2, ...
Count: TypeAlias = Annotated[int, Field(ge=0)]
#: Above 0, such as a learning rate or seconds.
Rate: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
#: 0 or more, such as a weight in a loss.
NonNegative: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]
#: In [0, 1].
Fraction: TypeAlias = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
#: In (0, 1], such as the capacity of a client.
Portion: TypeAlias = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
#: At least one of these.
Portions: TypeAlias = Annotated[tuple[Portion, ...], Field(min_length=1)]
#: In (0, 1), such as the share of examples for testing.
Share: TypeAlias = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
