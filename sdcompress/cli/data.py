"""`sdcompress data`: inspect, encode and generate data sets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from sdcompress_engines.command import as_argument, command_line

from sdcompress.backends.registry import help_text
from sdcompress.cli._console import (
    ConsoleReporter,
    card,
    echo,
    force_option,
    given_parameters,
    json_option,
    mib,
    output_option,
    print_json,
    sampling_options,
)
from sdcompress.cli._training import DATA_HELP, data_options, pop_data_overrides, suggest_training
from sdcompress.cli._types import BATCH, NAME, PICTURES, SEED, SIZE_PX, FilePath
from sdcompress.data.config import DataConfig

if TYPE_CHECKING:
    from sdcompress.data.report import Figures, Spread

BAR = 32
CAPTION_SHOWN = 100


@click.group(epilog=f"DATA: {DATA_HELP}")
def command() -> None:
    """Inspect a data set, encode it for training, or make one with a teacher.

    \b
      sdcompress data inspect "laion-art/{00000..00099}.tar" --where "aesthetic >= 7.5" --sheet sheet.png
      sdcompress data cache pictures realistic-vision-v4 -o rv4-cache
      sdcompress data generate realistic-vision-v4 --prompts prompts.txt -n 7000 -o rv4-pictures
    """


@command.command(short_help="Report usable pictures, sizes, metadata and captions.")
@click.argument("data", type=NAME)
@click.option(
    "--sheet",
    type=FilePath(dir_okay=False),
    default=None,
    metavar="FILE",
    help="Write a contact sheet of up to 64 pictures, drawn at random.",
)
@click.option(
    "--limit", type=PICTURES, default=None, metavar="N", help="Stop after N pictures with a caption.  [default: all]"
)
@click.option(
    "--decode",
    is_flag=True,
    help="Decode every picture, to find truncated ones; without it only headers are read.",
)
@json_option
@data_options
def inspect(data: str, sheet: Path | None, limit: int | None, decode: bool, as_json: bool, **options: Any) -> None:
    """Report what DATA holds: usable pictures, sizes, metadata and captions.

    Memory stays the same for millions of pictures: with more than 10,000, medians and histograms are those of 10,000
    drawn at random.

    \b
      sdcompress data inspect nano
      sdcompress data inspect pictures --min-size 512 --sheet sheet.png
      sdcompress data inspect "laion-art/*.tar" --where "aesthetic >= 7.5" --limit 100000 --json
    """
    from dataclasses import asdict

    from sdcompress_engines.errors import UsageError, shorten
    from sdcompress_engines.output_folders import check_file, staged_file

    from sdcompress.data.report import SMALL_PX, inspect_source
    from sdcompress.data.sources import open_source
    from sdcompress.support.pictures import encode_picture

    if sheet is not None and sheet.suffix.lower() not in (".png", ".webp", ".jpg", ".jpeg"):
        raise UsageError("is not a picture file name", where=sheet, expected="a name ending in .png, .webp or .jpg")
    again = typed_options(options)
    config = data_config(options)
    source = open_source(data, config)
    if sheet is not None:
        check_file(sheet, source.inputs)
    figures, picture = inspect_source(
        source,
        limit=limit,
        decode=decode,
        sheet=sheet is not None,
        small_px=config.size_px or SMALL_PX,
        report=ConsoleReporter(),
    )
    if sheet is not None and picture is not None:
        with staged_file(sheet) as partial:
            partial.write_bytes(encode_picture(picture, sheet.suffix))
    if as_json:
        print_json(asdict(figures))
        return
    for title, spread in (*figures.fields.items(), ("words a caption", figures.caption_words)):
        if spread is not None:
            echo("\n".join(["", f"{title}: {summarize(spread)}, of {spread.count:,} pictures", *draw_bars(spread)]))
    if figures.captions:
        echo("\n".join(["", "captions:", *(f"  {shorten(caption, CAPTION_SHOWN)}" for caption in figures.captions)]))
    rows = figure_rows(figures)
    if sheet is not None:
        rows.append(("sheet", sheet if picture is not None else "not written: there is no picture to show"))
    card(
        f"data set {figures.name}",
        rows,
        None if figures.fault else f"sdcompress data cache {command_line([as_argument(data)])} TEACHER -o cache{again}",
    )


@command.command(short_help="Encode a data set once, for any number of trainings.")
@click.argument("data", type=NAME)
@click.argument("teacher", type=NAME)
@click.option(
    "--vae-precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default="auto",
    show_default=True,
    help="Precision of the VAE; auto is bf16 on GPUs that compute in it, but fp32 for SDXL, and fp32 on a CPU.",
)
@output_option("Folder of the cache; a stopped build in it is continued.")
@force_option
@data_options
def cache(data: str, teacher: str, vae_precision: Any, output: Path, force: bool, **options: Any) -> None:
    """Encode DATA once with TEACHER's VAE and text encoder, for any number of trainings.

    Pictures are encoded in batches that fit the free memory. The same command continues a stopped build. `torchrun` or
    `accelerate launch` shares the work among GPUs.

    \b
      sdcompress data cache nano nano -o nano-cache
      sdcompress data cache "laion-art/{00000..00099}.tar" realistic-vision-v4 --where "aesthetic >= 7.5" -o rv4-cache
    """
    import time

    from sdcompress_engines.manifest import read_manifest
    from sdcompress_engines.output_folders import check_free

    from sdcompress.data.build_cache import build_cache
    from sdcompress.data.drawn import describe_latents
    from sdcompress.data.sources import open_source
    from sdcompress.models.load import load_pipeline
    from sdcompress.models.locate import local_paths

    again = typed_options(options)
    config = data_config(options)
    source = open_source(data, config)
    check_free(output, force, [*source.inputs, *local_paths(teacher)])
    loaded = load_pipeline(teacher)
    started = time.monotonic()
    report = ConsoleReporter()
    built = build_cache(
        source, loaded, output, config.size_px, config=config, precision=vae_precision, force=force, report=report
    )
    manifest = read_manifest(output)
    figures = manifest.figures if manifest else {}
    not_drawn = figures.get("not_drawn", {})
    left_out = {"skipped": figures.get("skipped"), "filtered out": figures.get("filtered")}
    card(
        f"cache of {source.name} for {loaded.name}",
        [
            ("cache", output),
            (
                "pictures",
                f"{figures['pictures']:,}"
                + (f" ({figures['duplicates']:,} duplicates left out)" if figures["duplicates"] else ""),
            ),
            ("captions", f"{figures['captions']:,}"),
            ("size", f"{mib(figures['bytes'])}, {figures['bytes_per_picture']:,} bytes a picture"),
            *([("latents", describe_latents(built.drawn, not_drawn))] if built.drawn or not_drawn else []),
            *(
                (name, "; ".join(f"{reason}: {count:,}" for reason, count in counts.items()))
                for name, counts in left_out.items()
                if counts
            ),
            ("VAE precision", built.precision + (f", in tiles of {built.tile_px} px" if built.tile_px else "")),
            ("time", f"{time.monotonic() - started:.0f} s"),
        ],
        f"sdcompress distill {command_line([as_argument(teacher)])} --data {command_line([data])} --cache"
        f" {command_line([str(output)])}{again} -o student",
    )


@command.command(short_help="Make a data set of a teacher's own pictures.")
@click.argument("teacher", type=NAME)
@click.option(
    "--prompts",
    "prompts_file",
    type=FilePath(),
    required=True,
    metavar="FILE",
    help="Prompts, one per line; they are used in turn.",
)
@click.option("-n", "--count", type=PICTURES, required=True, metavar="N", help="Pictures to make.")
@click.option(
    "--batch-size",
    type=BATCH,
    default=16,
    show_default=True,
    help="Pictures drawn at once: more is faster and takes more memory.",
)
@sampling_options
@click.option(
    "--size",
    "size_px",
    type=SIZE_PX,
    default=None,
    metavar="PX",
    help="Side of the pictures in pixels.  [default: the teacher's own]",
)
@click.option(
    "--seed",
    type=SEED,
    default=0,
    show_default=True,
    help="Seed of the first picture; the next picture has the next seed.",
)
@click.option("--backend", type=NAME, default="torch", show_default=True, help=help_text())
@click.option(
    "--format",
    "picture_format",
    type=click.Choice(["webp", "png"]),
    default="webp",
    show_default=True,
    help="webp (quality 95) takes a fraction of the disk space; png is lossless.",
)
@click.option(
    "--latents/--no-latents",
    default=True,
    show_default=True,
    help="Write the pictures' latents, too, so that training need not encode them: 2 bytes a value, 32 KiB a picture of"
    " SD1.x at 512 px.",
)
@output_option("Folder of the data set; a stopped run with the same settings is continued.")
@click.option(
    "--force", is_flag=True, help="Replace the folder if it holds something else, or a set with other settings."
)
def generate(
    teacher: str,
    prompts_file: Path,
    count: int,
    batch_size: int,
    steps: int | None,
    guidance: float | None,
    size_px: int | None,
    seed: int,
    backend: str,
    picture_format: Any,
    latents: bool,
    output: Path,
    force: bool,
) -> None:
    """Make a data set of TEACHER's own pictures: image files with metadata.jsonl, which `distill --data` takes.

    The latents of the pictures lie beside them. A cache of this set for TEACHER, or for a model with the same VAE,
    takes them as they are: nothing is encoded, and nothing is lost to the picture format.

    The same command continues a stopped run and ends with the same files.

    \b
      sdcompress data generate nano --prompts prompts.txt -n 200 -o nano-pictures
      sdcompress data generate realistic-vision-v4 --prompts prompts.txt -n 7000 --backend trt -o rv4-pictures
    """
    from sdcompress.generate.dataset import generate_dataset
    from sdcompress.generate.settings import GenerateSettings, read_prompts

    settings = GenerateSettings(count, batch_size, steps, guidance, size_px, seed, backend, picture_format, latents)
    settings.check()
    generated = generate_dataset(
        teacher,
        read_prompts(prompts_file),
        output,
        settings,
        force=force,
        inputs=[prompts_file],
        report=ConsoleReporter(),
    )
    figures, drawn_with = generated.manifest.figures, generated.manifest.config
    existing = figures["pictures"] - generated.drawn
    card(
        f"data set drawn by {teacher}",
        [
            ("data set", output),
            (
                "pictures",
                f"{figures['pictures']:,} of {figures['width_px']} x {figures['height_px']} px"
                + (f" ({existing:,} existed)" if existing else ""),
            ),
            ("prompts", f"{figures['prompts']:,}"),
            ("steps", f"{drawn_with['steps']}, guidance {drawn_with['guidance_scale']:g}"),
            ("size", f"{mib(figures['bytes'])}, {figures['bytes_per_picture']:,} bytes a picture"),
            *([("latents", f"{mib(size)} in all")] if (size := figures.get("latents_bytes")) else []),
            ("time", f"{generated.seconds:.0f} s"),
        ],
        suggest_training(teacher, output),
    )


def data_config(options: dict[str, Any]) -> DataConfig:
    """Remove the data options from `options`; returns them as a configuration.

    Raises:
        UsageError: invalid values; one message names all errors.
    """
    from sdcompress.train.config import TrainConfig
    from sdcompress.train.recipes import load_config

    return load_config(TrainConfig, None, {"data": pop_data_overrides(options)}).data


def typed_options(options: dict[str, Any]) -> str:
    """Returns the data options that were given, as the next command takes them; each begins with a space."""
    text = ""
    for parameter in given_parameters(DataConfig.model_fields):
        value = options[parameter.name or ""]
        for one in value if isinstance(value, tuple) else (value,):
            text += f" {parameter.opts[0]}" + ("" if one is True else f" {command_line([str(one)])}")
    return text


def figure_rows(figures: Figures) -> list[tuple[str, object]]:
    """Returns the rows of the card: usable pictures, the others by reason, and the sizes."""
    from sdcompress.data.drawn import describe_latents

    rows: list[tuple[str, object]] = [("usable", f"{figures.usable:,} pictures")]
    unusable = sum(group.count for group in figures.unusable.values())
    rows.append(
        ("unusable", f"{unusable:,}" + (f" ({unusable / (unusable + figures.usable):.1%})" if unusable else ""))
    )
    rows += [
        (
            f"  {reason}",
            f"{group.count:,}: {', '.join(group.examples)}" + (", ..." if group.count > len(group.examples) else ""),
        )
        for reason, group in figures.unusable.items()
    ]
    if figures.filtered:
        rows.append(("filtered out", f"{sum(figures.filtered.values()):,}"))
    rows += [(f"  {reason}", f"{count:,}") for reason, count in figures.filtered.items()]
    rows += [
        (name, summarize(spread))
        for name, spread in (
            ("width, px", figures.width_px),
            ("height, px", figures.height_px),
            ("aspect", figures.aspect),
        )
        if spread
    ]
    if figures.usable:
        rows.append((f"under {figures.small_px} px", f"{figures.small:.1%} by the short side"))
    if figures.drawn_by:
        latents = describe_latents(figures.drawn, figures.not_drawn)
        rows.append(("drawn", f"by {figures.drawn_by[:12]}, {latents}"))
    if figures.fault:
        rows.append(("training", f"would stop: {figures.fault}"))
    return rows


def format_number(value: float) -> str:
    """Returns a number without decimals where it is whole or large, else with four significant digits."""
    return f"{value:,.0f}" if abs(value) < 1e15 and (abs(value) >= 1000 or value == int(value)) else f"{value:.4g}"


def summarize(spread: Spread) -> str:
    """Returns the range and the median of a value."""
    return (
        format_number(spread.least)
        if spread.least == spread.most
        else f"{format_number(spread.least)} to {format_number(spread.most)}, median {format_number(spread.median)}"
    )


def draw_bars(spread: Spread) -> list[str]:
    """Returns a histogram as lines of text; no lines for a field of one value."""
    if len(spread.histogram) == 1:
        return []
    highest = max(share for _, _, share in spread.histogram)
    lines = []
    for low, high, share in spread.histogram:
        bar = "█" * round(BAR * share / highest)
        lines.append(f"  {format_number(low):>10} – {format_number(high):<10} {bar:<{BAR}} {share:6.1%}")
    return lines
