"""Configuration: what a TOML file may say, checked as a whole before anything starts.

`base` is what a section is, `data` the data sections, `run` all of a run, `load` reads files and
words their mistakes, and `compare` says which differences between two runs change the numbers.
"""

from __future__ import annotations
