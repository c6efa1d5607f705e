"""The report: one HTML page about a run, its numbers and what its latents respond to."""

import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from saex.evals.heldout import HeldOut
from saex.report.latents import Example, Latent, Study, study
from saex.report.page import Page, render, save
from saex.report.tokens import byte_text


def write(
    path: str | os.PathLike,
    *,
    sae: Any,
    params: Any,
    heldout: HeldOut,
    config: Mapping[str, Any] | None = None,
    history: Iterable[Mapping[str, Any]] = (),
    evaluation: Mapping[str, Any] | None = None,
    latents: int = 24,
    contexts: int = 8,
    title: str | None = None,
) -> pathlib.Path:
    """Study a dictionary's latents on held-out rows and write the page; returns its path.

    Args:
      path: of the HTML file; what is there is replaced in one move.
      sae: the dictionary.
      params: its arrays, on any mesh.
      heldout: rows for the latents' contexts; see ``study``.
      config: as in ``config.json``; only shown.
      history: lines of ``metrics.jsonl``.
      evaluation: as in ``eval.json``.
      latents: how many to show.
      contexts: top contexts of each.
      title: of the page; by default the kind of dictionary, its size and the site.

    Raises:
      StoreError: the site's rows have another width than the dictionary.
      OSError: the folder is not there or cannot be written to.
    """
    tokenizer = getattr(heldout.model, "tokenizer", None)  # of models that read no bytes
    token_text = getattr(tokenizer, "token_text", byte_text)
    found = study(sae, params, heldout, latents, contexts, token_text=token_text)
    site = heldout.rows.site
    page = Page(
        title=title or f"{type(sae).__name__}: {sae.n:,} latents of {site}",
        summary=f"{sae.d_in} dimensions, {sae.n:,} latents",
        config=config or {},
        curves=history,
        metrics=evaluation or {},
        histogram=found.histogram,
        latents=found.latents,
        rows=found.rows,
        notes=tuple(heldout.notes()),
    )
    return save(path, page)


__all__ = ["Example", "Latent", "Page", "Study", "render", "save", "study", "write"]
