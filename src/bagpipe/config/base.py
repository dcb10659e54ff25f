"""The base of all sections of a configuration file, and the limits of their numbers.

Every number has an upper limit, far beyond what makes sense. So a digit too many is told at once
and by name, not by a program that hangs or by an error from deep within.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from bagpipe.limits import MAX_EMBEDDING_DIM, MAX_RATE

Steps: TypeAlias = Annotated[int, Field(gt=0, lt=2**31)]
Samples: TypeAlias = Annotated[int, Field(gt=0, le=10**12)]
BatchSize: TypeAlias = Annotated[int, Field(gt=0, le=2**24)]
Batches: TypeAlias = Annotated[int, Field(gt=0, le=4096)]
"""The size of a window over batches, as the oracle has it."""
Count: TypeAlias = Annotated[int, Field(gt=0, le=10**6)]
"""A number of files, epochs and the like."""
Threads: TypeAlias = Annotated[int, Field(gt=0, le=256)]
Width: TypeAlias = Annotated[int, Field(gt=0, le=MAX_EMBEDDING_DIM)]
"""The width of a layer or an embedding."""
Depth: TypeAlias = Annotated[int, Field(gt=0, le=64)]
"""The number of layers, one upon the other."""
Seed: TypeAlias = Annotated[int, Field(ge=0, lt=2**63)]
Share: TypeAlias = Annotated[float, Field(ge=0.0, lt=1.0)]
Rate: TypeAlias = Annotated[float, Field(ge=0.0, le=MAX_RATE)]
Seconds: TypeAlias = Annotated[float, Field(gt=0.0, le=86_400.0)]
Weight: TypeAlias = Annotated[float, Field(ge=-MAX_RATE, le=MAX_RATE)]

MEMORY_PATTERN = r"^[0-9]{1,15}(\.[0-9]{1,15})? ?([KMGT]i?)?B$"
SHARE_PATTERN = r"^[0-9]{1,3}(\.[0-9]{1,15})?%$"
MemorySize: TypeAlias = Annotated[str, Field(pattern=MEMORY_PATTERN)]
"""For example "4GiB", "4GB" or "4 GB"."""
RowShare: TypeAlias = Annotated[str, Field(pattern=SHARE_PATTERN)]
"""For example "2%"."""


class Section(BaseModel):
    """One table of a TOML file.

    It is frozen. An unknown key is an error, which the loader answers with the nearest right key.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )
