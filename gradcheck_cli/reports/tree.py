"""The modules of a model as a tree with the first wrong one marked, and what agrees folded into a line."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from gradcheck_cli.reports import Look
from gradcheck_cli.reports.escape import escape
from gradcheck_cli.reports.summary import module_label, shorten
from gradcheck_cli.results import ModuleMark, ModuleNode

_SIGNS: dict[ModuleMark, str] = {"pass": "✓", "fail": "✗", "fault": "✗", "unknown": "?"}
_WORDS: dict[ModuleMark, str] = {
    "pass": "agrees",
    "fail": "disagrees",
    "fault": "◀ FAULT: the first module whose own gradient is wrong",
    "unknown": "not checked",
}
_STYLES: dict[ModuleMark, str] = {"pass": "green", "fail": "red", "fault": "bold red", "unknown": "dim"}
_MANY: dict[ModuleMark, str] = {"pass": "agree", "unknown": "not checked"}
_SHORTEST_RUN = 3
_MOST_LINES = 12
_MOST_CLASSES = 3
_HEADING = "modules"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """A module, or a run of modules in one line, with the lines below it."""

    sign: str
    style: str
    label: str
    word: str
    note: str = ""
    below: tuple["_Line", ...] = ()


def module_tree(root: ModuleNode, look: Look) -> RenderableType:
    """The tree under a heading; a module without a fault in it is one line, runs of such modules are folded."""
    return _Tree(line=_line(root, inside=""), look=look)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tree:
    line: _Line
    look: Look

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield Text(_HEADING, style="bold")
        yield from self._drawn(self.line, console, options.max_width, lead="", rest="")

    def _drawn(self, line: _Line, console: Console, width: int, *, lead: str, rest: str) -> Iterator[RenderableType]:
        """The line behind its guides, wrapped behind those of what follows, then the lines below it."""
        text = self._text(f"{line.sign} ", line.style).append_text(self._text(f"{line.label}  ", "default"))
        text.append_text(self._text(line.word, line.style))
        below = self._guide(f"{rest}{'│  ' if line.below else '   '}", width)
        yield from self._wrapped(text, console, width, lead=self._guide(lead, width), rest=below)
        if line.note:
            yield from self._wrapped(self._text(line.note, "default"), console, width, lead=below, rest=below)
        for position, child in enumerate(line.below):
            last = position == len(line.below) - 1
            yield from self._drawn(
                child, console, width, lead=rest + ("└─ " if last else "├─ "), rest=rest + ("   " if last else "│  ")
            )

    def _wrapped(self, text: Text, console: Console, width: int, *, lead: Text, rest: Text) -> Iterator[RenderableType]:
        for number, part in enumerate(text.wrap(console, max(width - max(lead.cell_len, rest.cell_len), 1))):
            part.rstrip()
            yield (lead if number == 0 else rest).copy().append_text(part)

    def _guide(self, guide: str, width: int) -> Text:
        """The guides nearest to the text, where a deep tree has more than half the width."""
        return self._text(guide[-3 * (width // 6) :], "dim")

    def _text(self, content: str, style: str) -> Text:
        return Text(escape(content, unicode=self.look.unicode), style=style)


def _line(node: ModuleNode, *, inside: str) -> _Line:
    below = () if _is_uniform(node) else tuple(_lines(node.children, inside=node.name))
    return _Line(
        sign=_SIGNS[node.mark],
        style=_STYLES[node.mark],
        label=shorten(module_label(node, inside=inside)),
        word=_WORDS[node.mark],
        note=node.note,
        below=below,
    )


def _lines(children: Sequence[ModuleNode], *, inside: str) -> Iterator[_Line]:
    """A line for each child; runs of one class that agree are folded, and of several where there are many."""
    runs = _runs(children, lambda child: (_foldable(child), child.mark, child.kind))
    if sum(1 if _folds(run) else len(run) for run in runs) > _MOST_LINES:
        runs = _runs(children, lambda child: (_foldable(child), child.mark))
    for run in runs:
        if _folds(run):
            yield _fold(run, inside=inside)
        else:
            yield from (_line(child, inside=inside) for child in run)


def _runs(children: Sequence[ModuleNode], key: Callable[[ModuleNode], object]) -> list[list[ModuleNode]]:
    return [list(run) for _, run in groupby(children, key)]


def _folds(run: Sequence[ModuleNode]) -> bool:
    return len(run) >= _SHORTEST_RUN and _foldable(run[0])


def _fold(run: Sequence[ModuleNode], *, inside: str) -> _Line:
    mark = run[0].mark
    first, last = (module_label(_nameless(node), inside=inside) for node in (run[0], run[-1]))
    kinds = list(dict.fromkeys(node.kind for node in run if node.kind))
    classes = ", ".join(kinds) if len(kinds) <= _MOST_CLASSES else f"{len(kinds)} classes"
    label = f"{shorten(first)} … {shorten(last)}" + (f" ({classes})" if classes else "")
    return _Line(sign=_SIGNS[mark], style=_STYLES[mark], label=label, word=f"{len(run):,} modules {_MANY[mark]}")


def _nameless(node: ModuleNode) -> ModuleNode:
    """The node without its class, which the line of a run names once."""
    return ModuleNode(name=node.name, kind="")


def _foldable(node: ModuleNode) -> bool:
    """Whether nothing is to be said of the module and of those in it but that they agree, or were not checked."""
    return node.mark in _MANY and not node.note and _is_uniform(node)


def _is_uniform(node: ModuleNode) -> bool:
    """Whether all modules inside have the same mark as the module, one that asks for no attention, and no note."""
    return node.mark in _MANY and all(
        child.mark == node.mark and not child.note and _is_uniform(child) for child in node.children
    )
