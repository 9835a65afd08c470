"""Rules of primitives: the role of a result, from those of the operands."""
