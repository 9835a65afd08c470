"""Soak: many random cases of whole subsystems. `python -m tests.soak --help`, or `make soak`."""
