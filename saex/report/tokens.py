"""Tokens as a reader sees them: one by one, nothing invisible, nothing joined."""

MARKS = {"\n": "⏎", "\r": "⇤", "\t": "⇥", " ": "·"}


def byte_text(token: int) -> str:
    """A byte token's text: its character, backslash and hex of what is not ASCII, or <bos>."""
    if token == 256:
        return "<bos>"
    return chr(token) if token < 127 else f"\\x{token:02x}"
