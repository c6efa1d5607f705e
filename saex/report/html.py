"""HTML that is escaped unless it says otherwise: ``el`` builds elements, plain text is inert."""

import html
import unicodedata


class Markup(str):
    """Text that is HTML already; only ``el`` and ``join`` make it."""


def visible(text: str) -> str:
    """Text whose control, format, surrogate and separator characters are spelled as escapes.

    Newlines stay. Directions cannot be overridden, nothing is invisible, all of it is valid UTF-8.
    """
    return "".join(c if _plain(c) else _spelled(c) for c in text)


def escape(text: object) -> Markup:
    """Markup as it is; anything else as visible text that no browser takes for markup."""
    if isinstance(text, Markup):
        return text
    return Markup(html.escape(visible(str(text)), quote=True))


def join(*children: object) -> Markup:
    """Children one behind the other; lists are joined too, None is nothing."""
    parts = []
    for child in children:
        if isinstance(child, list | tuple):
            parts.append(join(*child))
        elif child is not None:
            parts.append(escape(child))
    return Markup("".join(parts))


def el(name: str, /, *children: object, **attributes: object) -> Markup:
    """One element. ``class_`` is class, other underscores are hyphens; None leaves one out."""
    words = [
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    ]
    opening = f"<{name}{''.join(words)}>"
    if name in ("meta", "link", "br"):
        return Markup(opening)
    return Markup(f"{opening}{join(*children)}</{name}>")


def _plain(c: str) -> bool:
    return c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def _spelled(c: str) -> str:
    code = ord(c)
    return (
        f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
    )
