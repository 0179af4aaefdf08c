"""`sdcompress recipes`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdcompress.cli._console import card, json_option

if TYPE_CHECKING:
    from pydantic import BaseModel

    from sdcompress.train.config import TrainConfig

TRAINERS = {"distill": "distill TEACHER", "finetune": "finetune MODEL", "lora": "lora train MODEL"}


@click.group()
def command() -> None:
    """Named settings for distill, finetune and lora train: list, read, copy and check them.

    \b
      sdcompress recipes list
      sdcompress recipes show segmind-tiny
      sdcompress recipes copy segmind-tiny mine.yaml
      sdcompress recipes validate mine.yaml --set learning_rate=1e-5
    """


@command.command("list")
@json_option
def list_recipes(as_json: bool) -> None:
    """The recipes that come with sdcompress.

    \b
      sdcompress recipes list
    """
    import json

    from sdcompress.train.recipes import recipe_names, recipe_path

    facts = []
    for name in recipe_names():
        kind, config = resolved(name)
        facts.append(
            {
                "name": name,
                "kind": kind,
                "purpose": purpose(recipe_path(name).read_text(encoding="utf-8")),
                "steps": config.steps,
                "batch_size": config.batch_size,
            }
        )
    if as_json:
        click.echo(json.dumps(facts))
        return
    width = max(len(str(fact["name"])) for fact in facts)
    for fact in facts:
        click.echo(
            f"{fact['name']:<{width}}  {fact['kind']:<8}  {fact['steps']:>7,} steps of {fact['batch_size']:>3} "
            f" {fact['purpose']}"
        )


@command.command()
@click.argument("recipe", metavar="NAME|FILE")
@click.option(
    "--resolved", "as_resolved", is_flag=True, help="Every knob with its value and what it means, defaults too."
)
def show(recipe: str, as_resolved: bool) -> None:
    """A recipe's text.

    \b
      sdcompress recipes show bk-sdm-tiny
      sdcompress recipes show bk-sdm-tiny --resolved
    """
    from sdcompress.train.recipes import read_recipe, recipe_path

    if as_resolved:
        kind, config = resolved(recipe)
        click.echo(f"kind: {kind}\n" + knobs(config), nl=False)
    else:
        read_recipe(recipe)
        click.echo(recipe_path(recipe).read_text(encoding="utf-8"), nl=False)


@command.command()
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
def copy(name: str, file: Path, force: bool) -> None:
    """Copy a recipe to FILE, to change it there.

    \b
      sdcompress recipes copy bk-sdm-tiny mine.yaml
    """
    from sdcompress_engines.errors import ArtifactError, UsageError, storage_errors

    from sdcompress.train.recipes import read_recipe, recipe_path

    if file.suffix not in (".yaml", ".yml"):
        raise UsageError(
            "is no name for a recipe", where=file, expected="FILE.yaml, by which --recipe tells a file from a name"
        )
    kind = trainer(read_recipe(name), name)
    if file.is_dir() or (file.exists() and not force):
        raise ArtifactError(
            "exists",
            where=file,
            hint="add --force to replace it, or choose another name" if file.is_file() else "choose another name",
        )
    with storage_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(recipe_path(name).read_text(encoding="utf-8"), encoding="utf-8")
    card(f"a copy of {name}", [("recipe", file), ("kind", kind)], f"sdcompress recipes validate {file}")


@command.command()
@click.argument("recipe", metavar="NAME|FILE")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KNOB=VALUE",
    help="Any knob, such as ema_decay=0.999 or data.flip=true; repeat for more.",
)
@json_option
def validate(recipe: str, settings: tuple[str, ...], as_json: bool) -> None:
    """Check a recipe: all faults at once, or the figures it stands for.

    \b
      sdcompress recipes validate mine.yaml
      sdcompress recipes validate segmind-tiny --set learning_rate=1e-5 --set batch_size=32
    """
    import json

    kind, config = resolved(recipe, settings)
    if as_json:
        click.echo(json.dumps({"kind": kind} | config.model_dump(mode="json")))
        return
    options = "".join(f" --set '{setting}'" for setting in settings)
    card(
        f"{recipe}: a recipe for {kind}",
        figures(config),
        f"sdcompress {TRAINERS[kind]} --data DATA --recipe {recipe}{options} -o DIR",
    )


def resolved(recipe: str, settings: tuple[str, ...] = ()) -> tuple[str, TrainConfig]:
    """A recipe's kind and configuration.

    Raises:
        UsageError: as `load_config`; a kind, a plan or a split of the batch that cannot be.
    """
    from sdcompress_engines.errors import UsageError

    from sdcompress.prune.plan import preset_name
    from sdcompress.train.config import KINDS, DistillConfig
    from sdcompress.train.recipes import load_config, read_recipe

    kind = trainer(read_recipe(recipe), recipe)
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


def trainer(values: dict[str, Any], recipe: str) -> str:
    """The kind of training a recipe is for.

    Raises:
        UsageError: there is no such kind.
    """
    import difflib

    from sdcompress_engines.errors import UsageError

    from sdcompress.train.config import KINDS

    kind = str(values.get("kind", "distill"))
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        raise UsageError(
            f"kind {kind!r}",
            where=recipe,
            expected=f"one of {', '.join(KINDS)}",
            hint=f"kind: {near[0]}" if near else None,
        )
    return kind


def purpose(text: str) -> str:
    """What a recipe is for: the first line of its heading that is no command; empty where it has none."""
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        words = line.lstrip("# ").rstrip()
        if words and not words.startswith("sdcompress "):
            return words
    return ""


def knobs(config: BaseModel, indent: str = "") -> str:
    """Every knob of a configuration as YAML, its description above it; read back, it is the same configuration."""
    import yaml
    from pydantic import BaseModel

    text = ""
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        text += f"{indent}# {info.description}\n"
        if isinstance(value, BaseModel):
            text += f"{indent}{name}:\n{knobs(value, indent + '  ')}"
        else:
            plain = list(value) if isinstance(value, tuple) else value
            text += indent + yaml.safe_dump(
                {name: plain},
                default_flow_style=None if isinstance(plain, list | dict) else False,
                allow_unicode=True,
                width=10_000,
            )
    return text


def figures(config: TrainConfig) -> list[tuple[str, object]]:
    """The figures of a configuration that decide a run, for people."""
    from sdcompress.train.config import DistillConfig, LoraConfig

    passes = (
        f", in {config.gradient_accumulation} passes of {config.batch_size // config.gradient_accumulation}"
        if config.gradient_accumulation > 1
        else ""
    )
    warmup = f" after {config.lr_warmup_steps} of warm-up" if config.lr_warmup_steps else ""
    data = config.data.model_dump(exclude_defaults=True)
    rows: list[tuple[str, object]] = [
        ("steps", f"{config.steps:,}"),
        ("batch", f"{config.batch_size}{passes}"),
        ("pictures seen", f"{config.steps * config.batch_size:,}"),
        ("learning rate", f"{config.learning_rate:g}, {config.lr_schedule}{warmup}"),
        (
            "optimizer",
            f"{config.optimizer}, weight decay {config.weight_decay:g}, gradient norm {config.max_grad_norm:g}"
            + (f", average {config.ema_decay:g}" if config.ema_decay else ""),
        ),
        ("precision", config.precision + (", gradient checkpointing" if config.gradient_checkpointing else "")),
        (
            "data",
            ", ".join(f"{name} {value}" for name, value in data.items()) or "all pictures, at the UNet's own size",
        ),
    ]
    if isinstance(config, DistillConfig):
        weights = {
            "task": config.task_weight,
            "output": config.output_kd_weight,
            "feature": config.feature_kd_weight,
            "attention": config.attention_kd_weight,
        }
        rows += [
            ("plan", config.plan or "--plan decides"),
            ("losses", ", ".join(f"{name} x {weight:g}" for name, weight in weights.items() if weight)),
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
