"""Shapes that tests and benchmarks share: (rows, n, k)."""

SMALL = {
    "one": (3, 8, 1),
    "all": (4, 8, 8),
    "groups": (5, 256, 4),
    "ragged": (5, 250, 4),
    "wide": (2, 1024, 32),
    "two levels": (3, 1024, 4),
    "two levels at the least": (2, 4096, 16),
    "two levels, ragged": (2, 1030, 4),
    "two levels, one": (4, 512, 1),
}
NETWORK = {  # large enough for the CPU's network: in one level, in two, with groups of groups
    "one level": (43, 1536, 64),
    "all of a row": (1024, 64, 64),
    "levels": (33, 2048, 3),
    "k no power of two": (16, 4096, 48),
    "one": (128, 512, 1),
    "a single row": (1, 65536, 17),
    "k of a hundred": (16, 4096, 100),
    "the most slots": (8, 8192, 256),
    "a million of a row": (1, 2**20, 40),
}
BENCHMARK = {
    "quickstart": (4096, 2048, 32),
    "S1": (4096, 8192, 32),
    "S2": (2048, 24576, 32),
}
