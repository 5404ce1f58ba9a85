"""The report of a model: sections with what passes folded, the worst rows again, and the tree of modules."""

import random
import re
from dataclasses import replace

import pytest
from report_samples import MODEL, TREE, failing, parameter, report, row, structure
from rich.cells import cell_len

from gradcheck_cli.reports.ledger import fitted
from gradcheck_cli.reports.table import render_table
from gradcheck_cli.results import Diagnosis, ModuleNode, Verdict

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
def test_long_sections_show_the_first_and_the_worst_rows_and_count_the_others(width):
    text = table(many(160), width)
    rows, worst = shown_rows(text)
    assert rows == [*range(10), *range(150, 160)]
    assert worst == []
    assert "… and 140 pass (error/bound up to 0.015); all with --show-all\n" in text


def test_show_all_folds_nothing():
    text = table(many(160), show_all=True)
    rows, worst = shown_rows(text)
    assert rows == list(range(160))
    assert worst == []
    assert "--show-all" not in text


def test_the_worst_rows_of_a_long_table_are_repeated_where_they_fail_or_come_close():
    rows = list(many(160, (3,)).results)
    rows[70] = replace(rows[70], ratio=0.51)
    rows[80] = replace(rows[80], ratio=0.49)
    sample = report(*rows, sections=("parameters",))
    assert shown_rows(table(sample, show_all=True))[1] == [70, 3]
    shown, worst = shown_rows(table(sample))
    assert {3, 70, 80} <= set(shown)
    assert worst == []


@pytest.mark.parametrize("wrong", [(150,), (3, 90, 155), tuple(range(152, 160))])
def test_few_failing_rows_are_all_shown_in_their_order(wrong):
    sample = many(160, wrong)
    text = table(sample)
    rows, _ = shown_rows(text)
    assert rows == sorted(rows)
    assert set(wrong) <= set(rows)
    assert len(rows) == 20
    assert re.search(r"^  … and 140 pass \(", text, flags=re.MULTILINE)


def test_of_many_failing_rows_the_first_and_the_worst_are_shown():
    text = table(many(160, range(40, 130)))
    rows, _ = shown_rows(text)
    assert [number for number in rows if 40 <= number < 130] == [40, 41, 42, 43, 126, 127, 128, 129]
    assert len([number for number in rows if number < 40 or number >= 130]) == 12
    assert "… and 82 more fail, 58 pass (error/bound up to " in text


def test_rows_of_one_name_that_agree_are_one_row_with_the_numbers_of_the_worst():
    methods = [
        row(group="head", name="softmax", method=f"method {k}", ratio=0.01 * k, detectable=0.001 * k) for k in range(8)
    ]
    methods[5] = replace(methods[5], max_error=0.25, bound=0.5, ratio=0.3)
    laws = [structure(f"law {k}", group="head") for k in range(5)]
    laws = [replace(law, name="softmax", ratio=0.2) for law in laws]
    other = [replace(one, dtype="float32") for one in methods]
    reference = replace(
        methods[0], method="the reference", dtype="", max_error=None, bound=None, ratio=None, detectable=None
    )
    told = replace(reference, reason="rows 1 and 2")
    text = table(report(told, *methods, *laws, *other[:4], replace(other[4], ratio=0.6), sections=("head",)))
    lines = [line.split() for line in text.split("\n") if line.startswith("  softmax")]
    assert [line[1:] for line in lines] == [
        ["8", "methods,", "5", "laws", "agree", "·", "float64", "0.25", "(0,", "3,", "3)", "0.5", "0.3", "0.007", "✓", "pass"],
        ["4", "methods", "agree", "·", "float32", "1.11e-16", "(0,", "3,", "3)", "4.44e-16", "0.03", "0.003", "✓", "pass"],
        ["method", "4", "vs", "closed", "form", "·", "float32", "1.11e-16", "(0,", "3,", "3)", "4.44e-16", "0.6", "0.004", "✓", "pass"],
    ]  # fmt: skip
    assert text.count("rows 1 and 2") == 1
    whole = table(report(told, *methods, *laws, *other, sections=("head",)), show_all=True)
    assert len(re.findall(r"^  softmax", whole, flags=re.MULTILINE)) == 22


