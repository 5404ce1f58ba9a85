"""The report of a model: sections with what passes folded, the worst rows again, and the tree of modules."""

import random
import re
from dataclasses import replace

import pytest
from report_samples import MODEL, TREE, failing, parameter, report, row
from rich.cells import cell_len

from gradcheck_cli.reports.table import render_table
from gradcheck_cli.results import ModuleNode, Verdict

ANSI = re.compile(r"\x1b\[[0-9;]*m")
WIDTHS = (40, 60, 80, 120, 200)


def table(sample, width=120, **options):
    return render_table(sample, **{"width": width, "color": False, "unicode": True, **options})


def tree_lines(root, width=80, **options):
    return table(report(row(), tree=root), width, **options).split("\nmodules\n")[1].split("\n\n")[0].split("\n")


def many(count, wrong=(), **changes):
    rows = [parameter(f"layers.{k}.weight", wrong=k in wrong, ratio=(k + 1) * 1e-4) for k in range(count)]
    return report(*rows, sections=("parameters",), **changes)


def shown_rows(text):
    """The numbers of the layers in the table, those repeated at the end apart."""
    rows, _, worst = text.split("\n\n✓ pass")[0].split("\n\n✗ FAIL")[0].partition("worst (repeated)")
    return [[int(number) for number in re.findall(r"layers\.(\d+)\.weight", part)] for part in (rows, worst)]


def test_short_sections_are_shown_whole_without_repetition():
    rows, worst = shown_rows(table(many(20)))
    assert rows == list(range(20))
    assert worst == []


@pytest.mark.parametrize("width", [80, 120])
def test_long_sections_show_twenty_rows_and_count_the_others(width):
    text = table(many(160), width)
    rows, worst = shown_rows(text)
    assert rows == list(range(20))
    assert worst == [159, 158, 157, 156, 155]
    assert "… and 140 pass\n" in text


def test_show_all_folds_nothing():
    rows, worst = shown_rows(table(many(160), show_all=True))
    assert rows == list(range(160))
    assert len(worst) == 5


@pytest.mark.parametrize("wrong", [(150,), (3, 90, 155), tuple(range(40, 130))])
def test_failing_rows_are_always_shown_in_their_order(wrong):
    sample = many(160, wrong)
    text = table(sample)
    rows, _ = shown_rows(text)
    assert rows == sorted(rows)
    assert set(wrong) <= set(rows)
    passing = len(rows) - len(wrong)
    assert passing >= 5
    assert f"… and {160 - len(wrong) - passing} pass\n" in text


def test_inconclusive_rows_and_errors_are_not_folded():
    rows = list(many(100).results)
    rows[70] = replace(rows[70], verdict=Verdict.INCONCLUSIVE, reason="too wide")
    rows[80] = replace(rows[80], verdict=Verdict.ERROR, reason="raised")
    text = table(replace(many(100), results=tuple(rows)))
    (shown, _) = shown_rows(text.split("\n\n? inconclusive")[0])
    assert {70, 80} <= set(shown)
    assert "… and 80 pass\n" in text


def test_a_row_that_cannot_be_measured_is_among_the_worst():
    rows = [*many(40).results, parameter("layers.77.weight", verdict=Verdict.FAIL, ratio=float("nan"))]
    _, worst = shown_rows(table(report(*rows, sections=("parameters",))))
    assert worst[0] == 77


def test_sections_come_in_the_order_of_the_report_whatever_the_rows():
    shuffled = replace(MODEL, results=tuple(reversed(MODEL.results)))
    text = table(shuffled)
    places = [text.index(f"\n{title}\n") for title in MODEL.sections]
    assert places == sorted(places)


def test_groups_that_are_no_sections_are_counted_beside_them():
    lattice = [row(group="sizes", name=f"n={n}") for n in range(30)]
    text = table(replace(many(3), results=(*many(3).results, *lattice)))
    assert "n=7" not in text
    assert re.search(r"^sizes +30 ", text, flags=re.MULTILINE)


def test_what_all_rows_share_is_said_once():
    text = table(many(12))
    assert text.count("autograd vs differences · float64") == 1
    mixed = list(many(12).results)
    mixed[3] = replace(mixed[3], method="autograd vs the twin")
    text = table(report(*mixed, sections=("parameters",)))
    assert text.split("\ncovered")[0].count("autograd vs differences") == 11


def test_the_diagnosis_comes_first_and_the_command_once():
    text = table(MODEL)
    explained = re.findall(r"^✗ FAIL  (\S+ \S+) ", text, flags=re.MULTILINE)
    assert explained[0] == "where: transformer.h.7.attn"
    assert len(explained) == 4
    assert text.count("rerun: ") == 1
    others = text.split("also failing:")[1].split("\n\n")[0]
    assert re.findall(r"attn\.w(\d+)", others) == ["0", "1", "2", "3", "4", "5"]
    assert "and 3 more" in others


def test_different_commands_are_all_shown():
    rows = [failing(group="where", name=f"layers.{k}", rerun=f"softcheck model --only layers.{k}") for k in range(3)]
    assert table(report(*rows, sections=("where",))).count("rerun: ") == 3


def test_passing_rows_may_say_something():
    text = table(MODEL)
    assert "148 tensors, 124,439,808 numbers, all float32" in text


