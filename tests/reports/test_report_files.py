"""Report files: whole or not at all, and never in place of something else."""

import contextlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from report_samples import FAILING, INTERRUPTED, MODEL, PASSING

from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.reports.files import OutputFile, check_destinations, write_files
from gradcheck_cli.reports.output import OutputOptions, ReportFile, deliver

ROOT = Path(__file__).parents[2]


def write(path, text="new\n"):
    write_files([OutputFile(path=path, text=text)])


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "report.txt"
    path.write_text("old")
    path.chmod(0o640)
    write(path)
    assert path.read_text() == "new\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_gets_the_usual_permissions(tmp_path):
    path, usual = tmp_path / "report.txt", tmp_path / "usual.txt"
    usual.touch()
    write(path)
    assert path.stat().st_mode == usual.stat().st_mode


def test_a_symbolic_link_stays_one(tmp_path):
    target, link = tmp_path / "target.txt", tmp_path / "link.txt"
    target.write_text("old")
    link.symlink_to(target)
    write(link)
    assert link.is_symlink()
    assert target.read_text() == "new\n"


def test_text_that_is_not_utf8_is_written_as_codes(tmp_path):
    write(tmp_path / "x", "é \udc80\n")
    assert (tmp_path / "x").read_bytes() == "é \\udc80\n".encode()


def test_a_failure_leaves_every_old_file_as_it_was(tmp_path):
    first, folder = tmp_path / "first.txt", tmp_path / "folder"
    first.write_text("old")
    folder.mkdir()
    with pytest.raises(SoftcheckError, match="folder"):
        write_files([OutputFile(path=first, text="new"), OutputFile(path=folder, text="new")])
    with pytest.raises(SoftcheckError, match=r"/dev/full.*No space left"):
        write_files([OutputFile(path=first, text="new"), OutputFile(path=Path("/dev/full"), text="new")])
    assert first.read_text() == "old"
    assert sorted(tmp_path.iterdir()) == [first, folder]


def test_a_device_is_written_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True)
    write(pipe)
    assert reader.communicate(timeout=20)[0] == "new\n"
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    write(Path("/dev/null"))
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


@pytest.mark.parametrize("size", [10, 300])
def test_a_full_disk_leaves_the_old_file(tmp_path, size):
    path = tmp_path / "report.txt"
    path.write_text("old")
    script = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.reports.files import OutputFile, write_files
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    write_files([OutputFile(path=Path({str(path)!r}), text="x" * {size})])
except SoftcheckError as error:
    print(error.message)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert list(tmp_path.iterdir()) == [path]
    if size > 100:
        assert run.stdout == f"cannot write {str(path)!r}: File too large\n"
        assert path.read_text() == "old"
    else:
        assert path.read_text() == "x" * size


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["."], "it is a folder"),
        (["missing/report.json"], "there is no folder"),
        (["file/report.json"], "there is no folder"),
        (["a.json", "b.json", "./a.json"], "two reports would be written"),
    ],
)
def test_destinations_are_checked_beforehand(tmp_path, paths, message):
    (tmp_path / "file").touch()
    with pytest.raises(SoftcheckError, match=message) as caught:
        check_destinations(tmp_path / path for path in paths)
    assert caught.value.hint


def test_good_destinations_pass(tmp_path):
    check_destinations([tmp_path / "a", tmp_path / "b", Path("/dev/null")])


def test_deliver_writes_each_report_and_returns_the_code(tmp_path, capsys):
    output = OutputOptions(
        format="concise",
        path=tmp_path / "main.txt",
        reports=(ReportFile(format="json", path=tmp_path / "report.json"),),
    )
    assert deliver(FAILING, output) == 1
    assert capsys.readouterr().out == ""
    assert (tmp_path / "main.txt").read_text().count("\n") == 4
    assert '"exit_code": 1' in (tmp_path / "report.json").read_text()


def test_deliver_prints_beside_the_files(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    output = OutputOptions(reports=(ReportFile(format="json", path=tmp_path / "r.json"),), exit_zero=True)
    assert deliver(FAILING, output) == 0
    assert "exit code 0 instead of 1" in capsys.readouterr().out
    assert '"exit_code": 0' in (tmp_path / "r.json").read_text()


def test_nothing_is_printed_when_a_file_cannot_be_written(capsys):
    output = OutputOptions(reports=(ReportFile(format="json", path=Path("/dev/full")),))
    with pytest.raises(SoftcheckError, match="No space left"):
        deliver(PASSING, output)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("quiet", [False, True])
def test_what_an_interrupted_run_knows_is_printed_and_no_file_is_written(tmp_path, capsys, quiet):
    output = OutputOptions(
        format="concise",
        path=tmp_path / "main.txt",
        reports=(ReportFile(format="json", path=tmp_path / "report.json"),),
        quiet=quiet,
        exit_zero=True,
        allow_inconclusive=True,
    )
    assert deliver(INTERRUPTED, output) == 130
    captured = capsys.readouterr()
    assert captured.out.startswith("inconclusive: gpt2.pt")
    assert list(tmp_path.iterdir()) == []
    if quiet:
        assert captured.err == ""
    else:
        assert captured.err.startswith("interrupted; not written: ")
        assert "main.txt" in captured.err
        assert "report.json" in captured.err


def test_an_interrupted_run_whose_reader_is_gone_is_still_interrupted(monkeypatch, capsys):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert deliver(INTERRUPTED, OutputOptions()) == 130
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    assert capsys.readouterr().err.startswith("interrupted; cannot write the report to standard output: No space left")


def test_show_all_reaches_the_table(tmp_path, capsys):
    files = (ReportFile(format="table", path=tmp_path / "table.txt"),)
    deliver(MODEL, OutputOptions(reports=files, show_all=True))
    for text in (capsys.readouterr().out, (tmp_path / "table.txt").read_text()):
        assert "transformer.h.3.attn.w7" in text
        assert "--show-all" not in text
    deliver(MODEL, OutputOptions())
    text = capsys.readouterr().out
    assert "transformer.h.3.attn.w7" not in text
    assert "… and 4 more fail, 121 pass (error/bound up to 0.138); all with --show-all" in text
