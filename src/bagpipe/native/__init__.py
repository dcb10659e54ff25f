"""Doors to numba, to raw memory, threads, forks and files: what depends on the machine."""
