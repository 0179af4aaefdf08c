"""The model's weights beside its engine: what a WebUI's plugin runs in torch if the engine cannot serve a picture."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from sdcompress_engines.errors import EngineMismatch, UsageError
from sdcompress_engines.progress import Reporter

from sdcompress.hosts.engine_folder import Engine
from sdcompress.hosts.entry import Entry, Item

WEIGHTS = "student.safetensors"
"""The name of the file in the engine's folder."""


def prepare_weights(model: str | Path, engines: Sequence[Engine], stack: ExitStack, report: Reporter) -> Item:
    """Returns the model as one LDM file, to be copied beside the engines that were exported from it.

    Args:
        model: a name, path or hub id.
        engines: that will have the file beside them.
        stack: deletes the file on closing, if it had to be written.
        report: says that the file is being written.

    Raises:
        UsageError: there are no engines.
        EngineMismatch: an engine was exported from another model, or with a LoRA baked in.
    """
    from sdcompress.checkpoints.write import export_ldm
    from sdcompress.models.load import load_pipeline
    from sdcompress.models.locate import hash_pipeline, locate_pipeline

    if not engines:
        raise UsageError("--with-weights without an engine", expected="the engines that were exported from this model")
    path = locate_pipeline(Path(model) if Path(model).exists() else model)
    digest = hash_pipeline(path)
    for engine in engines:
        inputs = engine.manifest.inputs
        if inputs.get("pipeline") != digest or any(source.startswith("lora ") for source in inputs):
            what = (
                "contains a LoRA that this model does not contain"
                if inputs.get("pipeline") == digest
                else "was exported from another model"
            )
            raise EngineMismatch(
                f"{engine.name} {what}, so torch would draw different pictures",
                where=path,
                expected="the model it was exported from, unchanged",
            )
    if path.is_file() and path.suffix == ".safetensors":
        return Item(path, Entry.of(path))
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sdcompress-")))
    report.show_line("writing the model as one LDM file")
    file = export_ldm(load_pipeline(path, as_stored=True).pipeline, folder / WEIGHTS)
    return Item(file, Entry.of(file))
