"""Shapes that tests and benchmarks share: (rows, n, k)."""

SMALL = {
    "one": (3, 8, 1),
    "all": (4, 8, 8),
    "groups": (5, 256, 4),
    "ragged": (5, 250, 4),
    "wide": (2, 1024, 32),
    # what the CPU's backend gives to its network: in one level, in two, with groups of groups
    "network": (43, 1536, 64),
    "network, all of a row": (1024, 64, 64),
    "network, levels": (33, 2048, 3),
    "network, k no power of two": (16, 4096, 48),
    "network, one": (128, 512, 1),
    "network, a single row": (1, 65536, 17),
    "ragged, as large": (64, 1030, 4),
}
BENCHMARK = {
    "quickstart": (4096, 2048, 32),
    "S1": (4096, 8192, 32),
    "S2": (2048, 24576, 32),
}
