"""The entries of the UNet menu: the engines of one model are one entry."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .engine_folders import Artifact, Unreadable, can_be_offered, identify
from .traits import Traits

PREFIX = "[sdcompress] "
REASON = " – cannot run: "
_LONGEST_REASON = 120


class Label(str):
    """The text of a menu entry.

    A label equals every text that names the same engine, whatever reason it ends in. The reason comes and goes, while
    the settings keep an earlier text. If that text were not found, the WebUI would use the checkpoint's own UNet
    without a message.
    """

    def _title(self) -> str:
        return str(self).partition(REASON)[0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and self._title() == str(other).partition(REASON)[0]

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self._title())


@dataclass(frozen=True)
class Model:
    """One entry of the menu: the engines of one model in one precision and on one backend.

    Attributes:
        title: of the entry, without a reason.
        usable: the engines that this machine can run.
        faults: (folder, reason) of the engines that it cannot run.
    """

    title: str
    usable: tuple[Artifact, ...]
    faults: tuple[tuple[Path, str], ...] = ()

    @property
    def model_name(self) -> str | None:
        """The checkpoint for which the choice "Automatic" may take this entry.

        None for a student and for a model with a LoRA baked in: both are other models than the checkpoint.
        """
        first = self.usable[0] if self.usable else None
        return first.name if first is not None and first.whole and not first.loras else None

    def find_obstacle(self, checkpoint: Traits | None) -> str | None:
        """Returns why the entry cannot serve the loaded checkpoint on this machine, or None."""
        if not self.usable:
            return "; ".join(dict.fromkeys(fault for _, fault in self.faults))
        return None if checkpoint is None else self.usable[0].traits.find_mismatch(checkpoint)

    def label(self, checkpoint: Traits | None = None) -> Label:
        """Returns the text of the entry, with the reason if it cannot serve."""
        reason = self.find_obstacle(checkpoint)
        if reason is None:
            return Label(self.title)
        short = reason if len(reason) <= _LONGEST_REASON else reason[: _LONGEST_REASON - 3] + "..."
        return Label(f"{self.title}{REASON}{short}")


def group_models(artifacts: Iterable[Artifact | Unreadable], chosen: str | None = None) -> list[Model]:
    """Returns one menu entry per model, in the order of their titles.

    Args:
        artifacts: what `find_artifacts` has found.
        chosen: the entry in the settings. If nothing has that title, it is listed as one that is gone.
    """
    groups: dict[tuple[str, ...], list[tuple[Artifact | Unreadable, str | None]]] = {}
    entries: list[Model] = []
    for each in artifacts:
        fault = each.fault if isinstance(each, Unreadable) else None
        if each.manifest is None or not can_be_offered(each.manifest):
            entries.append(Model(PREFIX + each.folder.name, (), ((each.folder, fault or ""),)))
            continue
        if isinstance(each, Artifact):
            fault = each.find_obstacle()
        groups.setdefault(identify(each.folder, each.manifest), []).append((each, fault))
    titles = [(key[0], key[2], key[3]) for key in groups]
    for (name, _, precision, backend), members in groups.items():
        shown = name if titles.count((name, precision, backend)) == 1 else members[0][0].folder.name
        usable = tuple(each for each, fault in members if isinstance(each, Artifact) and fault is None)
        faults = tuple((each.folder, fault) for each, fault in members if fault is not None)
        entries.append(Model(f"{PREFIX}{shown} ({backend} {precision})", usable, faults))
    title = str(chosen or "").partition(REASON)[0]
    if title.startswith(PREFIX) and all(entry.title != title for entry in entries):
        reason = "it is not in the engine folder any more, or cannot be read there"
        entries.append(Model(title, (), ((Path(title.removeprefix(PREFIX)), reason),)))
    return sorted(entries, key=lambda entry: entry.title)
