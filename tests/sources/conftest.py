import io
import os
import sys

import pytest

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.sources.scores import read_scores


@pytest.fixture
def refusal():
    """Calls a reader that must refuse, and gives back its error after checking what holds for all of them."""

    def refused(path, *, reader=read_scores, names=None, **options):
        with pytest.raises(SoftcheckError) as caught:
            reader(str(path), **options)
        message = caught.value.message
        assert (str(path) if names is None else names) in message
        assert message.isprintable(), f"more than one line, or control characters: {message!r}"
        return caught.value

    return refused


@pytest.fixture
def pipe(monkeypatch):
    """Makes bytes come out of standard input."""

    def feed(content):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    return feed


@pytest.fixture
def bomb(tmp_path):
    """An object that creates a folder when it is unpickled, and a check that it did not."""
    marker = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    Bomb.marker = marker
    return Bomb()
