"""Shapes that tests share: (rows, d), the last with a block that is not full."""

SMALL = {"one": (1, 8), "few": (16, 128), "narrow": (24, 40), "ragged": (37, 200)}
