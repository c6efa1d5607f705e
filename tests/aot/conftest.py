"""Compilers for devices that are not here."""

import os

import jax
import pytest

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server to ask
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nobody opens a device
jax.config.update("jax_platforms", "cpu")  # a TPU's library without a TPU would not start


@pytest.fixture(scope="module", autouse=True)
def optimised():
    """Compiled as for a run: the other tests' quick compilation is not for these."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
