"""The `sdcompress` command. Every subcommand lives in a module of its own, imported only when it is called."""

from __future__ import annotations

import importlib
import io
import os
import sys

import click

COMMANDS = {
    "demo": "The whole way on the built-in teacher, in minutes, on any machine.",
    "run": "plan → distill → export → engine → bench for a teacher, resumable by stage.",
    "plan": "Show what a block-removal plan keeps of a teacher's UNet.",
    "distill": "Train a smaller student from a teacher.",
    "data": "Look at a data set, cache it for training, or make one with a teacher.",
    "finetune": "Train a teacher or a student on new pictures.",
    "lora": "Train a LoRA, or carry one over to a student.",
    "recipes": "Named settings for training: list, show, copy, validate.",
    "export": "Write ONNX graphs of a pipeline, and TensorRT engines of them.",
    "engines": "The store of built engines: list, show, verify, prune, path.",
    "install": "Put the plugin and engines into SD-WebUI, Forge or ComfyUI.",
    "uninstall": "Take away what install has put there.",
    "status": "Say what is installed in a WebUI or ComfyUI, and whether it loads.",
    "bench": "Measure latency and fidelity, and write a report.",
    "generate": "Make a picture.",
    "inspect": "Say what a pipeline or an artifact is.",
    "doctor": "Check this installation, and prove each backend against torch.",
    "push": "Upload a finished pipeline or LoRA to the hub, with a model card.",
}


class LazyGroup(click.Group):
    """A group whose `--help` needs no command's module, so that it answers at once."""

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
    """Turn a Stable Diffusion teacher into a small, fast student, and carry it to TensorRT.

    \b
    Start here (any machine, no download):
      sdcompress doctor                                  what works here, and what mends the rest
      sdcompress demo                                    the whole way on the built-in teacher
      sdcompress generate nano "a flat icon of a cat"    a picture from it
    With your own checkpoint:
      sdcompress plan TEACHER --preset bk-tiny           what would go, what would stay
      sdcompress distill TEACHER --plan bk-tiny --data DATA -o student
      sdcompress export student/pipeline -o engines --trt
      sdcompress bench TEACHER student/pipeline -o report
    """


def accept_all_characters() -> None:
    """Let stdout and stderr take every character.

    On Windows, redirected ones have a code page that lacks some of ours.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            chosen = stream.isatty() or os.environ.get("PYTHONIOENCODING")
            stream.reconfigure(encoding=None if chosen else "utf-8", errors="replace")


def main() -> None:
    """Run the command line: one line and an exit code for a user's mistake, a traceback only for ours."""
    from sdcompress_engines.errors import SdCompressError, storage_error

    accept_all_characters()
    # Notices of optional parts that are not there (torchvision) are not for who types a command; theirs are read at
    # import.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
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
    except OSError as error:
        known = storage_error(error, error.filename or ".")
        if known is None:
            raise
        click.echo(f"sdcompress: {known}", err=True)
        code = known.exit_code
    sys.exit(code if isinstance(code, int) else 0)
