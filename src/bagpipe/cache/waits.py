"""What a trainer waits for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class Waits:
    """Seconds that the trainer's thread waited, added up over steps."""

    plan_s: float = 0.0
    rows_s: float = 0.0
    slots_s: float = 0.0
    replicas_s: float = 0.0  # of rows that other trainers own
