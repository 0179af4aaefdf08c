"""The runner of one case of a proof: what the backend needs is exported, compiled or built first."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock
from sdcompress_engines.errors import ArtifactError, BackendMissing, EngineError, UsageError
from sdcompress_engines.export_folder import check_export
from sdcompress_engines.flavour import FLAVOURS, Flavour, present_card
from sdcompress_engines.manifest import cache_folder
from sdcompress_engines.profiles import ShapeRanges
from sdcompress_engines.runners import Runner, open_runner
from sdcompress_engines.signature import CONTEXT_TOKENS
from sdcompress_engines.store import EngineStore

from sdcompress.backends.backend import UNetRequest
from sdcompress.backends.cached import cached_graphs, graph_runtime
from sdcompress.backends.installation import remove_command
from sdcompress.backends.proof import Case
from sdcompress.backends.proof_plan import provable
from sdcompress.backends.subjects import BATCH, load_subject
from sdcompress.export.components import DTYPES, latent_side
from sdcompress.models.load import LoadedPipeline


def open_case_runner(loaded: LoadedPipeline, case: Case) -> Runner:
    """Returns the open runner of a case.

    Args:
        loaded: the pipeline with the UNet of the case, in torch on the CPU.
        case: of any backend but torch.

    Raises:
        ArtifactError: what the cache folder holds for the backend is damaged. Otherwise what the backend raises.
    """
    artifact = provable()[case.backend].artifact
    if artifact == "onnx":
        return open_runner(graph_folder(loaded, case) / "unet.onnx", device=case.device)
    if artifact == "engine":
        return _open_engine(loaded, case)
    return _open_unet(loaded, case)


def _open_unet(loaded: LoadedPipeline, case: Case) -> Runner:
    """Returns the open runner of a backend that runs the UNet of a pipeline in torch."""
    backend = provable()[case.backend]
    if backend.open_unet is None:
        raise UsageError(f"{backend.title} opens no UNet", expected="a backend with `open_unet`")
    if backend.cached_unet is None:  # nothing on disk: it runs the weights in torch
        loaded.pipeline.unet = loaded.pipeline.unet.to(case.device, DTYPES[case.precision])
    try:
        return backend.open_unet(UNetRequest(loaded, case.device, case.precision)).open()
    except (ArtifactError, EngineError) as error:
        if backend.cached_unet is None:
            raise
        folder = backend.cached_unet(loaded.sha256, case.device, case.precision).parent
        raise _damaged(folder, error.what) from error


def _open_engine(loaded: LoadedPipeline, case: Case) -> Runner:
    output = Path(case.folder) / f"{case.backend}-engine"
    _build(loaded, case, EngineStore(cache_folder() / "doctor" / "engines"), output)
    return open_runner(output / "unet.engine", device=case.device, cuda_graph=True, kernels="eager")


def graph_folder(loaded: LoadedPipeline, case: Case) -> Path:
    """Returns the folder with the UNet's graph in the cache, exported now if it is not there.

    It is the folder that `generate` uses where that exists, else one with the UNet alone.

    Args:
        loaded: the pipeline in torch.
        case: of a backend that runs graphs, or engines that are built from them.

    Raises:
        ArtifactError: a file of the folder was changed or is missing. Otherwise as `export_onnx`.
    """
    from sdcompress.export.onnx import export_onnx

    runtime = graph_runtime(provable()[case.backend], case.device)
    folder = cached_graphs(loaded.sha256, case.precision, runtime)
    if not folder.is_dir():
        folder = folder.with_name(f"{folder.name}-unet")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():
            try:
                check_export(folder, ["onnx"])
            except ArtifactError as error:
                raise _damaged(folder, error.what) from error
            return folder
        export_onnx(
            loaded.pipeline,
            folder,
            precision=case.precision,
            components=("unet",),
            runtime=runtime,
            source={"pipeline": loaded.sha256},
            name=loaded.name,
            plan=loaded.plan,
        )
    return folder


def _damaged(folder: Path, what: str) -> ArtifactError:
    return ArtifactError(
        f"the files of this backend in the cache are damaged ({what})", where=folder, hint=remove_command(folder)
    )


def explain_absence(flavour: Flavour) -> str | None:
    """Returns why a TensorRT library is not for this machine, or None.

    Raises:
        BackendMissing: it is for this machine, and does not load.
    """
    card = present_card()
    try:
        flavour.load()
    except BackendMissing as error:
        if card is None and isinstance(error.__cause__, ModuleNotFoundError):
            return f"runs on an NVIDIA GPU, and none is here; to build engines for another machine: {flavour.install}"
        raise
    return None if card is None else flavour.explain_unsupported(card)


def build_ahead(case: Case) -> dict[str, Any]:
    """Build an engine for a card that is not in this machine. Returns the outcome: `built_s`, `bytes` and `cards`.

    It is built each time, as a stored one would prove nothing.
    """
    (subject,) = case.subjects
    flavour = FLAVOURS[case.backend]
    store = EngineStore(Path(case.folder) / f"{case.backend}-store")
    output = Path(case.folder) / f"{case.backend}-engine"
    built = _build(load_subject(case.model, subject), case, store, output)
    for folder in (store.root, output):
        shutil.rmtree(folder, ignore_errors=True)
    cards = ", ".join(f"{major}.{minor}" for major, minor in flavour.supported_cards() or ())
    return {"built_s": built.seconds, "bytes": built.bytes, "cards": cards}


def _build(loaded: LoadedPipeline, case: Case, store: EngineStore, output: Path) -> Any:
    """Build the engine of a case. Returns its `BuiltEngine`.

    Args:
        loaded: the pipeline in torch.
        case: of a TensorRT library.
        store: for the engine.
        output: the folder to write.
    """
    from sdcompress.export.tensorrt import build_engines

    side = latent_side(loaded.pipeline.unet.config) * loaded.pipeline.vae_scale_factor
    fixed = ShapeRanges((BATCH,) * 3, (side,) * 3, (side,) * 3, (CONTEXT_TOKENS,) * 3)
    graphs = graph_folder(loaded, case)
    result = build_engines(graphs, output, profiles=[fixed], flavour=case.backend, components=("unet",), store=store)
    return result.builds["unet"]
