"""Is anything lost where a command is killed? Commands are killed at random moments, resumed, and compared.

    python bench/studies/kills.py --kills 200 -o bench/results/kills.jsonl --work build/kills
    python bench/studies/kills.py --kills 200 -o bench/results/kills.jsonl --work build/kills --resume

Commands on nano with the smallest settings: a training, a cache, a set of pictures, an export, an engine (TensorRT for
RTX builds without a GPU), an install into the tree of a host, and the chain. Each is measured once without
interruption. A round kills it by SIGKILL or SIGTERM at a random fraction of that time, starts it again, kills it
once more, and lets it end. After each kill, what carries the name of a finished artifact must be whole; at the end the
files and their content must be those of the uninterrupted command, with nothing visible beside them; hidden files that
kills have left are counted apart. Then two processes write one output: one result must remain, whole, and a process
that fails must say why in one line.

A row of the result is a round; rows are written as they are made, and `--resume` goes on after them. POSIX only.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdcompress_bench import interrupted
from sdcompress_bench.environment import environment
from sdcompress_bench.interrupted import is_hidden

ROOT = Path(__file__).parents[2]
PICTURES, KILLS_A_ROUND, CHAIN_KILLS_A_ROUND = 12, 2, 3
SIGNALS = ("SIGKILL", "SIGTERM")
VOLATILE = {"created", "seconds", "waited_s", "samples_per_s", "resumed_from", "command", "files", "seal"}
VOLATILE |= {"sha256", "onnx", "peak_mib", "reused"}
"""Keys of JSON files that name a time or a measurement, or the hash or size of a file with one, or of an engine."""
UNEQUAL = ("out/checkpoints/", "store/")
"""What may differ: a checkpoint is written where a signal comes; a store keeps locks and timing caches."""


@dataclass(frozen=True)
class Case:
    """A command that is killed.

    Attributes:
        name: of the command.
        share: of all kills.
        command: the arguments, of the case's folder.
        again: what is added where the output exists.
        finished: the artifact's folder within the case's folder; "" where there is none to inspect.
        compared: patterns of the files in the case's folder that must be equal.
        checks: commands that must end without a fault after a kill, of the case's folder.
        kills: in a round.
    """

    name: str
    share: float
    command: Callable[[Path], list[str]]
    finished: str
    compared: tuple[str, ...]
    again: tuple[str, ...] = ()
    checks: tuple[Callable[[Path], list[str]], ...] = ()
    kills: int = KILLS_A_ROUND


def make_cases(inputs: Path) -> dict[str, Case]:
    """Returns the cases, by name.

    Args:
        inputs: the folder of `make_inputs`.
    """
    pictures, cache, engine = str(inputs / "pictures"), str(inputs / "cache"), str(inputs / "engine")
    distill = ["distill", "nano", "--data", pictures, "--cache", cache, "--steps", "8", "--batch-size", "2"]
    distill += ["--checkpoint-every", "2", "--precision", "fp32", "--set", "log_every=1", "--set", "ema_decay=0.9"]
    drawn = ["data", "generate", "nano", "--prompts", str(inputs / "prompts.txt"), "-n", "8", "--batch-size", "2"]
    drawn += ["--steps", "2", "--size", "64", "--guidance", "1", "--format", "png"]
    graphs = ["export", "nano", "--component", "text_encoder", "--component", "vae_decoder"]
    engines = ["export", "nano", "--component", "text_encoder", "--trt", "--flavour", "tensorrt-rtx"]
    engines += ["--compute-capability", "8.6", "--profile", "batch=1:1:2,height=128,width=128"]
    chain = ["run", "nano", "--data", pictures, "--steps", "2", "--quick"]

    def verify(folder: Path) -> list[str]:
        return ["engines", "verify", "--store", str(folder / "store" / "engines")]

    def status(folder: Path) -> list[str]:
        return ["status", "webui", str(folder / "host")]

    cases = (
        Case("distill", 0.24, lambda f: [*distill, "-o", str(f / "out")], "out/pipeline",
             ("out/pipeline/**/*", "out/metrics.jsonl", "out/plan.json"), ("--resume",)),
        Case("data cache", 0.22, lambda f: ["data", "cache", pictures, "nano", "-o", str(f / "out")], "out",
             ("out/**/*",)),
        Case("data generate", 0.18, lambda f: [*drawn, "-o", str(f / "out")], "out", ("out/**/*",)),
        Case("export", 0.12, lambda f: [*graphs, "-o", str(f / "out")], "out", ("out/**/*",)),
        Case("engine build", 0.1, lambda f: [*engines, "-o", str(f / "out")], "out/engine",
             ("out/onnx/**/*", "out/engine/**/*.json"), checks=(verify,)),
        Case("install", 0.1, lambda f: ["install", "webui", str(f / "host"), engine], "",
             ("host/**/*",), checks=(status,)),
        Case("run", 0.04, lambda f: [*chain, "-o", str(f / "out")], "out/report",
             ("out/*/pipeline/**/*.safetensors", "out/*/onnx*/*.onnx", "out/cache/*.safetensors"),
             kills=CHAIN_KILLS_A_ROUND),
    )  # fmt: skip
    return {case.name: case for case in cases}


def make_inputs(folder: Path) -> None:
    """Write what the commands take: pictures, prompts, a cache, and an engine folder for the install.

    Raises:
        RuntimeError: the cache cannot be made.
    """
    from sdcompress.data.sources import open_source
    from sdcompress.models import nano
    from tests.sdcompress.hosts.trees import make_engine

    shutil.rmtree(folder, ignore_errors=True)
    (folder / "pictures").mkdir(parents=True)
    records = open_source(nano.shards("heldout"))
    captions = []
    for number, record in zip(range(PICTURES), records, strict=False):
        record.picture().save(folder / "pictures" / f"{number:02d}.png")
        (folder / "pictures" / f"{number:02d}.txt").write_text(record.caption, encoding="utf-8")
        captions.append(record.caption)
    (folder / "prompts.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    make_engine(folder / "engine", plan=b"not a real engine" * 1_000_000)
    arguments = ["data", "cache", str(folder / "pictures"), "nano", "-o", str(folder / "cache")]
    made = interrupted.run(arguments, folder / "cache.log", {})
    if made.code:
        raise RuntimeError(made.output)


def make_folder(folder: Path) -> dict[str, str]:
    """Make a fresh folder for one round; returns the environment of its commands, with a cache of their own."""
    from tests.sdcompress.hosts.trees import make_tree

    shutil.rmtree(folder, ignore_errors=True)
    make_tree(folder / "host", "webui")
    (folder / "store" / "engines").mkdir(parents=True)
    return {"SDCOMPRESS_CACHE": str(folder / "store"), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Reference:
    """A command that was not interrupted.

    Attributes:
        seconds: it took.
        content: file → hash, of the files that are compared.
        files: everything in its folder that must be there each time.
    """

    seconds: float
    content: Mapping[str, str]
    files: set[str]

    @classmethod
    def of(cls, case: Case, folder: Path) -> Reference:
        """Run a case without interruption.

        Raises:
            RuntimeError: the command fails.
        """
        environment_ = make_folder(folder)
        ended = interrupted.run(case.command(folder), folder.with_suffix(".log"), environment_)
        if ended.code:
            raise RuntimeError(f"{case.name}: {ended.output[-2000:]}")
        return cls(ended.seconds, contents(case, folder), interrupted.list_files(folder, UNEQUAL))

    def differences(self, case: Case, folder: Path) -> list[str]:
        """Returns how a folder differs: files that differ, are missing, or are visible and should not be there."""
        found, names = contents(case, folder), interrupted.list_files(folder, UNEQUAL)
        different = [f"{name} differs" for name in self.content if name in found and found[name] != self.content[name]]
        missing = [f"{name} is missing" for name in sorted(self.files - names)]
        return (
            different + missing + [f"{name} is left over" for name in sorted(names - self.files) if not is_hidden(name)]
        )

    def leftovers(self, folder: Path) -> list[str]:
        """Returns the hidden files and folders that the uninterrupted command does not leave; not what is in them."""
        new = interrupted.list_files(folder, UNEQUAL) - self.files
        return sorted(name for name in new if is_hidden(name) and not is_hidden(str(Path(name).parent)))


def contents(case: Case, folder: Path) -> dict[str, str]:
    return interrupted.fingerprint(folder, case.compared, VOLATILE)


def find_faults(case: Case, folder: Path, reference: Reference, environment_: Mapping[str, str]) -> list[str]:
    """Returns what is not as promised after a kill: what looks finished and is not, and tracebacks of checks."""
    from sdcompress_engines.errors import ArtifactError
    from sdcompress_engines.manifest import MANIFEST_NAME, faults, read_manifest

    found = []
    for manifest in folder.rglob(MANIFEST_NAME):
        name = manifest.parent.relative_to(folder)
        if is_hidden(str(name)):
            continue
        try:
            known = read_manifest(manifest.parent)
            found += [f"{name}: {fault}" for fault in faults(manifest.parent, known.kind)] if known else []
        except ArtifactError as error:
            found.append(str(error))
    top = {name.split("/")[0] for name in reference.files}
    found += [f"{path.name} is visible" for path in folder.iterdir() if path.name not in top and path.name[0] != "."]
    commands = [check(folder) for check in case.checks]
    if case.finished and (folder / case.finished).exists():
        commands.append(["inspect", str(folder / case.finished)])
    for command in commands:
        checked = interrupted.run(command, folder.with_suffix(".check.log"), environment_)
        if not checked.is_clean or checked.code not in (0, 1):
            found.append(f"{' '.join(command[:2])}: exit code {checked.code}: {checked.output[-300:]}")
        elif command[0] == "inspect" and checked.code == 0 and read_manifest(folder / case.finished):
            now = contents(case, folder)
            inside = [name for name in reference.content if name.startswith(f"{case.finished}/")]
            found += [
                f"{name} looks finished and is not" for name in inside if now.get(name) != reference.content[name]
            ]
    return found


def play_round(case: Case, number: int, seed: int, folder: Path, reference: Reference) -> dict[str, Any]:
    """Kill a command at random moments and let it end. Returns the row.

    Args:
        case: the command.
        number: of the round; with `seed` it decides moments and signals.
        seed: of the study.
        folder: for the round; it remains only where something is not as promised.
        reference: the command without interruption.
    """
    draw, environment_ = random.Random(f"{seed} {case.name} {number}"), make_folder(folder)
    kills: list[dict[str, Any]] = []
    faults: list[str] = []
    for _ in range(case.kills):
        chosen, moment = getattr(signal, draw.choice(SIGNALS)), draw.uniform(0.02, 1.1) * reference.seconds
        command = interrupted.Command(_again(case, folder), folder.with_suffix(".log"), environment_)
        before = command.wait(moment)
        ended = command.end(None if before else chosen)
        if before:
            faults += [] if ended.code == 0 else [f"exit code {ended.code}: {ended.output[-600:]}"]
            break
        kills.append({"signal": chosen.name, "at_s": round(moment, 2), "code": ended.code})
        faults += [] if ended.is_clean else [f"{chosen.name}: a traceback: {ended.output[-600:]}"]
        faults += [f"still runs after {chosen.name}: {name}" for name in ended.survivors]
        faults += find_faults(case, folder, reference, environment_)
    ended = interrupted.run(_again(case, folder), folder.with_suffix(".log"), environment_)
    different, hidden = reference.differences(case, folder), reference.leftovers(folder)
    # A command whose output was finished when it was killed refuses to write it again.
    refused = ended.code == 1 and len(ended.lines) == 1 and not different
    faults += [] if ended.code == 0 or refused else [f"resume: exit code {ended.code}: {ended.output[-600:]}"]
    if not faults and not different:
        shutil.rmtree(folder)
    row = {"case": case.name, "round": number, "kills": kills, "equal": not different, "hidden": hidden}
    return row | _shortened(faults, different)


def play_pair(case: Case, folder: Path, reference: Reference) -> dict[str, Any]:
    """Start a command twice at the same time. Returns the row: one result remains, and a failure has one line."""
    environment_ = make_folder(folder)
    logs = [folder.with_suffix(f".{number}.log") for number in range(2)]
    started = [interrupted.Command(case.command(folder), log, environment_) for log in logs]
    ended = [command.end() for command in started]
    faults = [
        f"exit code {each.code}: {each.output[-600:]}"
        for each in ended
        if each.code and (not each.is_clean or len(each.lines) != 1)
    ]
    faults += [] if any(each.code == 0 for each in ended) else ["neither of the two succeeds"]
    different = reference.differences(case, folder)
    if not faults and not different:
        shutil.rmtree(folder)
    codes = [each.code for each in ended]
    return {"case": case.name, "pair": codes, "kills": [], "equal": not different} | _shortened(faults, different)


def _shortened(faults: list[str], different: list[str]) -> dict[str, Any]:
    return {"faults": faults[:5], "different": different[:5], "lost": len(faults) + len(different)}


def _again(case: Case, folder: Path) -> list[str]:
    """Returns the arguments of a command that may have been started before."""
    return [*case.command(folder), *(case.again if (folder / "out").exists() else ())]


class Rows:
    """The rows of the result, on disk as soon as they are made.

    Args:
        path: of the JSONL file.
        seed: of the study.
        resume: keep the rows that are there.
    """

    def __init__(self, path: Path, seed: int, *, resume: bool) -> None:
        self.path, self.lock = path, threading.Lock()
        self.rows: list[dict[str, Any]] = []
        if resume and path.is_file():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            self.rows = [row for row in map(json.loads, lines) if "case" in row]
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"seed": seed, "environment": environment()}) + "\n", encoding="utf-8")

    def add(self, row: dict[str, Any]) -> None:
        """Append a row."""
        with self.lock, self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            self.rows.append(row)
            print(
                f"{row['case']} {row.get('round', 'pair')}: {len(row['kills'])} kills, lost {row['lost']}", flush=True
            )

    def of(self, case: Case) -> list[dict[str, Any]]:
        """Returns the rows of a case."""
        return [row for row in self.rows if row["case"] == case.name]

    def killed(self, case: Case) -> int:
        """Returns how often a case was killed."""
        return sum(len(row["kills"]) for row in self.of(case))


def play_case(case: Case, rows: Rows, needed: int, seed: int, work: Path) -> None:
    """Play the rounds of a case that are missing, and its pair.

    Args:
        case: the command.
        rows: gets the rows.
        needed: kills.
        seed: of the study.
        work: folder for the rounds.
    """
    name = case.name.replace(" ", "-")
    if rows.killed(case) >= needed and any("pair" in row for row in rows.of(case)):
        return
    reference = Reference.of(case, work / f"{name}-reference")
    while rows.killed(case) < needed:
        number = sum("round" in row for row in rows.of(case))
        rows.add(play_round(case, number, seed, work / f"{name}-{number}", reference))
    if not any("pair" in row for row in rows.of(case)):
        rows.add(play_pair(case, work / f"{name}-pair", reference))


def print_table(cases: Mapping[str, Case], rows: Rows) -> int:
    """Print command, kills and what was lost; returns how much was lost."""
    print("| command | kills | SIGKILL | SIGTERM | rounds | resumed equal | two at once | hidden leftovers | lost |")
    print("|---|--:|--:|--:|--:|--:|---|--:|--:|")
    lost = 0
    for case in cases.values():
        own = rows.of(case)
        signals = [kill["signal"] for row in own for kill in row["kills"]]
        rounds = [row for row in own if "round" in row]
        equal = sum(row["equal"] for row in rounds)
        pairs = ", ".join("exit codes " + " and ".join(map(str, row["pair"])) for row in own if "pair" in row)
        case_lost = sum(row["lost"] for row in own)
        lost += case_lost
        counts = f"{len(signals)} | {signals.count('SIGKILL')} | {signals.count('SIGTERM')} | {len(rounds)}"
        hidden = sum(len(row.get("hidden", ())) for row in own)
        print(f"| {case.name} | {counts} | {equal} | {pairs} | {hidden} | {case_lost} |")
    return lost


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--resume", action="store_true", help="go on after the rows that are there")
    parser.add_argument("--only", action="append", metavar="COMMAND", help="of the cases; repeat for more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=2, help="commands at the same time")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    work = options.work.absolute()
    rows = Rows(options.output, options.seed, resume=options.resume)
    if not (options.resume and (work / "inputs" / "cache").is_dir()):
        make_inputs(work / "inputs")
    cases = make_cases(work / "inputs")
    chosen = {name: case for name, case in cases.items() if name in (options.only or cases)}
    shares = sum(case.share for case in chosen.values())
    with ThreadPoolExecutor(options.at_once) as pool:
        played = [
            pool.submit(play_case, case, rows, max(1, round(options.kills * case.share / shares)), options.seed, work)
            for case in sorted(chosen.values(), key=lambda case: case.name != "run")
        ]
        for each in played:
            each.result()
    return 3 if print_table(chosen, rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
