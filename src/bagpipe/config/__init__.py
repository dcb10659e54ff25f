"""Configuration: what a TOML file may say, checked as a whole before anything starts.

`base` is what a section is. `data`, `model` and `run` are the sections. `load` reads files and
words their mistakes. `compare` says which differences between two runs change the numbers.
`tables` makes tables of a data set's features.
"""

from __future__ import annotations
