"""ONNX → TensorRT engine, in a process of its own (`build_worker`)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from .build_options import BuildOptions, check_options
from .child_process import describe_exit, run_job
from .errors import EngineError, StorageError
from .files import replace_file, sync
from .flavour import FLAVOURS, Flavour, present_card
from .graph import read_graph, weights_path
from .graph_weights import GraphWeights
from .manifest import cache_folder
from .output_folders import require_space
from .profiles import Profile
from .progress import SILENT, Reporter
from .resources import available_memory_bytes
from .trust import record_built

# Memory of a build: a multiple of the graph's weights, and bytes besides. Measured on whole and pruned UNets
# (bench/results/engines-cpu.json) and rounded up.
_MEMORY_FACTOR, _MEMORY_BASE = 3.2, 2**29


@dataclass(frozen=True)
class BuildResult:
    """What was built, and what the engine is bound to.

    Attributes:
        seconds: wall clock.
        bytes: size of the engine file.
        flavour, version: of the library.
        compute_capabilities: (major, minor) of the cards it runs on; none is every card from 8.0 on.
        peak_mib: largest resident memory of the build process.
    """

    seconds: float
    bytes: int
    flavour: str
    version: str
    compute_capabilities: tuple[tuple[int, int], ...]
    peak_mib: float


def targets(flavour: Flavour, requested: Sequence[tuple[int, int]] | None) -> tuple[tuple[int, int], ...]:
    """Returns the compute capabilities that an engine will be for, (major, minor) each.

    `tensorrt-rtx` builds for those requested. Without a request it returns none: one engine for 8.0 (Ampere) and all
    later ones. `tensorrt` builds for the card in this machine.

    Raises:
        EngineError: a card that the library does not build for, or none in this machine where one is needed.
    """
    if not flavour.builds_ahead():
        return (_require_present_card(requested, flavour),)
    known = flavour.supported_cards() or ()
    for target in requested or ():
        if target not in known:
            raise EngineError(
                f"this {flavour.name} ({flavour.version}) builds for no compute capability {target[0]}.{target[1]}",
                expected="one of " + ", ".join(f"{a}.{b}" for a, b in known),
            )
    return tuple(sorted(set(requested or ())))


def build_engine(
    onnx_path: str | PathLike[str],
    engine_path: str | PathLike[str],
    profiles: Profile | Sequence[Profile],
    flavour: Flavour,
    compute_capabilities: Sequence[tuple[int, int]] | None = None,
    options: BuildOptions | None = None,
    report: Reporter = SILENT,
) -> BuildResult:
    """Write the engine of an ONNX graph, strongly typed: it computes in the dtypes that the graph has.

    A build that fails or is stopped leaves nothing.

    Args:
        onnx_path: the graph; external data is read from beside it.
        engine_path: the file to write; an existing one is replaced once the new one is whole.
        profiles: min, opt and max of every input with a free size; an engine with several is tuned for each.
        flavour: the library to build with.
        compute_capabilities: of the cards to build for, see `targets`.
        options: by default `BuildOptions()`. `loras` needs the file with the graph's weights beside it.
        report: shows the phases of the build.

    Raises:
        UsageError: no such graph. BackendMissing: the library is not installed. StorageError: no space on disk or in
            memory.
        EngineError: the graph is damaged; the parser refused it (all its errors, with node and operator), the build
            failed, or its process died.
    """
    onnx_path, engine_path = Path(onnx_path).absolute(), Path(engine_path).absolute()
    graph = read_graph(onnx_path)
    profiles = [profiles] if isinstance(profiles, Profile) else list(profiles)
    options = options or BuildOptions()
    version, cards = flavour.version, targets(flavour, compute_capabilities)
    check_options(flavour, options)
    require_space(engine_path.parent, 2 * graph.bytes + 2**26, f"building {engine_path.name}")
    require_memory(int(_MEMORY_FACTOR * graph.bytes) + _MEMORY_BASE, engine_path.name)
    engine_path.parent.mkdir(parents=True, exist_ok=True)
    partial = engine_path.with_name(f".{engine_path.name}.{os.getpid()}.partial")
    job = {
        "flavour": flavour.name,
        "onnx": str(onnx_path),
        "out": str(partial),
        "profiles": [dict(profile.shapes) for profile in profiles],
        "targets": list(cards) if flavour.builds_ahead() else [],
        "options": options.chosen(),
        "refittable": _refittable(onnx_path) if options.loras else [],
        "timing_cache": str(timing_cache(flavour, cards)),
    }
    started = time.monotonic()
    try:
        with report.task(f"building {engine_path.name}") as advance:
            peak_mib = _run_build(job, onnx_path, advance)
        sync(partial)
        replace_file(partial, engine_path)
    finally:
        partial.unlink(missing_ok=True)
    record_built(engine_path)
    return BuildResult(time.monotonic() - started, engine_path.stat().st_size, flavour.name, version, cards, peak_mib)


def timing_cache(flavour: Flavour, cards: Sequence[tuple[int, int]]) -> Path:
    """Returns the file with what builds of a flavour and version have timed on these cards, for the next build.

    Args:
        flavour: the library; its version is the installed one.
        cards: compute capabilities, (major, minor) each.
    """
    digits = "-".join(f"{major}{minor}" for major, minor in cards)
    return cache_folder() / "engines" / "timing" / f"{flavour.name}-{flavour.version}-sm{digits}.cache"


def builds_refittable(flavour: Flavour) -> bool:
    """Returns whether engines that take LoRAs can be built here: the library runs their code on a card meanwhile."""
    card = present_card()
    return card is not None and flavour.explain_unsupported(card) is None


def newest_opset(flavour: Flavour) -> int:
    """Returns the ONNX opset that this library reads best.

    That is 23 where it has an attention layer of its own (TensorRT 10.14, TensorRT-RTX), else 20.
    """
    return 23 if hasattr(flavour.load(), "IAttentionBoundaryLayer") else 20


def require_memory(needed_bytes: int, name: str) -> None:
    """Refuse a build that this machine has too little memory for; without effect where free memory is not known.

    Args:
        needed_bytes: what the build needs.
        name: of the engine, for the message.

    Raises:
        StorageError: less is free.
    """
    free = available_memory_bytes()
    if free is not None and free < needed_bytes:
        raise StorageError(
            f"building {name} needs about {needed_bytes / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free",
            hint="close other programs, or build one component at a time with --component",
        )


def _refittable(onnx_path: Path) -> list[str]:
    """Returns the names of a graph's weights that a LoRA changes; none where they are not beside it."""
    file = weights_path(onnx_path)
    return sorted(GraphWeights(file).specs) if file.is_file() else []


