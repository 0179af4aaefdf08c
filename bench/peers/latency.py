"""Our backends beside what a user would take instead, on one machine in one run.

    python bench/peers/latency.py -o bench/results/peers-cpu.json --work build/peers
    python bench/peers/latency.py -o bench/results/peers-sd15-cpu.json --work build/peers --model bk-tiny
    python bench/peers/latency.py -o bench/results/peers-gpu.json --work build/peers --model sd15 --device cuda

The first command measures nano. The second and third take random weights in the shapes of SD1.5, at 512 px. Compared
are diffusers as it is, channels last, torch.compile, optimum-onnx, torch-tensorrt, and our backends.

All run one model folder, one set of UNet inputs, one prompt, one latent, and the pipeline's own scheduler and number of
steps. Timed are a UNet call on two latents, as in guidance, and a whole picture, caption to PIL image. Both are timed
by the wall clock, and the device is idle at both ends. Each setup runs in its own process, started again each round, in
turn. Raw samples are kept. The error is the relative L2 of the UNet's output to diffusers in fp32, and the PSNR of the
picture to the one of that setup.

optimum-onnx and torch-tensorrt get their own environments under `--work`, because they pin other versions of our
dependencies. They run their own exporter and their own pipeline class. What does not install or run is a row with the
reason. Prepared files are kept for the next run (`--prepare` stops after them), and so are torch.compile's kernels:
"first picture" of the first round includes compiling only if `compiled_before` is false. Each process runs this file,
whatever its environment, so packages are imported only where they are used.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from latency_parts.measure import measure
from latency_parts.model import write_model
from latency_parts.prepare import environment_of, prepare, prepare_own
from latency_parts.processes import run_child
from latency_parts.setups import REFERENCE, SETUPS, STUDENTS, PeerSetup, Run, output_of
from latency_parts.table import format_table, summarize_rows


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Run the task of a child process and return its answer."""
    folder, setup = Path(case["folder"]), SETUPS[case["device"]].get(case["way"])
    if case["task"] == "model":
        write_model(case["model"], folder)
    elif case["task"] == "prepare" and setup:
        prepare_own(setup, folder, case["device"])
    return measure(case) if case["task"] == "measure" else {}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for environments, exports and outputs; kept")
    parser.add_argument(
        "--model",
        choices=["nano", *STUDENTS],
        default="nano",
        help="nano, or random weights in the shape of SD1.5 or a student of it",
    )
    parser.add_argument("--device", choices=list(SETUPS), default="cpu")
    parser.add_argument("--steps", type=int, help="of a picture; by default 25, and 4 for a full-size model on a CPU")
    parser.add_argument("--rounds", type=int, help="by default 3, and 1 for a full-size model on a CPU")
    parser.add_argument("--setup", action="append", help="measure only this setup, beside the reference")
    parser.add_argument("--prepare", action="store_true", help="install, export and compile only")
    args = parser.parse_args()
    if unknown := set(args.setup or ()) - set(SETUPS[args.device]):
        parser.error(f"no setup {', '.join(sorted(unknown))}; choose from: {', '.join(SETUPS[args.device])}")
    return args


def create_run(args: argparse.Namespace) -> Run:
    """Returns the run with its defaults, which depend on how long a step takes."""
    slow = args.device == "cpu" and args.model != "nano"
    samples, pictures = (2, 1) if slow else (20, 2) if args.device == "cpu" else (50, 5)
    steps, rounds = args.steps or (4 if slow else 25), args.rounds or (1 if slow else 3)
    return Run(args.model, args.device, args.work.resolve(), steps, rounds, samples, pictures)


def prepare_all(run: Run, setups: dict[str, PeerSetup]) -> dict[str, Any]:
    """Prepare the model and every setup; returns a row for each, with the reason where that failed."""
    run.folder.mkdir(parents=True, exist_ok=True)
    if not (run.folder / "model").is_dir():
        outcome = run_child(sys.executable, run.case("model"), run.work)
        if "failed" in outcome:
            sys.exit(f"the model could not be written: {outcome['failed']}")
    rows: dict[str, Any] = {}
    for name, setup in setups.items():
        reason, seconds = prepare(name, setup, run)
        rows[name] = {"note": setup.note}
        rows[name] |= ({"prepare_s": seconds} if seconds else {}) | ({"failed": reason} if reason else {})
        done = f"prepared in {seconds} s" if seconds else "nothing to prepare"
        print(f"{name}: {reason or done}", file=sys.stderr, flush=True)
    return rows


def measure_all(run: Run, rows: dict[str, Any]) -> None:
    """Run the rounds of every prepared setup and add them to its row."""
    for number in range(run.rounds):
        for name in (n for n, row in rows.items() if "failed" not in row):
            python = environment_of(SETUPS[run.device][name], run.work)
            outcome = run_child(python, run.case("measure", name), run.work)
            if "failed" in outcome:
                rows[name] |= outcome
                result = outcome["failed"]
            else:
                rows[name].setdefault("rounds", []).append(outcome)
                steps = sorted(outcome["unet_step_ms"])
                result = f"{steps[len(steps) // 2]:.1f} ms a step"
            print(f"round {number + 1}: {name:<46} {result}", file=sys.stderr, flush=True)


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--child":
        print(json.dumps(run_case(json.loads(sys.argv[2]))))
        return
    args = parse_arguments()
    run = create_run(args)
    wanted = (REFERENCE, *(args.setup or SETUPS[run.device]))
    setups = {name: setup for name, setup in SETUPS[run.device].items() if name in wanted}
    compiled = [name for name, setup in setups.items() if setup.compile is not None]
    compiled_before = any(output_of(name, run.folder).is_file() for name in compiled)
    rows = prepare_all(run, setups)
    if args.prepare:
        return
    from sdcompress_bench.environment import environment

    machine = environment()
    measure_all(run, rows)
    summarize_rows(run, rows)
    sizes = (outcome["size_px"] for row in rows.values() for outcome in row.get("rounds", []))
    settings = {"model": run.model, "device": run.device, "size_px": next(sizes, None), "unet_batch": 2}
    settings |= {"steps": run.steps, "rounds": run.rounds, "samples": run.samples, "pictures": run.pictures}
    settings["compiled_before"] = compiled_before
    args.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"settings": settings, "ways": rows, "environment": machine}
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(format_table(rows))
    measured = {name: row for name, row in rows.items() if "failed" not in row}
    last = {"settings": settings}
    last |= {f: {name: row[f]["median"] for name, row in measured.items()} for f in ("unet_step_ms", "picture_ms")}
    print(json.dumps(last | {"failed": {name: row["failed"] for name, row in rows.items() if "failed" in row}}))
    if not measured:
        sys.exit("no setup ran")


if __name__ == "__main__":
    main()
