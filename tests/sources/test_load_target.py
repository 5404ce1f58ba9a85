import dataclasses
import math
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import gradcheck_cli
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.targets import CodeTarget, load_target

ROOT = Path(gradcheck_cli.__file__).parents[1]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty current directory; what a test imports or puts on the path is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def write(name, text):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(textwrap.dedent(text))


def refused(spec):
    with pytest.raises(SoftcheckError) as caught:
        load_target(spec)
    assert caught.value.message.isprintable()
    return caught.value


FUNCTION = """
    def softmax(x):
        return x

    class Model:
        def forward(self, x):
            return 2 * x
"""


@pytest.mark.parametrize("spec", ["mine.py:softmax", "./mine.py:softmax", "mine:softmax"])
def test_files_and_modules_are_found(folder, spec):
    write("mine.py", FUNCTION)
    target = load_target(spec)
    assert target.value(3) == 3
    assert target.label == spec
    assert (target.file, target.line) == (str(folder / "mine.py"), 2)


def test_an_absolute_path_is_found(folder):
    write("deep/er/mine.py", FUNCTION)
    assert load_target(f"{folder}/deep/er/mine.py:softmax").value(3) == 3


def test_a_package_in_the_current_directory_is_found():
    write("pack/__init__.py", "")
    write("pack/inner.py", "from . import other\n\ndef f(x):\n    return other.y + x\n")
    write("pack/other.py", "y = 5\n")
    assert load_target("pack.inner:f").value(1) == 6


def test_a_file_needs_no_extension():
    write("scripts/tool", FUNCTION)
    assert load_target("scripts/tool:softmax").value(3) == 3


def test_attributes_are_followed():
    write("mine.py", FUNCTION)
    target = load_target("mine.py:Model.forward")
    assert target.value(None, 4) == 8
    assert target.line == 6


