"""Does the fidelity gate detect faults of a backend, and how small can they be? Faults are planted into nano.

    python bench/studies/faults.py -o bench/results/faults-nano.json

The faults: a weight scaled by 1.02, an attention head zeroed, and values beyond fp16 (infinite, and clamped), at ten
places each, in nano's trained weights. The gate is tested in fp32, bf16 and fp16; in the last two it allows twice
PyTorch's own error in that precision. It is tested as in the bench, with a limit for each timestep, and with one limit
for all timesteps.

The places are drawn twice. Anywhere: some layers of a trained model have almost no effect, and a fault there is not
visible in pictures. In use: layers whose removal moves the output by 1% or more. A census of every layer and head in
fp32 comes first. It shows which layers are in use, and how many faults are not detected.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from sdcompress_bench import faults, fidelity
from sdcompress_bench.environment import environment
from sdcompress_bench.faults import Kind, Place
from sdcompress_engines.exactness import relative_l2

from sdcompress.data.sources import open_source
from sdcompress.export.components import DTYPES
from sdcompress.models import nano
from sdcompress.models.load import load_pipeline
from sdcompress.support.quiet import quiet

TIMESTEPS, PICTURES, COUNT, SEED = (1, 501, 999), 2, 10, 0
IN_USE = 0.01
"""A layer is in use if its removal moves the output by at least this relative L2."""


class GateTest:
    """Tests the gate with faults in one precision.

    Args:
        pipeline: in PyTorch fp32; it is not changed.
        probe: the UNet's inputs.
        precision: fp32, bf16 or fp16.

    Attributes:
        floors: PyTorch's own error at each timestep, without a fault; zero in fp32.
    """

    def __init__(self, pipeline: Any, probe: fidelity.Probe, precision: str) -> None:
        self.probe, self.precision = probe, precision
        self.reference = fidelity.predict(pipeline, probe)
        self.pipeline = copy.copy(pipeline)
        if precision != "fp32":
            with quiet():
                self.pipeline.unet = copy.deepcopy(pipeline.unet).to(DTYPES[precision])
        self.floors = self._errors()

    def _errors(self) -> list[float]:
        return [
            relative_l2(output, expected)
            for output, expected in zip(fidelity.predict(self.pipeline, self.probe), self.reference, strict=True)
        ]

    def limits(self) -> list[float]:
        """Returns the gate's limit of each timestep."""
        return [fidelity.gate(0.0, None if self.precision == "fp32" else floor)["limit"] for floor in self.floors]

    def errors(self, kind: Kind, place: Place, scale: float = faults.SCALE) -> list[float]:
        """Returns the relative L2 at each timestep with a fault.

        Args:
            kind: of the fault.
            place: where it is planted.
            scale: factor of the weight, for `scaled`.
        """
        with faults.plant(self.pipeline.unet, kind, place, scale):
            return self._errors()

    def detects(self, errors: list[float]) -> bool:
        """Returns whether a gate with one limit detects the errors."""
        floor = None if self.precision == "fp32" else max(self.floors)
        worst = math.nan if any(map(math.isnan, errors)) else max(errors)
        return not fidelity.gate(worst, floor)["passed"]

    def detects_by_timestep(self, errors: list[float]) -> bool:
        """Returns whether a gate with a limit for each timestep detects the errors."""
        return any(
            not fidelity.gate(error, None if self.precision == "fp32" else floor)["passed"]
            for error, floor in zip(errors, self.floors, strict=True)
        )


def _short(error: float) -> float:
    """Returns an error with three digits."""
    return float(f"{error:.3g}")


def take_census(test: GateTest) -> dict[str, dict[str, dict[str, float]]]:
    """Returns kind → place → the worst error in fp32 with the fault (`error`) and without the layer (`removed`)."""
    unet = test.pipeline.unet
    scaled = {
        str(p): {
            "error": _short(max(test.errors("scaled", p))),
            "removed": _short(max(test.errors("scaled", p, 0.0))),
        }
        for p in faults.candidates(unet, "scaled")
    }
    heads = {str(p): _short(max(test.errors("head", p))) for p in faults.candidates(unet, "head")}
    return {"scaled": scaled, "head": {name: {"error": error, "removed": error} for name, error in heads.items()}}


