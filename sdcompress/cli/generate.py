"""`sdcompress generate`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from sdcompress_engines.command import as_argument, command_line

from sdcompress.backends.registry import help_text
from sdcompress.cli._console import ConsoleReporter, card, sampling_options
from sdcompress.cli._trust import allow_all, trust_option
from sdcompress.cli._types import NAME, SEED, SIZE_PX, TEXT, FilePath
from sdcompress.support.console import describe_time

if TYPE_CHECKING:
    from PIL import Image

    from sdcompress.support.pipeline import TextToImagePipeline


@click.command()
@click.argument("model", type=NAME)
@click.argument("prompt", type=TEXT)
@click.option("--negative-prompt", type=TEXT, default=None, help="What the picture should not show.")
@sampling_options
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the initial noise.")
@click.option(
    "--size",
    "size_px",
    type=SIZE_PX,
    default=None,
    metavar="PX",
    help="Side of the picture in pixels.  [default: the model's own]",
)
@click.option(
    "--backend",
    type=NAME,
    default="torch",
    show_default=True,
    help=help_text(),
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    default=None,
    help="Precision in torch, or of a graph that is exported now.  [default: fp16 on a GPU, else fp32]",
)
@click.option(
    "--artifacts",
    type=FilePath(),
    default=None,
    metavar="DIR",
    help="Graphs or engines of MODEL that `export` wrote.  [default: exported once and cached]",
)
@click.option(
    "--fallback",
    type=click.Choice(["torch"]),
    default=None,
    help="Run the UNet in torch, with a notice, where an engine does not support the size.",
)
@click.option(
    "--lora",
    "loras",
    type=NAME,
    multiple=True,
    metavar="FILE[:WEIGHT]",
    help="LoRA for this model, or of the whole model for its student, on any backend; repeat for more.",
)
@click.option(
    "--decoder",
    type=FilePath(),
    default=None,
    metavar="DIR",
    help="Small decoder in the place of the VAE, from `distill-decoder`; `nano` is the built-in one.",
)
@trust_option
@click.option(
    "-o",
    "--output",
    type=FilePath(dir_okay=False),
    default=Path("out.png"),
    show_default=True,
    metavar="FILE",
    help="Picture file to write: .png, .webp or .jpg.",
)
def command(
    model: str,
    prompt: str,
    negative_prompt: str | None,
    steps: int | None,
    guidance: float | None,
    seed: int,
    size_px: int | None,
    backend: str,
    precision: Any,
    artifacts: Path | None,
    fallback: str | None,
    loras: tuple[str, ...],
    decoder: Path | None,
    trust: bool,
    output: Path,
) -> None:
    """Generate a picture of PROMPT with MODEL: nano, nano-tiny, a pipeline folder, a hub id, or an export folder.

    \b
      sdcompress generate nano "a flat icon of a wine glass" -o glass.png
      sdcompress generate nano-tiny "a flat icon of a cat" --lora style/lora/lora.safetensors:0.8 -o styled.png
      sdcompress generate graphs "a cat" --backend ort --lora detail.safetensors:0.8 --lora style.safetensors -o cat.png
      sdcompress generate student/pipeline "a 3d render of a cat face" --backend auto -o cat.png
    """
    import time

    from sdcompress.backends.assemble import close_pipeline, open_pipeline
    from sdcompress.backends.registry import backend_name
    from sdcompress.sampling import generate

    backend = backend_name(backend)
    _refuse_without_effect(negative_prompt, guidance, backend, artifacts, precision, fallback)
    weighted_loras = _check_options(model, backend, artifacts, decoder, loras, output, trust)
    report = ConsoleReporter()
    _warn_of_unknown(model, prompt, report)
    started = time.monotonic()
    options = {"precision": precision, "fallback": fallback, "decoder": decoder, "loras": bool(weighted_loras)}
    pipeline = open_pipeline(model, backend, artifacts, **options, report=report)
    if weighted_loras:
        pipeline.set_loras(weighted_loras)
    loaded = time.monotonic()
    steps, guidance = _choose_sampling(pipeline, steps, guidance)
    with report.task(f"draw {steps} steps on {backend}"):
        (picture,) = generate(
            pipeline,
            [prompt],
            seeds=[seed],
            steps=steps,
            guidance_scale=guidance,
            size_px=size_px,
            negative_prompt=negative_prompt,
        )
    drawn = time.monotonic()
    close_pipeline(pipeline)
    _save(picture, output)
    _show_card(picture, output, seed, steps, guidance, drawn - loaded, loaded - started)


def _choose_sampling(pipeline: TextToImagePipeline, steps: int | None, guidance: float | None) -> tuple[int, float]:
    """Returns the steps and the guidance scale that were asked for, else the model's own."""
    from sdcompress.families.sampling_defaults import sampling_defaults

    defaults = sampling_defaults(pipeline)
    return (
        defaults.num_inference_steps if steps is None else steps,
        defaults.guidance_scale if guidance is None else guidance,
    )