def test_rows_that_agree_and_are_left_out_are_all_counted():
    alike = [row(group="head", name=f"n{k}", method=f"method {m}", ratio=k / 100) for k in range(30) for m in range(5)]
    text = table(report(*alike, sections=("head",)))
    assert len(re.findall(r"^  n\d+ ", text, flags=re.MULTILINE)) == 20
    assert "… and 50 pass (error/bound up to 0.19)" in text


def test_a_failing_row_is_never_told_together_with_others():
    methods = [row(group="head", name="softmax", method=f"method {k}") for k in range(8)]
    methods[3] = failing(group="head", name="softmax", method="method 3", dtype="float64")
    text = table(report(*methods, sections=("head",)))
    assert "7 methods agree · float64" in text
    assert re.search(r"^  softmax +method 3 vs closed form · float64 .* ✗ FAIL$", text, flags=re.MULTILINE)


def test_skipped_rows_are_shown_where_nothing_of_their_name_and_dtype_ran():
    nothing = {"verdict": Verdict.SKIPPED, "max_error": None, "bound": None, "ratio": None, "detectable": None}
    slow = row(group="head", name="softmax", method="loop", reason="too slow", **nothing)
    blind = [
        row(
            group="head",
            name="softmax",
            method=f"method {k}",
            dtype="bfloat16",
            reason="the bound is too wide",
            **nothing,
        )
        for k in range(4)
    ]
    text = table(report(row(group="head"), slow, *blind, sections=("head",)))
    assert "too slow" not in text
    assert "… and 1 skipped; all with --show-all" in text
    assert text.count("the bound is too wide") == 1
    assert re.search(r"^  softmax .*– skipped$", text, flags=re.MULTILINE)
    assert "too slow" in table(report(row(group="head"), slow, sections=("head",)), show_all=True)


def test_inconclusive_rows_and_errors_are_not_folded():
    rows = list(many(100).results)
    rows[70] = replace(rows[70], verdict=Verdict.INCONCLUSIVE, reason="too wide")
    rows[80] = replace(rows[80], verdict=Verdict.ERROR, reason="raised")
    text = table(replace(many(100), results=tuple(rows)))
    (shown, _) = shown_rows(text.split("\n\n? inconclusive")[0])
    assert {70, 80} <= set(shown)
    assert "… and 80 pass (error/bound up to 0.0091)" in text


def test_a_row_that_cannot_be_measured_is_among_the_worst():
    rows = [*many(40).results, parameter("layers.77.weight", verdict=Verdict.FAIL, ratio=float("nan"))]
    _, worst = shown_rows(table(report(*rows, sections=("parameters",)), show_all=True))
    assert worst[0] == 77


def test_sections_come_in_the_order_of_the_report_whatever_the_rows():
    shuffled = replace(MODEL, results=tuple(reversed(MODEL.results)))
    text = table(shuffled)
    places = [text.index(f"\n{title}  ") for title in MODEL.sections]
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


def test_only_rows_with_a_diagnosis_are_explained_and_the_command_is_shown_once():
    text = table(MODEL)
    assert re.findall(r"^✗ FAIL  (.*)$", text, flags=re.MULTILINE) == ["where: transformer.h.7.attn"]
    assert text.count("rerun: ") == 1
    assert text.index("1.00001 times the derivative, in net.py:88") < text.index("\nmodules\n")


def test_without_a_diagnosis_the_worst_rows_are_explained():
    text = table(many(160, (3, 90, 155, 157, 158)))
    assert re.findall(r"^✗ FAIL  parameters: (.*)$", text, flags=re.MULTILINE) == [
        f"layers.{k}.weight" for k in (158, 157, 155)
    ]
    assert text.count("got 0.50001, expected 0.5") == 3
    assert text.count("rerun: ") == 1


