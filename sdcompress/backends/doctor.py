"""`examine`: what works on this machine. It checks the installation and proves each backend against torch."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdcompress_engines.progress import SILENT, Reporter

from sdcompress.backends.anonymous import anonymize
from sdcompress.backends.diagnosis import Diagnosis, anonymize_check
from sdcompress.backends.installation import NEEDED_BYTES, Check, Driver, check_installation, find_driver
from sdcompress.backends.machine import (
    core_count,
    describe_cards,
    load_average,
    machine_key,
    memory_gib,
    system_name,
)
from sdcompress.backends.proof_plan import full_name, plan_proofs, provable
from sdcompress.backends.prove import prove_backends
from sdcompress.models.locate import display_name, locate_pipeline
from sdcompress.models.nano import BUILT_IN

MINUTES, LONG_MINUTES = 2.0, 60.0
"""The time for all checks: of nano, and of a whole model or with `full`."""
_CLOSING_S = 6.0  # part of that time, for starting Python and for the end


def examine(
    model: str | Path = "nano",
    backends: Sequence[str] = (),
    *,
    full: bool = False,
    minutes: float | None = None,
    report: Reporter = SILENT,
) -> Diagnosis:
    """Returns what works on this machine, and for the rest the reason and the command that repairs it.

    Args:
        model: what `load_pipeline` takes. Of a built-in model, backends that compile run a small UNet.
        backends: names or aliases of those to prove; by default all. torch always runs, as all are compared with it.
        full: prove every backend on the whole UNet.
        minutes: for all together; a backend that is not proved by then is `unfinished`. By default 2 for a built-in
            model, else 60.
        report: gets the progress.

    Raises:
        UsageError, ModelError: there is no such model or backend.
    """
    started = time.monotonic()
    chosen = list(dict.fromkeys(("torch", *map(full_name, backends or provable()))))
    folder = locate_pipeline(model)
    built_in = str(model) in BUILT_IN
    whole = full or not built_in
    minutes = (LONG_MINUTES if whole else MINUTES) if minutes is None else minutes
    deadline = started + 60 * minutes - _CLOSING_S
    load, driver = load_average(), find_driver()
    checks = check_installation(driver, max(NEEDED_BYTES, 3 * _size_bytes(folder)))
    report.show_line(f"testing {', '.join(chosen)}: at most {minutes:g} minutes")
    with (
        _writable_cache(checks),
        tempfile.TemporaryDirectory(prefix="sdcompress-doctor-", ignore_cleanup_errors=True) as work,
    ):
        plan = plan_proofs(str(model), chosen, driver, checks, whole, work)
        name = "" if str(model) == "nano" else f" --model {model if built_in else 'MODEL'}"
        again = f"sdcompress doctor{name}{' --full' if full else ''} --minutes {5 * minutes:g}"
        proved, parameters = prove_backends(plan.cases, deadline, whole, again, report)
    order = list(provable())
    results = sorted([*proved, *plan.absent], key=lambda result: order.index(result.backend))
    facts, versions = _describe_machine(driver, load)
    return Diagnosis(
        str(model) if built_in else anonymize(display_name(folder)),
        parameters,
        facts,
        versions,
        [anonymize_check(check) for check in checks],
        [result.anonymized() for result in results],
        round(time.monotonic() - started, 1),
    )


def _describe_machine(driver: Driver | None, load: float) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the facts about this machine by name, and the installed versions.

    Args:
        driver: of the NVIDIA cards.
        load: before the proofs.
    """
    key = machine_key("cpu")
    facts = {
        "system": system_name(),
        "python": platform.python_version(),
        "processor": key["device"],
        "threads": key["threads"],
        "cores": core_count(),
        "load": round(load, 1),
        "memory_gib": memory_gib(),
        "cards": describe_cards(),
        "driver": driver.version if driver else None,
    }
    return {name: anonymize(value) if isinstance(value, str) else value for name, value in facts.items()}, key[
        "versions"
    ]


@contextmanager
def _writable_cache(checks: Sequence[Check]) -> Iterator[None]:
    """Use the user's cache folder in the block, or a temporary one where its check failed."""
    if next(check for check in checks if check.name == "cache").ok:
        yield
        return
    before = os.environ.get("SDCOMPRESS_CACHE")
    with tempfile.TemporaryDirectory(prefix="sdcompress-cache-", ignore_cleanup_errors=True) as folder:
        os.environ["SDCOMPRESS_CACHE"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["SDCOMPRESS_CACHE"]
            else:
                os.environ["SDCOMPRESS_CACHE"] = before


def _size_bytes(path: Path) -> int:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.stat().st_size for each in files)