def print_census(census: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print how many faults the gate detects in fp32, of all layers and of those in use."""
    limit = fidelity.gate(0.0, None)["limit"]
    for kind, layers in census.items():
        errors = np.array([row["error"] for row in layers.values()])
        used = np.array([row["removed"] >= IN_USE for row in layers.values()])
        print(
            f"census, {kind}: {len(errors)} places, fp32 gate catches {np.mean(errors > limit):.0%}; {used.sum()} in"
            f" use, of which {np.mean(errors[used] > limit):.0%}; the largest error unseen"
            f" {errors[errors <= limit].max(initial=0):.1e}",
            flush=True,
        )


def choose_places(unet: Any, census: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[Kind, list[Place]]]:
    """Returns the places of each kind of fault, drawn from all layers (`anywhere`) and from those `in use`."""
    every = {kind: faults.candidates(unet, kind) for kind in faults.KINDS}
    in_use = {
        kind: [p for p in places if census["head" if kind == "head" else "scaled"][str(p)]["removed"] >= IN_USE]
        for kind, places in every.items()
    }
    return {
        name: {kind: faults.spread(places, COUNT, SEED) for kind, places in candidates.items()}
        for name, candidates in (("anywhere", every), ("in use", in_use))
    }


def count_detected(test: GateTest, chosen: dict[str, dict[Kind, list[Place]]]) -> list[dict[str, Any]]:
    """Returns a row for each draw of places and each kind of fault: how many faults the gate detects."""
    rows = []
    for drawn, by_kind in chosen.items():
        for kind, places in by_kind.items():
            errors_at = {str(place): test.errors(kind, place) for place in places}
            missed = {name: max(errors) for name, errors in errors_at.items() if not test.detects(errors)}
            by_timestep = sum(test.detects_by_timestep(errors) for errors in errors_at.values())
            worst = {
                name: _short(max(errors)) if np.isfinite(errors).all() else None for name, errors in errors_at.items()
            }
            row = {
                "precision": test.precision,
                "places": drawn,
                "kind": kind,
                "count": len(places),
                "caught": len(places) - len(missed),
                "caught_by_timestep": by_timestep,
                "errors": worst,
            }
            rows.append(row)
            misses = (
                f"; missed: {', '.join(f'{name} {error:.1e}' for name, error in missed.items())}"
                if missed and test.precision == "fp32"
                else ""
            )
            print(
                f"{test.precision} {drawn:<9} {kind:<9} caught {row['caught']:2d} of {len(places)}, with a limit for"
                f" each timestep {by_timestep:2d}{misses}",
                flush=True,
            )
    return rows


def measure_least_change(test: GateTest, fp32: Any) -> dict[str, Any]:
    """Returns how small a fault each gate detects, measured in fp32.

    As a check, faults a quarter larger and a quarter smaller are planted into the gated precision itself.

    Args:
        test: the gate in one precision.
        fp32: the pipeline in fp32.
    """
    rows = {}
    places = {str(place): place for place in faults.candidates(test.pipeline.unet, "scaled")}
    whole_floor = 0.0 if test.precision == "fp32" else max(test.floors)
    for name, limit, floor, detects in (
        ("one limit", max(test.limits()), whole_floor, test.detects),
        ("by timestep", test.limits(), test.floors, test.detects_by_timestep),
    ):
        found = faults.sensitivity(fp32, test.probe, limit, floor, COUNT, SEED, len(TIMESTEPS), PICTURES)
        tried = [(places[place], change) for place, change in found.scaled.items() if change is not None]
        above, below = (
            sum(detects(test.errors("scaled", place, 1 + share * change)) for place, change in tried)
            for share in (1.25, 0.75)
        )
        rows[name] = asdict(found) | {"caught_above": above, "caught_below": below, "tried": len(tried)}
        middle = "none" if found.least is None else f"{found.least:.2%}"
        low = "none" if found.least_low is None else f"{found.least_low:.2%}"
        print(
            f"{test.precision} {name}: least change of one weight seen, median {middle}, lowest {low}, none at"
            f" {found.blind} of {found.places}; zeroed heads unseen {found.heads_unseen} of {found.heads}; planted in"
            f" {test.precision}, a quarter more is caught at {above} and a quarter less at {below} of"
            f" {len(tried)}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    pipeline: Any = load_pipeline("nano").pipeline
    records = list(islice(open_source(nano.shards("heldout")), PICTURES))
    probe = fidelity.make_probe(
        pipeline, [record.picture() for record in records], [record.caption for record in records], TIMESTEPS, SEED
    )
    exact = GateTest(pipeline, probe, "fp32")
    census = take_census(exact)
    print_census(census)
    chosen = choose_places(pipeline.unet, census)
    rows, gates = [], {}
    for precision in ("fp32", "bf16", "fp16"):
        test = exact if precision == "fp32" else GateTest(pipeline, probe, precision)
        rows += count_detected(test, chosen)
        gates[precision] = {
            "floors": test.floors,
            "limits": test.limits(),
            "least": measure_least_change(test, pipeline),
        }
    document = {
        "timesteps": TIMESTEPS,
        "pictures": PICTURES,
        "seed": SEED,
        "in_use": IN_USE,
        "rows": rows,
        "gates": gates,
        "census": census,
        "environment": environment(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if any(row["caught"] < row["count"] for row in rows if row["precision"] == "fp32" and row["places"] == "in use"):
        raise SystemExit("the fp32 gate missed a fault in a layer in use")


if __name__ == "__main__":
    main()
