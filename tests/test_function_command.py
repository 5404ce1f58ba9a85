"""`softcheck function` from the user's side: inputs, options, rows and exit codes, with wrong gradients planted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gradcheck_cli
from gradcheck_cli.cli import main

ROOT = Path(gradcheck_cli.__file__).parents[1]
FUNCTIONS = str(ROOT / "fixtures" / "functions.py")
HOMEWORK = str(ROOT / "fixtures" / "homework.py")


@pytest.fixture
def check(capsys):
    """Runs the command on a function of the fixtures and gives (exit code, report as JSON)."""

    def run(target, *words, expect=None):
        spec = target if ":" in target else f"{FUNCTIONS}:{target}"
        code = main(["function", spec, *map(str, words), "-f", "json", "-q"])
        captured = capsys.readouterr()
        assert expect is None or code == expect, captured.out + captured.err
        return json.loads(captured.out) if captured.out else captured.err

    return run


def row(report, method):
    exact = [result for result in report["results"] if result["method"] == method]
    (found,) = exact or [result for result in report["results"] if method in result["method"]]
    return found


def verdicts(report):
    return {result["method"]: result["verdict"] for result in report["results"]}


def codes(report):
    return {result["diagnosis"]["code"] for result in report["results"] if result["diagnosis"]}


def test_a_right_function_passes_every_check(check):
    report = check("RightSoftmax", "--shape", "4,8", expect=0)
    found = verdicts(report)
    assert found.pop("forward mode vs differences") == "skipped"
    assert set(found.values()) == {"pass"}
    assert {
        "reverse mode vs autodiff of RightSoftmax.forward",
        "reverse mode vs differences",
        "repeated calls agree",
        "backward twice through one graph",
        "calls do not disturb each other",
        "inputs are left unchanged",
        "zero upstream gives zero",
        "linear in the upstream",
        "transposed inputs",
        "sliced inputs",
        "expanded inputs",
        "expanded upstream",
        "batched derivatives (vmap)",
    } <= set(found)
    assert row(report, "reverse mode vs differences")["detectable"] < 1e-9
    assert row(report, "vs autodiff")["detectable"] < 1e-12


def test_plain_torch_code_has_forward_mode_and_the_dot_product_test(check):
    report = check("attention", *["--shape", "2,5,4"] * 3, "--order", "2", expect=0)
    found = verdicts(report)
    for method in (
        "forward mode vs differences",
        "forward vs reverse (dot product)",
        "Hessian–vector product vs differences",
        "Hessian is symmetric",
    ):
        assert found[method] == "pass", method


@pytest.mark.parametrize(
    ("target", "words", "code"),
    [
        ("WrongSoftmax", [], "missing-dot-product"),
        ("StraightThrough", [], "straight-through"),
        ("FlatHessian", ["--order", "2"], "second-order"),
        ("TailForgotten", ["--shape", "3,7"], "index-range"),
        ("detached_attention", ["--shape", "2,5,4", "--shape", "2,5,4", "--shape", "2,5,4"], "zero-gradient"),
        ("counts_its_calls", [], "stateful"),
    ],
)
def test_a_wrong_function_fails_with_the_name_of_its_mistake(check, target, words, code):
    assert code in codes(check(target, *words, expect=1))


def test_the_worst_entry_is_named_in_words_and_numbers(check):
    worst = row(check("WrongSoftmax", "--shape", "2,3,4", expect=1), "vs autodiff")["worst"]
    assert worst["place"].startswith("x[")
    assert worst["error"] == pytest.approx(abs(worst["got"] - worst["expected"]))
    assert worst["error"] > worst["bound"]


def test_a_first_derivative_alone_does_not_see_a_flat_hessian(check):
    check("FlatHessian", expect=0)


@pytest.mark.parametrize(
    ("target", "convention"), [("StraightThrough", "straight-through"), ("FusedSoftmax", "fused-loss")]
)
def test_conventions_fail_by_name_and_pass_when_allowed(check, target, convention):
    refused = check(target, expect=1)
    assert any(convention in json.dumps(result["diagnosis"]) for result in refused["results"])
    allowed = check(target, "--allow", convention, expect=0)
    assert convention in row(allowed, "reverse mode vs differences")["reason"]


def test_allowing_one_convention_does_not_allow_another_mistake(check):
    check("WrongSoftmax", "--allow", "fused-loss", "--allow", "straight-through", expect=1)


def test_inputs_come_from_files_in_the_order_of_the_arguments(check, tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(3, 4)))
    torch.save({"w": torch.randn(4, 2, dtype=torch.float64)}, tmp_path / "w.pt")
    report = check("torch:matmul", "--input", tmp_path / "x.npy", "--input", f"{tmp_path / 'w.pt'}::w", expect=0)
    assert report["facts"]["inputs"] == "x0 3×4 float64, x1 4×2 float64"


def test_whole_numbers_are_not_differentiated(check):
    report = check("two_outputs", "--shape", "4,6", "--shape", "4:int:6", expect=0)
    assert "labels 4 int64 (fixed)" in report["facts"]["inputs"]
    assert "['loss']" in report["facts"]["outputs"]
    assert "['parts'][0]" in report["facts"]["outputs"]


@pytest.mark.parametrize("wrt", ["1", "k"])
def test_wrt_picks_arguments_by_position_or_name(check, wrt):
    report = check("attention", *["--shape", "2,5,4"] * 3, "--wrt", wrt, expect=0)
    assert report["facts"]["inputs"] == "q 2×5×4 float64 (fixed), k 2×5×4 float64, v 2×5×4 float64 (fixed)"


def test_wrt_leaves_out_what_is_detached_on_purpose(check):
    shapes = ["--shape", "2,5,4"] * 3
    check("detached_attention", *shapes, expect=1)
    check("detached_attention", *shapes, "--wrt", "q", "--wrt", "v", expect=0)


def test_keyword_arguments_reach_the_function(check):
    report = check("attention", *["--shape", "2,5,4"] * 3, "--kwargs", '{"causal": true}', expect=0)
    assert report["verdict"] == "pass"


def test_a_module_is_checked_with_its_parameters(check):
    report = check("RMSNorm", "--make", "--make-kwargs", '{"width": 6}', "--shape", "3,6", expect=0)
    assert report["facts"]["parameters"] == "1 tensors, 6 numbers"
    assert any("narrows" in note and "functions.py" in note for note in report["notes"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("target", ["RightSoftmax", "attention", "hinge"])
def test_low_precision_is_judged_at_its_own_precision(check, target, dtype):
    shapes = ["--shape", "2,5,4"] * 3 if target == "attention" else ["--shape", "3,16"]
    report = check(target, *shapes, "--dtype", dtype, expect=0)
    assert row(report, f"reverse mode in {dtype}")["dtype"] == dtype
    assert row(report, "reverse mode vs differences")["dtype"] == "float64"
    assert verdicts(report)["forward vs the same in float64"] == "pass"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_formula_in_low_precision_is_seen_in_the_twin(check, dtype):
    report = check("WrongSoftmax", "--shape", "3,50", "--dtype", dtype, expect=1)
    assert row(report, "reverse mode vs differences")["verdict"] == "fail"


def test_a_kink_at_the_point_passes_between_its_slopes(check):
    report = check("hinge", "--values", "whole", "--shape", "4,6", expect=0)
    assert "kink" in row(report, "reverse mode vs differences")["reason"]


def test_random_functions_are_seeded(check):
    report = check("noisy", "--shape", "4,8", expect=0)
    assert row(report, "reverse mode vs differences")["verdict"] == "pass"
    assert row(report, "repeated calls agree")["verdict"] == "pass"
    assert "random" in " ".join(report["notes"])


def test_inputs_are_drawn_where_the_function_is_finite(check):
    report = check("torch:log", expect=0)
    assert "uniform in (0.1, 0.9)" in " ".join(report["notes"])


def test_a_hand_written_numpy_rule(check):
    shapes = ["--shape", "5,3", "--shape", "3,4"]
    check(f"{HOMEWORK}:layer", "--backward", f"{HOMEWORK}:layer_backward", *shapes, expect=0)
    wrong = check(f"{HOMEWORK}:layer", "--backward", f"{HOMEWORK}:layer_backward_wrong", *shapes, expect=1)
    assert row(wrong, "hand-written backward vs differences")["backend"] == "numpy"


def test_a_right_numpy_rule_in_float32_is_never_accused(check, tmp_path):
    """Entries in which terms of the others' size cancel are off by many of their own last places."""
    (tmp_path / "rule.py").write_text(
        "import numpy as np\n\n\ndef softmax(x):\n    e = np.exp(x - x.max(-1, keepdims=True))\n"
        "    return e / e.sum(-1, keepdims=True)\n\n\ndef backward(x, g):\n    s = softmax(x)\n"
        "    return s * (g - (s * g).sum(-1, keepdims=True))\n"
    )
    words = ["--backward", f"{tmp_path / 'rule.py'}:backward", "--shape", "3,2000", "--dtype", "float32"]
    for seed in range(6):
        check(f"{tmp_path / 'rule.py'}:softmax", *words, "--seed", seed, expect=0)


