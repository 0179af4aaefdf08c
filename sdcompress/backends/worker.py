"""The process of a proof: makes what one backend needs, runs a UNet with it, saves the answer and times the step.

`python -m sdcompress.backends.worker` reads a `Case` as one line of JSON, answers with one line once the backend has
run, waits for a second line, and then times the step.
"""

from __future__ import annotations

import hashlib
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from sdcompress_engines.child_process import receive_message, send_event
from sdcompress_engines.errors import ArtifactError, BackendMissing, EngineError, SdCompressError, UsageError
from sdcompress_engines.exactness import ieee_fp32, use_ieee_fp32
from sdcompress_engines.flavour import FLAVOURS, Flavour, present_card
from sdcompress_engines.manifest import cache_folder, canonical, faults
from sdcompress_engines.profiles import ShapeRanges
from sdcompress_engines.runners import Runner, TorchRunner, open_runner
from sdcompress_engines.runners.onnxruntime_install import require as require_onnxruntime
from sdcompress_engines.runners.torch import COMPILER
from sdcompress_engines.signature import CONTEXT_TOKENS
from sdcompress_engines.store import EngineStore

from sdcompress.backends.backend import UNetRequest
from sdcompress.backends.cached import cached_graphs, graph_runtime
from sdcompress.backends.fastest import BATCH
from sdcompress.backends.installation import remove_command
from sdcompress.backends.proof import REFERENCE, WHOLE, Case, answer_file
from sdcompress.backends.registry import find_backend
from sdcompress.backends.torch_unet import PositionalUNet
from sdcompress.export.aot import package_folder
from sdcompress.export.components import DTYPES, random_inputs, signature_of
from sdcompress.models.load import LoadedPipeline, load_pipeline

_TIMESTEP = 501
_COMPILERS = {
    "linux": "sudo apt-get install g++",
    "darwin": "xcode-select --install",
    "win32": (
        "winget install Microsoft.VisualStudio.2022.BuildTools"
        ' --override "--add Microsoft.VisualStudio.Workload.VCTools --includeRecommended"'
    ),
}
_SAMPLES, _MOST_SAMPLES = 3, 200
_LEAST_MS, _MOST_MS = 500.0, 10_000.0


def load_subject(model: str, subject: str) -> LoadedPipeline:
    """Returns the pipeline of a model on the CPU in fp32; for `SMALL` with `small_unet` in it and its own sha256."""
    loaded = load_pipeline(model)
    if subject == WHOLE:
        return loaded
    pipeline: Any = loaded.pipeline
    pipeline.unet = small_unet(pipeline.unet.config)
    own = hashlib.sha256(canonical({"small UNet of": loaded.sha256, "config": dict(pipeline.unet.config)})).hexdigest()
    return replace(loaded, name=f"a small UNet like {loaded.name}'s", sha256=own)


def small_unet(config: Mapping[str, Any]) -> Any:
    """Returns a UNet with the operators of an SD1 or SD2 UNet and few of them.

    It has the two outer levels, one block each, and random weights.

    Args:
        config: of the UNet it is like.
    """
    from diffusers import UNet2DConditionModel

    kept = {
        "block_out_channels": list(config["block_out_channels"])[:2],
        "down_block_types": [config["down_block_types"][0], "DownBlock2D"],
        "up_block_types": ["UpBlock2D", config["up_block_types"][-1]],
        "layers_per_block": 1,
        "mid_block_type": None,
    }
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(0)
        unet = UNet2DConditionModel.from_config(dict(config) | kept).eval()
        for weight in unet.parameters():
            if weight.ndim == 1:  # norms and biases are ones and zeros, which would hide a fault in them
                weight.add_(0.1 * torch.randn_like(weight))
    return unet


Feeds = dict[str, torch.Tensor]
Ready = Callable[[], dict[str, Any]]
"""Times what was prepared; returns the outcome."""


def _prepare(case: Case) -> Ready:
    """Make all that a case needs, run it once and save its answer; returns what times it."""
    if case.precision == "fp32":
        use_ieee_fp32()
    if case.backend == "torch":
        return _prepare_torch(case)
    (subject,) = case.subjects
    if case.backend in FLAVOURS:
        flavour = FLAVOURS[case.backend]
        if found := _hindrance(flavour):
            return lambda: {"not_here": found}
        if present_card() is None:
            return _build_ahead(case, flavour, subject)
    elif case.backend == "onnxruntime":
        require_onnxruntime(case.device)  # before anything is exported for it
    loaded = load_subject(case.model, subject)
    feeds = _feeds(loaded, case)
    runner = _open(loaded, case)
    del loaded  # a graph or an engine needs no weights of torch's beside it
    _save(runner.infer(feeds), case.answer(subject))
    return lambda: {"ms": {subject: _median_ms(runner, feeds)}}