def test_a_target_cannot_be_changed():
    target = CodeTarget(value=1, label="a:b", file=None, line=None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        target.line = 3


@pytest.mark.parametrize(
    ("attribute", "line"),
    [
        ("plain", 4),
        ("Class", 8),
        ("Class.method", 9),
        ("bound", 9),
        ("wrapped", 19),
        ("partial", 4),
        ("number", None),
        ("builtin", None),
    ],
)
def test_the_definition_is_located(folder, attribute, line):
    write(
        "mine.py",
        """\
        import functools


        def plain(x):
            return x


        class Class:
            def method(self):
                return 1


        def decorator(function):
            @functools.wraps(function)
            def wrapper(x):
                return function(x)
            return wrapper

        @decorator
        def wrapped(x):
            return x

        bound = Class().method
        partial = functools.partial(functools.partial(plain), 3)
        number = 5
        builtin = len
        """,
    )
    target = load_target(f"mine.py:{attribute}")
    assert (target.file, target.line) == (str(folder / "mine.py"), line)


def test_a_builtin_has_no_place():
    assert load_target("math:sqrt") == CodeTarget(value=math.sqrt, label="math:sqrt", file=None, line=None)


def test_a_file_is_loaded_once(folder):
    write(
        "mine.py",
        "import pathlib\nwith pathlib.Path('log').open('a') as log:\n    log.write('x')\ndef f(): pass\n",
    )
    first = load_target("mine.py:f")
    assert load_target(f"{folder}/mine.py:f").value is first.value
    assert (folder / "log").read_text() == "x"


def test_a_file_imported_as_a_module_is_not_loaded_again():
    write("mine.py", FUNCTION)
    assert load_target("mine:softmax").value is load_target("mine.py:softmax").value


def test_files_of_one_name_do_not_mix():
    write("a/mine.py", "def f(): return 'a'\n")
    write("b/mine.py", "def f(): return 'b'\n")
    assert load_target("a/mine.py:f").value() + load_target("b/mine.py:f").value() == "ab"


def test_a_file_shadows_no_module():
    write("json.py", "def f(): return 1\n")
    json = sys.modules.get("json")
    assert load_target("json.py:f").value() == 1
    assert sys.modules.get("json") is json


def test_siblings_can_be_imported_at_once_and_later():
    write(
        "lib/mine.py",
        "import near_sibling\ndef f():\n    import far_sibling\n    return near_sibling.x + far_sibling.x\n",
    )
    write("lib/near_sibling.py", "x = 1\n")
    write("lib/far_sibling.py", "x = 2\n")
    assert load_target("lib/mine.py:f").value() == 3


def test_the_folder_moves_behind_installed_packages(folder):
    write("mine.py", "import sys\nfirst = sys.path[0]\ndef f(): pass\n")
    before = list(sys.path)
    assert load_target("mine.py:first").value == str(folder)
    assert sys.path == [*before, str(folder)]


def test_dataclasses_and_pickle_work():
    write(
        "mine.py",
        """
        from __future__ import annotations
        import dataclasses
        from typing import ClassVar

        @dataclasses.dataclass
        class Point:
            kind: ClassVar[str] = "p"
            x: int = 3
        """,
    )
    point = load_target("mine.py:Point").value()
    assert pickle.loads(pickle.dumps(point)) == point


def test_what_the_module_prints_goes_to_stderr(capsys):
    write("mine.py", "import sys\nprint('hello')\nsys.stdout.write('there')\ndef f(): pass\n")
    load_target("mine.py:f")
    streams = capsys.readouterr()
    assert (streams.out, streams.err) == ("", "hello\nthere")


@pytest.mark.parametrize("spec", ["mine.py", "mine.py:", "mine", "mine:"])
def test_a_lone_function_is_suggested_without_importing(spec):
    write("mine.py", "raise SystemExit('imported')\ndef _private(): pass\ndef softmax(x): pass\nclass C: pass\n")
    error = refused(spec)
    assert "names no attribute" in error.message
    assert error.hint == f"did you mean {spec.rstrip(':')}:softmax?"


def test_several_functions_are_listed():
    write("mine.py", "def one(x): pass\ndef two(x): pass\n")
    hint = refused("mine.py").hint
    assert "package.module:attribute" in hint
    assert "path/to/file.py:attribute" in hint
    assert "one, two" in hint


@pytest.mark.parametrize("text", ["def f(:", "x = '\\0'", "\0"])
def test_broken_source_suggests_the_forms(text):
    write("mine.py", text)
    assert "package.module:attribute" in refused("mine.py").hint


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("", "names no attribute"),
        (":", "names no attribute"),
        ("softmax", "names no attribute"),
        (r"C:\code\mine.py", "names no attribute"),
        ("C:/code/mine.py", "names no attribute"),
        (":softmax", "names no module"),
        ("mine.py:soft max", "is not the name"),
        ("mine.py:a..b", "is not the name"),
        ("mine.py:f()", "is not the name"),
        ("mine.py::softmax", "two colons"),
        ("gone.py:f", "gone.py: no such file"),
        (r"C:\code\mine.py:f", r"C:\code\mine.py: no such file"),
        ("gone/mine.py:f", "the folder gone does not exist"),
        ("folder.py:f", "is a folder"),
        ("gone:f", "there is no module called gone"),
        ("gone.inner:f", "there is no module called gone"),
        ("os.gone:f", "there is no module called os.gone"),
        ("note.ipynb:f", "a notebook"),
        ("a\0.py:f", "no such file"),
    ],
)
def test_what_cannot_be_found_is_named(folder, spec, reason):
    (folder / "folder.py").mkdir()
    write("note.ipynb", "{}")
    with pytest.raises(SoftcheckError) as caught:
        load_target(spec)
    assert reason in caught.value.message


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("mien.py:softmax", "did you mean mine.py?"),
        ("mien:softmax", "did you mean mine?"),
        ("pack.iner:f", "did you mean pack.inner?"),
        ("mine.softmax:f", "did you mean mine:softmax?"),
        ("mine.py::softmax", "did you mean mine.py:softmax?"),
        ("mine.py:sotfmax", "did you mean softmax?"),
        ("mine.py:Model.forwards", "did you mean forward?"),
        ("mine.py:xyz", "it has softmax"),
    ],
)
def test_close_names_are_suggested(spec, hint):
    write("mine.py", FUNCTION)
    write("pack/__init__.py", "")
    write("pack/inner.py", "")
    assert refused(spec).hint.endswith(hint)