def _require_present_card(wanted: Sequence[tuple[int, int]] | None, flavour: Flavour) -> tuple[int, int]:
    import torch

    if not torch.cuda.is_available():
        raise EngineError(
            f"{flavour.name} builds only for a GPU in this machine, and there is none",
            hint="--flavour tensorrt-rtx: " + FLAVOURS["tensorrt-rtx"].install,
        )
    present: tuple[int, int] = torch.cuda.get_device_capability()
    for major, minor in set(wanted or ()) - {present}:
        raise EngineError(
            f"{flavour.name} builds for the GPU in this machine, of compute capability {present[0]}.{present[1]}, not"
            f" {major}.{minor}",
            hint=f"--compute-capability {present[0]}.{present[1]}",
        )
    return present


def _run_build(job: Mapping[str, Any], onnx_path: Path, advance: Callable[..., None]) -> float:
    """Run the build process. Returns its largest resident memory, MiB."""
    answer: dict[str, Any] = {}

    def take(event: Mapping[str, Any]) -> None:
        answer.update(event)
        if "phase" in event:
            advance(note=event["phase"])

    ending = run_job("sdcompress_engines.build_worker", job, take, paths=(Path(__file__).parents[1],))
    if failure := answer.get("error"):
        raise EngineError(failure, where=onnx_path, hint=driver_hint(failure, job["options"]))
    if ending.status or "done" not in answer:
        raise EngineError(
            f"{describe_exit(ending.status, 'the build process')}: {' '.join(ending.output) or 'no output'}",
            where=onnx_path,
            hint="a graphics card or container with more memory, or another runtime version",
        )
    return float(answer.get("peak_mib", 0.0))


def driver_hint(failure: str, options: Mapping[str, Any]) -> str | None:
    """Returns a hint if an option needs a step of the build that runs on the card and there is no driver, else None.

    Args:
        failure: the library's message.
        options: of the build, those that were given.
    """
    names = " ".join(f"--{name.removesuffix('_mib').replace('_', '-')}" for name in options)
    if not names or "CUDA driver version is insufficient" not in failure:
        return None
    return f"without {names}, or on a machine with an NVIDIA driver: such an engine is not built ahead of the card"
