"""`sdcompress recipes`: list, show, copy and check named settings for training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from sdcompress_engines.command import as_argument, command_line

from sdcompress.cli._console import card, echo, json_option, print_json
from sdcompress.cli._training import set_option
from sdcompress.cli._types import NAME, FilePath

if TYPE_CHECKING:
    from pydantic import BaseModel

    from sdcompress.train.config import LoopConfig

TRAINERS = {
    "distill": "distill TEACHER",
    "few-step": "few-step MODEL",
    "finetune": "finetune MODEL",
    "lora": "lora train MODEL",
    "decoder": "distill-decoder TEACHER",
}


@click.group()
def command() -> None:
    """List, show, copy and check recipes: named settings for every kind of training.

    \b
      sdcompress recipes list
      sdcompress recipes show segmind-tiny
      sdcompress recipes copy segmind-tiny mine.yaml
      sdcompress recipes validate mine.yaml --set learning_rate=1e-5
    """


@command.command("list")
@json_option
def list_recipes(as_json: bool) -> None:
    """List the recipes that come with sdcompress.

    \b
      sdcompress recipes list
    """
    from sdcompress.train.recipes import recipe_names, recipe_path

    facts = []
    for name in recipe_names():
        kind, config = resolve_recipe(name)
        facts.append(
            {
                "name": name,
                "kind": kind,
                "purpose": read_purpose(recipe_path(name).read_text(encoding="utf-8")),
                "steps": config.steps,
                "batch_size": config.batch_size,
            }
        )
    if as_json:
        print_json(facts)
        return
    width = max(len(str(fact["name"])) for fact in facts)
    for fact in facts:
        echo(
            f"{fact['name']:<{width}}  {fact['kind']:<8}  {fact['steps']:>7,} steps of {fact['batch_size']:>3} "
            f" {fact['purpose']}"
        )


@command.command()
@click.argument("recipe", type=NAME, metavar="NAME|FILE")
@click.option(
    "--resolved", "as_resolved", is_flag=True, help="Print every knob with its value and meaning, defaults included."
)
def show(recipe: str, as_resolved: bool) -> None:
    """Print a recipe.

    \b
      sdcompress recipes show bk-sdm-tiny
      sdcompress recipes show bk-sdm-tiny --resolved
    """
    from sdcompress.train.recipes import read_recipe, recipe_path

    if as_resolved:
        kind, config = resolve_recipe(recipe)
        echo(f"kind: {kind}\n" + render_config(config), newline=False)
    else:
        read_recipe(recipe)
        echo(recipe_path(recipe).read_text(encoding="utf-8"), newline=False)


@command.command()
@click.argument("name", type=NAME)
@click.argument("file", type=FilePath())
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
def copy(name: str, file: Path, force: bool) -> None:
    """Copy a recipe to FILE, where you can change it.

    \b
      sdcompress recipes copy bk-sdm-tiny mine.yaml
    """
    from sdcompress_engines.errors import UsageError
    from sdcompress_engines.output_folders import check_file, staged_file

    from sdcompress.train.recipes import read_recipe, recipe_path

    if file.suffix not in (".yaml", ".yml"):
        raise UsageError(
            "is not a file name for a recipe",
            where=file,
            expected="a name ending in .yaml or .yml; --recipe reads any other text as the name of a recipe",
        )
    kind = read_kind(read_recipe(name), name)
    check_file(file, [recipe_path(name)], replace=force)
    with staged_file(file) as partial:
        partial.write_text(recipe_path(name).read_text(encoding="utf-8"), encoding="utf-8")
    card(
        f"a copy of {name}",
        [("recipe", file), ("kind", kind)],
        f"sdcompress recipes validate {command_line([as_argument(file)])}",
    )


@command.command()
@click.argument("recipe", type=NAME, metavar="NAME|FILE")
@set_option("Any knob, such as ema_decay=0.999 or data.flip=true; repeat for more.")
@json_option
def validate(recipe: str, settings: tuple[str, ...], as_json: bool) -> None:
    """Check a recipe: print its main figures, or all errors at once.

    \b
      sdcompress recipes validate mine.yaml
      sdcompress recipes validate segmind-tiny --set learning_rate=1e-5 --set batch_size=32
    """
    kind, config = resolve_recipe(recipe, settings)
    if as_json:
        print_json({"kind": kind} | config.model_dump(mode="json"))
        return
    options = "".join(f" {command_line(['--set', setting])}" for setting in settings)
    card(
        f"{recipe}: a recipe for {kind}",
        figure_rows(config),
        f"sdcompress {TRAINERS[kind]} --data DATA --recipe {command_line([recipe])}{options} -o DIR",
    )


def resolve_recipe(recipe: str, settings: tuple[str, ...] = ()) -> tuple[str, LoopConfig]:
    """Returns a recipe's kind and configuration.

    Raises:
        UsageError: as `load_config`; an unknown kind or plan; a batch that does not divide into its passes.
    """
    from sdcompress_engines.errors import UsageError

    from sdcompress.prune.presets import preset_name
    from sdcompress.train.config import KINDS, DistillConfig
    from sdcompress.train.recipes import load_config, read_recipe

    kind = read_kind(read_recipe(recipe), recipe)
    config = load_config(KINDS[kind], recipe, {}, settings)
    if config.batch_size % config.gradient_accumulation:
        raise UsageError(
            f"batch_size {config.batch_size} does not divide into {config.gradient_accumulation} accumulation steps",
            where=recipe,
            expected=f"a multiple of {config.gradient_accumulation}",
        )
    if isinstance(config, DistillConfig) and config.plan is not None and Path(config.plan).suffix != ".json":
        preset_name(config.plan)
    return kind, config


def read_kind(values: dict[str, Any], recipe: str) -> str:
    """Returns the kind of training that a recipe is for: distill where it has none.

    Raises:
        UsageError: there is no such kind.
    """
    import difflib

    from sdcompress_engines.errors import UsageError, shorten

    from sdcompress.train.config import KINDS

    kind = shorten(values.get("kind", "distill"), 60)
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        raise UsageError(
            f"kind {kind!r}",
            where=recipe,
            expected=f"one of {', '.join(KINDS)}",
            hint=f"kind: {near[0]}" if near else None,
        )
    return kind


def read_purpose(text: str) -> str:
    """Returns the first line of a recipe's heading that is not a command, or an empty text."""
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        words = line.lstrip("# ").rstrip()
        if words and not words.startswith("sdcompress "):
            return words
    return ""