def test_the_tree_marks_the_first_wrong_module_in_words_and_folds_what_agrees():
    assert tree_lines(TREE, width=120) == [
        "✗ GPT2  disagrees",
        "├─ ✗ transformer (Transformer)  disagrees",
        "│  ├─ ? wte (Embedding)  not checked",
        "│  ├─ ✓ h.0 … h.6 (Block)  7 modules agree",
        "│  ├─ ✗ h.7 (Block)  disagrees",
        "│  │  ├─ ✓ ln_1 (LayerNorm)  agrees",
        "│  │  ├─ ✗ attn (Attention)  ◀ FAULT: the first module whose own gradient is wrong",
        "│  │  │     its gradient for `value` is 1.00001 times the derivative",
        "│  │  ├─ ✓ ln_2 (LayerNorm)  agrees",
        "│  │  └─ ✓ mlp (MLP)  agrees",
        "│  ├─ ✓ h.8 … h.11 (Block)  4 modules agree",
        "│  └─ ✓ ln_f (LayerNorm)  agrees",
        "└─ ✓ lm_head (Linear)  agrees",
    ]


def test_a_model_without_a_fault_is_one_line():
    children = tuple(ModuleNode(name=str(k), kind="Linear", mark="pass") for k in range(9))
    assert tree_lines(ModuleNode(name="", kind="MLP", mark="pass", children=children)) == ["✓ MLP  agrees"]


def test_long_chains_of_several_classes_are_folded_as_well():
    children = [ModuleNode(name=str(k), kind=("Linear", "ReLU")[k % 2], mark="pass") for k in range(30)]
    children[21] = replace(children[21], mark="fault")
    lines = tree_lines(ModuleNode(name="", kind="Sequential", mark="fail", children=tuple(children)))
    assert lines == [
        "✗ Sequential  disagrees",
        "├─ ✓ 0 … 20 (Linear, ReLU)  21 modules agree",
        "├─ ✗ 21 (ReLU)  ◀ FAULT: the first module whose own gradient is wrong",
        "└─ ✓ 22 … 29 (Linear, ReLU)  8 modules agree",
    ]


def test_modules_with_a_note_or_a_fault_inside_are_never_folded():
    blocks = [ModuleNode(name=f"h.{k}", kind="Block", mark="pass") for k in range(9)]
    blocks[2] = replace(blocks[2], note="dropout is seeded")
    inner = ModuleNode(name="h.5.mlp", kind="MLP", mark="fault")
    blocks[5] = replace(blocks[5], children=(inner,))
    text = "\n".join(tree_lines(ModuleNode(name="", kind="Net", mark="fail", children=tuple(blocks))))
    assert "dropout is seeded" in text
    assert "mlp (MLP)  ◀ FAULT" in text
    assert "h.6 … h.8 (Block)  3 modules agree" in text


def test_names_that_only_begin_alike_are_shown_whole():
    child = ModuleNode(name="heads.0", kind="Linear", mark="fault")
    root = ModuleNode(
        name="", kind="Net", mark="fail", children=(ModuleNode(name="head", kind="A", children=(child,)),)
    )
    assert tree_lines(root)[2].startswith("   └─ ✗ heads.0 (Linear)")


def random_tree(generator, path="", depth=0):
    names = ["h", "attn", "[red]x[/]", "слой", "名前" * 9, "\x1b[2J", "w" * 70, "\n"]
    children = [] if depth > 9 else [generator.choice(names) for _ in range(generator.randrange(4))]
    return ModuleNode(
        name=path,
        kind=generator.choice(["Block", "", "[b]", "K" * 50, "\x07"]),
        mark=generator.choice(["pass", "fail", "fault", "unknown"]),
        note=generator.choice(["", "", "n" * 200, "a \x1b[1m note " * 9]),
        children=tuple(random_tree(generator, f"{path}.{name}".lstrip("."), depth + 1) for name in children),
    )


@pytest.mark.parametrize(("color", "unicode"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("seed", range(6))
def test_any_tree_fits_any_width_and_colour_says_nothing_alone(seed, width, color, unicode):
    sample = report(row(), tree=random_tree(random.Random(seed)))
    text = table(sample, width, color=color, unicode=unicode)
    plain = ANSI.sub("", text)
    for line in plain.split("\n"):
        assert line.isprintable()
        assert cell_len(line) <= width
    assert unicode or plain.isascii()
    colourless = table(sample, width, color=False, unicode=unicode)
    assert "".join(f"{line.rstrip()}\n" for line in plain.splitlines()) == colourless


def test_a_very_deep_module_is_still_readable():
    node = ModuleNode(name=".".join("m" * 60), kind="Linear", mark="fault", note="wrong")
    for depth in range(59, -1, -1):
        node = ModuleNode(name=".".join("m" * depth), kind="Wrap", mark="fail", children=(node,))
    lines = tree_lines(node, width=80)
    (fault,) = [number for number, line in enumerate(lines) if "FAULT" in line]
    assert "m (Linear)  ◀ FAULT" in lines[fault]
    assert lines[-1].strip() == "wrong"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("unicode", [True, False])
def test_sections_fit_any_width(width, unicode):
    long = parameter("block." * 40 + "weight", wrong=True)
    sample = replace(MODEL, results=(*MODEL.results, long, parameter("層" * 50)))
    sample = replace(sample, results=tuple(replace(result, rerun=None) for result in sample.results))
    text = table(sample, width, unicode=unicode)
    assert all(cell_len(line) <= width for line in text.split("\n"))
    assert text.count("FAIL") >= 13
