"""Models as folders that need no trainer: those of runs, and of own loops."""
