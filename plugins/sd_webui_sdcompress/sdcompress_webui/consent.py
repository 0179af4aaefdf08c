"""Asking the user whether an engine that was built elsewhere may run: what it is, and where it came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from sdcompress_engines.errors import SdCompressError
from sdcompress_engines.trust import allow

from .engine_folders import Artifact, Unreadable

NONE = "none"
"""The choice of no engine."""


def find_waiting(artifacts: Iterable[Artifact | Unreadable]) -> dict[str, Artifact]:
    """Returns the engines that only lack a consent, by the text of their choice.

    The text begins with the sha256, so that a choice always means the file that was shown.

    Args:
        artifacts: what `find_artifacts` has found.
    """
    waiting = [each for each in artifacts if isinstance(each, Artifact) and each.lacks_consent]
    return {f"{each.sha256[:16]} {each.folder.name}": each for each in waiting}


def question_html(waiting: Iterable[Artifact]) -> str:
    """Returns the question: what each engine is, its sha256, and what its manifest says of its origin.

    Args:
        waiting: the engines; without any the text is empty.
    """
    rows = "".join(_row_html(each) for each in waiting)
    if not rows:
        return ""
    return (
        "<p><b>These engines were built elsewhere, or by an earlier version.</b>"
        " An engine is executable code: it can do on this computer"
        " whatever you can do. Allow one only if you trust the person or site that you have it from, and compare its"
        " sha256 with the one that is published there. What is said below of its origin stands in the engine's own"
        f" folder, and is no proof. The consent is kept for this sha256 alone.</p><ul>{rows}</ul>"
    )


def _row_html(artifact: Artifact) -> str:
    manifest, config = artifact.manifest, artifact.manifest.config
    library = f"{config.get('flavour')} {config.get('version')}"
    facts = (
        ("folder", artifact.folder),
        ("model", artifact.name),
        ("sha256", artifact.sha256),
        ("built", f"{manifest.created} with {library} on {config.get('platform')}"),
        ("from model", artifact.source or "unknown"),
    )
    return f"<li>{', '.join(f'{escape(name)}: <code>{escape(str(value))}</code>' for name, value in facts)}</li>"


def give_consent(choice: str | None, artifacts: Sequence[Artifact | Unreadable]) -> str:
    """Store the consent for a chosen engine, after a check of its bytes. Returns a sentence about the outcome.

    Args:
        choice: a key of `find_waiting`.
        artifacts: what `find_artifacts` finds now.
    """
    artifact = find_waiting(artifacts).get(choice or NONE)
    if artifact is None:
        return "Choose one of the engines that wait for a consent."
    try:
        consent = allow(artifact.file)
    except (SdCompressError, OSError) as error:
        return f"It is not allowed: {error}"
    return f"{artifact.folder.name} may run now (sha256 {consent.sha256})."
