"""How one of several trainers talks to the others."""
