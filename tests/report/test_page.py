import dataclasses

import numpy as np
import pytest
from pages import HOSTILE, Seen, hostile_page

from saex.report import Page, render, save
from saex.report.html import visible

TAGS = set(
    "html head meta title link style body h1 h2 h3 h4 div nav a dl dt dd section table thead tbody "
    "tr th td p figure figcaption svg path text polyline circle rect line details summary article "
    "header span code i".split()
)


@pytest.fixture(scope="module")
def page():
    return hostile_page()


@pytest.fixture(scope="module")
def seen(page):
    return Seen(render(page[0]))


def test_hostile_text_makes_no_element_and_no_attribute(seen):
    assert set(seen.tags) <= TAGS
    names = {name for _, name, _ in seen.attributes}
    assert not [n for n in names if n.startswith("on")]
    links = [v for _, name, v in seen.attributes if name in ("href", "src", "action", "data")]
    assert all(link.startswith("#") or link == "data:," for link in links)
    assert seen.tags.count("style") == 1


def test_hostile_text_is_shown_as_it_is(seen):
    for text in HOSTILE[:5]:
        assert text in seen.text
    assert visible(HOSTILE[5]) in seen.text
    assert seen.title == HOSTILE[2]


def test_everything_is_there_once(page, seen):
    assert seen.classes.count(("article", "latent")) == 5
    assert seen.classes.count(("div", "ctx")) == 15
    assert seen.spans() == page[1]
    assert seen.classes.count(("span", "peak")) == 15
    assert seen.tags.count("polyline") == 2  # the curve without numbers is left out
    for words in ("Metrics", "Training", "Density", "Latents", "Configuration", "most frequent"):
        assert words.lower() in seen.text.lower()


def test_policy_forbids_scripts_and_network(seen):
    (policy,) = [v for tag, name, v in seen.attributes if name == "content" and "default-src" in v]
    assert "default-src 'none'" in policy and "script" not in policy


def test_peak_and_shade_are_those_of_the_values():
    latent = hostile_page(1, 1)[0].latents[0]
    example = dataclasses.replace(
        latent.examples[0], tokens=("a", "b", "c", "d"), values=(0.0, 2.0, 0.5, 0.0), peak=1
    )
    latent = dataclasses.replace(latent, largest=4.0, examples=(example,))
    text = render(Page("t", latents=(latent,)))
    assert (
        '…a<span class="peak" style="--a:0.50" title="2.000">b</span>'
        '<span style="--a:0.12" title="0.500">c</span>d…'
    ) in text


def test_space_is_visible():
    latent = hostile_page(1, 1)[0].latents[0]
    example = dataclasses.replace(
        latent.examples[0], tokens=(" ", "\n", "\t", "<bos>"), values=(0.0,) * 4, peak=3
    )
    text = render(Page("t", latents=(dataclasses.replace(latent, examples=(example,)),)))
    assert "…<i>·</i><i>⏎</i><i>⇥</i><span" in text and "&lt;bos&gt;" in text


def test_an_empty_page_is_a_page():
    seen = Seen(render(Page("nothing yet")))
    assert seen.title == "nothing yet" and "section" not in seen.tags


def test_long_curves_are_thinned():
    lines = [{"step": i, "loss": float(np.sin(i))} for i in range(20_000)]
    assert len(render(Page("t", curves=lines))) < 20_000


@pytest.mark.parametrize("values", [[0.0], [3.0, 3.0], [1e-9, 1e9], [-1.0, 1.0], [0.0, 5.0]])
def test_any_curve_can_be_drawn(values):
    text = render(Page("t", curves=[{"step": i, "loss": v} for i, v in enumerate(values)]))
    assert "nan" not in text.split("polyline")[1] and "inf" not in text.split("polyline")[1]


def test_saving_replaces_in_one_move(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    assert save(path, hostile_page()[0]) == path
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(FileNotFoundError):
        save(tmp_path / "none" / "report.html", Page("t"))
