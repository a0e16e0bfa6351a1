"""Ranges of settings and hyper-parameters; whoever reads a configuration checks them. No float is infinite or NaN."""

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
#: In (0, 1]: what is never nothing, such as the capacity of a client.
Portion: TypeAlias = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
#: In (0, 1): what is neither nothing nor all, such as the examples that are held out.
Share: TypeAlias = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
