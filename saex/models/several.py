"""Several subject models over the same tokens: for dictionaries that compare models."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Array, Float

from saex.models.transformer import Edit, Tokens, Transformer


@dataclasses.dataclass(frozen=True)
class Several:
    """Models side by side, each with its own parameters; the logits are the last one's.

    models: (name, model) each. A site is `NAME.SITE`, and parameters are {NAME: parameters}.
    """

    models: tuple[tuple[str, Transformer], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.models]
        if not names or len(set(names)) < len(names) or any("." in n for n in names):
            raise ValueError(f"models named {names}: at least one, each once, without dots")

    @property
    def sites(self) -> dict[str, int]:
        """Site name -> width, model by model."""
        return {f"{n}.{site}": width for n, m in self.models for site, width in m.sites.items()}

    @property
    def context(self) -> int:
        """The most tokens that all of them read."""
        return min(model.context for _, model in self.models)

    def run(
        self,
        params: Mapping,
        tokens: Tokens,
        taps: Sequence[str] = (),
        edits: Mapping[str, Edit] | None = None,
        stop_at: str | None = None,
        positions: Tokens | None = None,
    ) -> tuple[Any, dict[str, Float[Array, "b t d"]]]:
        """One forward pass of each, as `Transformer.run`; an edit reaches its own model alone."""
        edits, acts, logits = edits or {}, {}, None
        for wanted in [*taps, *edits, *([stop_at] if stop_at else [])]:
            if wanted not in self.sites:
                raise KeyError(f"no site {wanted!r} in these models: {', '.join(self.sites)}")
        for name, model in self.models:
            prefix = f"{name}."
            last = stop_at if stop_at and stop_at.startswith(prefix) else None
            own = [t.removeprefix(prefix) for t in taps if t.startswith(prefix)]
            logits, found = model.run(
                params[name],
                tokens,
                own,
                {s.removeprefix(prefix): e for s, e in edits.items() if s.startswith(prefix)},
                last and last.removeprefix(prefix),
                positions,
            )
            acts |= {prefix + site: x for site, x in found.items()}
            if last:
                return None, acts
        return logits, acts

    def describe(self) -> dict[str, Any]:
        """What decides the activations."""
        return {name: dataclasses.asdict(model) for name, model in self.models}
