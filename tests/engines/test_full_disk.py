"""A disk that fills: one line, whatever library writes, and the old file as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FULL = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # EFBIG, in place of a disk that is full
from sdcompress_engines.errors import StorageError, storage_errors
from sdcompress_engines.files import append_line, write_atomically
from sdcompress_engines.output_folders import staged_file

path, writer = Path(sys.argv[1]), sys.argv[2]

def write(path):
    if writer == "torch":
        import torch
        torch.save(torch.zeros(10_000), path)
    elif writer == "safetensors":
        import torch
        from safetensors.torch import save_file
        save_file({"a": torch.zeros(10_000)}, path)
    elif writer == "onnx":
        import onnx
        tensor = onnx.helper.make_tensor("a", 1, [10_000], b"0" * 40_000, raw=True)
        onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [tensor])), path)
    elif writer == "numpy":
        import numpy
        with path.open("wb") as file:
            numpy.savez(file, a=numpy.zeros(10_000))
    elif writer == "zip":
        import zipfile
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a", b"0" * 40_000)
    elif writer == "tokenizer":
        from tokenizers import Tokenizer, models
        Tokenizer(models.WordLevel({str(i): i for i in range(5000)}, "0")).save(str(path))
    elif writer == "picture":
        from PIL import Image
        from sdcompress.support.pictures import save_picture
        save_picture(Image.effect_noise((200, 200), 90), path)
    elif writer == "pillow":
        from PIL import Image
        Image.effect_noise((200, 200), 90).save(path, "png")
    else:
        path.write_bytes(b"0" * 40_000)

try:
    if writer == "append":
        with storage_errors(path):
            append_line(path, "0" * 40_000)
    elif writer == "write_atomically":
        with storage_errors(path):
            write_atomically(path, "0" * 40_000)
    else:
        with staged_file(path) as partial:
            write(partial)
except StorageError as error:
    print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="RLIMIT_FSIZE")
@pytest.mark.parametrize(
    "writer",
    [
        "append",
        "write_atomically",
        "bytes",
        "torch",
        "safetensors",
        "onnx",
        "numpy",
        "zip",
        "tokenizer",
        "picture",
        "pillow",
    ],
)
def test_a_disk_that_fills_is_one_line_and_the_old_file_is_whole(tmp_path: Path, writer: str) -> None:
    path = tmp_path / "file.png"
    path.write_bytes(b"before\n")
    ended = subprocess.run([sys.executable, "-c", FULL, str(path), writer], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(str(path.parent)), ended.stdout
    assert len(ended.stdout.splitlines()) == 1
    assert path.read_bytes() == b"before\n"
    assert list(tmp_path.iterdir()) == [path]
