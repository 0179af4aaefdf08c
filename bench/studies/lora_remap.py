"""Do LoRAs of the whole model work on its students by remapping alone? nano's LoRAs for a new word on two students.

    python bench/studies/lora_remap.py -o bench/results/lora-remap-nano.json --work build/lora-remap

The word is that of `adapting.py`: "a sketch of ..." for line drawings. LoRAs are trained on nano and put on nano, then
without training on nano-tiny (bk-tiny) and on a bk-base student that the study distills, at several weights. Beside
them stands a LoRA of the same recipe that was trained on the student itself. For scale, each model is also judged
without a LoRA, with the new word and with the phrase that it knows for the style. The last rows tell what the LoRAs do
to other prompts. All arms draw the same prompts with the same seeds.

The share of a LoRA's norm that a student keeps is also computed for LoRAs of equal random entries in every layer, at
the shapes of SD 1.5 and of nano; this needs no weights.

Trained LoRAs and judged arms are kept, and the study goes on after them when it is started again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from sdcompress_bench.environment import environment
from sdcompress_bench.nano_students import open_cache
from sdcompress_bench.nano_word import STYLE, WORD, WordJudge, write_word_pictures
from sdcompress_engines.files import write_atomically
from sdcompress_engines.progress import Reporter

from sdcompress.data.build_cache import build_cache
from sdcompress.data.cache import LatentCache
from sdcompress.data.sources import open_source
from sdcompress.families.registry import published_families
from sdcompress.lora.adapters import Layers, LowRank
from sdcompress.lora.fuse import shapes_of
from sdcompress.lora.model_lora import LORA_COMPONENTS, read_model_lora
from sdcompress.lora.pipeline_loras import enable_loras
from sdcompress.lora.remap import remap_lora
from sdcompress.models.load import LoadedPipeline, load_pipeline
from sdcompress.prune.presets import PRESETS, make_plan
from sdcompress.prune.student import meta_unet
from sdcompress.support.console import ConsoleReporter
from sdcompress.train.config import DistillConfig, LoraConfig
from sdcompress.train.distill import distill
from sdcompress.train.lora import KOHYA_FILE, LORA, train_lora
from sdcompress.train.pipelines import PIPELINE
from sdcompress.train.recipes import load_config

TEACHER, TINY, BASE = "nano", "nano-tiny", "bk-base"
STUDENTS = (TINY, BASE)
WEIGHTS, OTHER_WEIGHTS = (0.5, 1.0, 1.5, 2.0), (1.0, 1.5)
"""Weights of remapped LoRAs: of `MAIN_KIND`, and of the other kinds."""
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
KINDS: dict[str, dict[str, Any]] = {
    "attention": {"targets": ATTENTION},
    "attention and text encoder": {"targets": ATTENTION, "text_encoder": True},
}
"""Kind of LoRA → what its config sets beside the recipe."""
MAIN_KIND = "attention"
RANDOM_RANK = 16

PromptKind = Literal["word", "known phrase", "others"]


@dataclass(frozen=True)
class Arm:
    """A model with or without a LoRA, and what it draws.

    Attributes:
        model: which draws.
        prompts: with the new word, with the known phrase, or without either.
        kind: of the LoRA, of `KINDS`; None without a LoRA.
        trained_on: the model that the LoRA was trained on.
        weight: of the LoRA.
        seed: of the LoRA's training.
    """

    model: str
    prompts: PromptKind = "word"
    kind: str | None = None
    trained_on: str | None = None
    weight: float = 0.0
    seed: int = 0


def list_arms(seeds: int, other_seeds: int) -> Iterator[Arm]:
    """Yield all arms, those of the main kind first.

    Args:
        seeds: number of LoRAs of the main kind on each model.
        other_seeds: number of LoRAs of each other kind on each model.
    """
    yield from (Arm(model, prompts) for prompts in ("word", "known phrase") for model in (TEACHER, *STUDENTS))
    for kind in KINDS:
        weights = WEIGHTS if kind == MAIN_KIND else OTHER_WEIGHTS
        for seed in range(seeds if kind == MAIN_KIND else other_seeds):
            on_teacher = weights if kind == MAIN_KIND and seed == 0 else (1.0,)
            yield from (Arm(TEACHER, "word", kind, TEACHER, weight, seed) for weight in on_teacher)
            for student in STUDENTS:
                yield from (Arm(student, "word", kind, TEACHER, weight, seed) for weight in weights)
                yield Arm(student, "word", kind, student, 1.0, seed)
    yield from (Arm(model, "others") for model in (TEACHER, *STUDENTS))
    yield Arm(TEACHER, "others", MAIN_KIND, TEACHER, 1.0)
    for student in STUDENTS:
        yield from (Arm(student, "others", MAIN_KIND, trained_on, 1.0) for trained_on in (TEACHER, student))


class RemapStudy:
    """Trains LoRAs and judges arms; what is there already is not repeated.

    Args:
        models: by name; each exchanges its LoRAs.
        judge: of the pictures.
        work: folder for LoRAs, caches and rows.
        report: shows progress.
    """

    def __init__(self, models: dict[str, LoadedPipeline], judge: WordJudge, work: Path, report: Reporter) -> None:
        self.models, self.judge, self.work, self.report = models, judge, work, report
        for model in models.values():
            enable_loras(model.pipeline, model.plan, report)

    def label(self, model: str) -> str:
        """Returns a model's name with the start of its hash, for the names of files that depend on its weights."""
        return f"{model}-{self.models[model].sha256[:8]}"

    def row_file(self, arm: Arm) -> Path:
        """Returns the file that keeps an arm's row."""
        trained_on = self.label(arm.trained_on) if arm.trained_on else "none"
        parts = (self.label(arm.model), arm.prompts, arm.kind, "of", trained_on, arm.weight, arm.seed)
        name = "-".join(str(part).replace(" ", "-") for part in parts)
        return self.work / f"rows-{len(self.judge.captions)}" / f"{name}.json"

    def judge_arm(self, arm: Arm) -> dict[str, Any]:
        """Returns the row of an arm: what it is, its figures, and what the model keeps of a remapped LoRA."""
        kept = self.row_file(arm)
        if kept.is_file():
            row: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
            return row
        pipeline, loras = self.models[arm.model].pipeline, []
        row = asdict(arm)
        if arm.kind is not None and arm.trained_on is not None:
            loras = [(self.train(arm.kind, arm.trained_on, arm.seed), arm.weight)]
            row |= self.describe_kept(loras[0][0], arm.model)
        draw_and_judge = {
            "word": self.judge.judge,
            "known phrase": self.judge.judge_known_phrase,
            "others": self.judge.judge_others,
        }
        pipeline.set_loras(loras)
        row |= draw_and_judge[arm.prompts](pipeline)
        pipeline.set_loras([])
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, json.dumps(row))
        self.report.show_line(json.dumps(row))
        return row

    def describe_kept(self, file: Path, model: str) -> dict[str, Any]:
        """Returns the share of the LoRA's norm that a model keeps, and its number of UNet layers before and after."""
        loaded = self.models[model]
        networks = {name: shapes_of(getattr(loaded.pipeline, name, None)) for name in LORA_COMPONENTS}
        lora = read_model_lora(file, networks, loaded.plan)
        layers = sum(component == "unet" for component, _ in lora.layers)
        return {"kept_norm": lora.kept_norm, "unet_layers": layers, "unet_layers_of_lora": layers + lora.dropped}

    def train(self, kind: str, model: str, seed: int) -> Path:
        """Returns the file of a LoRA of a kind that was trained on a model."""
        folder = self.work / "loras" / f"{self.label(model)}-{kind.replace(' ', '-')}-{seed}"
        if not (folder / LORA).is_dir():
            config = load_config(LoraConfig, "nano-lora", {"sample_every": 0, "seed": seed} | KINDS[kind])
            resume = (folder / "checkpoints").is_dir()
            cache = self.open_pictures(model)
            train_lora(self.models[model], cache, config, folder, resume=resume, report=self.report)
        return folder / LORA / KOHYA_FILE

    def open_pictures(self, model: str) -> LatentCache:
        """Returns the cache of the pictures with the new word for a model."""
        folder, pictures = self.work / f"cache-{self.label(model)}", self.work / "pictures"
        if folder.is_dir():
            return LatentCache.open(folder, self.models[model].sha256)
        shutil.rmtree(pictures, ignore_errors=True)
        write_word_pictures(pictures)
        return build_cache(open_source(pictures), self.models[model], folder, report=self.report)


