"""The same with sparsify's other optimiser: see ``quality_sparsify``."""

import functools

import quality_sparsify

train = functools.partial(quality_sparsify.train, adam=True)
