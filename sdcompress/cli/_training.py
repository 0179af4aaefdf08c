"""The options that every kind of training shares, and the inputs of a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from sdcompress_engines.command import as_argument, command_line

from sdcompress.cli._console import ConsoleReporter, force_option, output_option
from sdcompress.cli._options import field_options, pop_given
from sdcompress.cli._types import NAME, TEXT, FilePath
from sdcompress.data.config import DataConfig
from sdcompress.train.config import LoopConfig

if TYPE_CHECKING:
    from sdcompress_engines.progress import Reporter

    from sdcompress.data.cache import LatentCache
    from sdcompress.models.load import LoadedPipeline
    from sdcompress.train.loop import TrainResult
    from sdcompress.train.recipes import Config

DATA_HELP = "Folder of captioned pictures, webdataset shards (folder, glob or brace list), or nano."
TRAINING_FIELDS = (
    "steps",
    "batch_size",
    "learning_rate",
    "precision",
    "checkpoint_every",
    "sample_every",
    "validation_prompts",
    "seed",
)
"""The fields that have an option of their own, in the kinds of training that have them; `--set` reaches the others."""

data_options = field_options(
    DataConfig, metavars={"where": "CONDITION", "captions": "COLUMN[=SHARE]", "max_unusable": "SHARE"}
)
"""Adds the options that choose the pictures of a data set and how they are cropped."""


def set_option(help: str) -> Callable[[Any], Any]:
    """Returns the decorator for `--set KNOB=VALUE`, which can be repeated."""
    return click.option("--set", "settings", type=TEXT, multiple=True, metavar="KNOB=VALUE", help=help)


@dataclass(frozen=True)
class TrainingArguments:
    """What was typed for a training, of the options that every kind of it has.

    Attributes:
        data: what `open_source` takes.
        cache_folder: None for the folder beside the output.
        recipe: name or file, or None.
        settings: values of `--set`.
        resume: continue the training in `output`.
        output: the training folder.
        force: replace `output`.
        knobs: values of the options that set a field of the configuration or of its data section, by name.
    """

    data: str
    cache_folder: Path | None
    recipe: str | None
    settings: tuple[str, ...]
    resume: bool
    output: Path
    force: bool
    knobs: Mapping[str, Any]

    def read_config(self, config_class: type[Config]) -> Config:
        """Returns the resolved configuration of this kind of training.

        Raises:
            UsageError: as `load_config`.
        """
        from sdcompress.train.recipes import load_config

        options = dict(self.knobs)
        data = pop_data_overrides(options)
        overrides = pop_given(config_class, options) | ({"data": data} if data else {})
        return load_config(config_class, self.recipe, overrides, self.settings)


def training_options(
    config_class: type[LoopConfig], output_help: str, flags: Mapping[str, str] | None = None
) -> Callable[[Any], Any]:
    """Returns the decorator that adds the options for data, recipe and the most used knobs, `-o` and `--force`.

    The command gets them as one argument, `run`, a `TrainingArguments`. So it does with other options that set a field
    of the configuration.

    Args:
        config_class: of this kind of training; it gives the defaults.
        output_help: help text of `-o`.
        flags: as of `field_options`.
    """
    decorators = (
        click.option("--data", type=NAME, required=True, metavar="DATA", help=DATA_HELP),
        click.option(
            "--cache",
            "cache_folder",
            type=FilePath(),
            default=None,
            metavar="DIR",
            help="Latents and text embeddings; encoded now if the folder does not exist."
            "  [default: beside the output, DIR-cache]",
        ),
        click.option(
            "--recipe",
            type=NAME,
            default=None,
            metavar="NAME|FILE",
            help="Named settings (`sdcompress recipes list`) in place of the defaults; the options override them.",
        ),
        set_option("Any knob of the recipe, such as ema_decay=0.999 or data.flip=true; repeat for more."),
        field_options(
            config_class, [name for name in TRAINING_FIELDS if name in config_class.model_fields], flags=flags
        ),
        click.option("--resume", is_flag=True, help="Continue from the newest intact checkpoint in the output folder."),
        output_option(output_help),
        force_option,
        data_options,
    )
    shared = {field.name for field in fields(TrainingArguments)} - {"knobs"}
    knobs = {*config_class.model_fields, *DataConfig.model_fields} - shared

    def decorate(function: Any) -> Any:
        @wraps(function)
        def gather(**options: Any) -> Any:
            given = {name: options.pop(name) for name in shared}
            run = TrainingArguments(**given, knobs={name: options.pop(name) for name in knobs & options.keys()})
            return function(run=run, **options)

        for decorator in reversed(decorators):
            gather = decorator(gather)
        return gather

    return decorate


def pop_data_overrides(options: dict[str, Any]) -> dict[str, Any]:
    """Remove the data options from `options`; returns those that were given, as a recipe's `data` section has them.

    Raises:
        UsageError: the share of a caption column is not a number.
    """
    return pop_given(DataConfig, options)


def load_inputs(
    model: str,
    run: TrainingArguments,
    config: LoopConfig,
    report: ConsoleReporter,
    *,
    files: Sequence[Path] = (),
    check: Callable[[LoadedPipeline], object] = lambda loaded: None,
    denoises: bool = True,
) -> tuple[LoadedPipeline, LatentCache]:
    """Returns the model and its cache: an existing cache is opened and checked, a missing one is built.

    Options and data are checked before the model is loaded.

    Args:
        model: path, hub id or built-in name.
        run: what was typed.
        config: of the training.
        report: shows the progress.
        files: what the training reads besides model, data and recipe.
        check: refuses what this kind of training cannot do with the model, before the data is encoded.
        denoises: the training trains the UNet, so that its noise and inputs have to be known ones.

    Raises:
        ArtifactError: the output folder is not empty, or holds an input.
        BackendMissing: what the configuration needs is not installed.
        DataError: the cache does not fit the model, the data or the data options.
        ModelError: the model cannot be loaded, or not trained.
        UsageError: no such data or model.
    """
    from sdcompress.data.build_cache import build_cache
    from sdcompress.data.cache import LatentCache
    from sdcompress.data.sources import open_source
    from sdcompress.models.load import load_pipeline
    from sdcompress.models.locate import local_paths
    from sdcompress.support.pipeline import native_size_px
    from sdcompress.train.accelerator import check_settings
    from sdcompress.train.pipelines import check_trainable
    from sdcompress.train.recipes import recipe_files

    check_settings(config)
    source, output = open_source(run.data, config.data), run.output.absolute()
    folder = run.cache_folder or output.parent / f"{output.name}-cache"
    _check_output(run, [*local_paths(model), *source.inputs, folder, *recipe_files(run.recipe), *files])
    loaded = load_pipeline(model)
    if denoises:
        check_trainable(loaded.pipeline)
    check(loaded)
    size_px = config.data.size_px or native_size_px(loaded.pipeline)
    if not folder.exists():
        return loaded, build_cache(source, loaded, folder, size_px, config=config.data, report=report)
    cache = LatentCache.open(folder, loaded.sha256, source, size_px, config.data)
    drawn = f", {cache.drawn:,} with the teacher's own latents" if cache.drawn else ""
    report.show_line(f"cache: {len(cache):,} pictures in {folder}{drawn}")
    return loaded, cache


def _check_output(run: TrainingArguments, inputs: Sequence[Path]) -> None:
    from sdcompress_engines.output_folders import check_free

    from sdcompress.support.console import is_first_process
    from sdcompress.train.run_folder import check_resumable

    if run.resume:
        check_resumable(run.output, inputs)
    elif is_first_process():  # which may have made the folder before another one looks
        check_free(run.output, run.force, inputs, in_place=True)


def folder_size_bytes(folder: Path) -> int:
    """Returns the size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def note_few_steps(model: LoadedPipeline, report: Reporter) -> None:
    """Show that an ordinary training of a few-step model does not keep how it draws in few steps.

    Args:
        model: to be trained.
        report: shows the line.
    """
    from sdcompress.families.sampling_defaults import sampling_defaults

    defaults = sampling_defaults(model.pipeline)
    if defaults.is_few_step:
        report.show_line(
            f"{model.name} draws in {defaults.num_inference_steps} steps, which this training does not keep up: better"
            " train the model before it, and let few-step be the last"
        )


