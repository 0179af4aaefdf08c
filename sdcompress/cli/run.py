"""`sdcompress run`: every stage in turn, each skipped when its artifact is there and whole."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click

from sdcompress.cli._console import ConsoleReporter, card, force_option, mib, millions, output_option

MARKER = "run.json"


@click.command()
@click.argument("teacher")
@click.option(
    "--data",
    required=True,
    metavar="DATA",
    help="Folder of captioned pictures, webdataset shards (folder or glob), or nano.",
)
@click.option(
    "--plan",
    "plans",
    multiple=True,
    default=("bk-tiny",),
    show_default=True,
    help="bk-base, bk-small, bk-tiny, or a plan.json; repeat for several students.",
)
@click.option("--recipe", default=None, metavar="NAME|FILE", help="Training settings, e.g. nano.")
@click.option("--steps", type=int, default=None, help="Training steps; overrides the recipe.")
@click.option(
    "--compute-capability",
    default=None,
    metavar="MAJOR.MINOR",
    help="Card to build engines for.  [default: the one here, else 8.0 and newer]",
)
@click.option(
    "--prompts",
    "prompts_file",
    type=click.Path(path_type=Path),
    default=None,
    metavar="FILE",
    help="Captions for the report, one a line.",
)
@click.option("--quick", is_flag=True, help="A shorter bench: a look, not figures to quote.")
@output_option("Folder of the run; an earlier run in it is continued.")
@force_option
def command(
    teacher: str,
    data: str,
    plans: tuple[str, ...],
    recipe: str | None,
    steps: int | None,
    compute_capability: str | None,
    prompts_file: Path | None,
    quick: bool,
    output: Path,
    force: bool,
) -> None:
    """Take TEACHER the whole way: plan → distill → export → engine → bench. Type it again to go on after a stop.

    \b
      sdcompress run nano --data nano --recipe nano -o demo
      sdcompress run ./realistic-vision-v4 --data ./pictures --plan sd-small --plan sd-tiny --steps 50000 -o rv4
    """
    run(
        teacher,
        data,
        plans,
        recipe,
        {"steps": steps},
        output,
        compute_capability=compute_capability,
        prompts_file=prompts_file,
        quick=quick,
        force=force,
    )


@dataclass
class _Stages:
    """Runs a stage unless its artifact is there, whole, and made from the same inputs."""

    report: ConsoleReporter
    total: int
    done: int = 0

    def __call__(
        self,
        label: str,
        folder: Path,
        kind: str,
        inputs: dict[str, str],
        make: Callable[[], Any],
        config: dict[str, Any] | None = None,
    ) -> None:
        from sdcompress_engines.manifest import faults, read_manifest

        self.done += 1
        head = f"[{self.done}/{self.total}] {label}"
        if folder.is_dir() and not faults(folder, kind):
            manifest = read_manifest(folder)
            if (
                manifest is not None
                and inputs.items() <= manifest.inputs.items()
                and (config or {}).items() <= manifest.config.items()
            ):
                self.report.say(f"{head}: there already, {folder}")
                return
        started = time.monotonic()
        self.report.say(head)
        make()
        self.report.say(f"{head}: {time.monotonic() - started:.0f} s")


def run(
    teacher: str,
    data: str,
    plans: tuple[str, ...],
    recipe: str | None,
    overrides: dict[str, Any],
    output: Path,
    *,
    compute_capability: str | None = None,
    prompts_file: Path | None = None,
    quick: bool = False,
    force: bool = False,
) -> None:
    """The chain behind `run` and `demo`; prints the closing card."""
    from sdcompress_engines.errors import UsageError
    from sdcompress_engines.manifest import MANIFEST_NAME, check_free, sha256_file, sha256_tree, storage_errors

    from sdcompress.data.sources import open_source
    from sdcompress.models.load import load_pipeline
    from sdcompress.models.locate import refuse_student, unet_config
    from sdcompress.prune.plan import read_plan
    from sdcompress.train.config import DistillConfig
    from sdcompress.train.recipes import load_config

    capability = None
    if compute_capability is not None:
        try:
            major, minor = compute_capability.split(".")
            capability = [(int(major), int(minor))]
        except ValueError as error:
            raise UsageError(
                f"--compute-capability {compute_capability!r}", expected="major.minor, such as 8.9"
            ) from error
    config = load_config(DistillConfig, recipe, overrides)
    theirs = unet_config(teacher)
    refuse_student(theirs, teacher)
    chosen = {
        plan.name if plan.name != "custom" else Path(name).stem: plan
        for name in plans
        for plan in [read_plan(name, theirs)]
    }
    source = open_source(data, config.data)
    if force or not (output / MARKER).is_file():
        check_free(output, force)
    with storage_errors(output):
        if force and output.is_dir():
            shutil.rmtree(output)
        output.mkdir(parents=True, exist_ok=True)
        (output / MARKER).write_text(
            json.dumps({"teacher": teacher, "data": data, "plans": list(plans), "recipe": recipe}) + "\n",
            encoding="utf-8",
        )

    import torch
    from sdcompress_bench.scenario import ModelUnderTest
    from sdcompress_engines.runners import available

    from sdcompress.data.build_cache import build_cache
    from sdcompress.data.cache import LatentCache, default_size_px
    from sdcompress.export.onnx import export_onnx
    from sdcompress.export.tensorrt import build_engines
    from sdcompress.train.distill import distill
    from sdcompress.train.run_folder import PIPELINE

    report = ConsoleReporter()
    started = time.monotonic()
    gpu = torch.cuda.is_available()
    reasons = available("cuda" if gpu else "cpu")
    # An engine for a card that is not here is built ahead of time by TensorRT for RTX; it needs no device, only the
    # library.
    builder = _builder()
    graphs_to_write = 0 if reasons["onnxruntime"] else 1 + len(chosen)
    engines_to_build = 0 if builder is not None else 2 * (len(chosen) + gpu)
    stages = _Stages(report, 2 + len(chosen) + graphs_to_write + engines_to_build)
    loaded = load_pipeline(teacher)
    pipeline: Any = loaded.pipeline
    size_px = config.data.size_px or default_size_px(pipeline)

    cache_folder = output / "cache"
    stages(
        "encode the data",
        cache_folder,
        "cache",
        {"teacher": loaded.sha256},
        lambda: build_cache(source, loaded, cache_folder, size_px, config=config.data, force=True, report=report),
        {"files": source.fingerprint(), "size_px": size_px},
    )
    cache = LatentCache.open(cache_folder, loaded.sha256)
    exported: dict[str, Path] = {}
    graphs: dict[str, Path] = {}
    engines: dict[str, Path] = {}

    def export(name: str, model: str | Path, sha256: str) -> None:
        def make(precision: Literal["fp32", "fp16"], folder: Path) -> None:
            export_onnx(
                load_pipeline(model).pipeline,
                folder,
                precision=precision,
                source={"pipeline": sha256},
                reuse=exported.get(precision),
                force=True,
                report=report,
            )

        if not reasons["onnxruntime"]:
            graphs[name] = output / name / "onnx"
            stages(
                f"export {name} to ONNX", graphs[name], "onnx", {"pipeline": sha256}, lambda: make("fp32", graphs[name])
            )
            exported.setdefault("fp32", graphs[name])
        if builder is None and (gpu or name != loaded.name):
            half, engines[name] = output / name / "onnx-fp16", output / name / "engine"
            stages(f"export {name} in fp16", half, "onnx", {"pipeline": sha256}, lambda: make("fp16", half))
            exported.setdefault("fp16", half)
            made_from = {"onnx": sha256_file(half / MANIFEST_NAME)}
            stages(
                f"build {name} as a TensorRT engine",
                engines[name],
                "engine",
                made_from,
                lambda: build_engines(half, engines[name], compute_capabilities=capability, force=True, report=report),
            )

    models: list[tuple[str, str, str, Path | None]] = [(loaded.name, teacher, loaded.sha256, None)]
    export(loaded.name, teacher, loaded.sha256)
    for name, plan in chosen.items():
        training = output / name
        student = training / PIPELINE

        def make(plan: Any = plan, training: Path = training) -> None:
            resume = (training / "checkpoints").is_dir()
            distill(loaded, plan, cache, config, training, resume=resume, force=not resume, report=report)

        stages(
            f"distill {name}",
            student,
            "student",
            {"teacher": loaded.sha256, "data": cache.sha256},
            make,
            {"train": config.model_dump(mode="json")},
        )
        sha256 = sha256_tree(student)
        models.append((name, str(student), sha256, training / "metrics.jsonl"))
        export(name, student, sha256)
    tested = tuple(
        ModelUnderTest(name, path, graphs.get(name), engines.get(name) if gpu else None, sha256, metrics)
        for name, path, sha256, metrics in models
    )
    report_folder = output / "report"
    results = _bench(stages, tested, size_px, prompts_file, quick, report_folder, report)

    rows: list[tuple[str, object]] = []
    for model in results.models:
        name = model["name"]
        sizes = [f"UNet {millions(model['parameters']['unet'])} parameters"]
        sizes += [
            f"{kind} {mib((folders[name] / file).stat().st_size)}"
            for kind, folders, file in (("ONNX", graphs, "unet.onnx"), ("engine", engines, "unet.engine"))
            if name in folders
        ]
        rows.append((name, ", ".join(sizes)))
        for row in results.rows():
            if row.model == name and row.unet_step is not None:
                faster = f", {row.speedup:.2f}× the teacher in PyTorch" if row.speedup else ""
                rows.append(
                    (
                        "",
                        (
                            f"{row.way}: UNet step {row.unet_step.median:.1f} ms, {row.images_per_s or 0:.2f}"
                            f" pictures/s{faster}"
                        ),
                    )
                )
        if name in results.students:
            rows.append(
                (
                    "",
                    (
                        f"noise prediction {results.students[name]['relative_l2_mean']:.3f} relative L2 from the"
                        " teacher's, mean over timesteps"
                    ),
                )
            )
        if name in results.quality and "style" in results.quality[name]:
            judged = results.quality[name]
            rows.append(
                (
                    "",
                    (
                        f"right style {judged['style']['share']:.0%}, right caption in the top 5"
                        f" {judged['top5']['share']:.0%}"
                    ),
                )
            )
    if builder is not None:
        rows.append(("no engine", builder))
    rows += [("time", f"{time.monotonic() - started:.0f} s"), ("report", report_folder / "report.html")]
    card(
        f"{loaded.name} → {', '.join(chosen)}",
        rows,
        f'sdcompress generate {output / next(iter(chosen)) / PIPELINE} "{results.captions[0]}" -o out.png',
    )


def _builder() -> str | None:
    """Returns None where a TensorRT flavour can build here, else why not."""
    from sdcompress_engines.errors import BackendMissing
    from sdcompress_engines.flavour import choose_flavour, present_card

    try:
        choose_flavour(None, present_card())
    except BackendMissing as error:
        return str(error)
    return None


def _bench(
    stages: _Stages,
    tested: tuple[Any, ...],
    size_px: int,
    prompts_file: Path | None,
    quick: bool,
    folder: Path,
    report: ConsoleReporter,
) -> Any:
    from sdcompress_bench.results import read_results
    from sdcompress_bench.suite import run_suite

    from sdcompress.cli.bench import QUICK, again, suite_of

    described: dict[str, Any] = {"models": [str(model.path) for model in tested], "size_px": size_px, "rounds": 3} | (
        QUICK if quick else {}
    )
    if prompts_file is not None:
        described["prompts"] = str(prompts_file)
    suite, skipped = suite_of(described, quick=quick, tested=tested)
    stages(
        "measure and write the report",
        folder,
        "results",
        {model.name: model.sha256 for model in tested},
        lambda: run_suite(suite, folder, report, force=True, skipped=skipped, command=again()),
    )
    return read_results(folder / "results.json")
