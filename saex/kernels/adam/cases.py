"""Shapes for tests: (rows, d), two of them with a block that is not full."""

SMALL = {"one": (1, 8), "few": (16, 128), "narrow": (24, 40), "ragged": (37, 200)}
