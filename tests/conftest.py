"""What holds for every test: eight CPU devices, quick compilation, checked shapes."""

import os

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Most of the suite's time was LLVM's, on programs that run once. Processes that tests start do
# as this one.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
jax.config.update("jax_disable_most_optimizations", True)
# Shapes and dtypes in saex's signatures are checked at run time; before any import of saex.
install_import_hook("saex", "beartype.beartype")


def pytest_configure(config):
    """One program is compiled once: by this process, those that tests start, and the next run."""
    cache = getattr(config, "cache", None)  # without pytest's cache, without this one
    if cache is not None:
        kept = {
            "jax_compilation_cache_dir": str(cache.mkdir("jax")),
            "jax_persistent_cache_min_compile_time_secs": 0.2,
        }
        for name, value in kept.items():
            jax.config.update(name, value)
            os.environ[name.upper()] = str(value)
