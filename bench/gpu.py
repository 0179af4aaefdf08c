"""Ten minutes on a card: its peaks, the time of UNet steps, pictures and training, and whether our tests pass.

    python bench/gpu.py --minutes 9 -o build/gpu             all parts within nine minutes, the most important first
    python bench/gpu.py --parts 3,4 -o build/gpu --again     the UNet steps once more
    python bench/gpu.py --parts nano -o build/nano-gpu       train the built-in teacher, and nothing else
    python bench/gpu.py --device cpu --smoke -o build/smoke  every part small on a CPU, to test this program

It runs from a checkout that is not installed; it needs torch, diffusers, transformers, accelerate, onnx and pydantic.
Each part runs in its own process with a cap in seconds, and its results are kept row by row. So a crash or a hang costs
only itself, and the same command continues where it was cut. Everything is in DIR/gpu.json, whose schema is in
`sdcompress_bench/gpu/__init__.py`. One line is printed for each row, and the last line is JSON. Exit status: 0 if every
chosen part has ended, failed rows included; 1 if one was cut, died, or did not begin; 2 for a usage error.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]


def use_checkout() -> None:
    """Let this process and its children import this checkout's packages."""
    packages = [str(ROOT), str(ROOT / "engines"), str(ROOT / "bench")]
    sys.path[:0] = [path for path in packages if path not in sys.path]
    known = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([*packages, *([known] if known else [])])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("build/gpu"), metavar="DIR", help="default: build/gpu"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit of the whole run (default: 9)")
    parser.add_argument("--parts", help="parts to run, as 3,4 or 0-2 or nano (default: all but nano)")
    parser.add_argument("--again", action="store_true", help="also run chosen parts that have already ended in DIR")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="nano's models, a few samples each")
    args = parser.parse_args()
    if args.device == "cpu" and not args.smoke:
        parser.error("--device cpu needs --smoke: full-size models take hours on a CPU")
    try:
        args.parts = None if args.parts is None else parse_parts(args.parts)
    except ValueError:
        parser.error(f"--parts {args.parts}; expected numbers, as 3,4 or 0-2, or nano")
    return args


def parse_parts(text: str) -> list[int]:
    """Returns the numbers of `3,4`, `0-2` or `nano`.

    Raises:
        ValueError: it is none of them.
    """
    from sdcompress_bench.gpu.program import PARTS

    titles = {part.title: part.number for part in PARTS}
    found: set[int] = set()
    for item in text.split(","):
        if item in titles:
            found.add(titles[item])
            continue
        first, _, last = item.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return sorted(found)


def stop(_signal: int, _frame: Any) -> NoReturn:
    """End as an interrupt does, so that no process of a part is left running."""
    raise KeyboardInterrupt


def main() -> int:
    use_checkout()
    args = parse_arguments()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # code that chooses its device itself chooses the CPU
    from sdcompress_bench.gpu.program import Program
    from sdcompress_engines.errors import SdCompressError

    signal.signal(signal.SIGTERM, stop)
    try:
        program = Program(args.output, args.device, args.smoke, args.minutes)
        ended = program.run(args.parts, args.again)
    except SdCompressError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; what was measured is kept", file=sys.stderr)
        return 1
    print(json.dumps(program.summary()))
    return 0 if ended else 1


if __name__ == "__main__":
    sys.exit(main())
