"""Which files of a folder sdcompress has written: what `--force` may replace."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import ArtifactError
from .json_files import read_json_object
from .leftovers import is_temporary
from .manifest import MANIFEST_NAME, read_manifest

KINDS = frozenset(
    {
        "cache",
        "checkpoint",
        "dataset",
        "decoder",
        "engine",
        "few-step",
        "finetuned",
        "lora",
        "onnx",
        "package",
        "random model",
        "results",
        "student",
    }
)
"""Every kind of artifact."""


@dataclass(frozen=True)
class Mark:
    """A file by which the folder of a stage without a manifest, finished or stopped, is known.

    Attributes:
        file: its name. It holds a JSON object.
        keys: that the object has.
        beside: matches the paths of the other files that the stage writes, relative to the folder.
    """

    file: str
    keys: frozenset[str]
    beside: re.Pattern[str]

    def explains(self, name: str) -> bool:
        """Returns whether the stage writes a file, given by its path in the folder."""
        return name == self.file or self.beside.fullmatch(name) is not None

    def is_in(self, folder: Path) -> bool:
        """Returns whether the mark lies in a folder."""
        path = folder / self.file
        try:
            return path.is_file() and self.keys <= read_json_object(path).keys()
        except (OSError, ArtifactError):
            return False


RUN = Mark("run.json", frozenset({"teacher", "data", "plans"}), re.compile(r"\.(cache|report)\.lock"))
"""The mark of `sdcompress run`; beside it, the locks of stages that were killed."""
TRAINING = Mark(
    "recipe.json",
    frozenset({"steps", "batch_size", "learning_rate"}),
    re.compile(
        r"\.lock|plan\.json|metrics\.jsonl|samples/step-\d+\.webp|(sdcompress|runs|wandb)/.*"  # trackers' folders
    ),
)
"""The mark of a training."""
MARKS = (
    RUN,
    TRAINING,
    Mark("build.json", frozenset({"teacher", "files", "units"}), re.compile(r"unit-\d{5,}\.safetensors\.json")),
    Mark(
        "settings.json",
        frozenset({"prompts", "picture_format"}),
        re.compile(r"metadata\.jsonl|\d{6,}\.(webp|png)|latents-\d{6,}\.safetensors"),
    ),
)
"""The marks of `run`, of a training, of a cache whose build was killed at its very end, and of `data generate`."""

_UNFINISHED = re.compile(r"\..+\.(partial|work)")
"""Names of folders that a stage fills before it is finished: a cache, a checkpoint and a bench."""
_OF_THE_SYSTEM = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
_MOST_FOREIGN = 1000

Explains = Callable[[str], bool]


def is_marked(folder: Path) -> bool:
    """Returns whether a manifest or a mark of a stage lies in the folder, or the two folders of `export --trt` do."""
    return any(_explainers(folder)) or _has_graphs_and_engines(folder)


def list_foreign(folder: Path) -> list[str]:
    """Returns the files in a folder that no manifest and no stage of sdcompress explains, at most 1,000.

    Artifacts inside explain their own files. Empty folders and what a system's file manager writes do not count.

    Args:
        folder: an output folder.

    Returns:
        Paths relative to `folder`, sorted.
    """
    found = []
    for path in _foreign(folder, []):
        found.append(path.relative_to(folder).as_posix())
        if len(found) == _MOST_FOREIGN:
            break
    return sorted(found)


def _foreign(folder: Path, above: list[tuple[Path, Explains]]) -> Iterator[Path]:
    known = [*above, *((folder, explains) for explains in _explainers(folder))]
    try:
        entries = list(os.scandir(folder))
    except OSError:  # it cannot be read, so nothing explains it
        yield folder
        return
    for entry in entries:
        path = Path(entry.path)
        is_folder = entry.is_dir(follow_symlinks=False)
        if (
            is_temporary(entry.name)
            or entry.name in _OF_THE_SYSTEM
            or (is_folder and _UNFINISHED.fullmatch(entry.name))
        ):
            continue
        if is_folder:
            yield from _foreign(path, known)
        elif not any(explains(path.relative_to(base).as_posix()) for base, explains in known):
            yield path


def _explainers(folder: Path) -> Iterator[Explains]:
    """Yields for the manifest and each mark in a folder: whether it explains a file, by its path in the folder."""
    if (kind_and_files := _read_kind(folder)) is not None:
        yield (kind_and_files[1] | {MANIFEST_NAME}).__contains__
    yield from (mark.explains for mark in MARKS if mark.is_in(folder))
    lock = folder / ".lock"
    if lock.is_file() and not lock.is_symlink() and lock.stat().st_size == 0:  # a training that could not begin
        yield ".lock".__eq__


def _read_kind(folder: Path) -> tuple[str, frozenset[str]] | None:
    """Returns the kind and the files of a folder's manifest; None where there is none of a known kind."""
    try:
        manifest = read_manifest(folder)
    except (ArtifactError, OSError):
        return None
    return None if manifest is None or manifest.kind not in KINDS else (manifest.kind, frozenset(manifest.files))


def _has_graphs_and_engines(folder: Path) -> bool:
    """Returns whether the folder is one of `export --trt`: it holds `onnx` and `engine`, and nothing else."""
    names = {entry for entry in os.listdir(folder) if entry not in _OF_THE_SYSTEM}
    kinds = {name: found[0] for name in names if (found := _read_kind(folder / name)) is not None}
    return kinds == {"onnx": "onnx", "engine": "engine"} and names == set(kinds)
