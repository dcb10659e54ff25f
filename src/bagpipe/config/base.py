"""What every section of a configuration file is: a frozen pydantic model that refuses keys it does
not know.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One table of a TOML file. Frozen; an unknown key is an error, which the loader answers with
    the nearest right key.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