def render_config(config: BaseModel, indent: str = "") -> str:
    """Returns a configuration as YAML, each knob below its description; it reads back as the same configuration."""
    from pydantic import BaseModel

    from sdcompress.support.yaml_files import write_yaml

    text = ""
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        text += f"{indent}# {info.description}\n"
        if isinstance(value, BaseModel):
            text += f"{indent}{name}:\n{render_config(value, indent + '  ')}"
        else:
            plain = list(value) if isinstance(value, tuple) else value
            text += indent + write_yaml({name: plain})
    return text


def figure_rows(config: LoopConfig) -> list[tuple[str, object]]:
    """Returns the rows of the card: the figures of a configuration that decide a run."""
    from sdcompress.train.config import DecoderConfig, DistillConfig, LoraConfig, TrainConfig

    passes = (
        f", in {config.gradient_accumulation} passes of {config.batch_size // config.gradient_accumulation}"
        if config.gradient_accumulation > 1
        else ""
    )
    warmup = f" after {config.lr_warmup_steps} of warm-up" if config.lr_warmup_steps else ""
    data = config.data.model_dump(exclude_defaults=True)
    is_checkpointed = isinstance(config, TrainConfig) and config.gradient_checkpointing
    rows: list[tuple[str, object]] = [
        ("steps", f"{config.steps:,}"),
        ("batch", f"{config.batch_size}{passes}"),
        ("pictures seen", f"{config.steps * config.batch_size:,}"),
        ("learning rate", f"{config.learning_rate:g}, {config.lr_schedule}{warmup}"),
        (
            "optimizer",
            f"{config.optimizer}, weight decay {config.weight_decay:g}, gradient norm {config.max_grad_norm:g}"
            + (f", EMA decay {config.ema_decay:g}" if config.ema_decay else ""),
        ),
        ("precision", config.precision + (", gradient checkpointing" if is_checkpointed else "")),
        (
            "data",
            ", ".join(f"{name} {value}" for name, value in data.items()) or "all pictures, at the UNet's own size",
        ),
    ]
    if isinstance(config, DistillConfig):
        weights = {
            name.removesuffix("_loss").removesuffix("_kd"): weight for name, weight in config.loss_weights().items()
        }
        rows += [
            ("plan", config.plan or "not set; --plan chooses it"),
            ("losses", ", ".join(f"{name} x {weight:g}" for name, weight in weights.items() if weight)),
        ]
    if isinstance(config, DecoderConfig):
        rows += [
            ("decoder", f"{config.width} channels, blocks {', '.join(map(str, config.blocks))}"),
            ("losses", f"pixels x {config.pixel_weight:g}, LPIPS ({config.lpips_net}) x {config.lpips_weight:g}"),
        ]
    if isinstance(config, LoraConfig):
        rows.append(
            (
                "adapter",
                f"rank {config.rank}, alpha {config.alpha or config.rank:g}, on {', '.join(config.targets)}"
                + (", text encoder too" if config.text_encoder else ""),
            )
        )
    return rows
