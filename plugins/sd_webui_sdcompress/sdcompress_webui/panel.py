"""What a person is told: the table of engines, why one cannot run, the command that makes it anew, and what an engine
leaves out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from sdcompress_engines.command import command_line
from sdcompress_engines.manifest import Manifest
from sdcompress_engines.profiles import ShapeRanges, format_range
from sdcompress_engines.runners.shapes import Ranges, Shape

from .calls import CONTEXT, SAMPLE
from .library import Artifact, Model, Traits, Unreadable

LIMITS = (
    (
        "LoRA",
        (
            'An engine has its weights inside, so a LoRA in the prompt cannot change it. With the setting "error" the'
            ' picture is refused, with the command that bakes the LoRA in; with "torch" it is made by the engine\'s own'
            " weights in torch, with the LoRA, where no block of the model has been removed. A student's layers are"
            " not the checkpoint's, so there it is refused in both; bake it in. A LoRA that changes the text encoder"
            " only works as ever."
        ),
    ),
    (
        "ControlNet, IP-Adapter, reference",
        (
            "They work inside the checkpoint's own UNet: refused with the reason, whatever the settings say. Set SD"
            " Unet to None for such pictures."
        ),
    ),
    ("Hypernetworks, tiling", "Refused likewise: both change layers inside the UNet."),
    (
        "Refiner, another checkpoint for hires fix",
        (
            "An engine stands in for the UNet of the checkpoint that a picture was begun with. From the step on at"
            " which another is loaded the picture is refused (on Forge the refiner runs with its own UNet)."
        ),
    ),
    (
        "AnimateDiff, FreeU and other extensions that rebuild the UNet",
        (
            "They have no effect on an engine. On Forge, which says what they patch, they are refused; A1111 does not"
            " say so: set SD Unet to None for them."
        ),
    ),
    ("Token merging, HyperTile", "They make the checkpoint's UNet faster and less exact, and do nothing to an engine."),
    (
        "Prompts",
        (
            "Any number of 77-token parts the engine was built for. A prompt and a negative prompt of different length"
            " run one after the other."
        ),
    ),
    (
        "Sizes",
        (
            "Those the engine was built for, in steps that its levels allow: 64 px, 32 px for bk-tiny. Hires fix needs"
            " an engine, or several of one model, that take both sizes."
        ),
    ),
)


def build_command(manifest: Manifest | None, widen: Mapping[str, Shape] | None = None, lora: Sequence[str] = ()) -> str:
    """What to type where the model is, to make this engine again.

    Args:
        widen: the shapes of a call that it should take too. lora: further ones to bake in, as `FILE:WEIGHT`.
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
    for baked in [*(name.removeprefix("lora ") for name in manifest.inputs if name.startswith("lora ")), *lora]:
        words += ["--lora", baked]
    return command_line([*words, "-o", "DIR"])


def profile_ranges(manifest: Manifest, widen: Mapping[str, Shape] | None = None) -> list[ShapeRanges]:
    """An engine's profiles in a person's units; with `widen` a single one is widened to take the shapes, and to several
    one that does is added.
    """
    scale = int(manifest.config.get("vae_scale", 8))
    found = [_person(profile, scale) for profile in (manifest.config.get("profiles") or {}).get("unet", ())]
    if widen is None or not found:
        return found
    asked = {
        "batch": widen[SAMPLE][0],
        "height": widen[SAMPLE][2] * scale,
        "width": widen[SAMPLE][3] * scale,
        "tokens": widen[CONTEXT][1],
    }
    if len(found) > 1:
        return [*found, ShapeRanges(**{name: (size, size, size) for name, size in asked.items()})]
    old = found[0]

    def wider(name: str) -> tuple[int, int, int]:
        least, best, most = getattr(old, name)
        return min(least, asked[name]), best, max(most, asked[name])

    return [ShapeRanges(**{name: wider(name) for name in asked})]


