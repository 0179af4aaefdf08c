"""Standard streams of every kind, and names of every kind: no traceback, no lost line, the right exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from sdcompress_engines.errors import SdCompressError, UsageError, escape_controls, storage_error, system_error

from sdcompress.cli import COMMANDS, _report
from sdcompress.cli._streams import _replace_characters
from sdcompress.support.console import ConsoleReporter, describe_time

from .conftest import Cli, one_line

POSIX = pytest.mark.skipif(os.name != "posix", reason="POSIX streams")


def run(*arguments: str | bytes, flags: tuple[str, ...] = (), **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run the command in a process of its own."""
    environment = os.environ | options.pop("environment", {})
    command = [sys.executable, *flags, "-m", "sdcompress", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(command, env=environment, check=False, timeout=120, **streams)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437:strict", "utf-8"])
def test_a_pipe_of_any_encoding_takes_every_character(encoding: str) -> None:
    environment = {"PYTHONIOENCODING": encoding}
    for arguments in (["recipes", "list"], ["--help"], ["recipes", "show", "日本→…"]):
        done = run(*arguments, environment=environment)
        out, err = (stream.decode(encoding.partition(":")[0]) for stream in (done.stdout, done.stderr))
        assert done.returncode == (2 if "show" in arguments else 0), err
        assert "Traceback" not in err
        assert "?" not in out
    assert ("日本→…" if encoding == "utf-8" else "\\u65e5\\u672c") in err
    if encoding == "ascii":
        assert "\\u65e5\\u672c->..." in err


def test_signs_become_ascii_and_other_characters_escapes() -> None:
    for text, shown in (("─→×≥…µ", "-->x>=...u"), ("“a”", '"a"'), ("é猫", "\\xe9\\u732b"), ("\udcff", "\\xff")):
        error = UnicodeEncodeError("ascii", text, 0, len(text), "no")
        assert text.isascii() or _replace_characters(error)[0].replace("a", "") == shown.replace("a", "")


@pytest.mark.parametrize(("seconds", "words"), [(0.0364, "36 ms"), (0.5, "0.5 s"), (83.24, "83.2 s")])
def test_a_short_time_is_in_milliseconds(seconds: float, words: str) -> None:
    assert describe_time(seconds) == words


@POSIX
def test_json_is_valid_in_every_encoding(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text('validation_prompts: ["猫 → é"]', encoding="utf-8")
    done = run("recipes", "validate", str(recipe), "--json", environment={"PYTHONIOENCODING": "ascii"})
    assert json.loads(done.stdout.decode("ascii"))["validation_prompts"] == ["猫 → é"]


@POSIX
@pytest.mark.parametrize("arguments", [["--help"], ["recipes", "list"]], ids=" ".join)
def test_a_full_disk_behind_stdout_is_one_line_and_exit_code_1(arguments: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = run(*arguments, stdout=full)
    assert done.returncode == 1
    assert done.stderr.decode() == "sdcompress: standard output: no space left on the device\n"


@POSIX
def test_a_reader_that_goes_ends_the_command_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run("recipes", "list", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@POSIX
@pytest.mark.parametrize(("redirection", "code"), [("<&- >&- 2>&-", 0), ("2>/dev/full", 0), ("nowhere 2>&-", 2)])
def test_closed_streams_change_no_exit_code(redirection: str, code: int) -> None:
    name = "show" if "nowhere" in redirection else "list"
    line = f'"{sys.executable}" -m sdcompress recipes {name} {redirection}'
    assert subprocess.run(["sh", "-c", line], stdout=subprocess.DEVNULL, check=False, timeout=120).returncode == code


@POSIX
def test_a_file_never_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    program = "import sys; from sdcompress.cli._streams import prepare_streams; prepare_streams(); " + (
        "file = open(sys.argv[1], 'w'); sys.exit(file.fileno())"
    )
    line = f'"{sys.executable}" -c "{program}" "{tmp_path / "file"}" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", line], check=False, timeout=120).returncode > 2


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", pytest.param("SIGHUP", marks=POSIX)])
def test_a_signal_to_stop_that_a_library_turns_into_an_error_of_its_own_is_a_stop(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    number = getattr(signal, name)

    def fail(**_: Any) -> None:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt as interrupt:
            raise RuntimeError("Failed to import a module") from interrupt

    monkeypatch.setattr("sdcompress.cli.cli", fail)
    usual = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    before = signal.signal(number, usual)  # a shell ignores SIGINT in the background, and nohup SIGHUP
    try:
        assert cli("plan", "nano") == (128 + number, "", "sdcompress: stopped\n")
        assert signal.getsignal(number) is usual
    finally:
        signal.signal(number, before)


def test_a_signal_that_is_ignored_stays_so(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdcompress.cli.cli", lambda **_: signal.raise_signal(signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert cli("plan", "nano") == (0, "", "")
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("module", ["sdcompress.cli._streams", "sdcompress.cli._processes", "sdcompress.cli.recipes"])
def test_ctrl_c_during_any_import_is_no_traceback(module: str) -> None:
    program = f"""import sys
class Interrupt:
    def find_spec(self, name, path, target=None):
        if name == "{module}":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
sys.argv[1:] = ["recipes", "list"]
from sdcompress.__main__ import main
main()"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False, timeout=120)
    assert done.returncode == 130
    assert done.stderr.strip() in (b"", b"sdcompress: stopped")


@POSIX
def test_a_folder_that_safetensors_cannot_open_is_refused_before_any_work(tmp_path: Path, cli: Cli) -> None:
    output = tmp_path / os.fsdecode(b"caf\xe9")
    code, _, err = cli("data", "cache", "nano", "nano", "-o", output)
    assert code == 1
    assert "has bytes in its path that are not UTF-8" in one_line(err)


def test_help_and_commands_work_without_docstrings() -> None:
    done = run("plan", "--help", flags=("-OO",))
    assert b"Show what a block-removal plan keeps" in done.stdout
    done = run("plan", "nano", "--preset", "nowhere", environment={"PYTHONOPTIMIZE": "2"})
    assert (done.returncode, b"Traceback" in done.stderr) == (2, False)


@POSIX
@pytest.mark.parametrize(
    "name",
    [
        b"x" * 5000,
        b"caf\xe9",
        b"a\nb",
        b"\x1b[2Jx",
        b"~nosuchuser/x",
        b"/etc/hostname/x",
        b"loop",
        "\u202eexe".encode(),
    ],
)
def test_every_name_is_one_line_and_no_traceback(name: bytes, tmp_path: Path, cli: Cli, request: Any) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    request.getfixturevalue("monkeypatch").chdir(tmp_path)
    text = os.fsdecode(name)
    commands = [("inspect", text), ("plan", text), ("recipes", "show", text), ("status", "webui", text)]
    commands += [("data", "inspect", text), ("bench", "compare", text, text), ("engines", "show", text)]
    if name in (b"x" * 5000, b"~nosuchuser/x", b"/etc/hostname/x", b"loop"):
        commands.append(("recipes", "copy", "nano", f"{text}/x.yaml"))
    for arguments in commands:
        code, _, err = cli(*arguments)
        assert code in (1, 2), arguments
        assert len(one_line(err)) < 1500
        assert escape_controls(err.replace("\n", "")) == err.replace("\n", "")


@POSIX
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_one_line_without_a_hint_about_the_output(tmp_path: Path, cli: Cli) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.touch(mode=0)
    code, _, err = cli("recipes", "validate", recipe)
    assert code == 1
    assert one_line(err) == f"sdcompress: {recipe}: no permission to read or write this"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
        (OSError(36, "File name too long", "x"), "x: a name in this path is too long"),
        (OSError(5, "Input/output error", "x"), "x: the disk reports a fault"),
        (OSError(61, "No data available", "x"), "x: No data available"),
        (FileNotFoundError(2, "No such file or directory", b"x"), "x: does not exist"),
        (ValueError("embedded null byte"), "a path holds the character NUL"),
        (RuntimeError("Symlink loop from '/a/b'"), "/a/b: the links in this path lead to each other"),
        (RuntimeError("Could not determine home directory."), "the home folder of a path"),
        (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), "no folder for temporary files"),
        (RuntimeError("can't start new thread"), "the system starts no more processes or threads"),
        (BlockingIOError(11, "Resource temporarily unavailable"), "the system starts no more processes or threads"),
    ],
    ids=str,
)
def test_what_the_system_refuses_is_one_line(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _report(error) in (1, 2)
    assert capsys.readouterr().err.startswith(f"sdcompress: {line}")


@POSIX
def test_a_working_folder_that_was_removed_is_one_line(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    code, _, err = cli("inspect", "nano")
    assert code == 1
    assert one_line(err) == "sdcompress: the folder you are in was removed. Try: cd to one that exists"


def test_a_fault_of_the_program_keeps_its_traceback_and_ends_with_how_to_report_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _report(KeyError("unet")) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2] == "KeyError: 'unet'"
    assert "Please report it" in lines[-1]


@pytest.mark.parametrize(
    ("path", "output", "hints"),
    [("out/x", "out", True), ("in.bin", "out", False), (".out.1.partial", "out", True), (None, "out", True)],
)
def test_only_a_failed_write_hints_at_another_output(path: str | None, output: str, hints: bool) -> None:
    known = storage_error(PermissionError(13, "Permission denied", path), output)
    assert known is not None
    assert ("-o" in str(known)) == hints


def test_long_and_hostile_parts_of_an_error_are_cut_and_escaped() -> None:
    error = UsageError("x" * 5000 + "\x1b[31m", where="y\n\x07" * 2000, expected="z" * 5000, hint="cat " + "w" * 5000)
    assert len(str(error)) < 1600
    assert str(error).isprintable()
    assert error.where == "y\n\x07" * 2000
    assert str(system_error(OSError(2, "", "/ok\u202egpj")) or "") == "/ok\\u202egpj: does not exist"


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_option_of_any_length_is_a_short_usage_error(cli: Cli, name: str) -> None:
    code, _, err = cli(name, "--" + "x" * 5000 + "\x1b[2J")
    assert code == 2
    assert len(err) < 1500
    assert "\x1b" not in err


def test_progress_survives_a_full_stderr_and_names_with_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(click, "echo", refuse)
        ConsoleReporter().show_line("a line")
    reporter = ConsoleReporter()
    with reporter._show_bar("[/red] \x1b[2J [bold", 2) as advance:
        advance(1, "[/x]")


def test_all_errors_keep_their_exit_code_when_stderr_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        encoding = "utf-8"

        def write(self, _: str) -> int:
            raise OSError(28, "No space left on device")

        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    assert _report(SdCompressError("x")) == 1
    assert _report(UsageError("x")) == 2
    assert _report(click.UsageError("x")) == 2
    assert _report(KeyError("x")) == 1