def test_numpy_without_a_rule_says_what_is_missing(check):
    error = check(f"{HOMEWORK}:layer", "--shape", "5,3", "--shape", "3,4", expect=2)
    assert "--backward" in error


def test_a_reference_decides_about_the_value_first(check):
    right = check("RightSoftmax", "--reference", f"{FUNCTIONS}:softmax", expect=0)
    assert row(right, "forward vs")["verdict"] == "pass"
    wrong = check("RightSoftmax", "--reference", "torch:sigmoid", expect=1)
    assert row(wrong, "forward vs")["diagnosis"]["code"] == "forward-wrong"


def test_resolution_makes_a_blind_check_inconclusive(check):
    check("RightSoftmax", "--resolution", "1e-6", expect=0)
    check("RightSoftmax", "--dtype", "float32", "--resolution", "1e-9", expect=3)


def test_exhaustive_moves_every_entry(check):
    covered = row(check("RightSoftmax", "--shape", "4,8", "--exhaustive", expect=0), "reverse mode vs differences")[
        "checked"
    ]
    assert (covered["entries"], covered["total"]) == (32, 32)
    sampled = row(check("RightSoftmax", "--shape", "2,3", "--no-exhaustive", expect=0), "reverse mode vs differences")[
        "checked"
    ]
    assert sampled["entries"] == 0
    assert sampled["probes"] >= 2