def distill_student(teacher: LoadedPipeline, steps: int, work: Path, report: Reporter) -> LoadedPipeline:
    """Returns the bk-base student of nano, distilled by the recipe nano unless it is there already.

    Args:
        teacher: nano.
        steps: of the training.
        work: folder for the run and the cache.
        report: shows progress.
    """
    folder = work / f"{BASE}-{steps}"
    if not (folder / PIPELINE).is_dir():
        cache = open_cache(teacher, work / "cache-distillation", report)
        config = load_config(DistillConfig, "nano", {"steps": steps, "sample_every": 0})
        resume = (folder / "checkpoints").is_dir()
        plan = make_plan(teacher.pipeline.unet.config, BASE)
        distill(teacher, plan, cache, config, folder, resume=resume, report=report)
    return load_pipeline(folder)


def measure_random_norms() -> list[dict[str, Any]]:
    """Returns what each preset keeps of LoRAs with equal random entries in every layer, for SD 1.5 and nano."""
    configs = {
        "SD 1.5": published_families()["sd1"].read_config("unet/config.json"),
        TEACHER: dict(load_pipeline(TEACHER).pipeline.unet.config),
    }
    rows = []
    for model, config in configs.items():
        shapes = shapes_of(meta_unet(config)) or {}
        for name, chosen in {
            "attention": [name for name in shapes if name.endswith(ATTENTION)],
            "transformers": [name for name in shapes if ".attentions." in name],
            "attention and convolutions": [
                name for name, shape in shapes.items() if name.endswith(ATTENTION) or _is_inner_conv(name, shape)
            ],
        }.items():
            layers = make_random_lora({name: shapes[name] for name in chosen})
            for preset in PRESETS:
                plan = make_plan(config, preset)
                found = remap_lora(layers, plan, shapes_of(meta_unet(plan.student_config())) or {})
                row = {"model": model, "lora": name, "plan": preset, "kept_norm": found.kept_norm}
                rows.append(row | {"unet_layers": len(found.layers), "unet_layers_of_lora": len(layers)})
    return rows


