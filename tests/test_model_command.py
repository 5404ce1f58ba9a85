"""`softcheck model` from the user's side: options, what Ctrl-C leaves, and what reaches which stream."""

import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import gradcheck_cli
from gradcheck_cli.cli import main

ROOT = Path(gradcheck_cli.__file__).parents[1]

DRIVER = '''
"""The command with a check that does what a word says, in place of the one on real gradients."""

import sys
import time
import types
from pathlib import Path

import torch

from gradcheck_cli.cli import main
from gradcheck_cli.models.case import Loss, ModelCase
from gradcheck_cli.sources.checkpoints.checkpoint import Checkpoint
from gradcheck_cli.results import CheckResult, Diagnosis, ModuleNode, Verdict

MODE = ""


def row(group, name, verdict=Verdict.PASS, **more):
    return CheckResult(group=group, name=name, check="derivative", method="autograd", verdict=verdict, **more)


def wait():
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)


class Options:
    def __init__(self, **options):
        self.options = options


def load_case(options):
    print("printed by the model")
    if MODE == "wait-loading":
        wait()
    loss = Loss(label=repr(sorted(options.options.items())), call=torch.sum)
    case = ModelCase(name="net", module=torch.nn.Linear(2, 3), args=(), kwargs={}, loss=loss,
                     seed=options.options["seed"], train=options.options["train"], notes=("inputs are random",))
    checkpoint = Checkpoint(path=Path("ckpt.pt"), kind="state dict", tensors={"weight": torch.ones(2)})
    return types.SimpleNamespace(case=case, checkpoint=checkpoint)


class Check:
    def __init__(self, case, plan, advance, tensors):
        self.case, self.plan, self.advance, self.tensors = case, plan, advance, tensors

    def results(self):
        if MODE == "wait-first":
            wait()
        yield row("checkpoint", "tensors")
        if MODE == "wait-after-failure":
            yield row("parameters", "weight", Verdict.FAIL, ratio=9.0)
            wait()
        yield row("head", "softmax", ratio=0.5, detectable=1e-12)
        if MODE in ("wait", "wait-twice"):
            wait()
        if MODE == "fault":
            yield row("parameters", "weight", Verdict.FAIL, ratio=9.0)
            yield row("where", "net", Verdict.FAIL, diagnosis=Diagnosis(code="scale", message="twice"))
        if MODE == "unclear":
            yield row("parameters", "weight", Verdict.INCONCLUSIVE, reason="the bar is wide")

    def facts(self):
        return (("options", self.case.loss.label), ("plan", repr(self.plan)), ("tensors", str(list(self.tensors))))

    def notes(self):
        if MODE == "wait-twice":
            wait()
        return ("from the check",)

    def tree(self):
        return ModuleNode(name="", kind="Net", mark="fault") if MODE == "fault" else None


def module(name, **contents):
    made = types.ModuleType(name)
    vars(made).update(contents)
    return made


MODULES = {
    "gradcheck_cli.models.make": module("make", ModelOptions=Options, load_case=load_case),
    "gradcheck_cli.checks.model.check": module("check", ModelCheck=Check),
}
if __name__ == "__main__":
    sys.modules.update(MODULES)
    MODE = sys.argv.pop(1)
    sys.exit(main())
'''


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "driver.py"
    path.write_text(DRIVER, encoding="utf-8")
    return path


@pytest.fixture
def start(driver, tmp_path):
    def start(mode, *words):
        return subprocess.Popen(
            [sys.executable, str(driver), mode, "model", "ckpt.pt", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"},
        )

    return start


@pytest.fixture
def run(driver, monkeypatch, capsys):
    """Runs the command in this process: exit code, standard output (as JSON if it is) and standard error."""
    fake = runpy.run_path(str(driver), run_name="driver")
    with_fakes = "gradcheck_cli.commands.model_run"
    for name, module in fake["MODULES"].items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, with_fakes, raising=False)

    def run(mode, *words):
        fake["load_case"].__globals__["MODE"] = mode
        code = main(["model", "ckpt.pt", *words])
        captured = capsys.readouterr()
        return code, json.loads(captured.out) if captured.out.startswith("{") else captured.out, captured.err

    yield run
    sys.modules.pop(with_fakes, None)


@pytest.fixture
def interrupt(start):
    """Runs the command in a process of its own, which gets Ctrl-C each time that it says it is ready."""

    def interrupt(mode, *words, interrupts=1):
        process = start(mode, *words)
        err = ""
        for _ in range(interrupts):
            while (line := process.stderr.readline()) != "ready\n":
                assert line, process.stdout.read()
                err += line
            process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=60)
        return process.returncode, json.loads(out) if out.startswith("{") else out, err + rest

    return interrupt


EVERY_OPTION = (
    "--arch", "net.py:Net", "--arch-kwargs", '{"width": 4}', "--backend", "torch", "--inputs", "in puts.npz", "--input-shape", "1,8:int:9",
    "--input-shape", "3", "--targets", "y.npy", "--loss", "net.py:loss", "--train", "--device", "cuda:1", "--dtype",
    "float32", "--seed", "7", "--only", "h.*", "--only", "input", "--skip", "*.bias", "--budget", "2.5",
    "--per-parameter", "--trust-checkpoint", "--resolution", "0.1", "--allow", "straight-through",
)  # fmt: skip