def _prepare_torch(case: Case) -> Ready:
    """The answers that all others are compared with, in IEEE fp32, and those of torch in the precision of the case."""
    opened: dict[str, tuple[Runner, Feeds]] = {}
    parameters = 0
    for subject in case.subjects:
        loaded = load_subject(case.model, subject)
        unet: Any = loaded.pipeline.unet.to(case.device)
        parameters = max(parameters, sum(weight.numel() for weight in unet.parameters()))
        exact = signature_of("unet", unet, "fp32")
        reference = TorchRunner(PositionalUNet(unet), exact.inputs, exact.outputs)
        with ieee_fp32(), reference:
            _save(
                reference.infer(_feeds(loaded, replace(case, precision="fp32"))),
                answer_file(case.folder, REFERENCE, subject),
            )
        wanted, mode = (
            signature_of("unet", unet, case.precision),
            "eager" if case.precision == "fp32" else "channels_last",
        )
        runner = TorchRunner(
            PositionalUNet(unet.to(DTYPES[case.precision])), wanted.inputs, wanted.outputs, mode
        ).open()
        feeds = _feeds(loaded, case)
        _save(runner.infer(feeds), case.answer(subject))
        opened[subject] = (runner, feeds)
    return lambda: {"ms": {name: _median_ms(*each) for name, each in opened.items()}, "parameters": parameters}


def _open_registered(loaded: LoadedPipeline, case: Case) -> Runner:
    """Returns the open runner of a backend that runs the UNet of a pipeline in torch."""
    backend = find_backend(case.backend)
    if backend.open_unet is None:
        raise UsageError(f"{backend.title} opens no UNet", expected="a backend with `open_unet`")
    if backend.suffix is None:  # nothing on disk: the weights in torch are what runs
        loaded.pipeline.unet = loaded.pipeline.unet.to(case.device, DTYPES[case.precision])
    try:
        return backend.open_unet(UNetRequest(loaded, case.device, case.precision)).open()
    except (ArtifactError, EngineError) as error:
        if backend.name != "aot":
            raise
        raise _damaged(package_folder(loaded.sha256, case.device, case.precision), error.what) from error


def _open_graph(loaded: LoadedPipeline, case: Case) -> Runner:
    return open_runner(graph_folder(loaded, case) / "unet.onnx", device=case.device)


def _open_engine(loaded: LoadedPipeline, case: Case) -> Runner:
    output = Path(case.folder) / f"{case.backend}-engine"
    _build(loaded, case, FLAVOURS[case.backend], EngineStore(cache_folder() / "doctor" / "engines"), output)
    return open_runner(output / "unet.engine", device=case.device, cuda_graph=True, kernels="eager")


def _open(loaded: LoadedPipeline, case: Case) -> Runner:
    if case.backend in FLAVOURS:
        return _open_engine(loaded, case)
    return _open_graph(loaded, case) if case.backend == "onnxruntime" else _open_registered(loaded, case)


def graph_folder(loaded: LoadedPipeline, case: Case) -> Path:
    """Returns the folder with the UNet's graph in the cache, exported now where it is not there.

    It is the one that `generate` uses where that exists, else one with the UNet alone.

    Raises:
        ArtifactError: a file of it was altered or is missing. Otherwise as `export_onnx`.
    """
    from sdcompress.export.onnx import export_onnx

    runtime = graph_runtime(case.backend, case.device)
    folder = cached_graphs(loaded.sha256, case.precision, runtime)
    if not folder.is_dir():
        folder = folder.with_name(f"{folder.name}-unet")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():
            if found := faults(folder, "onnx"):
                raise _damaged(folder, "; ".join(found[:3]))
            return folder
        source = {"pipeline": loaded.sha256}
        export_onnx(
            loaded.pipeline,
            folder,
            precision=case.precision,
            components=("unet",),
            runtime=runtime,
            source=source,
            name=loaded.name,
        )
    return folder


def _damaged(folder: Path, what: str) -> ArtifactError:
    return ArtifactError(f"what the cache holds for it is damaged ({what})", where=folder, hint=remove_command(folder))


def _hindrance(flavour: Flavour) -> str | None:
    """Why a flavour is none of this machine's, or None.

    Raises:
        BackendMissing: this machine could have it, and it does not load.
    """
    card = present_card()
    try:
        flavour.load()
    except BackendMissing as error:
        if card is None and isinstance(error.__cause__, ModuleNotFoundError):
            return f"runs on an NVIDIA GPU, and none is here; to build engines for another machine: {flavour.install}"
        raise
    return None if card is None else flavour.unserved(card)


