"""How processes find each other. The only reader of the environment; no training logic."""