def test_a_direction_costs_at_most_sixty_evaluations(check):
    cost = check("RightSoftmax", expect=0)["facts"]["cost"]
    assert 20 < int(cost.split(" of ")[1].split()[0]) <= 60


def test_self_test_shows_what_would_be_caught(check):
    report = check("RightSoftmax", "--self-test", expect=0)
    planted = [result for result in report["results"] if result["method"].startswith("planted")]
    assert len(planted) >= 7
    missed = [result["method"] for result in planted if result["verdict"] != "pass"]
    assert missed == ["planted in x: ε of the mean dropped"]  # the gradient of a softmax has no mean
    assert row(report, "planted in x: times 1 + ε")["detectable"] < 1e-10
    assert row(report, "sign flipped")["reason"] == "caught"


def test_self_test_admits_what_it_would_miss(check):
    """Where the derivative is zero, a gradient scaled or zeroed is the same gradient."""
    report = check("torch:round", "--self-test")
    assert row(report, "planted in x: times 1 + ε")["verdict"] == "skipped"


def test_the_same_seed_gives_the_same_numbers(check):
    def numbers():
        report = check("attention", *["--shape", "2,5,4"] * 3, "--seed", "3")
        return [(result["method"], result["max_error"], result["bound"]) for result in report["results"]]

    assert numbers() == numbers()


def test_nothing_is_left_behind(check):
    before = torch.get_rng_state()
    threads = torch.get_num_threads()
    check("noisy")
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["functions.py:nothing"], "no such file"),
        ([f"{FUNCTIONS}:RMSNorm"], "is a class"),
        (["torch:softmax", "--kwargs", "dim=1"], "not JSON"),
        (["torch:softmax", "--kwargs", "[1]"], "JSON object"),
        (["torch:relu", "--shape", "4,-1"], "negative"),
        (["torch:relu", "--shape", "0,3"], "no entries"),
        (["torch:relu", "--shape", "four"], "not a shape"),
        (["torch:relu", "--shape", "3:int:5"], "nothing to differentiate"),
        (["torch:relu", "--wrt", "banana"], "no such argument"),
        (["torch:argmax"], "no floating-point output"),
        (["torch:relu", "--input", "missing.npy"], "missing.npy"),
        (["torch:relu", "--make-kwargs", "{}"], "--make"),
        (["torch:relu", "--backend", "fortran"], "fortran"),
        (["torch:relu", "--shape", "3", "--input", "x.npy"], "cannot be mixed"),
        ([f"{FUNCTIONS}:attention"], "attention raised"),
    ],
)
def test_bad_requests_get_one_clear_line(capsys, words, message):
    assert main(["function", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err


def test_nan_in_a_file_is_refused(capsys, tmp_path):
    np.save(tmp_path / "x.npy", np.array([1.0, np.nan]))
    assert main(["function", "torch:relu", "--input", str(tmp_path / "x.npy")]) == 2
    assert "nan" in capsys.readouterr().err


def test_the_rerun_command_repeats_the_failure(check, capsys):
    report = check("TailForgotten", "--shape", "3,7", "--seed", "2", expect=1)
    command = row(report, "reverse mode vs differences")["rerun"]
    assert command.startswith("softcheck function ")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    words = command.removeprefix("softcheck ")
    again = subprocess.run(
        f"{sys.executable} -m gradcheck_cli {words} -f json",
        shell=True, capture_output=True, text=True, check=False, env=environment, timeout=120,
    )  # fmt: skip
    assert again.returncode == 1
    assert (
        row(json.loads(again.stdout), "reverse mode vs differences")["worst"]
        == row(report, "reverse mode vs differences")["worst"]
    )


def test_compiled_code_is_recorded_and_judged(check, tmp_path, monkeypatch):
    (tmp_path / "compiled.py").write_text(
        "import torch\n\n\n@torch.compile(backend='eager')\ndef smooth(x):\n    return torch.tanh(x) * x\n"
    )
    report = check(f"{tmp_path / 'compiled.py'}:smooth", "--dtype", "float32")
    assert report["environment"]["compiled"] is True
    assert row(report, "reverse mode in float32")["verdict"] == "pass"
