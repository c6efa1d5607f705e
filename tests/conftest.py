"""What holds for every test: eight CPU devices, no silent broadcasting, checked shapes."""

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Shapes and dtypes in saex's signatures are checked at run time; before any import of saex.
install_import_hook("saex", "beartype.beartype")
