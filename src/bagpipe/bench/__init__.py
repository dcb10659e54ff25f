"""Benchmarks that anybody can run: `bagpipe bench` measures what docs/results.md states, in one process, arms interleaved.

`oracle` measures the control plane alone, `step` a training step and its embedding part against in-memory tables, `curve`
counts rows fetched over cache size and lookahead. Each returns a `measure.Result`: tables for the eye and JSON values. Their
tests run them at tiny sizes, so that they can't rot.
"""
