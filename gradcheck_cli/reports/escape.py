"""Text from files and programs, made safe to print."""

_ASCII = str.maketrans(
    {
        "✓": "+", "✗": "x", "–": "-", "—": "-", "−": "-", "·": "|", "×": "x", "µ": "u", "≤": "<=", "≥": ">=",
        "…": "...", "→": "->", "‘": "'", "’": "'", "“": '"', "”": '"', "ᵀ": "^T", "±": "+/-",
        "├": "|", "└": "`", "│": "|", "─": "-", "◀": "<",
    }
)  # fmt: skip


def escape(text: str, *, unicode: bool = True, keep: str = "") -> str:
    r"""The text on one line, all that a terminal would act on shown as its code (`\x1b`, `\u202e`).

    That covers control characters, line breaks, text-direction marks and undecodable bytes, except those in
    `keep`. With `unicode=False` the result is ASCII: typographic signs become their nearest ASCII spelling,
    other characters their code.
    """
    if not text.isprintable():
        text = "".join(char if char.isprintable() or char in keep else _code(char) for char in text)
    if unicode or text.isascii():
        return text
    return text.translate(_ASCII).encode("ascii", "backslashreplace").decode("ascii")


def _code(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
