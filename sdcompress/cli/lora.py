"""`sdcompress lora`: train a LoRA, or convert one for a student."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from sdcompress_engines.command import as_argument, command_line
from sdcompress_engines.errors import ModelError

from sdcompress.cli._console import ConsoleReporter, card, mib
from sdcompress.cli._options import field_options
from sdcompress.cli._training import TrainingArguments, load_inputs, note_few_steps, result_rows, training_options
from sdcompress.cli._types import NAME, FilePath
from sdcompress.train.config import LoraConfig

if TYPE_CHECKING:
    from sdcompress.lora.remap import RemappedLora
    from sdcompress.models.load import LoadedPipeline


@click.group()
def command() -> None:
    """Train a LoRA, or convert one for a student.

    \b
      sdcompress lora train nano-tiny --data ./pictures --recipe nano-lora -o style
      sdcompress lora train segmind/tiny-sd --data ./portraits -o portrait --set rank=32
      sdcompress lora remap detail-tweaker.safetensors --teacher ./rv4 --plan bk-tiny -o tweaker-tiny.safetensors
    """


@command.command()
@click.argument("model", type=NAME)
@field_options(LoraConfig, ("rank",))
@training_options(LoraConfig, "Training folder: checkpoints, metrics.jsonl, samples, and the LoRA under lora/.")
def train(
    model: str,
    run: TrainingArguments,
) -> None:
    """Train a LoRA for MODEL's attention layers. It is saved for diffusers and, in kohya's naming, for the WebUIs.

    \b
      sdcompress lora train nano-tiny --data ./pictures --recipe nano-lora -o style
      sdcompress lora train segmind/tiny-sd --data ./portraits -o portrait --set rank=32 --set text_encoder=true
    """
    from sdcompress.train.lora import FILE, KOHYA_FILE, LORA, check_adaptable, train_lora

    config = run.read_config(LoraConfig)
    report = ConsoleReporter()

    def check(loaded: LoadedPipeline) -> None:
        check_adaptable(loaded, config)
        note_few_steps(loaded, report)

    loaded, cache = load_inputs(model, run, config, report, check=check)
    result = train_lora(loaded, cache, config, run.output, resume=run.resume, force=run.force, report=report)
    folder = run.output / LORA
    rows: list[tuple[str, object]] = [
        ("diffusers", folder / FILE),
        ("WebUIs", folder / KOHYA_FILE),
        ("size", mib(sum(path.stat().st_size for path in folder.glob(FILE)))),  # other machines may not have it
    ]
    card(
        f"LoRA of rank {config.rank} for {loaded.name}",
        rows + result_rows(result),
        f'sdcompress generate {command_line([as_argument(model)])} "PROMPT"'
        f" {command_line(['--lora', str(folder / FILE)])} -o out.png",
    )


@command.command()
@click.argument("lora", type=FilePath())
@click.option(
    "--teacher",
    type=NAME,
    required=True,
    help="The model that the LoRA was trained for: a checkpoint, a hub id, or nano.",
)
@click.option(
    "--plan",
    "plan_name",
    type=NAME,
    default="bk-tiny",
    show_default=True,
    help="The student's block-removal plan: bk-base, bk-small, bk-tiny, or a plan.json.",
)
@click.option(
    "--naming",
    type=click.Choice(["kohya", "diffusers"]),
    default="kohya",
    show_default=True,
    help="The WebUIs read kohya.",
)
@click.option(
    "-o",
    "--output",
    type=FilePath(dir_okay=False),
    required=True,
    metavar="FILE",
    help="The student's LoRA, .safetensors.",
)
@click.option("--reverse", is_flag=True, help="FILE was trained on the student: name its layers as the teacher does.")
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
def remap(lora: Path, teacher: str, plan_name: str, naming: str, output: Path, reverse: bool, force: bool) -> None:
    """Convert a LoRA of the whole UNet into one for the student. `generate --lora` and the WebUIs' engines do this by
    themselves; a checkpoint of `export --ldm` needs the file.

    Layers of removed blocks are dropped; the card names them, and says how much of the change is kept. Reads LoRA,
    LoCon, LoHa, LoKr and DoRA. With --reverse, a LoRA of the student gets the names that a WebUI's loader knows.

    \b
      sdcompress lora remap detail-tweaker.safetensors --teacher ./rv4 --plan bk-tiny -o tweaker-tiny.safetensors
      sdcompress lora remap my-style.safetensors --teacher ./rv4 --plan bk-tiny --reverse -o my-style-whole.safetensors
    """
    from sdcompress_engines.output_folders import check_file

    from sdcompress.checkpoints.weights import open_weights
    from sdcompress.lora.files import read_lora, write_lora
    from sdcompress.lora.model_lora import UNET_ENTRY, WHOLE
    from sdcompress.lora.names import unet_modules
    from sdcompress.lora.remap import remap_lora, remap_to_teacher
    from sdcompress.lora.settings import kept_entries
    from sdcompress.models.locate import local_paths, read_unet_config
    from sdcompress.prune.presets import plan_files, read_plan
    from sdcompress.prune.student import meta_unet

    check_file(output, [lora, *plan_files(plan_name), *local_paths(teacher)], replace=force)
    plan = read_plan(plan_name, read_unet_config(teacher))
    student = unet_modules(meta_unet(plan.student_config()))
    layers = read_lora(lora, student if reverse else unet_modules(meta_unet(plan.teacher)))
    if reverse:
        written, rows = remap_to_teacher(layers, plan), list[tuple[str, object]]()
    else:
        remapped = remap_lora(layers, plan, student)
        written, rows = remapped.layers, _describe_kept(remapped)
        if not any(component == "unet" for component, _ in written):
            raise ModelError(f"changes only blocks that {plan.name} removes", where=lora)
    entries = kept_entries(open_weights(lora)) | {UNET_ENTRY: WHOLE if reverse else plan.name}
    write_lora(written, output, naming, entries)
    card(
        f"{lora.name} for {'the whole model' if reverse else plan.name}",
        [
            ("LoRA", output),
            ("size", mib(output.stat().st_size)),
            ("layers", f"{len(layers)} → {len(written)}"),
            *rows,
        ],
    )


def _describe_kept(remapped: RemappedLora) -> list[tuple[str, object]]:
    """Returns the card's rows on what a student keeps of a LoRA, and what it loses."""
    dropped: dict[str, int] = {}
    for name in remapped.dropped:
        block = ".".join(name.split(".")[:4] if name.startswith(("down", "up")) else name.split(".")[:3])
        dropped[block] = dropped.get(block, 0) + 1
    rows: list[tuple[str, object]] = [("kept", f"{remapped.kept_norm:.0%} of its change by norm")]
    return rows + [
        ("dropped" if i == 0 else "", f"{block}: {count} layers") for i, (block, count) in enumerate(dropped.items())
    ]
