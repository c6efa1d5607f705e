from saex.report.html import Markup, el, escape, join, visible


def test_text_is_inert_and_markup_stays():
    assert escape("<b>&\"'") == "&lt;b&gt;&amp;&quot;&#x27;"
    assert el("p", "a<b", el("b", "c"), id='x"y') == '<p id="x&quot;y">a&lt;b<b>c</b></p>'
    assert join("a", None, ["<", Markup("<br>")]) == "a&lt;<br>"


def test_attributes_are_named_as_python_can():
    assert el("a", class_="b", aria_label="c", href=None) == '<a class="b" aria-label="c"></a>'
    assert el("meta", name="x") == '<meta name="x">'


def test_nothing_stays_invisible():
    assert visible("a\x00b\x7f\u202ec\u2028d\ud800e\n") == (
        "a\\x00b\\x7f\\u202ec\\u2028d\\ud800e\n"
    )
    assert visible("\U000e0041") == "\\U000e0041"
    escape("\ud800").encode("utf-8")
    assert visible("naïve 日本 🙂") == "naïve 日本 🙂"
