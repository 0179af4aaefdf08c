"""A training folder, and what lands in it: one run at a time, samples, the finished pipeline."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from sdcompress_engines.errors import ArtifactError, BackendMissing, ModelError, StorageError, UsageError
from sdcompress_engines.locks import HeldLock, try_lock
from sdcompress_engines.manifest import check_free, staged, storage_errors, write_manifest
from torch import nn

from sdcompress.support.quiet import quiet
from sdcompress.train.config import TrainConfig

PIPELINE = "pipeline"
LOCK = ".lock"


@contextmanager
def run_folder(output: Path, *, resume: bool, force: bool) -> Iterator[None]:
    """The training folder, made and locked for the block; processes of one run enter it together.

    A run that could not begin leaves none.

    Raises:
        ArtifactError: in the way (neither `resume` nor `force`), or another run is at work in it.
        StorageError: no space, no permission, or a file system without locks.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    lock, new = _enter(output, resume, force) if state.is_main_process else (None, False)
    state.wait_for_everyone()
    try:
        yield
    except (UsageError, BackendMissing, ModelError):
        if lock is not None and new:
            _leave_nothing(output, lock)
            lock = None
        raise
    finally:
        if lock is not None:
            lock.release()


def _enter(output: Path, resume: bool, force: bool) -> tuple[HeldLock, bool]:
    """Make and lock the folder; with `force`, empty it.

    Returns the lock, and whether what is in the folder is this run's alone.
    """
    with storage_errors(output):
        if not resume:
            check_free(output, force)
        new = not output.exists()
        output.mkdir(parents=True, exist_ok=True)
        try:
            lock = try_lock(output / LOCK, hint="choose another -o, on a local disk")
        except StorageError:
            if new:
                shutil.rmtree(output, ignore_errors=True)
            raise
        if lock is None:
            raise ArtifactError(
                "another run is at work in this folder", where=output, hint="wait for it, or choose another -o"
            )
        if force and not resume:
            try:
                _empty(output)
            except BaseException:
                lock.release()
                raise
            new = True
    return lock, new


def _empty(output: Path) -> None:
    """Remove all but the lock file: while it is held, Windows removes neither it nor the folder."""
    for path in output.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _leave_nothing(output: Path, lock: HeldLock) -> None:
    """Remove the folder and release its lock."""
    with suppress(OSError):  # another error is on its way to the user
        _empty(output)
    with suppress(OSError):
        lock.discard()
        output.rmdir()


def with_unet(pipeline: Any, unet: nn.Module) -> Any:
    """The pipeline around another UNet; every other component is shared, not copied."""
    components = dict(pipeline.components) | {"unet": unet}
    if "safety_checker" in components:
        components["requires_safety_checker"] = False
    other = type(pipeline)(**components)
    other.set_progress_bar_config(disable=True)
    return other


def save_pipeline(
    pipeline: Any, target: Path, kind: str, *, precision: str = "fp32", force: bool = False, **manifest: Any
) -> None:
    """Save a pipeline as an ordinary diffusers folder with a manifest, by one rename; the pipeline is left as it is."""
    with staged(target, force) as out:
        if precision == "fp16":
            pipeline = with_unet(pipeline, copy.deepcopy(pipeline.unet).half())
            for name in ("vae", "text_encoder", "text_encoder_2"):
                if getattr(pipeline, name, None) is not None:
                    pipeline.register_modules(**{name: copy.deepcopy(getattr(pipeline, name)).half()})
        with quiet():
            pipeline.save_pretrained(out)
        for config in out.rglob(
            "*.json"
        ):  # diffusers notes where a component was loaded from: a path on this machine, not for the world
            content = json.loads(config.read_text(encoding="utf-8"))
            if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
                config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        write_manifest(out, kind, **manifest)


def training_scheduler(scheduler: Any) -> Any:
    """DDPM with the pipeline's noise schedule, whatever sampler it carries."""
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(scheduler.config)


def write_once(path: Path, text: str) -> None:
    """Write a file that is not there yet: a refused resume must find the run's own unharmed."""
    if PartialState().is_main_process and not path.is_file():
        path.write_text(text, encoding="utf-8")


def recipe_text(config: TrainConfig) -> str:
    """The resolved recipe, as it is saved with a run."""
    return json.dumps(config.model_dump(mode="json"), indent=1) + "\n"


def sampler(dressed: Callable[[nn.Module], Any], config: TrainConfig, output: Path, size_px: int) -> Any:
    """What draws the validation prompts with `dressed(network)`, a pipeline around the network in training; None
    without prompts.
    """
    if not config.validation_prompts:
        return None
    folder = output / "samples"

    def draw(trained: nn.Module, step: int) -> None:
        from sdcompress.sampling import generate, grid

        was_training = trained.training
        trained.eval()
        # The other components come to where the network trains.
        pipeline = dressed(trained).to(next(trained.parameters()).device)
        pictures = generate(
            pipeline,
            list(config.validation_prompts),
            seeds=list(range(len(config.validation_prompts))),
            size_px=size_px,
        )
        trained.train(was_training)
        with storage_errors(folder):
            folder.mkdir(exist_ok=True)
            grid(pictures).save(folder / f"step-{step:06d}.webp", quality=90)

    return draw
