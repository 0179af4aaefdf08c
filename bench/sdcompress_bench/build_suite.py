"""Builds a `Suite` from settings: this machine's backends, the models, the prompts and what judges the pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompress_engines.errors import BackendMissing, UsageError

from sdcompress.backends.registry import find_backend
from sdcompress.support.bounds import LEAST_PX

from .loras import find_loras, read_lora_sampling
from .models import random_folder
from .prompts import read_prompts, read_reference
from .scenario import BackendSetup, Gate, ModelUnderTest, Prompt, Random, Sampling, Suite
from .suite_file import GateEntry, ModelEntry, SuiteFile, check_suite, read_setup, suite_names

if TYPE_CHECKING:
    from sdcompress.families.sampling_defaults import SamplingDefaults

DEFAULT_PROMPTS = (
    "a photo of a lighthouse on a cliff at dusk",
    "portrait photo of an old fisherman, natural light",
    "a bowl of ramen on a wooden table, top view",
    "a red fox in a snowy forest",
    "a quiet street in Lisbon after rain, film photo",
    "a glass bottle with a ship inside, studio light",
    "a watercolour painting of a mountain village",
    "macro photo of a dew-covered dragonfly",
)
"""The captions for a model that is not nano, where no file of prompts is given."""
QUICK: dict[str, Any] = {
    "rounds": 1,
    "samples": 6,
    "end_to_end_samples": 3,
    "stage_budget_s": 2.0,
    "pictures": 4,
    "probes": 2,
    "sensitivity": 0,
}
"""The settings of `--quick`."""
NANO_PROMPTS, QUICK_NANO_PROMPTS = 150, 40
"""How many held-out prompts of nano the quality figures take."""


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a suite, and what judges the pictures of them.

    Attributes:
        prompts: the captions.
        shown: captions of the picture grid; empty takes the first of `prompts`.
        metric: the folder of a CLIP, or None.
        styles: (style, phrase) pairs; see `Suite.styles`.
        real: a shard or folder of real pictures, or None.
    """

    prompts: tuple[Prompt, ...]
    shown: tuple[Prompt, ...] = ()
    metric: Path | None = None
    styles: tuple[tuple[str, str], ...] = ()
    real: Path | None = None


def build_suite(
    settings: Mapping[str, Any],
    *,
    quick: bool = False,
    where: Path | None = None,
    models: tuple[ModelUnderTest, ...] | None = None,
) -> tuple[Suite, dict[str, str]]:
    """Returns the suite for this machine, and backend → reason for the backends that are left out.

    Args:
        settings: fields of `SuiteFile`.
        quick: take fewer of nano's prompts.
        where: the suite's file, for messages.
        models: those of the settings, already found; None finds them.

    Raises:
        UsageError: a wrong setting, or a model or file that does not exist.
        ModelError: a LoRA is none, or not for its model.
        BackendMissing: the suite is for a GPU, and there is none.
    """
    file = check_suite(dict(settings), where or "the options")
    device = _choose_device(file, where)
    precision = file.precision or ("fp16" if device == "cuda" else "fp32")
    names = (file.gpu_backends if device == "cuda" else None) or file.backends
    measured, skipped = choose_backends(names, device, precision)
    entries = file.models if models else _with_decoder(file)
    found = models or tuple(find_model(entry) for entry in entries)
    chosen = tuple(_complete(model, entry, file) for model, entry in zip(found, entries, strict=True))
    _check_gates(file, chosen, where)
    native_size_px = _native_size_px(chosen[0])
    prompts = _choose_prompts(chosen[0], file, quick)
    suite = Suite(
        models=chosen,
        setups=measured,
        name=file.title,
        device=device,
        sizes_px=file.size_px or (native_size_px,),
        batch=file.batch,
        prompts=prompts.prompts,
        shown=prompts.shown[: file.pictures],
        seed=file.seed,
        rounds=file.rounds,
        samples=file.samples,
        end_to_end_samples=file.end_to_end_samples,
        stage_budget_s=file.stage_budget_s,
        scenario_timeout_s=file.scenario_timeout_s,
        pictures=file.pictures,
        quality_pictures=_count_quality_pictures(chosen, file, prompts),
        timesteps=file.timesteps,
        probes=file.probes,
        sensitivity=file.sensitivity,
        metric=prompts.metric,
        styles=prompts.styles,
        real=prompts.real,
        threads=file.threads,
        gates=tuple(_read_gate(entry, precision) for entry in file.gates if _is_measured(entry, precision, measured)),
        prompts_file=None if file.prompts is None else Path(file.prompts),
    )
    return suite, skipped


def _choose_device(file: SuiteFile, where: Path | None) -> str:
    import torch

    gpu = torch.cuda.is_available()
    if file.device == "cuda" and not gpu:
        cpu = f"{where.stem}-cpu" if where else ""
        hint = f"sdcompress bench {cpu}, or --device cpu" if cpu in suite_names() else "--device cpu"
        raise BackendMissing("the suite needs an NVIDIA GPU, and there is none", where=where, hint=hint)
    if file.device == "auto":
        return "cuda" if gpu else "cpu"
    return file.device


