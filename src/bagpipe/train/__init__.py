"""Training: a run's parts, the loop, evaluation and logs. Joins the control and the data plane."""

from __future__ import annotations
