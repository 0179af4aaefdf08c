"""Work in a Python process of its own: a crash of native code becomes an error, and the work can be ended at any time.

The parent sends JSON messages, one a line, on the child's stdin. The child answers with JSON events, one a line, on its
stdout. A prefix distinguishes events from what native code prints there.

None of these processes imports from the working folder, where a `json.py` may lie: see `python_command`.

Parent: `run_job` for one job, or `ChildProcess` where messages go back and forth.
Child: `receive_message`, `send_event` and, where the parent decides about Ctrl-C, `ignore_interrupts`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

Message = dict[str, Any]
_MARK = "sdcompress:"
_KEPT_LINES = 5


def leave_out_working_folder(variables: MutableMapping[str, str]) -> None:
    """Set the variables that keep the working folder out of what a process and its children search.

    That is the import path of Python 3.11 or newer, and on Windows the places of programs such as `nvidia-smi`. An
    empty part of `PYTHONPATH` is the working folder, too: `PYTHONPATH=$PYTHONPATH:/folder` often has one.

    Args:
        variables: the environment, which is changed.
    """
    variables.update({"PYTHONSAFEPATH": "1", "NoDefaultCurrentDirectoryInExePath": "1"})
    if "PYTHONPATH" in variables:
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, variables["PYTHONPATH"].split(os.pathsep)))


def python_command(module: str) -> list[str]:
    """Returns the command that runs a module in this Python, without the working folder on the import path.

    Folders in `PYTHONPATH` stay.

    Args:
        module: full name of the module.
    """
    if sys.version_info >= (3, 11):
        return [sys.executable, "-P", "-m", module]
    return python_code(f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)")


def python_code(code: str) -> list[str]:
    """Returns the command that runs statements in this Python, with the import path of `python_command`.

    Args:
        code: the statements.
    """
    if sys.version_info >= (3, 11):
        return [sys.executable, "-P", "-c", code]
    return [sys.executable, "-c", f"import sys; del sys.path[0]; {code}"]


class ChildProcess:
    """A module that runs in a Python process of its own, by `python_command`.

    Args:
        module: full name of the module.
        paths: folders from which the child imports, besides those of `PYTHONPATH`.
        environment: variables that differ from this process's.
        folder: the child's working directory; None is this process's.
    """

    def __init__(
        self,
        module: str,
        *,
        paths: Sequence[Path] = (),
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        variables = {**os.environ, **(environment or {})}
        leave_out_working_folder(variables)
        if paths:
            variables["PYTHONPATH"] = os.pathsep.join(filter(None, [*map(str, paths), variables.get("PYTHONPATH")]))
        self.timed_out = False
        self._printed: deque[str] = deque(maxlen=_KEPT_LINES)
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            python_command(module),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            errors="replace",
            env=variables,
            cwd=folder,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message. Without effect on a child that has ended: how it ended is the answer."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def events(self) -> Iterator[Message]:
        """Yields the child's events as they come, until it closes its stdout."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            event = _read_event(line)
            if event is not None:
                yield event
            elif line.strip():
                self._printed.append(line.strip())

    def wait(self) -> int:
        """Wait until the child ends. Returns its exit status; on POSIX minus the number of the signal that ended it."""
        return self._process.wait()

    def output(self) -> list[str]:
        """Returns the last lines, none of them empty, of what an ended child wrote on stdout and then on stderr."""
        self._errors.seek(0)
        lines = (line.strip() for line in self._errors)
        return [*self._printed, *deque(filter(None, lines), maxlen=_KEPT_LINES)]

    @contextmanager
    def time_limit(self, seconds: float | None) -> Iterator[None]:
        """End the child when the block takes longer than `seconds`, None is never; `timed_out` is true from then on."""
        if seconds is None:
            yield
            return

        def expire() -> None:
            self.timed_out = True
            self._kill()

        timer = threading.Timer(max(0.0, seconds), expire)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def close(self) -> None:
        """End the child and all that it has started. Safe to call twice."""
        self._kill()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with suppress(OSError):  # nobody reads what was not sent
                if stream is not None:
                    stream.close()

    def _kill(self) -> None:
        if self._process.poll() is not None:
            return
        started = _descendants(self._process.pid)
        self._process.kill()
        for process in started:
            with suppress(Exception):  # psutil's, for one that has ended
                process.kill()
        self._process.wait()


@dataclass(frozen=True)
class Ending:
    """How a child process ended.

    Attributes:
        status: its exit status; on POSIX the negative number of the signal that ended it.
        output: its last lines that were no events, see `ChildProcess.output`.
        timed_out: whether it was ended because it took too long.
    """

    status: int
    output: list[str]
    timed_out: bool


def run_job(
    module: str,
    job: Mapping[str, Any],
    on_event: Callable[[Message], None],
    *,
    paths: Sequence[Path] = (),
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    timeout_s: float | None = None,
) -> Ending:
    """Run one job in a process of its own. Returns how the process ended.

    An exception in this process, as of Ctrl-C, ends the other one.

    Args:
        module: full name of the module that does it; it reads the job with `receive_message`.
        job: the message; JSON values only.
        on_event: called with each event of the process.
        paths, environment, folder: see `ChildProcess`.
        timeout_s: the process is ended after so many seconds; None is never.
    """
    with ChildProcess(module, paths=paths, environment=environment, folder=folder) as child:
        with child.time_limit(timeout_s):
            child.send(job)
            for event in child.events():
                on_event(event)
            status = child.wait()
        return Ending(status, child.output(), child.timed_out)


def describe_exit(status: int, process: str = "its process") -> str:
    """Returns how a process ended, in words: by which signal, or with which exit status.

    Args:
        status: as `subprocess` gives it.
        process: the subject of the sentence.
    """
    if status >= 0:
        return f"{process} ended with status {status}"
    name = next((each.name for each in signal.Signals if each == -status), f"signal {-status}")
    return f"{process} was ended by {name}" + (", as when memory runs out" if name == "SIGKILL" else "")


def explain_exit(status: int, output: Sequence[str]) -> str:
    """Returns how a process ended and, where it ended by itself, the last line that it wrote: most often the reason.

    Args:
        status: as `subprocess` gives it.
        output: lines that the process wrote.
    """
    if status < 0:
        return describe_exit(status)
    words = next((line.strip() for line in reversed(output) if line.strip()), "no message")
    return f"{describe_exit(status)}: {words[:300]}"


def receive_message() -> Message | None:
    """Returns the parent's next message, in the child; None if the parent has closed the pipe or has ended."""
    line = sys.stdin.readline()
    return dict(json.loads(line)) if line.strip() else None


def send_event(**event: Any) -> bool:
    """Send an event to the parent, in the child; returns whether the parent is still there.

    Args:
        event: JSON values by name.
    """
    try:
        print(_MARK + json.dumps(event), flush=True)
    except OSError:
        return False
    return True


def ignore_interrupts() -> None:
    """Leave Ctrl-C to the parent, in the child: it reaches both, and the parent ends this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _read_event(line: str) -> Message | None:
    if not line.startswith(_MARK):
        return None
    try:
        return dict(json.loads(line[len(_MARK) :]))
    except ValueError:  # cut, as by the end of the process
        return None


def _descendants(process_id: int) -> list[Any]:
    try:
        import psutil
    except ImportError:
        return []
    try:
        found: list[Any] = psutil.Process(process_id).children(recursive=True)
    except psutil.Error:
        return []
    return found
