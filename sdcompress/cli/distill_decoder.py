"""`sdcompress distill-decoder`: train a small decoder in the place of a VAE."""

from __future__ import annotations

from pathlib import Path

import click
from sdcompress_engines.command import as_argument, command_line

from sdcompress.cli._console import ConsoleReporter, card, mib, millions
from sdcompress.cli._options import field_options
from sdcompress.cli._training import TrainingArguments, folder_size_bytes, load_inputs, result_rows, training_options
from sdcompress.cli._types import NAME
from sdcompress.train.config import DecoderConfig


@click.command("distill-decoder")
@click.argument("teacher", type=NAME)
@field_options(DecoderConfig, ("width", "pixel_weight", "lpips_weight"))
@training_options(
    DecoderConfig, "Training folder: checkpoints, metrics.jsonl, samples, and the small decoder under decoder/."
)
def command(
    teacher: str,
    run: TrainingArguments,
) -> None:
    """Train a small decoder that draws what TEACHER's VAE draws, for the teacher and all its students.

    \b
      sdcompress distill-decoder nano --data nano --recipe nano-decoder -o small
      sdcompress distill-decoder rv4.safetensors --data ./laion-art --recipe sd-decoder -o rv4-decoder
      sdcompress generate nano "a flat icon of a cat" --decoder small/decoder -o cat.png
    """
    from sdcompress.models.locate import DECODER
    from sdcompress.support.pipeline import native_size_px
    from sdcompress.train.decoder import build_decoder, check_lpips, check_teacher, count_decoder, distill_decoder

    config = run.read_config(DecoderConfig)
    check_lpips(config)
    report = ConsoleReporter()
    loaded, cache = load_inputs(
        teacher,
        run,
        config,
        report,
        check=lambda loaded: check_teacher(loaded, config, config.data.size_px or native_size_px(loaded.pipeline)),
        denoises=False,
    )
    result = distill_decoder(loaded, cache, config, run.output, resume=run.resume, force=run.force, report=report)
    folder, vae = run.output / DECODER, loaded.pipeline.vae
    before, after = count_decoder(vae), count_decoder(build_decoder(config, vae.config.latent_channels))
    rows: list[tuple[str, object]] = [
        ("decoder", folder),
        ("parameters", f"{millions(before)} → {millions(after)} ({describe_change(before, after)})"),
        ("size", mib(folder_size_bytes(folder))),
        ("WebUIs, ComfyUI", describe_taesd_files(folder)),
    ]
    card(
        f"small decoder of {loaded.name}",
        rows + result_rows(result),
        f'sdcompress generate {command_line([as_argument(teacher)])} "PROMPT"'
        f" {command_line(['--decoder', str(folder)])} -o out.png",
    )


def describe_taesd_files(folder: Path) -> str:
    """Returns the names of the files for the WebUIs and ComfyUI, or why there are none."""
    names = sorted(path.name for path in folder.glob("taesd*"))
    return ", ".join(names) or "no files: they load only width 64 with blocks 3, 3, 3, 1"


def describe_change(before: int, after: int) -> str:
    """Returns by how much a count has changed, such as `94.7% smaller`."""
    return f"{abs(1 - after / before):.1%} {'smaller' if after <= before else 'larger'}"