def choose_backends(
    names: tuple[str, ...] | None, device: str, precision: str
) -> tuple[tuple[BackendSetup, ...], dict[str, str]]:
    """Returns the backends to measure, each with its precision, and backend → reason for those that do not run here.

    Args:
        names: as they are typed, such as `ort` or `aot:bf16`; None takes the usual ones of the device.
        device: `cpu` or `cuda`.
        precision: of the names that have none.

    Raises:
        UsageError: no such backend or precision.
    """
    usual = ("torch", "compile", "ort", "trt") if device == "cuda" else ("torch", "ort")
    wanted = list(dict.fromkeys(read_setup(name, precision) for name in names or usual))
    skipped: dict[str, str] = {}
    for setup in wanted:
        backend = find_backend(setup.backend)
        if reason := backend.missing(device):
            skipped[backend.title] = reason
        elif reason := backend.lacks.get(device, {}).get(setup.precision):
            skipped[str(setup)] = reason
    measured = tuple(setup for setup in wanted if not {find_backend(setup.backend).title, str(setup)} & set(skipped))
    return measured, skipped


def find_model(entry: ModelEntry) -> ModelUnderTest:
    """Returns the model of an entry, with its hash and the `metrics.jsonl` of its training folder.

    A model with random weights has no hash yet: `models.prepare_model` creates the weights and computes it.

    Raises:
        UsageError, ModelError: there is no such model, or no such decoder.
    """
    from sdcompress.models.decoder import hash_decoder, locate_decoder
    from sdcompress.models.locate import display_name, hash_pipeline, locate_pipeline
    from sdcompress.models.nano import BUILT_IN

    is_random = entry.random is not None and entry.decoder == "random"
    decoder = None if entry.decoder is None or is_random else locate_decoder(entry.decoder)
    found: dict[str, Any] = {} if decoder is None else {"decoder": decoder, "decoder_sha256": hash_decoder(decoder)}
    if entry.random:
        random = Random(entry.random, entry.plan, is_random)
        name = entry.name or f"{entry.random} {entry.plan or ''}".strip()
        return ModelUnderTest(name + _suffix(entry), random_folder(random), random=random, **found)
    folder = locate_pipeline(str(entry.path))
    metrics = folder.parent / "metrics.jsonl"
    name = entry.name or (str(entry.path) if entry.path in BUILT_IN else display_name(folder)) + _suffix(entry)
    found["metrics"] = metrics if metrics.is_file() else None
    return ModelUnderTest(name, folder, sha256=hash_pipeline(folder), **found)


def _suffix(entry: ModelEntry) -> str:
    """Returns what the name of an entry without one ends in, so that it differs from the model as it is."""
    if entry.name:
        return ""
    loras = "" if not entry.loras else " with LoRA" if len(entry.loras) == 1 else f" with {len(entry.loras)} LoRAs"
    return loras + (" with small decoder" if entry.decoder else "")


def _with_decoder(file: SuiteFile) -> tuple[ModelEntry, ...]:
    """Returns the models of a suite, with the last one once more where a decoder is given."""
    if file.decoder is None:
        return file.models
    last = file.models[-1]
    name = f"{last.name} with small decoder" if last.name else None
    return (*file.models, last.model_copy(update={"decoder": file.decoder, "name": name}))


def read_configs(model: ModelUnderTest) -> dict[str, Any]:
    """Returns the configs of a model's `unet` and `vae`.

    A model with random weights has those of its family, before it is made, and more components.

    Args:
        model: a pipeline folder or file, or a model with random weights.
    """
    from sdcompress.models.locate import read_component_config, read_unet_config
    from sdcompress.models.random import family_configs

    if model.random:
        return family_configs(model.random.family, model.random.plan)
    return {"unet": read_unet_config(model.path), "vae": read_component_config(model.path, "vae")}


def _native_size_px(model: ModelUnderTest) -> int:
    """Returns the side that the model was trained on: its UNet's `sample_size` times its VAE's reduction."""
    configs = read_configs(model)
    return int(configs["unet"]["sample_size"]) * 2 ** (len(configs["vae"]["block_out_channels"]) - 1)


def _complete(model: ModelUnderTest, entry: ModelEntry, file: SuiteFile) -> ModelUnderTest:
    """Returns a model with its LoRAs, and with the steps and the guidance that it draws in.

    Raises:
        UsageError, ModelError: as `find_loras` and `_with_sampling`.
    """
    loras = find_loras(file.loras if entry.loras is None else entry.loras, model)
    return _with_sampling(replace(model, loras=loras), entry, file)


