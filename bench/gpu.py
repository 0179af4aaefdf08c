"""Ten minutes on a card: its peaks, what UNet steps, pictures and training take on it, whether our tests pass.

    python bench/gpu.py --minutes 9 -o build/gpu             all parts, in order of their worth, inside nine minutes
    python bench/gpu.py --parts 3,4 -o build/gpu --again     the UNet steps once more
    python bench/gpu.py --device cpu --smoke -o build/smoke  every part small on a CPU, to prove this program

From a checkout with nothing installed: torch, diffusers, transformers, accelerate, onnx and pydantic are what it needs.
Each part runs in a process of its own with a cap in seconds, and what it has found is kept row by row: a crash or a
hang costs only itself, and the same command goes on where it was cut. Everything lands in DIR/gpu.json, whose schema is
in `sdcompress_bench/gpu/__init__.py`. One line is printed for each row; the last line is JSON. Exit status 0 when every
chosen part has ended, failed rows included; 1 when one was cut, died, or was not begun; 2 for a usage error.
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
    """Let this process, and those that it starts, import this checkout's packages."""
    ours = [str(ROOT), str(ROOT / "engines"), str(ROOT / "bench")]
    sys.path[:0] = [path for path in ours if path not in sys.path]
    known = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([*ours, *([known] if known else [])])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("build/gpu"), metavar="DIR", help="default: build/gpu"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="after which everything has ended (default: 9)")
    parser.add_argument("--parts", help="numbers of the parts to run, as 3,4 or 0-2 (default: all)")
    parser.add_argument("--again", action="store_true", help="run the chosen parts again that ended before in DIR")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="nano's models, a few samples each")
    args = parser.parse_args()
    if args.device == "cpu" and not args.smoke:
        parser.error("--device cpu needs --smoke: full-size models take hours on a CPU")
    try:
        args.parts = None if args.parts is None else parse_parts(args.parts)
    except ValueError:
        parser.error(f"--parts {args.parts}; expected numbers, as 3,4 or 0-2")
    return args


def parse_parts(text: str) -> list[int]:
    """Returns the numbers of `3,4` or `0-2`.

    Raises:
        ValueError: it is neither.
    """
    found: set[int] = set()
    for item in text.split(","):
        first, _, last = item.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return sorted(found)


def stop(_signal: int, _frame: Any) -> NoReturn:
    """End as an interrupt does, so that no part's process stays behind."""
    raise KeyboardInterrupt


def main() -> int:
    args = parse_arguments()
    use_checkout()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what picks its device itself picks the CPU
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
