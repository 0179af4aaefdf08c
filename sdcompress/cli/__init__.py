"""The `sdcompress` command. Each subcommand is a module of its own, imported only when it is called."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

import click

COMMANDS = {
    "demo": "Run every stage on the built-in teacher, in minutes, on any machine.",
    "run": "Run plan → distill → export → engine → bench for a teacher; resumable by stage.",
    "plan": "Show what a block-removal plan keeps of a teacher's UNet.",
    "distill": "Train a smaller student from a teacher.",
    "few-step": "Train a model to draw in few steps, without guidance.",
    "distill-decoder": "Train a small decoder in the place of a teacher's VAE.",
    "data": "Inspect a data set, cache it for training, or make one with a teacher.",
    "finetune": "Train a teacher or a student on new pictures.",
    "lora": "Train a LoRA, or convert one of the teacher for a student.",
    "recipes": "Named training settings: list, show, copy, validate.",
    "export": "Write ONNX graphs of a pipeline, and build TensorRT engines from them.",
    "engines": "The store of built engines: list, show, verify, prune, path.",
    "install": "Install the plugin and engines in SD-WebUI, Forge or ComfyUI.",
    "uninstall": "Remove the plugin and engines that install added.",
    "status": "Show what is installed in a WebUI or ComfyUI, and whether it loads.",
    "bench": "Measure latency and fidelity, and write a report.",
    "generate": "Generate a picture.",
    "inspect": "Show what a pipeline or an artifact is.",
    "doctor": "Check this installation, and test each backend against torch.",
    "push": "Upload a finished pipeline or LoRA to the hub, with a model card.",
}


class LazyGroup(click.Group):
    """A group whose `--help` imports no command's module, so that it is fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"sdcompress.cli.{name.replace('-', '_')}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from sdcompress.cli._console import suggest

            raise click.UsageError(f"no command {args[0]!r}{suggest(args[0], COMMANDS)}", ctx) from error


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="sdcompress")
def cli() -> None:
    """Turn a Stable Diffusion teacher into a small, fast student, and export it to TensorRT.

    \b
    Start here (any machine, no download):
      sdcompress doctor                                  what works here, and how to fix the rest
      sdcompress demo                                    every stage on the built-in teacher
      sdcompress generate nano "a flat icon of a cat"    a picture from it
    With your own checkpoint:
      sdcompress plan TEACHER --preset bk-tiny           what it would remove and keep
      sdcompress distill TEACHER --plan bk-tiny --data DATA -o student
      sdcompress few-step student/pipeline --teacher TEACHER --data DATA --recipe few-step -o fast
      sdcompress export fast/pipeline -o engines --trt
      sdcompress bench TEACHER student/pipeline -o report
    """


def main() -> None:
    """Run the command line and exit.

    A user's mistake, and what the system refuses, get one line and an exit code. Only a fault of the program gets a
    traceback.
    """
    if sys.flags.optimize > 1:
        _restart_with_docstrings()
    from sdcompress_engines.child_process import leave_out_working_folder

    from sdcompress.cli._streams import close_streams, prepare_streams

    prepare_streams()
    leave_out_working_folder(os.environ)  # for processes that libraries start, such as compilers' workers
    # The libraries read these when they are imported. Their notices of missing optional parts (torchvision) do not
    # help the person who types a command.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    sys.exit(close_streams(_run()))


def _run() -> int:
    """Run the command that was typed; returns its exit status."""
    from sdcompress_engines.thread_waiting import choose_waiting

    from sdcompress.cli._processes import watch_processes

    streams = sys.stdout, sys.stderr
    with _record_stops() as stops:
        try:
            if not {"-h", "--help", "--version"} & set(sys.argv) and len(sys.argv) > 1:
                _check_working_folder()
                choose_waiting()
            with watch_processes():
                code = cli(prog_name="sdcompress", standalone_mode=False)
            return code if isinstance(code, int) else 0
        except SystemExit:
            if sys.stdout is streams[0]:
                raise
            sys.stdout, sys.stderr = streams  # click replaces them after a broken pipe, here that of a child process
            return _report(BrokenPipeError(errno.EPIPE, "broken pipe"))
        except BaseException as error:
            return _report(KeyboardInterrupt(*stops[:1]) if stops else error)


def _check_working_folder() -> None:
    """Refuse a working folder that was removed: libraries fail there in ways that do not name it."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        from sdcompress_engines.errors import StorageError

        raise StorageError("the folder you are in was removed", hint="cd to one that exists") from error


@contextmanager
def _record_stops() -> Iterator[list[int]]:
    """Yield a list that receives the signals to stop, each of which is raised as `KeyboardInterrupt`, as Ctrl-C is.

    So a command removes what it has begun, whoever ends it: Ctrl-C, `kill`, a batch system or a closed terminal. A
    library may turn the exception into an error of its own. What is ignored, as Ctrl-C in the background, stays so.
    """
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        received.append(number)
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    usual = {number: signal.getsignal(number) for number in numbers}
    caught = [number for number in numbers if usual[number] in (signal.SIG_DFL, signal.default_int_handler)]
    for number in caught:
        signal.signal(number, interrupt)
    try:
        yield received
    finally:
        for number in caught:
            signal.signal(number, usual[number])


def _report(error: BaseException) -> int:
    """Print what ended the command; returns the exit status."""
    from sdcompress_engines.errors import SdCompressError, storage_error, system_error

    from sdcompress.cli._streams import BROKEN_PIPE_STATUS, OutputClosed, print_error

    if isinstance(error, OutputClosed):
        return BROKEN_PIPE_STATUS
    if isinstance(error, click.exceptions.Abort | KeyboardInterrupt):
        print_error("stopped")
        return 128 + (error.args or (signal.SIGINT,))[0]
    with suppress(OSError, OutputClosed):  # of stderr: then the status has to be enough
        if isinstance(error, click.ClickException):
            _show(error)
            return error.exit_code
        known = error if isinstance(error, SdCompressError) else system_error(error)
        # A library's own text of a full disk, met where it writes a temporary file.
        if known := known or storage_error(error, tempfile.gettempdir()):
            print_error(str(known))
            return known.exit_code
        traceback.print_exception(error)
        print_error("this is a fault of sdcompress. Please report it, with the lines above and `sdcompress doctor`")
    return error.exit_code if isinstance(error, click.ClickException) else 1


def _show(error: click.ClickException) -> None:
    """Print a mistake of the command line as click does, with what was typed cut and escaped."""
    from sdcompress_engines.errors import SdCompressError

    from sdcompress.cli._streams import print_error

    context = getattr(error, "ctx", None)
    if context is not None:
        click.echo(f"{context.get_usage()}\nTry '{context.command_path} --help' for help.\n", err=True)
    print_error(str(SdCompressError(error.format_message())))


def _restart_with_docstrings() -> NoReturn:
    """Run this command line in a Python that keeps docstrings, which `-OO` removes.

    The help texts of the commands are docstrings, and transformers cannot be imported without its own.
    """
    from sdcompress_engines.child_process import python_code

    program = f"import sys; sys.path[:] = {sys.path!r}; from sdcompress.__main__ import main; main()"
    command = [*python_code(program), *sys.argv[1:]]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONOPTIMIZE"}
    if os.name == "posix":
        os.execve(command[0], command, environment)
    import subprocess

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command decides what Ctrl-C does
    sys.exit(subprocess.run(command, env=environment, check=False).returncode)
