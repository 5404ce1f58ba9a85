"""Sections of rows laid out in columns, with headings and remarks that run across them."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from gradcheck_cli.reports import Look
from gradcheck_cli.reports.escape import escape

GAP = 2
_INDENT = 2
_REMARK_INDENT = 4
_LEAST_ASIDE = 16
_LONGEST_NAME = 60
_LEAST_HOW = 36
Lines = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A row as text: its name, how it was computed, its numbers by column, and what is to be said of it.

    `numbers` has one tuple of lines for each column of numbers, or is empty where there is nothing to compare.
    """

    name: str
    how: str
    numbers: tuple[Lines, ...]
    word: str
    style: str
    remark: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A heading, what it says of all rows below it, the rows, and a line about those that are not shown."""

    title: str
    shared: str
    entries: tuple[Entry, ...]
    told: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """Which columns there are: the heads of those with numbers, and whether `how` stands below the name.

    `least_name` is how much of a name is left before a narrower form is taken, None where all of it is; the columns
    `left` are aligned to the left.
    """

    heads: tuple[Lines, ...]
    left: frozenset[int] = frozenset()
    how_below: bool = False
    least_name: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Widths:
    name: int
    how: int
    numbers: tuple[int, ...]
    word: int
    gap: int

    @property
    def before_word(self) -> int:
        cells = [self.name, *([self.how] if self.how else []), *self.numbers]
        return sum(cells) + self.gap * len(cells)

    @property
    def total(self) -> int:
        return self.before_word + self.word


def lay_out(parts: Sequence[Part], form: Form, look: Look) -> list[RenderableType] | None:
    """The lines of the table, none wider than the look, or None where this form does not fit."""
    widths = _widths(parts, form, look)
    return None if widths is None else _Drawing(form=form, widths=widths, look=look).lines(parts)


def _widths(parts: Sequence[Part], form: Form, look: Look) -> _Widths | None:
    def widest(texts: Sequence[str]) -> int:
        return max((cell_len(escape(text, unicode=look.unicode)) for text in texts), default=0)

    entries = [entry for part in parts for entry in part.entries]
    measured = [entry for entry in entries if entry.numbers]
    numbers = tuple(
        widest([*head, *(line for entry in measured for line in entry.numbers[n])]) for n, head in enumerate(form.heads)
    )
    word = widest(["verdict", *(entry.word for entry in entries)])
    names = min(widest([entry.name for entry in measured]), _LONGEST_NAME) + _INDENT
    hows = min(widest([entry.how for entry in measured]), _LONGEST_NAME)
    if form.how_below:
        names, hows = max(names, hows + _REMARK_INDENT if hows else 0), 0
    names = max(names, len("check"), 0 if measured else _LONGEST_NAME // 2)
    for gap in (GAP, 1):
        found = _Widths(name=names, how=hows, numbers=numbers, word=word, gap=gap)
        if found.total <= look.width:
            return found
    if form.least_name is None:
        return None
    missing = found.total - look.width
    how = max(hows - missing, min(hows, _LEAST_HOW))
    name = names - missing + (hows - how)
    fits = name >= min(names, form.least_name + _INDENT)
    return _Widths(name=name, how=how, numbers=numbers, word=word, gap=1) if fits else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawing:
    """Entries and headings drawn in columns of known widths."""

    form: Form
    widths: _Widths
    look: Look

    def lines(self, parts: Sequence[Part]) -> list[RenderableType]:
        drawn: list[RenderableType] = [*self._head()]
        for number, part in enumerate(parts):
            drawn += [Text("")] if number else []
            drawn.append(self._heading(part))
            for entry in part.entries:
                drawn += self._entry(entry) if entry.numbers else self._plain(entry)
            if part.told:
                drawn.append(Padding(self._text(part.told, "dim"), (0, 0, 0, _INDENT)))
        return drawn

    def _head(self) -> list[Text]:
        heads = self.form.heads
        height = max((len(head) for head in heads), default=1)
        lines = []
        for level in range(height):
            bottom = level == height - 1 if not self.form.how_below else level == 0
            cells = [self._cell("check" if bottom else "", self.widths.name, "bold")]
            cells += [self._cell("method" if bottom else "", self.widths.how, "bold")] if self.widths.how else []
            for n, head in enumerate(heads):
                at = level if self.form.how_below else level - height + len(head)
                text = head[at] if 0 <= at < len(head) else ""
                cells.append(self._cell(text, self.widths.numbers[n], "bold", right=n not in self.form.left))
            cells.append(self._text("verdict" if bottom else "", "bold"))
            lines.append(self._joined(cells))
        return [*lines, self._text("─" * self.widths.total, "dim")]

    def _heading(self, part: Part) -> Text:
        title = self._fitted(part.title, self.look.width, "bold")
        room = self.look.width - title.cell_len - GAP
        if part.shared and room >= _LEAST_ASIDE:
            title.append_text(Text(" " * GAP)).append_text(self._fitted(part.shared, room, "dim"))
        return title

    def _entry(self, entry: Entry) -> list[RenderableType]:
        lines: list[RenderableType] = []
        for level in range(max(*map(len, entry.numbers), 2 if self.form.how_below and entry.how else 1)):
            first = f"{' ' * _INDENT}{entry.name}" if level == 0 else ""
            if level == 1 and self.form.how_below:
                first = f"{' ' * _REMARK_INDENT}{entry.how}"
            style = "" if level == 0 else "dim"
            cells = [self._cell(first, self.widths.name, style)]
            if self.widths.how:
                cells.append(self._cell(entry.how if level == 0 else "", self.widths.how, "dim"))
            for n, number in enumerate(entry.numbers):
                text = number[level] if level < len(number) else ""
                cells.append(self._cell(text, self.widths.numbers[n], style, right=n not in self.form.left))
            cells.append(self._text(entry.word if level == 0 else "", entry.style))
            lines.append(self._joined(cells))
        return [*lines, *self._remark(entry.remark)]

    def _plain(self, entry: Entry) -> list[RenderableType]:
        """A row without numbers: what is to be said of it runs across the columns, below it where it is long."""
        room = self.widths.before_word - self.widths.gap
        aside = entry.remark or entry.how
        name = self._fitted(f"{' ' * _INDENT}{entry.name}", room)
        start = max(name.cell_len, min(self.widths.name, room)) + self.widths.gap
        said = self._text(aside, "dim")
        if start + said.cell_len > room:
            start = name.cell_len + GAP
        fits = bool(aside) and start + said.cell_len <= room
        line = name.copy()
        if fits:
            line.append(" " * (start - name.cell_len)).append_text(said)
        line.append(" " * (self.widths.before_word - line.cell_len))
        line.append_text(self._text(entry.word, entry.style))
        return [_whole(line), *([] if fits else self._remark(aside))]

    def _remark(self, remark: str) -> list[RenderableType]:
        return [Padding(self._text(remark, "dim"), (0, 0, 0, _REMARK_INDENT))] if remark else []

    def _joined(self, cells: Sequence[Text]) -> Text:
        return _whole(Text(" " * self.widths.gap).join(cells))

    def _cell(self, content: str, width: int, style: str, *, right: bool = False) -> Text:
        text = self._fitted(content, width, style)
        blank = Text(" " * (width - text.cell_len))
        return blank.append_text(text) if right else text.append_text(blank)

    def _fitted(self, content: str, width: int, style: str = "") -> Text:
        return Text(fitted(escape(content, unicode=self.look.unicode), width, unicode=self.look.unicode), style=style)

    def _text(self, content: str, style: str = "") -> Text:
        return Text(escape(content, unicode=self.look.unicode), style=style)


def _whole(line: Text) -> Text:
    line.no_wrap, line.overflow = True, "ignore"
    return line


def fitted(text: str, width: int, *, unicode: bool = True) -> str:
    """The text in at most `width` terminal cells, its middle left out where it is longer."""
    if cell_len(text) <= width:
        return text
    sign = "…" if unicode else "..."
    room = max(width - len(sign), 0)
    head = set_cell_size(text, room // 2).rstrip()
    tail = _end(text, room - cell_len(head))
    return set_cell_size(f"{head}{sign}{tail}", width).rstrip() if width > len(sign) else sign[:width]


def _end(text: str, width: int) -> str:
    """As much of the end of the text as fits."""
    taken = 0
    for position in range(len(text) - 1, -1, -1):
        taken += cell_len(text[position])
        if taken > width:
            return text[position + 1 :]
    return text