def _person(profile: Ranges, scale: int) -> ShapeRanges:
    samples, contexts = profile[SAMPLE], profile[CONTEXT]

    def of(axis: int, factor: int = 1) -> tuple[int, int, int]:
        least, best, most = (shape[axis] * factor for shape in samples)
        return least, best, most

    tokens = contexts[0][1], contexts[1][1], contexts[2][1]
    return ShapeRanges(of(0), of(2, scale), of(3, scale), tokens)


@dataclass(frozen=True)
class Row:
    """One folder of the table: what is in it, whether it is fit here and now, and how to make it anew."""

    folder: Path
    model: str
    made: str
    shapes: str
    verdict: str | None
    command: str


def rows(found: Iterable[Artifact | Unreadable], checkpoint: Traits | None) -> list[Row]:
    """The table; `verdict` is why a folder's engine cannot run, None where it can."""
    table = []
    for each in found:
        command = build_command(each.manifest)
        if isinstance(each, Unreadable):
            table.append(Row(each.folder, "", "", "", each.fault, command))
            continue
        config: Mapping[str, Any] = each.manifest.config
        cards = ", ".join(f"{major}.{minor}" for major, minor in config.get("compute_capabilities") or ())
        made = f"{each.backend} {each.precision}" + (
            f", {config['version']} for {cards or '8.0 and newer'}" if each.manifest.kind == "engine" else ""
        )
        shapes = (
            "; ".join(map(str, profile_ranges(each.manifest)))
            or f"any, in steps of {each.multiple * each.vae_scale} px"
        )
        kind = "whole" if each.whole else "student"
        verdict = each.why_not_here() or (each.traits.why_not(checkpoint) if checkpoint else None)
        table.append(Row(each.folder, f"{each.name} ({kind}, {each.traits.family})", made, shapes, verdict, command))
    return table


def page(
    root: Path,
    found: Sequence[Artifact | Unreadable],
    entries: Sequence[Model],
    checkpoint: Traits | None,
    notes: Sequence[str] = (),
) -> str:
    """The tab, as HTML: where engines are looked for, the table, and what an engine leaves out.

    Args:
        notes: what is amiss besides, such as a runtime that is not there.
    """
    head = "".join(f"<p><b>{escape(note)}</b></p>" for note in notes)
    head += (
        f"<p>Engines are looked for in <code>{escape(str(root))}</code>. Choose one under Settings → Stable Diffusion →"
        " SD Unet, or on Forge in the box below the prompt.</p>"
    )
    if not found:
        return (
            head
            + "<p>There are none yet: <code>sdcompress install webui WEBUI ENGINE</code> brings one here.</p>"
            + _limits()
        )
    lines = []
    for row in rows(found, checkpoint):
        verdict = "ready" if row.verdict is None else f"cannot run: {row.verdict}"
        shown = row.folder.relative_to(root) if row.folder.is_relative_to(root) else row.folder
        cells = (
            escape(str(shown)),
            escape(row.model),
            escape(row.made),
            escape(row.shapes),
            escape(verdict),
            f"<code>{escape(row.command)}</code>",
        )
        lines.append(
            f"<tr{'' if row.verdict is None else ' style=&quot;opacity: 0.6&quot;'.replace('&quot;', chr(34))}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        )
    titles = "".join(
        f"<th>{title}</th>"
        for title in ("folder", "model", "made with", "shapes", "state", "make it again (MODEL is its folder or file)")
    )
    gone = "".join(
        f"<p>{escape(str(entry.label()))}</p>"
        for entry in entries
        if not entry.usable and not any(path in {each.folder for each in found} for path, _ in entry.faults)
    )
    return f"{head}<table><tr>{titles}</tr>{''.join(lines)}</table>{gone}{_limits()}"


def _limits() -> str:
    return (
        "<h3>What an engine leaves out</h3><ul>"
        + "".join(f"<li><b>{escape(name)}</b>: {escape(text)}</li>" for name, text in LIMITS)
        + "</ul>"
    )