def _build_ahead(case: Case, flavour: Flavour, subject: str) -> Ready:
    """Build an engine for a card that is not here. Each time anew: a stored one would prove nothing."""
    loaded = load_subject(case.model, subject)
    store = EngineStore(Path(case.folder) / f"{case.backend}-store")
    output = Path(case.folder) / f"{case.backend}-engine"
    built = _build(loaded, case, flavour, store, output)
    cards = ", ".join(f"{major}.{minor}" for major, minor in flavour.served_cards() or ())
    outcome = {"built_s": built.seconds, "bytes": built.bytes, "cards": cards}
    for folder in (store.root, output):
        shutil.rmtree(folder, ignore_errors=True)
    return lambda: outcome


def _build(loaded: LoadedPipeline, case: Case, flavour: Flavour, store: EngineStore, output: Path) -> Any:
    from sdcompress.export.tensorrt import build_engines

    side = _latent_side(loaded) * int(loaded.pipeline.vae_scale_factor)
    fixed = ShapeRanges((BATCH,) * 3, (side,) * 3, (side,) * 3, (CONTEXT_TOKENS,) * 3)
    graphs = graph_folder(loaded, case)
    found = build_engines(graphs, output, profiles=[fixed], flavour=flavour.name, components=("unet",), store=store)
    return found.builds["unet"]


def _feeds(loaded: LoadedPipeline, case: Case) -> Feeds:
    """Random inputs of one picture under guidance, at the UNet's own size; the same for every backend."""
    unet: Any = loaded.pipeline.unet
    side = _latent_side(loaded)
    sizes = {"batch": BATCH, "height": side, "width": side, "tokens": CONTEXT_TOKENS}
    made = random_inputs(signature_of("unet", unet, case.precision), unet.config, sizes, _TIMESTEP)
    return {name: value.to(case.device) for name, value in made.items()}


def _latent_side(loaded: LoadedPipeline) -> int:
    size = loaded.pipeline.unet.config["sample_size"]
    return int(size if isinstance(size, int) else max(size))


def _save(answer: Mapping[str, torch.Tensor], path: Path) -> None:
    torch.save(next(iter(answer.values())).float().cpu(), path)


def _median_ms(runner: Runner, feeds: Feeds) -> float:
    """Returns the median of three calls; of more where they are short, of fewer where those would take long."""
    times: list[float] = []
    runner.infer(feeds)
    while sum(times) < (_MOST_MS if len(times) < _SAMPLES else _LEAST_MS) and len(times) < _MOST_SAMPLES:
        if runner.device.type == "cuda":
            torch.cuda.synchronize(runner.device)
        started = time.perf_counter()
        runner.infer(feeds)
        if runner.device.type == "cuda":
            torch.cuda.synchronize(runner.device)
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def _attempt(work: Callable[[], Any]) -> Any:
    """Returns what `work` returns; an error is told to the parent, and ends the process."""
    try:
        return work()
    except SdCompressError as error:
        expected = f"; expected {error.expected}" if error.expected else ""
        send_event(failed=f"{error.what}{expected}", command=_remedy(error) or error.hint)
    except Exception as error:  # a backend's errors share no base class
        text = " ".join(str(error).split())[:300]
        send_event(failed=f"{type(error).__name__}: {text}", command=_remedy(error))
    raise SystemExit(0)


def _remedy(error: BaseException) -> str | None:
    """Returns the command against an error of a known cause: no compiler, no Triton, a package that does not import."""
    if isinstance(error, BackendMissing):
        return _COMPILERS.get(sys.platform, _COMPILERS["linux"]) if COMPILER in (error.hint or "") else None
    if "triton" in str(error).lower():
        return f"pip install triton{'-windows' if sys.platform == 'win32' else ''}"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ImportError) and cause.name:
            module = cause.name.partition(".")[0]
            return f"pip install --force-reinstall {packages_distributions().get(module, [module])[0]}"
        cause = cause.__cause__ or cause.__context__
    return None


def _serve() -> None:
    raw = receive_message()
    if raw is None:
        return
    case = Case(**raw | {"subjects": tuple(raw["subjects"])})
    for name in case.hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # an import of it then finds nothing
    ready = _attempt(lambda: _prepare(case))
    send_event(prepared=True)
    if receive_message() is not None:
        send_event(**_attempt(ready))


if __name__ == "__main__":
    _serve()
