"""The index of weights that are split into several files: its names lead to files beside it, or it is refused."""

from __future__ import annotations

from pathlib import Path

from sdcompress_engines.errors import ModelError
from sdcompress_engines.json_files import read_json_object
from sdcompress_engines.paths import file_inside


def check_weight_indexes(folder: Path) -> None:
    """Check the indexes in a pipeline's folder before diffusers or transformers follow them.

    Args:
        folder: of the pipeline; each component has a folder in it.

    Raises:
        ModelError: an index names a file outside its folder, or is none.
    """
    for index in sorted(folder.glob("*/*.index.json")):
        names = read_json_object(index, ModelError).get("weight_map")
        if not isinstance(names, dict):
            raise ModelError("has no weight_map", where=index, expected="tensor → file")
        for name in {name if isinstance(name, str) else repr(name) for name in names.values()}:
            # People link the files of large models.
            file_inside(index.parent, name, source=index, links=True, error=ModelError)
