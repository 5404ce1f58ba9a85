"""Backends by name: our own, those of other packages, and every way in which a name can be of no use."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gradcheck_cli
from gradcheck_cli import backends
from gradcheck_cli.backends import (
    Published,
    installed_backends,
    is_installed,
    known_backends,
    load_backend,
    load_published,
    published_backends,
)
from gradcheck_cli.backends.numpy import NumpyBackend
from gradcheck_cli.errors import SoftcheckError

ROOT = Path(gradcheck_cli.__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OURS = ["numpy", "torch", "tensorflow", "jax"]

RIGHT = """
from gradcheck_cli.backends.numpy import NumpyBackend

class Backend(NumpyBackend):
    name = "other"
"""


def test_ours_come_first_and_are_all_installed_here():
    assert list(known_backends())[:4] == OURS
    assert installed_backends()[:4] == OURS


def test_the_entry_points_are_those_of_a_bare_checkout():
    published = PROJECT["entry-points"]["softcheck.backends"]
    assert published == {name: known_backends()[name].address for name in OURS}


@pytest.mark.parametrize("name", ["tensorflow", "jax"])
def test_the_extra_installs_what_is_needed(name):
    """The extra exists, asks for the oldest version that works, is part of `test`, and every part of it is pinned."""
    backend, extras = known_backends()[name], PROJECT["optional-dependencies"]
    assert backend.install == f"pip install 'softcheck[{name}]'"
    asked = [re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in extras[backend.extra]]
    assert {least for _, least in asked} == {backend.least}
    assert any(name in package for package, _ in asked)
    assert f"{name}" in extras["test"][0]
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert all(f"\n{package}==" in pinned for package, _ in asked)


def test_constraints_pin_what_is_installed():
    """Everything that the frameworks bring along has its version in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {_plain(line.partition("==")[0]) for line in lines if "==" in line}
    needed, queue = set(), [_plain(name) for name in ("tensorflow-cpu", "jax", "autograd")]
    while queue:
        name = queue.pop()
        if name in needed:
            continue
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # for another platform
            continue
        needed.add(name)
        queue += [_plain(re.match(r"[\w.-]+", line)[0]) for line in requires if "extra ==" not in line]
    assert needed - pinned == set()


def _plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_an_unknown_name_lists_the_known():
    with pytest.raises(SoftcheckError, match="unknown backend 'theano'") as refusal:
        load_backend("theano")
    assert refusal.value.hint.startswith("known backends: jax, numpy, tensorflow, torch")


def test_a_third_partys_backend_is_loaded_by_name(plugin):
    known = known_backends()
    assert known["autograd"].distribution == "softcheck-autograd 0.1"
    assert "autograd" in installed_backends()
    backend = load_backend("autograd")
    assert type(backend).__module__ == "softcheck_autograd"
    assert load_backend("autograd") is backend


def test_without_the_plugin_there_is_no_such_backend():
    assert "autograd" not in known_backends()


def test_a_missing_framework_names_the_command_that_installs_it():
    missing = Published(name="jax", address="x:y", package="no_such_package", extra="jax")
    assert not is_installed(missing)
    with pytest.raises(SoftcheckError, match="needs the package no_such_package") as refusal:
        load_published(missing)
    assert refusal.value.hint == "pip install 'softcheck[jax]'"


def test_an_old_framework_is_not_imported(publish):
    publish("oldframe", "1.9.3", "", "raise RuntimeError('imported')")
    old = Published(name="oldframe", address="oldframe:X", package="oldframe", least="1.10", extra="oldframe")
    with pytest.raises(SoftcheckError, match=r"needs oldframe 1\.10 or newer, and 1\.9\.3 is installed"):
        load_published(old)


@pytest.mark.parametrize("installed", ["1.10", "1.10.0rc1", "1.11.dev3+local", "2"])
def test_a_new_framework_is(publish, installed):
    publish("newframe", installed, "", "from gradcheck_cli.backends.numpy import NumpyBackend as X\nX.name = 'numpy'")
    new = Published(name="numpy", address="newframe:X", package="newframe", least="1.10")
    assert isinstance(load_published(new), NumpyBackend)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ImportError('libcuda.so is missing\\nsecond line')", r"ImportError: libcuda\.so is missing$"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("raise AttributeError('numpy has no attribute bool8')", "AttributeError: numpy has no attribute bool8"),
        ("def broken(:", "SyntaxError: invalid syntax"),
        ("x = 1", "has no attribute 'Backend'"),
        ("class Backend: pass", "is not a gradcheck_cli.backends.base.Backend"),
        (RIGHT.replace('"other"', '"another"'), "calls itself 'another'"),
        ("from gradcheck_cli.backends.base import Backend", "TypeError: Can't instantiate abstract class"),
    ],
)
def test_what_a_package_does_wrong_is_one_line(publish, code, reason):
    publish("otherpackage", "1.0", "other = otherpackage:Backend", code)
    with pytest.raises(SoftcheckError, match=f"^backend other cannot be loaded: .*{reason}"):
        load_backend("other")


def test_a_right_one_passes_the_same_way(publish, capsys):
    """And what it prints does not reach standard output."""
    publish("otherpackage", "1.0", "other = otherpackage:Backend", f"print('hello')\n{RIGHT}")
    assert load_backend("other").name == "other"
    assert capsys.readouterr() == ("", "hello\n")


def test_two_packages_of_one_name_are_an_error_for_that_name_only(publish):
    publish("packagea", "1.0", "other = packagea:Backend", RIGHT)
    publish("packageb", "2.0", "other = packageb:Backend", RIGHT)
    clash = r"two packages publish a backend named 'other': packagea 1\.0 \(packagea:Backend\) and packageb 2\.0"
    with pytest.raises(SoftcheckError, match=clash):
        load_backend("other")
    with pytest.raises(SoftcheckError, match=clash):
        installed_backends()
    assert load_backend("numpy").name == "numpy"
    assert [one.distribution for one in published_backends() if one.problem] == ["packagea 1.0", "packageb 2.0"]


def test_the_same_backend_published_twice_is_no_clash(publish):
    publish("packagea", "1.0", "other = packagea:Backend", RIGHT)
    publish("packagec", "1.0", "other = packagea:Backend")
    assert load_backend("other").name == "other"


def test_a_built_in_name_stays_ours(publish):
    publish("packagea", "1.0", "torch = packagea:Backend", RIGHT)
    assert type(load_backend("torch")).__module__ == "gradcheck_cli.backends.torch"
    assert known_backends()["torch"].problem == ""
    with pytest.raises(SoftcheckError, match=r"packagea 1\.0 takes the name 'torch' of a built-in backend"):
        installed_backends()


def test_names_are_found_without_importing_anything(plugin):
    code = (
        "import sys; from gradcheck_cli.backends import installed_backends; print(*installed_backends());"
        "print(*(name for name in ('numpy', 'torch', 'tensorflow', 'jax', 'autograd') if name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": f"{ROOT}:{plugin}", "PATH": ""},
    )  # fmt: skip
    assert done.stdout == "numpy torch tensorflow jax autograd\n\n"


def test_loading_again_costs_nothing():
    assert load_backend("torch") is load_backend("torch")
    assert "torch" in backends._loaded