def result_rows(result: TrainResult) -> list[tuple[str, object]]:
    """Returns the rows of a training's closing card that say how the training ended."""
    rows: list[tuple[str, object]] = [
        ("training steps", f"{result.steps}" + (f" (resumed at {result.resumed_from})" if result.resumed_from else "")),
        ("losses", ", ".join(f"{k} {v:.4f}" for k, v in result.losses.items())),
        (
            "time",
            f"{result.seconds:.0f} s, {result.samples_per_s:.1f} pictures/s, {result.waited_s:.1f} s waiting for data",
        ),
    ]
    if result.peak_memory_mib is not None:
        rows.append(("memory", f"{result.peak_memory_mib:,.0f} MiB at most on the GPU"))
    return rows


def suggest_training(teacher: str, data: Path) -> str:
    """Returns the command that trains on a data set that a model drew: distillation, or finetuning of a student."""
    from sdcompress.families.registry import family_of
    from sdcompress.generate.dataset import is_export
    from sdcompress.models.locate import read_unet_config

    name, command, output = command_line([as_argument(teacher)]), "distill", "student"
    if is_export(teacher):
        name = "TEACHER"
    elif family_of(config := read_unet_config(teacher)).student_of(config) is not None:
        name, command, output = "MODEL", "finetune", "finetuned"
    return f"sdcompress {command} {name} --data {command_line([str(data)])} -o {output}"
