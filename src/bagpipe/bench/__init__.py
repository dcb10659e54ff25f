"""Benchmarks that anybody can run: `bagpipe bench` measures what docs/results.md states, arms
interleaved.

`oracle` measures the control plane alone, `step` a training step and its embedding part against
in-memory tables, `curve` counts rows fetched over cache size and lookahead, `gpu` measures a step
on a GPU and `trainers` one of several trainers, in processes that it starts. Each returns a
`measure.Result`: tables for the eye and JSON values. Their tests run them at tiny sizes, so that
they can't rot.
"""
