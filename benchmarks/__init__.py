"""Benchmarks that anybody can run: `python -m benchmarks` measures what docs/results.md states.

- `oracle` measures the control plane alone.
- `step` measures a training step on a CPU, and its embedding part, against tables in memory.
- `curve` counts rows fetched over cache size and lookahead.
- `gpu` measures a training step on one GPU.
- `trainers` measures a step of several trainers, in processes that it starts.

The contenders are called arms. They take turns, so that every ratio comes from neighbouring
minutes. Each benchmark returns a `measure.Result`: tables to read and JSON values. Tests run them
at tiny sizes, so that they can't rot. The package is not part of the wheel: it imports `bagpipe`,
never the other way round.
"""
