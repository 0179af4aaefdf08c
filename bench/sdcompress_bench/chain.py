"""The chain behind `sdcompress run` and `sdcompress demo`: encode, distill, few steps, export, engines, measure.

Every stage leaves one artifact in the run's folder. A stage is skipped if its artifact is complete and was made from
the same inputs, so a run that was stopped continues with the first unfinished stage.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompress_engines.errors import SdCompressError, storage_errors
from sdcompress_engines.files import parents_made, write_atomically
from sdcompress_engines.graph import read_graph
from sdcompress_engines.leftovers import remove_partial_files
from sdcompress_engines.manifest import MANIFEST_NAME, sha256_file, sha256_tree
from sdcompress_engines.output_folders import begun_folder, check_free, check_inputs, locked, moved_aside
from sdcompress_engines.output_marks import RUN
from sdcompress_engines.progress import SILENT, Reporter

from .build_suite import QUICK, build_suite
from .chain_inputs import CACHE, REPORT, ChainSettings, FewStepStudent, Inputs, list_read, read_inputs
from .chain_machine import Machine, choose_cards, read_machine
from .chain_stages import Stage, StageRunner
from .export_jobs import ExportJob, count_workers, run_exports
from .outputs import count_weights
from .results import Results, read_results
from .scenario import ModelUnderTest
from .suite import describe_suite, run_suite

if TYPE_CHECKING:
    from sdcompress.data.cache import LatentCache
    from sdcompress.models.load import LoadedPipeline
    from sdcompress.prune.plan import BlockPlan
    from sdcompress.train.config import DistillConfig


@dataclass(frozen=True)
class ChainResult:
    """What a run made.

    Attributes:
        teacher: its name.
        students: student → its pipeline folder.
        few_step: the name of the student that draws in few steps, or None.
        graphs: model → the size of its UNet's ONNX graph, in bytes.
        engines: model → the size of its UNet's engine, in bytes.
        no_engine: why no engine was built, or None.
        results: the measurements.
        report: the report's page.
        seconds: of wall clock.
        stage_seconds: kind of artifact → seconds that its stages took in this run.
    """

    teacher: str
    students: Mapping[str, Path]
    few_step: str | None
    graphs: Mapping[str, int]
    engines: Mapping[str, int]
    no_engine: str | None
    results: Results
    report: Path
    seconds: float
    stage_seconds: Mapping[str, float]


def run_chain(settings: ChainSettings, report: Reporter = SILENT, command: str | None = None) -> ChainResult:
    """Take a teacher through every stage: data, graphs, students, engines and the report.

    Args:
        settings: what to do.
        report: gets the progress.
        command: what the report names as the command to type again; None takes this process's own.

    Raises:
        UsageError, PlanError, ModelError, DataError: the teacher, the plans, the data or the training settings are
            wrong. ArtifactError: the output is in the way, or another process is writing it. What a stage raises
            passes through.
    """
    inputs = read_inputs(settings)
    read = list_read(settings, inputs)
    if _continues(settings):
        check_inputs(settings.output, read)
    else:
        check_free(settings.output, settings.force, read, in_place=True)
    with locked(settings.output):
        return _run_alone(settings, inputs, report, command)


def _run_alone(settings: ChainSettings, inputs: Inputs, report: Reporter, command: str | None) -> ChainResult:
    """Do as `run_chain` does, while no other process writes the output."""
    from sdcompress.models.load import load_pipeline

    started = time.monotonic()
    machine = read_machine(settings.compute_capabilities)
    students = len(inputs.plans) + (inputs.few_step is not None)
    graphs = 1 + students if machine.onnxruntime else 0
    engines = 2 * (students + machine.gpu) if machine.no_engine is None else 0
    stages = StageRunner(report, 2 + students + graphs + engines)
    teacher = load_pipeline(settings.teacher)
    _check_teacher(teacher, inputs)
    with _begun_folder(settings):
        cache = _encode_data(stages, teacher, inputs, settings.output)
    with _continuable():
        parameters = sum(map(count_weights, teacher.pipeline.components.values()))
        exporter = _Exporter(stages, settings, machine, teacher.name, parameters)
        models = [ModelUnderTest(teacher.name, settings.teacher, sha256=teacher.sha256)]
        for name, plan in inputs.plans.items():
            models.append(_distill_student(stages, teacher, name, plan, cache, inputs.config, settings.output / name))
        if inputs.few_step is not None:
            student = next(model for model in models if model.name == inputs.few_step.student)
            models.append(_train_few_steps(stages, teacher, student, inputs.few_step, cache, settings.output))
        exporter.export(models)
        models = [exporter.with_artifacts(model) for model in models]
        results = _measure(stages, settings, models, cache.size_px, command)
    return ChainResult(
        teacher.name,
        {model.name: Path(model.path) for model in models[1:]},
        None if inputs.few_step is None else inputs.few_step.name,
        {name: read_graph(folder / "unet.onnx").bytes for name, folder in exporter.graphs.items()},
        {name: (folder / "unet.engine").stat().st_size for name, folder in exporter.engines.items()},
        machine.no_engine,
        results,
        settings.output / REPORT / "report.html",
        time.monotonic() - started,
        stages.seconds,
    )


def _check_teacher(teacher: LoadedPipeline, inputs: Inputs) -> None:
    """Refuse a teacher that no stage can learn from, before anything is written.

    Raises:
        ModelError: it cannot be trained, or has no trajectory of many steps.
        UsageError: the few steps do not fit its noise schedule.
    """
    from sdcompress.train.few_step import check_pair
    from sdcompress.train.pipelines import check_trainable

    check_trainable(teacher.pipeline)
    if inputs.few_step is not None:
        check_pair(teacher, teacher, inputs.few_step.config)


def _continues(settings: ChainSettings) -> bool:
    return not settings.force and RUN.is_in(settings.output)


@contextmanager
def _begun_folder(settings: ChainSettings) -> Iterator[None]:
    """Make the run's folder and mark it as one, for its first stage; an earlier run's is kept, unless `force`.

    An error that leaves nothing to continue with removes a new folder, and puts back the one that `force` replaces.
    """
    output = settings.output
    marker = {
        "teacher": settings.teacher,
        "data": settings.data,
        "plans": list(settings.plans),
        "recipe": settings.recipe,
    }
    kept = nullcontext() if _continues(settings) else moved_aside(output)
    with storage_errors(output), kept, parents_made(output), begun_folder(output, RUN.file):
        remove_partial_files(output)
        write_atomically(output / RUN.file, json.dumps(marker) + "\n")
        yield


@contextmanager
def _continuable() -> Iterator[None]:
    """Add to an error of the later stages what to type."""
    try:
        yield
    except SdCompressError as error:
        raise error.with_hint("the same command continues after the finished stages") from error


def _encode_data(stages: StageRunner, teacher: LoadedPipeline, inputs: Inputs, output: Path) -> LatentCache:
    from sdcompress.data.build_cache import build_cache
    from sdcompress.data.cache import LatentCache, select_content_settings
    from sdcompress.support.pipeline import native_size_px

    config, folder = inputs.config.data, output / CACHE
    size_px = config.size_px or native_size_px(teacher.pipeline)
    stage = Stage(
        "encode the data",
        folder,
        "cache",
        {"teacher": teacher.sha256},
        {
            "files": inputs.source.fingerprint(),
            "captions": inputs.source.hash_captions(),
            "size_px": size_px,
            "data": select_content_settings(config),
        },
    )
    stages.run(
        stage,
        lambda: build_cache(inputs.source, teacher, folder, size_px, config=config, force=True, report=stages.report),
    )
    return LatentCache.open(folder, teacher.sha256)


def _distill_student(
    stages: StageRunner,
    teacher: LoadedPipeline,
    name: str,
    plan: BlockPlan,
    cache: LatentCache,
    config: DistillConfig,
    folder: Path,
) -> ModelUnderTest:
    """Train the student of a plan in `folder`; a training that was stopped is resumed."""
    from sdcompress.train.distill import distill
    from sdcompress.train.pipelines import PIPELINE

    def train() -> None:
        resume = (folder / "checkpoints").is_dir()
        distill(teacher, plan, cache, config, folder, resume=resume, force=not resume, report=stages.report)

    pipeline = folder / PIPELINE
    inputs = {"teacher": teacher.sha256, "data": cache.sha256}
    made_with = {"train": config.model_dump(mode="json"), "plan": plan.to_content()}
    stages.run(Stage(f"distill {name}", pipeline, "student", inputs, made_with), train)
    return ModelUnderTest(name, str(pipeline), sha256=sha256_tree(pipeline), metrics=folder / "metrics.jsonl")


def _train_few_steps(
    stages: StageRunner,
    teacher: LoadedPipeline,
    student: ModelUnderTest,
    wanted: FewStepStudent,
    cache: LatentCache,
    output: Path,
) -> ModelUnderTest:
    """Train a student to draw in few steps; a training that was stopped is resumed."""
    from sdcompress.models.load import load_pipeline
    from sdcompress.train.few_step import few_step
    from sdcompress.train.pipelines import PIPELINE

    folder, config = output / wanted.name, wanted.config

    def train() -> None:
        resume = (folder / "checkpoints").is_dir()
        model = load_pipeline(student.path)
        few_step(model, teacher, cache, config, folder, resume=resume, force=not resume, report=stages.report)

    pipeline = folder / PIPELINE
    inputs = {"model": student.sha256, "teacher": teacher.sha256, "data": cache.sha256}
    made_with = {"train": config.model_dump(mode="json")}
    label = f"train {student.name} to draw in {config.num_inference_steps} steps"
    stages.run(Stage(label, pipeline, "few-step", inputs, made_with), train)
    return ModelUnderTest(wanted.name, str(pipeline), sha256=sha256_tree(pipeline), metrics=folder / "metrics.jsonl")


@dataclass
class _Exporter:
    """Exports the models of a run, and builds their engines.

    Without a GPU the teacher gets no engine: it would not be measured.

    Attributes:
        teacher: its name.
        parameters: of the teacher, the largest model.
        graphs: model → its ONNX folder in fp32.
        engines: model → its engine folder.
    """

    stages: StageRunner
    settings: ChainSettings
    machine: Machine
    teacher: str
    parameters: int
    graphs: dict[str, Path] = field(default_factory=dict)
    engines: dict[str, Path] = field(default_factory=dict)

    def export(self, models: Sequence[ModelUnderTest]) -> None:
        """Write the ONNX graphs of the models and their engines, as far as this machine runs or builds them."""
        jobs: dict[str, ExportJob] = {}
        for model in models:
            folder, source = self.settings.output / model.name, {"pipeline": model.sha256}
            if self.machine.onnxruntime:
                self.graphs[model.name] = folder / "onnx"
                jobs[f"export {model.name} to ONNX"] = ExportJob(str(model.path), "fp32", folder / "onnx", source)
            if self.machine.no_engine is None and (self.machine.gpu or model.name != self.teacher):
                self.engines[model.name] = folder / "engine"
                jobs[f"export {model.name} in fp16"] = ExportJob(str(model.path), "fp16", folder / "onnx-fp16", source)
        self._write_graphs(jobs)
        for name, folder in self.engines.items():
            self._build_engine(name, folder.with_name("onnx-fp16"), folder)

    def with_artifacts(self, model: ModelUnderTest) -> ModelUnderTest:
        """Returns a model with the folders that its backends run from."""
        engine = self.engines.get(model.name) if self.machine.gpu else None
        return dataclasses.replace(model, onnx=self.graphs.get(model.name), engine=engine)

    def _write_graphs(self, jobs: Mapping[str, ExportJob]) -> None:
        """Do the exports that are missing, by label; later ones take equal components of earlier ones."""

        def make(missing: set[Path], finish: Callable[[Path], None]) -> None:
            there: dict[str, Path] = {job.precision: job.folder for job in jobs.values() if job.folder not in missing}
            todo = [job for job in jobs.values() if job.folder in missing]
            workers = count_workers(len(todo), self.parameters)
            run_exports(todo, workers, there, lambda job: finish(job.folder))

        stages = [Stage(label, job.folder, "onnx", job.source) for label, job in jobs.items()]
        self.stages.run_together("exporting graphs", stages, make)

    def _build_engine(self, name: str, graphs: Path, folder: Path) -> None:
        from sdcompress.export.tensorrt import build_engines

        capabilities = self.settings.compute_capabilities
        self.stages.run(
            Stage(
                f"build {name} as a TensorRT engine",
                folder,
                "engine",
                {"onnx": sha256_file(graphs / MANIFEST_NAME)},
                {"compute_capabilities": [list(card) for card in choose_cards(capabilities)]},
            ),
            lambda: build_engines(
                graphs, folder, compute_capabilities=capabilities, force=True, report=self.stages.report
            ),
        )


def _measure(
    stages: StageRunner,
    settings: ChainSettings,
    models: Sequence[ModelUnderTest],
    size_px: int,
    command: str | None,
) -> Results:
    described: dict[str, Any] = {"models": [str(model.path) for model in models], "size_px": size_px, "rounds": 3}
    described |= QUICK if settings.quick else {}
    if settings.prompts_file is not None:
        described["prompts"] = str(settings.prompts_file)
    suite, skipped = build_suite(described, quick=settings.quick, models=tuple(models))
    folder = settings.output / REPORT
    stages.run(
        Stage(
            "measure and write the report",
            folder,
            "results",
            {model.name: model.sha256 for model in models},
            {name: value for name, value in describe_suite(suite).items() if name in (*QUICK, "prompts_sha256")},
        ),
        lambda: run_suite(suite, folder, stages.report, force=True, skipped=skipped, command=command),
    )
    return read_results(folder / "results.json")