def _with_sampling(model: ModelUnderTest, entry: ModelEntry, file: SuiteFile) -> ModelUnderTest:
    """Returns a model with its steps and guidance: those of its entry, else the suite's, else the model's own.

    A few-step LoRA makes those that it was trained for the model's own.

    Raises:
        UsageError: guidance for a model that was trained to draw without it.
    """
    own = _read_defaults(model)
    asked = (entry.guidance_scale, file.guidance_scale)
    guidance_scale = next((scale for scale in asked if scale is not None), own.guidance_scale)
    if own.is_guidance_free and guidance_scale > 1:
        raise UsageError(
            f"guidance {guidance_scale:g} for {model.name}, which was trained for {own.num_inference_steps} steps"
            " without guidance: the guidance is in its weights",
            expected="no guidance for this model",
            hint=f"leave the guidance out, or in a suite: models: [{{path: ..., guidance_scale: {guidance_scale:g}}}]"
            " for the others",
        )
    sampling = Sampling(entry.steps or file.steps or own.num_inference_steps, guidance_scale)
    return replace(model, sampling=sampling)


def _read_defaults(model: ModelUnderTest) -> SamplingDefaults:
    from sdcompress.families.sampling_defaults import read_defaults
    from sdcompress.models.locate import locate_pipeline, read_model_index

    index = {} if model.random else read_model_index(locate_pipeline(model.path))
    return read_defaults(index | read_lora_sampling(model.loras), read_configs(model)["unet"])


def _choose_prompts(teacher: ModelUnderTest, file: SuiteFile, quick: bool) -> PromptSet:
    """Returns the prompts, and what judges the pictures: the files in the settings, else what nano has of its own.

    Raises:
        UsageError: a file or folder in the settings does not exist.
        ModelError, DataError: the folder holds no CLIP, or no pictures.
    """
    usual = _usual_prompts(teacher, file, quick)
    metric = Path(file.clip) if file.clip else usual.metric
    real = Path(file.reference) if file.reference else usual.real
    for path, option in ((metric, "--clip"), (real, "--reference")):
        if path is not None and not path.exists():
            raise UsageError(f"{option} does not exist", where=path)
    if file.clip:  # what is opened only after hours of measurement is checked here
        from .resnet_clip import is_dual_encoder

        is_dual_encoder(Path(file.clip))
    if file.reference:
        read_reference(file.reference, LEAST_PX)
    return replace(usual, metric=metric, real=real)


def _usual_prompts(teacher: ModelUnderTest, file: SuiteFile, quick: bool) -> PromptSet:
    from sdcompress.data import nano_prompts
    from sdcompress.models import nano
    from sdcompress.models.locate import locate_pipeline

    if file.prompts is not None:
        return PromptSet(tuple(read_prompts(file.prompts)))
    if teacher.random or locate_pipeline(teacher.path) != nano.teacher_folder():
        return PromptSet(tuple(Prompt(caption) for caption in DEFAULT_PROMPTS))
    wanted = file.quality_pictures
    if wanted is None:
        wanted = QUICK_NANO_PROMPTS if quick else NANO_PROMPTS
    heldout = nano_prompts.draw_prompts("heldout", min(max(wanted, 1), NANO_PROMPTS), file.seed)
    prompts, shown = (
        tuple(Prompt(prompt.caption, prompt.style) for prompt in chosen)
        for chosen in (heldout, nano_prompts.shown_prompts())
    )
    return PromptSet(prompts, shown, nano.metric_folder(), tuple(nano.styles().items()), nano.shards("heldout")[0])


def _count_quality_pictures(models: tuple[ModelUnderTest, ...], file: SuiteFile, prompts: PromptSet) -> int:
    """Returns how many pictures the quality figures take; 0 where nothing judges them or weights are random."""
    if any(model.random for model in models):
        return 0
    available = len(prompts.prompts)
    if file.quality_pictures is not None:
        return min(file.quality_pictures, available)
    return available if prompts.metric or prompts.real or file.prompts is not None else 0


def _read_gate(entry: GateEntry, precision: str) -> Gate:
    setup = read_setup(entry.backend, precision) if entry.backend else None
    return Gate(entry.figure, entry.model, setup, entry.at_least, entry.at_most)


def _check_gates(file: SuiteFile, models: tuple[ModelUnderTest, ...], where: Path | None) -> None:
    """Refuse a gate on a model that the suite does not have: it could never pass."""
    names = [model.name for model in models]
    if unknown := [entry.model for entry in file.gates if entry.model not in (None, *names)]:
        raise UsageError(f"a gate on a model {unknown[0]!r}", where=where, expected=f"one of {', '.join(names)}")


def _is_measured(entry: GateEntry, precision: str, measured: tuple[BackendSetup, ...]) -> bool:
    """Returns whether a gate's backend is measured in this run; a gate on another backend is left out."""
    return entry.backend is None or read_setup(entry.backend, precision) in measured