def _show_card(
    picture: Image.Image, output: Path, seed: int, steps: int, guidance: float, draw_s: float, load_s: float
) -> None:
    card(
        "picture",
        [
            ("file", output),
            ("size", f"{picture.width} x {picture.height} px"),
            ("seed", seed),
            ("steps", f"{steps}, {f'guidance {guidance:g}' if guidance > 1 else 'no guidance'}"),
            ("time", f"{describe_time(draw_s)} (and {describe_time(load_s)} to load)"),
        ],
    )


def _warn_of_unknown(model: str, prompt: str, report: ConsoleReporter) -> None:
    """Print a line where nano does not know what the prompt asks for."""
    from sdcompress.data.nano_prompts import describe_unknown
    from sdcompress.models.nano import draws_like_nano

    if draws_like_nano(model) and (unknown := describe_unknown(prompt)):
        report.show_line(unknown)


def _check_options(
    model: str,
    backend: str,
    artifacts: Path | None,
    decoder: Path | None,
    loras: tuple[str, ...],
    output: Path,
    trust: bool,
) -> list[tuple[Path, float]]:
    """Returns the file and weight of each LoRA, after a check of all options that need no model, and the consent."""
    from sdcompress_engines.errors import UsageError
    from sdcompress_engines.output_folders import check_file

    from sdcompress.lora.fuse import parse_lora
    from sdcompress.models.locate import local_path, local_paths

    weighted_loras = [parse_lora(text) for text in loras]
    export = command_line(["sdcompress", "export", as_argument(model)])
    if artifacts is not None and not artifacts.is_dir():
        raise UsageError("no such folder", where=artifacts, hint=f"{export} {command_line(['-o', str(artifacts)])}")
    if output.suffix.lower() not in (".png", ".webp", ".jpg", ".jpeg"):
        raise UsageError("is not a picture file name", where=output, expected="a name ending in .png, .webp or .jpg")
    if trust:
        allow_all([local_path(model), artifacts])
    inputs = [*local_paths(model), *(file for file, _ in weighted_loras)]
    check_file(output, [*inputs, *(folder for folder in (artifacts, decoder) if folder is not None)])
    return weighted_loras


def _refuse_without_effect(
    negative_prompt: str | None,
    guidance: float | None,
    backend: str,
    artifacts: Path | None,
    precision: str | None,
    fallback: str | None,
) -> None:
    from sdcompress.backends.registry import AUTO, find_backend

    if negative_prompt and guidance is not None and guidance <= 1:
        raise click.UsageError(f"--negative-prompt has no effect with --guidance {guidance:g}, which is no guidance")
    if artifacts is None or precision is None or fallback is not None or backend == AUTO:
        return  # a fallback has the precision; of `auto` the choice of a backend refuses both
    if find_backend(backend).cached_unet is None:  # a compiled package is looked up by its precision
        raise click.UsageError("--precision has no effect with --artifacts, which have their own")


def _save(picture: Image.Image, output: Path) -> None:
    from sdcompress_engines.output_folders import staged_file

    from sdcompress.support.pictures import encode_picture

    with staged_file(output) as partial:
        partial.write_bytes(encode_picture(picture, output.suffix))
