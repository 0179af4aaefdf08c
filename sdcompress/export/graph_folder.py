"""Reading a folder of graphs that an earlier export has written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator
from sdcompress_engines.errors import ArtifactError
from sdcompress_engines.export_folder import check_export
from sdcompress_engines.graph import AGAIN
from sdcompress_engines.manifest import MANIFEST_NAME, Manifest
from sdcompress_engines.signature import COMPONENTS, HOSTS

from sdcompress.export.components import DTYPES
from sdcompress.export.quantize.precisions import PRECISIONS as QUANTIZED
from sdcompress.support.faults import faults_of


class GraphConfig(BaseModel):
    """What the manifest of an ONNX folder has to say about its graphs, besides what is there for people to read."""

    components: Annotated[list[Literal[tuple(COMPONENTS)]], Field(min_length=1)]  # type: ignore[valid-type]
    signature: Literal[tuple(HOSTS)]  # type: ignore[valid-type]
    precision: Literal[(*DTYPES, *QUANTIZED)]  # type: ignore[valid-type]
    precisions: dict[str, Literal[(*DTYPES, *QUANTIZED)]]  # type: ignore[valid-type]
    model_name: Annotated[str, Field(max_length=1000)] = ""

    @field_validator("precisions")
    @classmethod
    def _cover_components(cls, precisions: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        if lacking := set(info.data.get("components", ())) - set(precisions):
            raise ValueError(f"lacks {', '.join(sorted(lacking))}")
        return precisions


def read_graph_folder(folder: Path) -> Manifest:
    """Returns the manifest of an ONNX folder, after a check of its files and of what it says.

    Raises:
        ArtifactError: as `check_export`, or the manifest does not describe graphs.
    """
    manifest = check_export(folder, ["onnx"])
    try:
        config = GraphConfig.model_validate(manifest.config)
    except ValidationError as error:
        faults = faults_of(error, GraphConfig, "entry")
        raise ArtifactError(
            f"does not describe its graphs: {faults}", where=folder / MANIFEST_NAME, hint=AGAIN
        ) from error
    if lacking := [name for name in config.components if f"{name}.onnx" not in manifest.files]:
        raise ArtifactError(f"has no {lacking[0]}.onnx", where=folder, hint=AGAIN)
    return manifest
