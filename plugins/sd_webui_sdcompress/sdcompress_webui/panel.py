"""The tab's content: the table of engines, why one cannot run, and the command that builds it again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from sdcompress_engines.command import command_line
from sdcompress_engines.errors import shorten
from sdcompress_engines.manifest import Manifest
from sdcompress_engines.profiles import ShapeRanges, format_range
from sdcompress_engines.runners.shapes import Ranges, Shape

from .calls import CONTEXT, SAMPLE
from .consent import find_waiting, question_html
from .engine_folders import Artifact, Unreadable
from .limits import limits_html
from .menu import Model
from .traits import Traits


def build_command(manifest: Manifest | None, widen: Mapping[str, Shape] | None = None, lora: Sequence[str] = ()) -> str:
    """Returns the command that builds an engine again, to be typed where the model is.

    Args:
        manifest: the engine's, or None if it cannot be read.
        widen: input → shape of a call that the engine should take too.
        lora: further LoRAs to bake in, as `FILE:WEIGHT`.
    """
    if manifest is None:
        return "sdcompress export MODEL --trt --signature webui --profile webui -o DIR"
    config = manifest.config
    name = str(config.get("model_name") or "")
    words = ["sdcompress", "export", name if "/" in name or name in ("nano", "nano-tiny") else "MODEL"]
    precision = str(config.get("precision") or "")
    if manifest.kind == "engine":
        words += ["--trt", "--flavour", str(config.get("flavour"))]
        for ranges in profile_ranges(manifest, widen):
            words += [
                "--profile",
                ",".join(
                    f"{field}={format_range(getattr(ranges, field))}"
                    for field in ("batch", "height", "width", "tokens")
                ),
            ]
        for option, value in sorted(dict(config.get("options") or {}).items()):
            flag = f"--{'workspace' if option == 'workspace_mib' else option.replace('_', '-')}"
            words += [flag] if value is True else [flag, str(value)]
    words += ["--signature", "webui"] + (["--precision", precision] if precision else [])
    baked = [name.removeprefix("lora ") for name in manifest.inputs if name.startswith("lora ")]
    for each in [*baked, *lora]:
        words += ["--lora", each]
    return command_line([*words, "-o", "DIR"])


def profile_ranges(manifest: Manifest, widen: Mapping[str, Shape] | None = None) -> list[ShapeRanges]:
    """Returns an engine's profiles in samples, pixels and tokens.

    Args:
        manifest: the engine's.
        widen: input → shape of a call. A single profile is widened to take it. If there are several, one
            for this call is added.
    """
    scale = int(manifest.config.get("vae_scale", 8))
    profiles = (manifest.config.get("profiles") or {}).get("unet", ())
    ranges = [_to_ranges(profile, scale) for profile in profiles]
    if widen is None or not ranges:
        return ranges
    sizes = {
        "batch": widen[SAMPLE][0],
        "height": widen[SAMPLE][2] * scale,
        "width": widen[SAMPLE][3] * scale,
        "tokens": widen[CONTEXT][1],
    }
    if len(ranges) > 1:
        return [*ranges, ShapeRanges(**{name: (size, size, size) for name, size in sizes.items()})]
    widened = {}
    for name, size in sizes.items():
        least, best, most = getattr(ranges[0], name)
        widened[name] = min(least, size), best, max(most, size)
    return [ShapeRanges(**widened)]


def _to_ranges(profile: Ranges, scale: int) -> ShapeRanges:
    samples, contexts = profile[SAMPLE], profile[CONTEXT]

    def axis_range(axis: int, factor: int = 1) -> tuple[int, int, int]:
        least, best, most = (shape[axis] * factor for shape in samples)
        return least, best, most

    tokens = contexts[0][1], contexts[1][1], contexts[2][1]
    return ShapeRanges(axis_range(0), axis_range(2, scale), axis_range(3, scale), tokens)


@dataclass(frozen=True)
class Row:
    """One folder of the table.

    Attributes:
        folder: the engine's.
        model: name, kind, family and, of a few-step model, the sampling that it was trained for.
        built: backend, precision and card.
        shapes: that the engine takes.
        fault: why the engine cannot run, or None.
        command: that builds it again.
    """

    folder: Path
    model: str
    built: str
    shapes: str
    fault: str | None
    command: str


def table_rows(artifacts: Iterable[Artifact | Unreadable], checkpoint: Traits | None) -> list[Row]:
    """Returns one row for each folder.

    Args:
        artifacts: what `find_artifacts` has found.
        checkpoint: the traits of the loaded checkpoint, or None.
    """
    rows = []
    for each in artifacts:
        try:
            rows.append(_read_row(each, checkpoint))
        except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
            # A strange manifest must not hide the other rows.
            unreadable = f"its manifest has an unexpected value ({shorten(error, 120)})"
            fault = each.fault if isinstance(each, Unreadable) else unreadable
            rows.append(Row(each.folder, "", "", "", fault, build_command(None)))
    return rows


def _read_row(artifact: Artifact | Unreadable, checkpoint: Traits | None) -> Row:
    command = build_command(artifact.manifest)
    if isinstance(artifact, Unreadable):
        return Row(artifact.folder, "", "", "", artifact.fault, command)
    config: Mapping[str, Any] = artifact.manifest.config
    cards = ", ".join(f"{major}.{minor}" for major, minor in config.get("compute_capabilities") or ())
    built = f"{artifact.backend} {artifact.precision}"
    if artifact.manifest.kind == "engine":
        built += f", {config['version']} for {cards or '8.0 and newer'}"
    ranges = profile_ranges(artifact.manifest)
    shapes = "; ".join(map(str, ranges)) or f"any, in steps of {artifact.multiple * artifact.vae_scale} px"
    model = f"{artifact.name} ({'whole' if artifact.whole else 'student'}, {artifact.traits.family})"
    if artifact.sampling is not None:
        model += f"; {artifact.sampling.describe_in(('webui', 'forge'))}"
    fault = artifact.find_obstacle() or (artifact.traits.find_mismatch(checkpoint) if checkpoint else None)
    return Row(artifact.folder, model, built, shapes, fault, command)


def tab_html(
    root: Path,
    artifacts: Sequence[Artifact | Unreadable],
    entries: Sequence[Model],
    checkpoint: Traits | None,
    notes: Sequence[str] = (),
) -> str:
    """Returns the tab's HTML: the engine folder, the table of engines, and what an engine does not support.

    Args:
        root: the engine folder.
        artifacts: what `find_artifacts` has found there.
        entries: of the menu.
        checkpoint: the traits of the loaded checkpoint, or None.
        notes: further problems, such as a missing runtime.
    """
    head = "".join(f"<p><b>{escape(note)}</b></p>" for note in notes)
    head += (
        f"<p>The engine folder is <code>{escape(str(root))}</code>. Choose an engine under Settings → Stable Diffusion"
        " → SD Unet, or on Forge in the box below the prompt.</p>"
    )
    if not artifacts:
        install = "<code>sdcompress install webui WEBUI ENGINE</code>"
        return f"{head}<p>There are no engines yet: {install} puts one here.</p>{limits_html()}"
    columns = ("folder", "model", "built with", "shapes", "state", "build it again (MODEL is its folder or file)")
    titles = "".join(f"<th>{title}</th>" for title in columns)
    body = "".join(_row_html(root, row) for row in table_rows(artifacts, checkpoint))
    folders = {each.folder for each in artifacts}
    gone = "".join(
        f"<p>{escape(str(entry.label()))}</p>"
        for entry in entries
        if not entry.usable and not any(path in folders for path, _ in entry.faults)
    )
    question = question_html(find_waiting(artifacts).values())
    return f"{head}<table><tr>{titles}</tr>{body}</table>{question}{gone}{limits_html()}"


def _row_html(root: Path, row: Row) -> str:
    folder = row.folder.relative_to(root) if row.folder.is_relative_to(root) else row.folder
    state = "ready" if row.fault is None else f"cannot run: {row.fault}"
    cells = [escape(str(text)) for text in (folder, row.model, row.built, row.shapes, state)]
    cells.append(f"<code>{escape(row.command)}</code>")
    style = "" if row.fault is None else ' style="opacity: 0.6"'
    return f"<tr{style}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