def _is_inner_conv(name: str, shape: tuple[int, ...]) -> bool:
    """Returns whether a layer is a convolution of a resnet or sampler, as LoCon adapts them."""
    return len(shape) == 4 and name not in ("conv_in", "conv_out") and ".attentions." not in name


def make_random_lora(shapes: dict[str, tuple[int, ...]]) -> Layers:
    """Returns a LoRA of rank 16 whose matrices have normal entries of variance 1 in every layer.

    Args:
        shapes: layer of the UNet → its weight's shape.
    """
    generator = torch.Generator().manual_seed(0)
    layers: Layers = {}
    for name, (rows, *columns) in shapes.items():
        down = torch.randn(RANDOM_RANK, *columns, generator=generator)
        up = torch.randn(rows, RANDOM_RANK, *(1 for _ in columns[1:]), generator=generator)
        layers["unet", name] = LowRank(down, up)
    return layers


def describe_arm(row: dict[str, Any]) -> str:
    """Returns what a row's model had and drew, without its name."""
    if row["kind"] is None:
        return 'no LoRA, "a black line drawing of ..."' if row["prompts"] == "known phrase" else "no LoRA"
    if row["model"] == row["trained_on"]:
        return f"{row['kind']}: trained on {row['model']}, weight {row['weight']:g}"
    return f"{row['kind']}: trained on nano, remapped, weight {row['weight']:g}"