def test_a_missing_attribute_says_of_what():
    write("mine.py", FUNCTION)
    assert refused("mine.py:Model.backward").message.endswith("mine.py:Model has no attribute 'backward'")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = 1\ndef f(:\n", "mine.py:2: "),
        ("import broken\n", "broken.py:1: "),
        ("x = 1\nraise ValueError('bad\\nnews')\n", "raised ValueError: bad at {folder}/mine.py:2"),
        ("raise ValueError\n", "raised ValueError at {folder}/mine.py:1"),
        (
            "def g():\n    return 1 / 0\ng()\n",
            "raised ZeroDivisionError: division by zero at {folder}/mine.py:2",
        ),
        ("import json\njson.loads('{')\n", "raised JSONDecodeError: "),
        (
            "import not_there\n",
            "raised ModuleNotFoundError: No module named 'not_there' at {folder}/mine.py:1",
        ),
        ("from math import nothing\n", "raised ImportError: "),
        ("import sys\nsys.exit(0)\n", "calls sys.exit(0) at {folder}/mine.py:2"),
        ("raise SystemExit\n", "calls sys.exit(None)"),
        ("quit()\n", "calls sys.exit(None)"),
        ("class E(BaseException): pass\nraise E('x')\n", "raised E: x"),
        (
            "class E(Exception):\n    def __str__(self): raise OSError\nraise E\n",
            "raised E: <exception str() failed>",
        ),
        ("def f(): f()\nf()\n", "raised RecursionError: "),
        ("raise ValueError('\\x1b[31m')\n", "raised ValueError: [31m"),
    ],
)
@pytest.mark.parametrize("spec", ["mine.py:f", "mine:f"])
def test_whatever_the_module_raises_is_one_line(folder, spec, text, reason):
    write("mine.py", text)
    write("broken.py", "def f(:\n")
    error = refused(spec)
    assert reason.format(folder=folder) in error.message
    assert error.message.startswith(f"{spec}: ")
    assert error.__cause__ is not None


def test_the_deepest_line_of_the_users_code_is_named(folder):
    write("mine.py", "import json, helper\nhelper.run()\n")
    write("helper.py", "import json\n\ndef run():\n    json.loads('{')\n")
    assert refused("mine.py:f").message.endswith(f"at {folder}/helper.py:4")


def test_an_exit_hints_at_the_main_guard():
    write("mine.py", "import sys\nsys.exit(0)\n")
    assert "__main__" in refused("mine.py:f").hint


def test_a_relative_import_hints_at_the_package():
    write("pack/mine.py", "from . import other\n")
    assert "package.module:attribute" in refused("pack/mine.py:f").hint


def test_a_failed_import_can_be_tried_again():
    write("mine.py", "raise ValueError\n")
    refused("mine.py:f")
    write("mine.py", "def f(): return 'mended'\n")
    assert load_target("mine.py:f").value() == "mended"


@pytest.mark.parametrize("spec", ["mine.py:f", "mine:f"])
def test_an_interrupt_passes_through(spec):
    write("mine.py", "raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_target(spec)
    assert not [name for name in sys.modules if name.startswith("softcheck_target_mine_")]


def test_an_attribute_that_raises_is_reported(folder):
    write("mine.py", "def __getattr__(name):\n    raise OSError('no network')\n")
    assert refused("mine.py:f").message == f"mine.py:f: looking it up raised OSError: no network at {folder}/mine.py:2"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_fifo_is_refused(folder):
    os.mkfifo(folder / "mine.py")
    assert "not a Python file" in refused("mine.py:f").message


@pytest.mark.parametrize(("module", "heavy"), [("targets", False), ("scores", True)])
def test_targets_import_neither_numpy_nor_torch(module, heavy):
    """The second case proves that the first can fail."""
    code = f"import sys, gradcheck_cli.sources.{module}; print('numpy' in sys.modules or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == str(heavy)


def test_a_framework_that_is_missing_comes_with_its_extra(tmp_path):
    (tmp_path / "code.py").write_text("raise ModuleNotFoundError(\"No module named 'jax.numpy'\", name='jax.numpy')\n")
    with pytest.raises(SoftcheckError) as caught:
        load_target(f"{tmp_path / 'code.py'}:f")
    assert caught.value.hint == "pip install 'softcheck[jax]'"
