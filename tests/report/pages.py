"""A page whose every text is hostile, and a parser that says what is in a page."""

import html.parser

import numpy as np

from saex.evals import Counts, histogram
from saex.report import Example, Latent, Page

HOSTILE = (
    "</script><script>document.title='pwned'</script>",
    "\"><img src='/stolen' onerror=\"document.title='pwned'\">",
    "</style></title><svg onload=document.title='pwned'>",
    "' onmouseover='document.title=1' x='",
    "<!-- ]]> &lt;b&gt; &#60;",
    "\u202e\u2028\x00\x1b[31m\ud83d",
    "javascript:alert(1)",
)


def hostile_page(latents=5, contexts=3):
    """(page, number of highlighted tokens)."""
    evil = tuple(t for text in HOSTILE for t in (text, "\n", "\t", " "))
    values = tuple(0.0 if i % 3 else 1.0 + i for i in range(len(evil)))
    example = Example(evil, values, 3, HOSTILE[1], (True, True))
    shown = tuple(
        Latent(
            i,
            HOSTILE[i % len(HOSTILE)] if i else "most frequent",
            10.0**-i,
            1.0,
            max(values),
            (example,) * contexts,
            tuple((t, 0.5) for t in HOSTILE),
            tuple((t, -0.5) for t in HOSTILE),
        )
        for i in range(latents)
    )
    counts = Counts(np.array([0, 0, 1, 5, 100, 100]), 100)
    page = Page(
        HOSTILE[2],
        HOSTILE[0],
        {h: {h: h, "list": list(HOSTILE)} for h in HOSTILE},
        [{"step": s, "loss": 1 / (s + 1), HOSTILE[1]: s, "bad": None} for s in range(1000)],
        {"fvu": 0.25, "l0": 4.0, "dead_fraction": 0.5, f"{HOSTILE[1]}.fvu": 0.5, "kl": None},
        histogram(counts),
        shown,
        100,
        HOSTILE,
    )
    return page, latents * contexts * sum(v != 0 for v in values)


class Seen(html.parser.HTMLParser):
    """Elements, attributes and text of a page; an error where tags do not match."""

    VOID = frozenset({"meta", "link", "br"})

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.classes = [], [], [], []
        self.text, self.title = "", ""
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        names = [c for key, value in attrs if key == "class" for c in value.split()]
        self.classes += [(tag, name) for name in names]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] == "title" and "svg" not in self.open:
            self.title += data

    def spans(self):
        """Highlighted tokens: those with a value to hover over."""
        return sum(tag == "span" and name == "title" for tag, name, _ in self.attributes)
