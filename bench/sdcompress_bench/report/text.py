"""The sentences of the report: headline, notes, method, machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ..results import Results
from ..scenario import BackendSetup, Sampling
from .formatting import format_millions, format_row_name


def headline(results: Results) -> str:
    """Returns the answer in one line: the largest speed-up, or why there is none."""
    rows = [row for row in results.rows() if row.speedup is not None]
    best = max(rows, key=lambda row: row.speedup or 0.0, default=None)
    base = f"{results.teacher} in {results.baseline or 'PyTorch'}"
    if best is None:
        without = f"{results.teacher}, measured without PyTorch to compare with"
        return f"{base} could not be measured" if results.baseline else without
    is_base = best.model == results.teacher and best.setup == results.baseline
    if best.speedup is None or best.speedup <= 1.0 or is_base:
        return f"Nothing here is faster than {base}"
    reference = next(
        row
        for row in rows
        if (row.model, row.setup) == (results.teacher, results.baseline)
        and (row.size_px, row.batch) == (best.size_px, best.batch)
    )
    uncertain = any(s is None or s.noisy or s.count < 3 for s in (best.end_to_end, reference.end_to_end))
    name = best.model
    if best.sampling != reference.sampling:
        name, base = f"{name} ({best.sampling})", f"{results.teacher} ({reference.sampling}) in {results.baseline}"
    claim = f"{name} on {best.setup} makes pictures {best.speedup:.2f}× as fast as {base}"
    return claim + (", if these few or scattered samples can be trusted" if uncertain else "")


def subline(results: Results) -> str:
    """Returns what stands below the headline: sizes of the students, quality, settings."""
    teacher, *students = results.models
    whole = teacher["parameters"].get("unet") or 1
    parts = [
        f"{student['name']} has {student['parameters'].get('unet', 0) / whole:.0%} of the UNet's"
        f" {format_millions(whole)} parameters"
        for student in students
    ]
    parts += _quality_parts(results)
    settings = results.settings
    sizes = " and ".join(map(str, settings["sizes_px"]))
    random = ", random weights" if any(model.get("random") for model in results.models) else ""
    parts.append(f"{sizes} px, {_sampling(results)}{random}")
    return ". ".join(parts) + "."


def _sampling(results: Results) -> str:
    """Returns in how many steps and with which guidance the pictures were drawn; by model where they differ."""
    names: dict[Sampling, list[str]] = {}
    for name, sampling in results.sampling().items():
        names.setdefault(sampling, []).append(name)
    if len(names) == 1:
        return str(next(iter(names)))
    return "; ".join(f"{', '.join(models)} in {sampling}" for sampling, models in names.items())


def _quality_parts(results: Results) -> Iterator[str]:
    judged = [(name, figures) for name, figures in results.quality.items() if "style" in figures or "top1" in figures]
    if judged:
        style = "style" in judged[0][1]
        key, what = ("style", "Style recognized in") if style else ("top1", "Caption found in")
        shares = (
            f"{figures[key]['share']:.0%} ({'real pictures' if name == 'real' else name})"
            for name, figures in judged
            if key in figures
        )
        yield f"{what} {', '.join(shares)}"


def notes(results: Results) -> list[str]:
    """Returns what a reader must know before trusting the figures, failed gates first."""
    return [
        *results.failed_gates(),
        *(f"{name} was not measured: {reason}" for name, reason in results.skipped.items()),
        *(f"{format_row_name(results, run)} failed: {run.failed}" for run in results.latency if run.failed),
        *_uncompared_backends(results),
        *_doubts(results),
        *dict.fromkeys(_estimate_warnings(results)),
        *results.warnings,
    ]


def _uncompared_backends(results: Results) -> Iterator[str]:
    for entry in results.backends:
        if "failed" in entry and "gate" not in entry:
            name = f"{entry['model']} on {BackendSetup(entry['backend'], entry['precision'])}"
            yield f"{name} could not be compared with PyTorch fp32: {entry['failed']}"


def _doubts(results: Results) -> Iterator[str]:
    """Yields the reasons to doubt the measured times."""
    if results.settings["rounds"] == 1:
        yield (
            "Every case ran in one round: the intervals do not include how one process differs from the next, and"
            " a busy machine may have slowed one case alone"
        )
    if noisy := [format_row_name(results, row) for row in results.rows() if row.unet_step and row.unet_step.noisy]:
        yield (
            f"UNet step samples scatter by over 10% (interquartile range over median) for {', '.join(noisy)}: the"
            " machine was busy or too few were taken"
        )
    if unsteady := [run for run in results.latency if run.unsteady]:
        names = ", ".join(f"{format_row_name(results, run)} ({', '.join(run.unsteady)})" for run in unsteady)
        yield f"Calls were not yet steady when timing began for {names}"


def _estimate_warnings(results: Results) -> Iterator[str]:
    for part in (*results.quality.values(), *results.students.values()):
        for figure in part.values():
            if isinstance(figure, dict) and figure.get("warning"):
                yield str(figure["warning"])


def pictures_note(results: Results) -> str | None:
    """Returns which prompts the pictures show, if they are not those of the figures."""
    if not results.settings.get("shown"):  # older results do not have it
        return None
    return f"{results.teacher} was trained on these prompts. The quality figures are of prompts that it has not seen."


def method(results: Results) -> list[str]:
    """Returns a paragraph for each thing that was measured: how, and what the figure means."""
    settings = results.settings
    guided = {sampling.is_guided for sampling in results.sampling().values()}
    inputs = " or ".join(
        text
        for is_guided, text in (
            (True, "2 × batch latents, as classifier-free guidance makes it"),
            (False, "batch latents, without guidance"),
        )
        if is_guided in guided
    )
    paragraphs = [
        f"Every case runs in a fresh process, {settings['rounds']} time(s), taking turns and never two at once. After a"
        f" warm-up until calls agree within 10%, up to {settings['samples']} calls of a stage are timed a round"
        f" ({settings['end_to_end_samples']} whole pictures). Figures are medians over all rounds; intervals are 95%"
        " and include how rounds differ, if there are two or more. Raw samples are in results.json.",
        f"A UNet step is one call on {inputs}."
        f" Speed-up compares pictures a second, prompt to pixels, with {results.teacher} in"
        f" {results.baseline or 'PyTorch'} at the same size and batch, each model in its own steps and with its own"
        " guidance. Peak memory is the GPU's where there is one,"
        " else the resident memory of the process, the Python runtime and its libraries included. The first picture"
        " includes loading and warming up.",
        "Of peak: multiply-adds counted in convolutions, products and attention, over what this device reached in"
        " square matrix products of that precision in this run. Bytes are those an ideally fused execution has to"
        " move.",
        _distance_method(results),
    ]
    if any(run.lora_swap_ms for run in results.latency):
        paragraphs.append(
            "A model with LoRAs has them in every figure and picture, and so does its PyTorch fp32. They are swapped"
            " in an open pipeline that has read their files, by the wall clock until the device is done."
            " Each swap puts in LoRAs that are 0.1% stronger than those before, so a backend cannot use what it has"
            " kept; the last column is the time for the same ones again."
        )
    if results.students:
        paragraphs.append(
            "Student against teacher: the same UNet inputs to both; LPIPS, PSNR and SSIM of pictures from equal initial"
            " noise, FID and KID of the two sets. A student may draw another good picture, so read the pairs with the"
            " figures of sets and the CLIP figures, which ask only whether a picture shows its caption. FID falls as"
            " pictures are added and compares only with FID of as many; KID does not."
        )
    if any("sensitivity" in entry for entry in results.backends):
        paragraphs.append(
            "Smallest detected fault: one layer's weights are scaled until the error exceeds the limit, at several"
            " places; the median and the range of that change. Zeroed heads: attention heads are set to zero, one at a"
            " time."
        )
    return paragraphs


def _distance_method(results: Results) -> str:
    settings = results.settings
    random = bool(settings.get("random"))
    probes = "latents of noise" if random else "pictures of the teacher noised to each timestep"
    return (
        "Off PyTorch: relative L2 of the UNet's output to PyTorch fp32 with the same weights, the worst of"
        f" {len(settings['timesteps'])} timesteps, on {settings['probes']} {probes}. fp32 must stay within 1e-4 at each"
        " of them, a lower precision within twice PyTorch's own error in that precision at the same timestep; values"
        " that are not finite never pass."
    )


def machine(results: Results) -> str:
    """Returns the GPU, the CPU, the memory and the system in one line."""
    env = results.environment
    gpu = "; ".join(f"{g['name']}, {g['memory_mib']:,} MiB, driver {g['driver']}" for g in env["gpu"])
    memory = f"{(env['memory_mib'] or 0) / 1024:,.0f} GiB"
    return ", ".join(part for part in (gpu, env["cpu"], f"{env['cores']} cores", memory, env["os"]) if part)


def machine_facts(results: Results) -> list[tuple[str, str]]:
    """Returns the names and values of the machine section."""
    return [(str(name), str(value)) for name, value in _facts(results) if value not in (None, "")]


def _facts(results: Results) -> Iterable[tuple[str, Any]]:
    env = results.environment
    loads = [str(env[key]) for key in ("load_average", "load_average_after") if env.get(key) is not None]
    after = " after" if env.get("load_average_after") is not None else ""
    return [
        ("Machine", machine(results)),
        ("Python", env["python"]),
        *env["packages"].items(),
        ("PyTorch threads", env["torch_threads"]),
        ("vector units", ", ".join(env.get("cpu_features", []))),
        ("clocks", env.get("clocks", "")),
        ("load average", " before, ".join(loads) + after),
        ("commit", env["commit"]),
        ("took", f"{results.seconds / 60:.1f} min" if results.seconds else None),
        *((f"sha256 of {model['name']}", model["sha256"]) for model in results.models),
    ]
