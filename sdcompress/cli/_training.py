"""The options every kind of training shares, and the cache they train from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdcompress.cli._console import ConsoleReporter, force_option, output_option

if TYPE_CHECKING:
    from sdcompress.data.cache import LatentCache
    from sdcompress.models.load import LoadedPipeline
    from sdcompress.train.config import TrainConfig
    from sdcompress.train.recipes import Config

DATA_HELP = "Folder of captioned pictures, webdataset shards (folder, glob or brace list), or nano."
_DATA_OPTIONS = (
    click.option(
        "--size",
        "size_px",
        type=int,
        default=None,
        metavar="PX",
        help="Side of the training pictures.  [default: the UNet's own]",
    ),
    click.option(
        "--where",
        multiple=True,
        metavar="CONDITION",
        help='Only pictures whose metadata say so, such as "aesthetic >= 7.5"; repeat for more.',
    ),
    click.option(
        "--min-size",
        "min_size_px",
        type=int,
        default=None,
        metavar="PX",
        help="Only pictures whose short side is at least this.",
    ),
    click.option(
        "--max-aspect", type=float, default=None, help="Only pictures at most this many times as long as wide."
    ),
    click.option(
        "--caption",
        "captions",
        multiple=True,
        metavar="COLUMN[=SHARE]",
        help="Metadata column that holds captions; repeat for several, with shares.",
    ),
    click.option(
        "--buckets",
        is_flag=True,
        default=None,
        help="Keep aspect ratios (to the nearest of a set of shapes) where a square would crop.",
    ),
    click.option("--crop", type=click.Choice(["center", "random"]), default=None, help="Where pictures are cropped."),
    click.option("--views", type=int, default=None, help="With --crop random: crops kept of each picture."),
    click.option("--flip", is_flag=True, default=None, help="Mirrored pictures too."),
    click.option(
        "--max-unusable",
        type=float,
        default=None,
        metavar="SHARE",
        help="Stop where more pictures than this are broken or without a caption.  [default: 0.05]",
    ),
)
DATA_KNOBS = (
    "size_px",
    "where",
    "min_size_px",
    "max_aspect",
    "captions",
    "buckets",
    "crop",
    "views",
    "flip",
    "max_unusable",
)
_TRAINING_OPTIONS = (
    click.option("--data", required=True, metavar="DATA", help=DATA_HELP),
    click.option(
        "--cache",
        "cache_folder",
        type=click.Path(path_type=Path),
        default=None,
        metavar="DIR",
        help="Latents and text embeddings; made here if not there.  [default: beside the output, DIR-cache]",
    ),
    click.option(
        "--recipe",
        default=None,
        metavar="NAME|FILE",
        help="Named settings (`sdcompress recipes list`); the options below override them.",
    ),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KNOB=VALUE",
        help="Any knob of the recipe, such as ema_decay=0.999 or data.flip=true; repeat for more.",
    ),
    click.option("--steps", type=int, default=None, help="Optimizer steps."),
    click.option("--batch-size", type=int, default=None, help="Pictures a step, over all processes."),
    click.option("--learning-rate", type=float, default=None, help="The optimizer's."),
    click.option("--precision", default=None, help="auto, fp32, bf16 or fp16."),
    click.option("--checkpoint-every", type=int, default=None, help="Steps between checkpoints."),
    click.option(
        "--sample-every", type=int, default=None, help="Steps between pictures of the validation prompts; 0 is never."
    ),
    click.option(
        "--validation-prompt", "validation_prompts", multiple=True, help="Prompt drawn at those steps; repeat for more."
    ),
    click.option("--seed", type=int, default=None, help="Of everything random."),
    click.option("--resume", is_flag=True, help="Go on from the newest whole checkpoint in the output folder."),
)


def data_options(function: Any) -> Any:
    """Which pictures are used, and how they are cut."""
    for option in reversed(_DATA_OPTIONS):
        function = option(function)
    return function


def training_options(output_help: str) -> Callable[[Any], Any]:
    """Data, recipe and the knobs that are set most, the output folder and `--force`."""

    def decorate(function: Any) -> Any:
        function = output_option(output_help)(force_option(data_options(function)))
        for option in reversed(_TRAINING_OPTIONS):
            function = option(function)
        return function

    return decorate


def data_overrides(options: dict[str, Any]) -> dict[str, Any]:
    """What was given of the data options, as a recipe's `data` section has it; taken out of `options`.

    Raises:
        UsageError: a caption share that is no number.
    """
    from sdcompress_engines.errors import UsageError

    given = {name: options.pop(name) for name in DATA_KNOBS}
    given = {name: value for name, value in given.items() if value not in (None, ())}
    if "captions" in given:
        shares = {}
        for text in given["captions"]:
            column, _, share = text.partition("=")
            try:
                shares[column] = float(share or 1)
            except ValueError as error:
                raise UsageError(
                    f"--caption {text!r}", expected="COLUMN or COLUMN=SHARE, such as caption=0.7"
                ) from error
        given["captions"] = shares
    return given


def training_config(
    kind: type[Config], recipe: str | None, settings: tuple[str, ...], options: dict[str, Any]
) -> Config:
    """The resolved configuration; `options` is emptied of what is a knob.

    Raises:
        UsageError: as `load_config`.
    """
    from sdcompress.train.recipes import load_config

    data = data_overrides(options)
    options["validation_prompts"] = options["validation_prompts"] or None
    return load_config(kind, recipe, options | ({"data": data} if data else {}), settings)


def begin(
    model: str,
    data: str,
    cache_folder: Path | None,
    config: TrainConfig,
    output: Path,
    *,
    resume: bool,
    force: bool,
    report: ConsoleReporter,
) -> tuple[LoadedPipeline, LatentCache]:
    """The model and its cache, which is opened where it is whole and fits and made where nothing is; whatever is wrong
    is told before the model is loaded.

    Raises:
        UsageError, ModelError: no such data or model. ArtifactError: the output is in the way. DataError: the cache
            does not fit the model, the data or the cut.
    """
    from sdcompress_engines.manifest import check_free, storage_errors

    from sdcompress.data.build_cache import build_cache
    from sdcompress.data.cache import LatentCache, default_size_px
    from sdcompress.data.sources import open_source
    from sdcompress.models.load import load_pipeline

    source = open_source(data, config.data)
    if not resume:
        check_free(output, force)
    with storage_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    loaded = load_pipeline(model)
    folder = cache_folder or output.with_name(f"{output.name}-cache")
    size_px = config.data.size_px or default_size_px(loaded.pipeline)
    if not folder.exists():
        return loaded, build_cache(source, loaded, folder, size_px, config=config.data, report=report)
    cache = LatentCache.open(folder, loaded.sha256, source, size_px, config.data)
    report.say(f"cache: {len(cache):,} pictures in {folder}")
    return loaded, cache


def outcome(result: Any) -> list[tuple[str, object]]:
    """The rows of a training's closing card that tell how it went."""
    rows: list[tuple[str, object]] = [
        ("steps", f"{result.steps}" + (f" (resumed at {result.resumed_from})" if result.resumed_from else "")),
        ("losses", ", ".join(f"{k} {v:.4f}" for k, v in result.losses.items())),
        (
            "time",
            f"{result.seconds:.0f} s, {result.samples_per_s:.1f} pictures/s, {result.waited_s:.1f} s waiting for data",
        ),
    ]
    if result.peak_memory_mib is not None:
        rows.append(("memory", f"{result.peak_memory_mib:,.0f} MiB at most on the GPU"))
    return rows
