"""Names for arrays: the letters that every shape in saex is written in.

``b`` rows of a batch, ``d`` activation width, ``n`` latents, ``k`` active latents, ``s`` stacked
dictionaries, ``p`` sites of a crosscoder, ``t`` sequence position, ``v`` vocabulary.
"""

from typing import Any

# A leaf of a pytree class: an array while training, a ShapeDtypeStruct, a sharding or None while
# trees are being described. Functions carry the shapes; containers stay loose.
Leaf = Any
Params = dict[str, Any]  # name -> array; the names and shapes are those of ``specs()["params"]``
Batch = dict[str, Any]  # column -> array [b, ...]; "x" at least