def test_every_option_reaches_the_case_and_the_plan(run):
    code, report, err = run("pass", *EVERY_OPTION, "-f", "json", "-q")
    assert code == 0, err
    assert eval(report["facts"]["options"]) == [
        ("arch", "net.py:Net"), ("arch_kwargs", '{"width": 4}'), ("backend", "torch"), ("device", "cuda:1"),
        ("input_shapes", ("1,8:int:9", "3")), ("inputs", "in puts.npz"), ("loss", "net.py:loss"), ("path", "ckpt.pt"), ("seed", 7), ("targets", "y.npy"),
        ("train", True), ("trust", True),
    ]  # fmt: skip
    assert report["facts"]["plan"] == (
        "ModelPlan(only=('h.*', 'input'), skip=('*.bias',), budget=2.5, per_parameter=True, wide=torch.float32, "
        "resolution=0.1, allow=frozenset({'straight-through'}))"
    )
    assert (report["environment"]["mode"], report["environment"]["twin"]) == ("train", "float32")
    assert report["subject"] == "ckpt.pt as net.py:Net"


def test_the_defaults(run):
    _, report, _ = run("pass", "-f", "json")
    assert eval(report["facts"]["options"]) == [
        ("arch", None), ("arch_kwargs", None), ("backend", None), ("device", "cpu"), ("input_shapes", ()), ("inputs", None),
        ("loss", "cross-entropy"), ("path", "ckpt.pt"), ("seed", 0), ("targets", None), ("train", False),
        ("trust", False),
    ]  # fmt: skip
    assert report["facts"]["plan"] == (
        "ModelPlan(only=(), skip=(), budget=None, per_parameter=False, wide=torch.float64, resolution=0.5, "
        "allow=frozenset())"
    )
    assert report["environment"]["mode"] == "eval"
    assert report["notes"] == ["inputs are random", "from the check"]
    assert (report["facts"]["format"], report["facts"]["tensors"]) == ("state dict", "['weight']")
    assert (report["command"], report["verdict"]) == ("model", "pass")


@pytest.mark.parametrize("words", [EVERY_OPTION, ("--eval",), ("--seed", "0", "--loss", "cross-entropy"), ()])
@pytest.mark.parametrize("mode", ["fault", "unclear"])
def test_the_command_to_run_again_gives_the_same_options(run, mode, words):
    code, report, _ = run(mode, *words, "-f", "json")
    assert code == {"fault": 1, "unclear": 3}[mode]
    commands = {result["rerun"] for result in report["results"] if result["verdict"] != "pass"}
    assert {result["rerun"] for result in report["results"] if result["verdict"] == "pass"} == {None}
    (command,) = commands
    program, name, path, *again = shlex.split(command)
    assert (program, name, path) == ("softcheck", "model", "ckpt.pt")
    _, repeated, _ = run(mode, *again, "-f", "json")
    assert repeated["facts"] == report["facts"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--dtype", "bfloat16"), "'bfloat16' is not one of 'float64', 'float32'"),
        (("--budget", "0"), "0.0 is not in the range x>0"),
        (("--resolution", "-1"), "-1.0 is not in the range x>0"),
        (("--inputs", "a", "b"), "unexpected extra argument (b)"),
        (("--targts", "a"), "--targets"),
        (("-o", "missing/report.txt"), "there is no folder 'missing'"),
    ],
)
def test_wrong_options(run, words, message):
    code, out, err = run("pass", *words)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_what_the_model_prints_is_not_in_the_report(run):
    code, out, err = run("fault")
    assert code == 1
    assert "printed by the model" not in out
    assert "printed by the model" in err
    assert "✗ Net  ◀ FAULT: the first module whose own gradient is wrong" in out
    assert "rerun: softcheck model ckpt.pt" in out


def test_ctrl_c_prints_what_was_established(interrupt, tmp_path):
    (tmp_path / "report.json").write_text("old")
    code, report, err = interrupt(
        "wait", "-f", "json", "-o", "report.json", "--report", "table=t.txt", "--allow-inconclusive"
    )
    assert code == 130
    assert [result["name"] for result in report["results"]] == ["tensors", "softmax"]
    assert (report["verdict"], report["exit_code"], report["interrupted"]) == ("inconclusive", 130, True)
    assert report["notes"] == [
        "interrupted: this is what 2 checks had shown until then; the others did not run",
        "inputs are random",
        "from the check",
    ]
    assert err.endswith("interrupted; not written: 'report.json', 't.txt'\n")
    assert "Traceback" not in err
    assert (tmp_path / "report.json").read_text() == "old"
    assert not (tmp_path / "t.txt").exists()


def test_ctrl_c_after_a_failure_shows_the_failure(interrupt):
    code, out, _ = interrupt("wait-after-failure")
    assert code == 130
    assert "✗ FAIL interrupted; until then 1 of 2 checks: parameters: weight (exit code 130)" in out


@pytest.mark.parametrize("mode", ["wait-loading", "wait-first"])
def test_ctrl_c_before_the_first_check_prints_no_report(interrupt, mode):
    code, out, err = interrupt(mode)
    assert (code, out) == (130, "")
    assert err.endswith("interrupted\n")


def test_a_second_ctrl_c_ends_at_once(interrupt):
    code, out, err = interrupt("wait-twice", interrupts=2)
    assert (code, out) == (130, "")
    assert err.endswith("interrupted\n")


def test_the_command_is_listed_and_helps_without_loading_torch():
    script = (
        "import sys; from gradcheck_cli.cli import main; main(['--help']); main(['model', '--help']); "
        "print([name for name in ('numpy', 'torch', 'rich') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"},
    )  # fmt: skip
    listing, _, own = done.stdout.partition("Usage: softcheck model")
    assert "Check the gradients of a model checkpoint" in listing
    assert "softcheck model ckpt.pt --arch net.py:Net" in own
    assert own.endswith("[]\n")