def test_rows_with_the_same_diagnosis_are_explained_together():
    def cut(k, share):
        found = Diagnosis(code="low-precision", message=f"off by {share} of its size")
        return failing(group="parameters", name=f"layers.{k}", diagnosis=found, ratio=float(k))

    rows = [cut(k, k / 8) for k in range(12)]
    rows.append(failing(group="parameters", name="head", diagnosis=Diagnosis(code="zero-gradient", message="cut")))
    text = table(report(*rows, sections=("parameters",)))
    assert re.findall(r"^✗ FAIL  parameters: (.*)$", text, flags=re.MULTILINE) == ["layers.11", "head"]
    assert "low-precision: off by 1.375 of its size" in text
    assert "the same in: layers.0; layers.1; layers.2; layers.3; layers.4; layers.5; and 5 more" in text


def test_the_last_line_names_the_module_and_the_fault():
    assert table(MODEL).endswith("\n✗ FAIL transformer.h.7.attn (Attention): scale (exit code 1)\n")
    own = failing(
        group="where", name="transformer.h.7.attn (Attention)", diagnosis=Diagnosis(code="own", message="its own")
    )
    for order in ((own, *MODEL.results), (*MODEL.results, own)):
        results = tuple(replace(row, name="other") if row.name == "transformer.h.7.attn" else row for row in order)
        assert table(replace(MODEL, results=results)).endswith("(Attention): own (exit code 1)\n")
    bare = replace(MODEL, results=tuple(replace(row, diagnosis=None) for row in MODEL.results))
    assert table(bare).endswith("\n✗ FAIL transformer.h.7.attn (Attention) (exit code 1)\n")
    assert "\n13 of 149 checks fail; covered: head 100/100 entries; " in table(MODEL)


def test_a_note_of_the_tree_that_stands_above_it_is_not_repeated():
    (fault,) = [row for row in MODEL.results if row.group == "where"]
    same = Diagnosis(code="scale", message="its gradient for `value` is 1.00001 times the derivative")
    text = table(replace(MODEL, results=(*MODEL.results[:-1], replace(fault, diagnosis=same))))
    assert text.count(same.message) == 1
    assert text.index(same.message) < text.index("\nmodules\n")


def test_different_commands_are_all_shown():
    rows = [failing(group="where", name=f"layers.{k}", rerun=f"softcheck model --only layers.{k}") for k in range(3)]
    assert table(report(*rows, sections=("where",))).count("rerun: ") == 3


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_passing_rows_may_say_something(width):
    lines = [line.strip() for line in table(MODEL, width).split("\n")]
    said = "148 tensors, 124,439,808 numbers, all float32"
    assert said in " ".join(lines)
    assert bool(re.search(rf"tensors +{said}", " ".join(lines))) == (width >= 80)
    measured = replace(row(group="head", name="a"), reason="4 of 32 rows")
    text = table(report(measured, replace(measured, dtype="float32"), sections=("head",)), width)
    assert text.count("    4 of 32 rows\n") == 1


def test_long_names_are_shortened_and_never_wrapped():
    names = [f"model.layers.{k}.{'self_attn.' * 6}q_proj.weight" for k in range(3)]
    for width in (80, 120):
        text = table(report(*map(parameter, names), sections=("parameters",)), width)
        lines = [line for line in text.split("\n") if line.endswith("✓ pass")]
        assert len(lines) == 3
        for number, line in enumerate(lines):
            assert re.match(rf"  model\.layers\.{number}\.\S*…\S*q_proj\.weight ", line)


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


@pytest.mark.parametrize(
    ("text", "width", "unicode", "shown"),
    [
        ("abcdefghij", 10, True, "abcdefghij"), ("abcdefghij", 5, True, "ab…ij"), ("abcdefghij", 5, False, "a...j"),
        ("層" * 10, 7, True, "層…層層"), ("層" * 10, 2, True, "…"), ("abc", 1, False, "."), ("abc", 0, True, ""),
    ],
)  # fmt: skip
def test_fitted(text, width, unicode, shown):
    assert fitted(text, width, unicode=unicode) == shown


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
    assert text.count("FAIL") >= 10
