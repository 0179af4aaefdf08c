"""The `sdcompress` command. Each subcommand is a module of its own, imported only when it is called."""

from __future__ import annotations

import importlib
import io
import os
import sys
import tempfile

import click

COMMANDS = {
    "demo": "Run every stage on the built-in teacher, in minutes, on any machine.",
    "run": "Run plan → distill → export → engine → bench for a teacher; resumable by stage.",
    "plan": "Show what a block-removal plan keeps of a teacher's UNet.",
    "distill": "Train a smaller student from a teacher.",
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
        return importlib.import_module(f"sdcompress.cli.{name}").command

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
      sdcompress export student/pipeline -o engines --trt
      sdcompress bench TEACHER student/pipeline -o report
    """


def accept_all_characters() -> None:
    """Let stdout and stderr take every character.

    On Windows, the code page of a redirected stream lacks some of the characters that the commands print.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            chosen = stream.isatty() or os.environ.get("PYTHONIOENCODING")
            stream.reconfigure(encoding=None if chosen else "utf-8", errors="replace")


def main() -> None:
    """Run the command line and exit.

    A user's mistake gets one line and an exit code; only a fault of the program gets a traceback.
    """
    from sdcompress_engines.errors import SdCompressError, storage_error
    from sdcompress_engines.thread_waiting import choose_waiting

    accept_all_characters()
    # The libraries read these when they are imported. Their notices of missing optional parts (torchvision) do not
    # help the person who types a command.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    if not {"-h", "--help", "--version"} & set(sys.argv) and len(sys.argv) > 1:
        choose_waiting()
    try:
        code = cli(standalone_mode=False)
    except SdCompressError as error:
        click.echo(f"sdcompress: {error}", err=True)
        code = error.exit_code
    except click.exceptions.Abort:
        click.echo("sdcompress: stopped", err=True)
        code = 130
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except KeyboardInterrupt:
        click.echo("sdcompress: stopped", err=True)
        code = 130
    except Exception as error:  # of any library, where it writes a temporary file
        known = storage_error(error, tempfile.gettempdir())
        if known is None:
            raise
        click.echo(f"sdcompress: {known}", err=True)
        code = known.exit_code
    sys.exit(code if isinstance(code, int) else 0)
