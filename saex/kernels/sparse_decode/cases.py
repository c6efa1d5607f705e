"""Shapes that tests and benchmarks share: (rows, d, n, k)."""

SMALL = {
    "one": (3, 4, 8, 1),
    "few": (5, 6, 32, 4),
    "many": (4, 8, 64, 40),
    "all": (3, 5, 6, 6),
    "crowded": (40, 3, 4, 2),  # few latents, each in many rows
    "wide": (5, 6, 100, 4),  # the others have few latents to a slot
}
BENCHMARK = {
    "quickstart": (4096, 256, 2048, 32),
    "S1": (4096, 512, 8192, 32),
    "S2": (2048, 768, 24576, 32),
}
