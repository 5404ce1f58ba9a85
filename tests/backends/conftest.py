"""The plug-in that stands for a third party's package, on the path as if it were installed."""

import sys
from pathlib import Path

import pytest

from gradcheck_cli import backends

PLUGIN = Path(__file__).parent / "autograd_plugin"


@pytest.fixture
def plugin(monkeypatch):
    """The folder of the distribution softcheck-autograd, importable and with its entry point seen."""
    monkeypatch.syspath_prepend(str(PLUGIN))
    loaded = dict(backends._loaded)
    yield PLUGIN
    backends._loaded.clear()
    backends._loaded.update(loaded)
    sys.modules.pop("softcheck_autograd", None)


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Install a distribution that publishes backends: `publish("other", "1.2", "jax = other:Backend", code)`."""

    def install(name, version, entry, code=""):
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[softcheck.backends]\n{entry}\n")
        if code:
            (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return tmp_path

    monkeypatch.syspath_prepend(str(tmp_path))
    loaded = dict(backends._loaded)
    yield install
    backends._loaded.clear()
    backends._loaded.update(loaded)