def format_rows(rows: list[dict[str, Any]]) -> list[str]:
    """Returns the lines of a table: the mean over seeds (lowest to highest) of each arm."""
    lines = [
        "| model | LoRA | seeds | right style | right caption in the top 5 | norm kept | UNet layers kept |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (TEACHER, *STUDENTS).index(row["model"])):
        groups.setdefault((row["model"], describe_arm(row)), []).append(row)
    for (model, arm), found in groups.items():
        shares = (_format_spread([row[name] for row in found]) for name in ("style_accuracy", "retrieval_top5"))
        kept, layers = "", ""
        if found[0].get("kept_norm") is not None:
            kept = _format_spread([row["kept_norm"] for row in found])
            layers = f"{found[0]['unet_layers']} of {found[0]['unet_layers_of_lora']}"
        count = "" if found[0]["kind"] is None else str(len(found))
        lines.append(f"| {' | '.join((model, arm, count, *shares, kept, layers))} |")
    return lines


def _format_spread(values: list[float]) -> str:
    """Returns the mean of values, and the lowest and highest where they differ."""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return f"{statistics.fmean(values):.2f}" + (f" ({low} to {high})" if low != high else "")


def format_remap(result: dict[str, Any]) -> str:
    """Returns the results as Markdown."""
    rows, count, lora = result["rows"], result["prompts"], result["lora"]
    norms = ["| model | LoRA on | student | norm kept | UNet layers kept |", "|---|---|---|---|---|"]
    norms += [
        f"| {row['model']} | {row['lora']} | {row['plan']} | {row['kept_norm']:.2f}"
        f" | {row['unet_layers']} of {row['unet_layers_of_lora']} |"
        for row in result["random_norms"]
    ]
    return "\n".join(
        [
            f'LoRAs for "{result["word"]} ..." ({lora["steps"]} steps, rank {lora["rank"]}), put on nano and on its'
            f" students; concepts of {count} held-out pairs. nano-tiny is bk-tiny; bk-base was distilled for"
            f" {result['distillation_steps'][BASE]} steps. Of {result['seen_in_style']} concepts, line drawings were"
            " among the training pictures of nano and of the LoRAs.",
            "",
            *format_rows([row for row in rows if row["prompts"] != "others"]),
            "",
            f"The same {count} concepts prompted without the word, each in its held-out style: what the LoRA does to"
            " other prompts.",
            "",
            *format_rows([row for row in rows if row["prompts"] == "others"]),
            "",
            f"What a student keeps of a LoRA with equal random entries in every layer (rank {RANDOM_RANK}).",
            '"Attention" is to_q, to_k, to_v and to_out; "transformers" also the projections and feed-forward layers'
            " beside them; convolutions are those of resnets and samplers.",
            "",
            *norms,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where LoRAs, caches and judged arms are kept")
    parser.add_argument("--steps", type=int, default=600, help="of the distillation of bk-base")
    parser.add_argument("--seeds", type=int, default=3, help="LoRAs on attention alone, on each model")
    parser.add_argument("--other-seeds", type=int, default=1, help="LoRAs of each other kind, on each model")
    parser.add_argument("--prompts", type=int, default=100)
    args = parser.parse_args()
    report = ConsoleReporter()
    teacher = load_pipeline(TEACHER)
    models = {
        TEACHER: teacher,
        TINY: load_pipeline(TINY),
        BASE: distill_student(teacher, args.steps, args.work, report),
    }
    study = RemapStudy(models, WordJudge(args.prompts), args.work, report)
    recipe = load_config(LoraConfig, "nano-lora", {})
    trained = {record.caption for record in open_source("nano")}
    result = {
        "teacher_sha256": teacher.sha256,
        "student_sha256": {name: models[name].sha256 for name in STUDENTS},
        "distillation_steps": {BASE: args.steps},
        "word": WORD,
        "style": STYLE,
        "prompts": args.prompts,
        "seen_in_style": sum(prompt.caption in trained for prompt in study.judge.expected),
        "lora": {"steps": recipe.steps, "batch_size": recipe.batch_size, "rank": recipe.rank},
        "rows": [study.judge_arm(arm) for arm in list_arms(args.seeds, args.other_seeds)],
        "random_norms": measure_random_norms(),
        "environment": environment(),
    }
    table = format_remap(result)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output, json.dumps(result, indent=1, default=str) + "\n")
    write_atomically(args.output.with_suffix(".md"), table)
    print(table)


if __name__ == "__main__":
    main()
