"""Shapes that tests share: (rows, d, n, k). Benchmarks take ``sparse_decode``'s."""

SMALL = {
    "few": (5, 6, 40, 3),
    "k = n": (3, 5, 12, 12),
    "all of a tile": (3, 8, 16, 16),
    "ties": (5, 2, 40, 6),
    "one": (3, 4, 600, 1),
    "one of several tiles": (17, 24, 300, 1),
    "two levels": (4, 6, 2048, 5),
    "two levels, ragged": (3, 6, 1999, 5),
}
