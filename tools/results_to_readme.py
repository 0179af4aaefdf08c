"""Write the README's figures from `bench/results/`, between the marks of each section.

python tools/results_to_readme.py            rewrites README.md
python tools/results_to_readme.py --check    exit 1 where it disagrees
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdcompress_bench.report import format_estimate
from sdcompress_bench.results import Results, read_results

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results"


def load(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def percent(figures: dict[str, Any]) -> str:
    return f"{figures['share']:.0%}"


def nano() -> str:
    """The teacher's own quality, beside the ceiling."""
    found = load("nano-teacher.json")
    lines = [
        (
            f"Nano (UNet {found['parameters']['unet'] / 1e6:.1f} M parameters, sha256 `{found['sha256'][:12]}`),"
            f" {found['prompts']} prompts each, {found['steps']} steps; VAE reconstruction"
            f" {found['vae_psnr_db']:.1f} dB:"
        ),
        "",
    ]
    lines += ["| pictures | right style | right caption first of 200 | in the top 5 |", "|---|---|---|---|"]
    rows = {
        "seen": "nano, prompts seen in training",
        "seen_real_pictures": "the real pictures of those prompts, which the judge has seen too",
        "heldout": "nano, held-out pairs of style and concept",
        "heldout_real_pictures": "the real pictures of those pairs, which the judge has never seen",
    }
    for key, label in rows.items():
        lines.append(
            f"| {label} | {percent(found[key]['style'])} | {percent(found[key]['top1'])} |"
            f" {percent(found[key]['top5'])} |"
        )
    return "\n".join(lines) + "\n"


def distillation() -> str:
    """bk-tiny: untrained, task loss alone, distilled."""
    found = load("distillation-nano.json")
    seeds = len({row["seed"] for row in found["rows"]} - {None})
    lines = [
        (
            f"Its bk-tiny student, {found['steps']} steps of batch {found['batch_size']}, {found['prompts']} held-out"
            f" prompts, mean of {seeds} seeds (lowest to highest):"
        ),
        "",
    ]
    lines += [
        "| | right style | right caption in the top 5 | noise prediction, relative L2 to the teacher |",
        "|---|---|---|---|",
    ]
    for arm in dict.fromkeys(row["arm"] for row in found["rows"]):
        cells = []
        for name, form in (("style_accuracy", ".0%"), ("retrieval_top5", ".0%"), ("output_relative_l2", ".3f")):
            values = [row[name] for row in found["rows"] if row["arm"] == arm]
            spread = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):{form}}{spread}")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def latency() -> str:
    """What `sdcompress demo` measured."""
    found = load("demo.json")
    cpu = found["environment"].get("cpu", "CPU")
    lines = [
        (
            f"Latency in the demo ({cpu}, {found['environment']['cores']} cores, no GPU; one picture, guidance,"
            f" {found['settings']['steps']} steps):"
        ),
        "",
    ]
    lines += ["| model | backend | UNet step, ms | whole picture, s |", "|---|---|---|---|"]
    for run in found["latency"]:
        if not run.get("failed"):
            step, whole = (
                statistics.median(sample for of_round in run["samples_ms"][stage] for sample in of_round)
                for stage in ("unet_step", "end_to_end")
            )
            lines.append(f"| {run['model']} | {run['backend']} | {step:.1f} | {whole / 1000:.2f} |")
    return "\n".join(lines) + "\n"


def adapting() -> str:
    """nano-tiny before and after a LoRA and a finetuning; LoRA steps on student and teacher."""
    found = load("adapting-nano.json")
    lines = [
        (
            f'nano-tiny learns a word it has never seen ("{found["word"]} ..." for line drawings), {found["prompts"]}'
            " held-out prompts:"
        ),
        "",
        "| | drawn as the word asks | steps | seconds |",
        "|---|---|---|---|",
    ]
    for name, row in found["rows"].items():
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else "–"
        lines.append(f"| {name} | {row['style_accuracy']:.0%} | {row.get('steps', '–')} | {seconds} |")
    speed = {name: statistics.median(values) for name, values in found["lora_steps_per_s"].items()}
    lines += [
        "",
        (
            f"LoRA training runs at {speed['nano-tiny']:.1f} steps a second on the student and {speed['nano']:.1f} on"
            f" the teacher: {found['lora_student_over_teacher']:.2f} times as fast."
        ),
    ]
    return "\n".join(lines) + "\n"


def training() -> str:
    """Our loop beside one in the public scripts' manner."""
    found = load("training-peers-nano.json")
    settings = found["settings"]
    lines = [
        (
            f"Distilling nano on the CPU ({found['environment']['cpu']}), batch {settings['batch']}, pictures a second,"
            f" in turn, median of {settings['rounds']} rounds:"
        ),
        "",
    ]
    lines += [
        (
            "| precision | threads | the public scripts' manner: VAE and text encoder at every step | ours, from its"
            " cache | times as fast | ours, of the matrix-product peak |"
        ),
        "|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        speed = row["samples_per_s"]
        lines.append(
            f"| {row['precision']} | {row['threads']} | {speed['public manner']:.1f} | {speed['ours']:.1f} |"
            f" {row['speedup']:.2f} | {row['share_of_peak']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def engines() -> str:
    """What a TensorRT engine costs to make, and how near its graph is."""
    found = load("engines-cpu.json")
    env = found["environment"]
    version = next(row["version"] for row in found["rows"].values() if "version" in row)
    lines = [
        (
            f"`sdcompress export --trt` at full size, random weights, fp16, TensorRT for RTX {version}, {env['cores']}"
            " cores and no GPU:"
        ),
        "",
    ]
    lines += [
        "| UNet | parameters | whole command | peak memory | engine | error to torch fp32 (torch fp16's own) |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found["rows"].items():
        if row["status"] == 0:
            parity = row["parity"]
            lines.append(
                f"| {name} | {row['parameters'] / 1e6:,.0f} M | {row['seconds']:.0f} s | {row['peak_mib'] / 1024:.1f}"
                f" GiB | {row['engine_bytes'] / 2**20:,.0f} MiB | {parity['relative_l2']:.1e}"
                f" ({parity['torch_relative_l2']:.1e}) |"
            )
    return "\n".join(lines) + "\n"


def backends() -> str:
    """One UNet call on a CPU, every way that was tried."""
    found = load("backends-cpu.json")
    env = found["environment"]
    lines = [
        (
            f"One UNet call on a CPU ({env['cpu']}, {env['cores']} cores), the same weights every way; the gate is what"
            " counts as the same picture:"
        ),
        "",
    ]
    batches = sorted({batch for rows in found["models"].values() for row in rows.values() for batch in row["batch"]})
    heads = [f"{name}, batch {batch}" for name in found["models"] for batch in batches]
    lines += [f"| | {' | '.join(heads)} | relative L2 |", "|---" * (len(heads) + 2) + "|"]
    for variant in dict.fromkeys(variant for rows in found["models"].values() for variant in rows):
        cells, errors = [], []
        for rows in found["models"].values():
            for batch in batches:
                row = rows.get(variant, {}).get("batch", {}).get(batch)
                cells.append(
                    "–"
                    if row is None or "failed" in rows[variant]
                    else f"{row['median_ms']:,.0f} ms ({row['speedup']:.2f}×)"
                )
                errors += [] if row is None else [row]
        if errors:
            worst = max(errors, key=lambda row: row["relative_l2"])
            lines.append(
                f"| {variant} | {' | '.join(cells)} |"
                f" {worst['relative_l2']:.1e}{'' if all(row['inside'] for row in errors) else ', over the gate'} |"
            )
    return "\n".join(lines) + "\n"


def bench_nano() -> str:
    """What `sdcompress bench nano` found."""
    found = read_results(RESULTS / "bench-nano.json")
    took = f"; {found.seconds / 60:.1f} minutes in all, its graphs not yet made" if found.seconds else ""
    lines = [
        (
            f"`sdcompress bench nano` ({machine(found)}; one picture, guidance, {found.settings['steps']} steps;"
            f" {found.settings['rounds']} rounds, 95% intervals{took}):"
        ),
        "",
        *answer(found),
        "",
    ]
    student = found.models[1]["name"]
    pair, real = found.students[student], found.quality.get("real", {})
    lines += [
        f"{student} beside {found.teacher}, {found.settings['quality_pictures']} prompts: FID"
        f" {format_estimate(pair['fid'])}, KID {format_estimate(pair['kid'])}, LPIPS {format_estimate(pair['lpips'])};"
        " caption among the judge's first five "
        + ", ".join(
            f"{percent(figures['top5'])} ({name})"
            for name, figures in (
                (found.teacher, found.quality[found.teacher]),
                (student, found.quality[student]),
                ("real pictures", real),
            )
            if "top5" in figures
        )
        + "."
    ]
    for entry in found.backends:
        if felt := entry.get("sensitivity"):
            lines += [
                "",
                (
                    f"The {entry['precision']} gate sees one layer's weights off by {felt['least']:.1%} (median of"
                    f" {len(felt['scaled'])} layers, {felt['least_low']:.1%} to {limit(felt['least_high'])});"
                    f" {felt['heads_unseen']} of {felt['heads']} dead attention heads pass it."
                ),
            ]
    return "\n".join(lines) + "\n"


def sd15() -> str:
    """Full-size SD1.5 shapes on a CPU."""
    found = read_results(RESULTS / "sd15-cpu.json")
    rounds = found.settings["rounds"]
    told = f"{rounds} rounds" if rounds > 1 else "one round, so the intervals do not know how processes differ"
    command = found.command.partition(" -o ")[0]
    lines = [
        (
            f"SD1.5 at {found.settings['sizes_px'][0]} px on a CPU, random weights ({machine(found)}; `{command}`; one"
            f" picture, guidance, {found.settings['steps']} steps; {told}):"
        ),
        "",
        *answer(found, "of peak"),
    ]
    return "\n".join(lines) + "\n"


def peers() -> str:
    """What a user would pick instead, in one run."""
    found = load("peers-cpu.json")
    s, env = found["settings"], found["environment"]
    ways = found["ways"]
    reference = ways["diffusers fp32"]
    lines = [
        (
            f"What one would pick instead, {s['model']}, one run ({env['cpu']}, {env['cores']} cores; {s['rounds']}"
            " rounds in turn, 95% intervals; `python bench/peers/latency.py`):"
        ),
        "",
    ]
    lines += [
        (
            "| | UNet step, ms | | whole picture, ms | | first picture, s | peak memory, MiB | relative L2 to diffusers"
            " fp32 |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in ways.items():
        if "failed" in row:
            lines.append(f"| {name} | {row['failed']} | | | | | | |")
            continue
        cells = []
        for figure in ("unet_step_ms", "picture_ms"):
            time = row[figure]
            cells += [
                (
                    f"{time['median']:,.1f} ({time['low']:,.1f} to"
                    f" {time['high']:,.1f}){', noisy' if time['noisy'] else ''}"
                ),
                f"{reference[figure]['median'] / time['median']:.2f}×",
            ]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {row['first_picture_s']:.1f} | {row['peak_mib']:,.0f} |"
            f" {row['relative_l2']:.1e} |"
        )
    return "\n".join(lines) + "\n"


def overhead() -> str:
    """What the WebUI extension adds to a step."""
    found = load("webui-overhead-cpu.json")["summary"]
    return (
        f"Through the WebUI extension a step of nano takes {found['added_ms']:.2f} ms ({found['overhead']:.1%}) longer"
        f" than in the runner itself, {found['calls']:,} calls each way (`python bench/studies/webui_overhead.py`).\n"
    )


def gates() -> str:
    """What the bench's own checks find, on faults and changes that were planted."""
    planted, found = load("statistics.json")["planted"], load("faults-nano.json")
    lines = [
        (
            "Planted into nano, ten places each, and caught by the gate at each timestep (`python"
            " bench/studies/faults.py`). In use: layers whose removal moves the output by 1% or more."
        ),
        "",
    ]
    kinds = list(dict.fromkeys(row["kind"] for row in found["rows"]))
    names = {
        "scaled": "a weight × 1.02",
        "head": "an attention head zeroed",
        "overflow": "values past fp16, infinite",
        "saturated": "values past fp16, clamped",
    }
    lines += [
        (
            f"| gate | places | {' | '.join(names[kind] for kind in kinds)} | least change of one layer's weights it"
            " sees, median (lowest) |"
        ),
        "|---" * (len(kinds) + 3) + "|",
    ]
    for precision, gate in found["gates"].items():
        least = gate["least"]["by timestep"]
        seen = f"{limit(least['least'])} ({limit(least['least_low'])}); blind at {least['blind']} of {least['places']}"
        for drawn in ("in use", "anywhere"):
            rows = {
                row["kind"]: row for row in found["rows"] if row["precision"] == precision and row["places"] == drawn
            }
            cells = [f"{rows[kind]['caught_by_timestep']} of {rows[kind]['count']}" for kind in kinds]
            lines.append(f"| {precision} | {drawn} | {' | '.join(cells)} | {seen if drawn == 'anywhere' else ''} |")
    layers, fp32 = found["census"]["scaled"], found["gates"]["fp32"]["limits"][0]
    caught, used = (
        sum(row["error"] > fp32 for row in layers.values()),
        sum(row["removed"] >= found["in_use"] for row in layers.values()),
    )
    lines += [
        "",
        (
            f"Of all {len(layers)} layers the fp32 gate sees a weight off by 2% in {caught}, among them all {used} in"
            " use; the others move the output by less than fp32 gates can ask about."
        ),
    ]
    rows = {(row["rounds"], row["planted"]): row for row in planted if row["noise"] == "quiet"}
    five, none = rows[5, 1.05], rows[5, 1.0]
    lines += [
        "",
        (
            "`sdcompress bench compare` on synthetic rounds (5 of 20 samples, 200 seeds; `python"
            f" bench/studies/stats.py`): a planted slowdown of 5% is told in {five['slower']:.1%} of the runs, a change"
            f" where none was planted in {none['slower'] + none['faster']:.1%}."
        ),
    ]
    return "\n".join(lines) + "\n"


def gpu() -> str:
    """What `bench/gpu.py` found, a table for each card in bench/results/gpu-*.json."""
    tables = [gpu_table(json.loads(path.read_text())) for path in sorted(RESULTS.glob("gpu-*.json"))]
    return "\n".join(tables) if tables else "It has not been run yet, so there is no GPU figure here.\n"


def gpu_table(found: dict[str, Any]) -> str:
    """One gpu.json: the UNet's steps, and a line each for pictures, training and tests."""
    rows = [row for row in found["rows"] if "failed" not in row and "skipped" not in row]
    env, card, headline = found["environment"], found["card"], found["headline"]
    name = f"{card['name']}, driver {card['driver']}" if card else f"{env['cpu']}, no GPU"
    known = {(row["part"], row["row"]): row for row in rows}
    lines = [
        (
            f"{name}, torch {env['packages']['torch']}, random weights (`python bench/gpu.py --minutes"
            f" {found['minutes']:g}`):"
        ),
        "",
    ]
    lines += [
        "| UNet | batch | eager | fastest | by | speed-up | of peak | off PyTorch fp32 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    steps = [row for row in rows if row["part"] in (3, 4, 8) and "step_ms" in row]
    for model, batch in sorted(
        {(row["model"], row["batch"]) for row in steps}, key=lambda key: (key[1], key[0] != "sd15", key[0])
    ):
        best = min(
            (row for row in steps if (row["model"], row["batch"]) == (model, batch)), key=lambda row: row["step_ms"]
        )
        eager, teacher = known.get((3, f"{model} b{batch} eager")), known.get((3, f"sd15 b{batch} eager"))
        speedup = f"{teacher['step_ms'] / best['step_ms']:.2f}×" if teacher else "–"
        way = best["row"].removeprefix(f"{model} b{batch} ")
        before = f"{eager['step_ms']:.2f} ms" if eager else "–"
        lines.append(
            f"| {model} | {batch} | {before} | {best['step_ms']:.2f} ms | {way} | {speedup} |"
            f" {best['share_of_peak']:.0%} | {best['relative_l2']:.1e} |"
        )
    lines.append("")
    if "picture_speedup" in headline:
        slow, fast = known[5, "sd15 eager"], known[5, "bk-tiny best"]
        gap = f"of which the host's share is {fast['gap_ms_per_step']:.2f} ms a step"
        lines.append(
            f"A picture with guidance takes SD1.5 in eager mode {slow['picture_ms']:.0f} ms and bk-tiny"
            f" {fast['picture_ms']:.0f} ms, {gap}."
        )
    loops = [row for row in rows if row["part"] == 6 and "samples_per_s" in row]
    if loops:
        lines.append(
            "Training samples a second: " + ", ".join(f"{row['row']} {row['samples_per_s']:.1f}" for row in loops) + "."
        )
    if "tests_passed" in headline:
        lines.append(
            f"Tests that need a GPU: {headline['tests_passed']} passed, {headline['tests_not_passed']} did not."
        )
    return "\n".join(lines) + "\n"


def answer(found: Results, *more: str) -> list[str]:
    """The table of a report, as a README has room for it."""
    lines = [
        (
            "| model | UNet parameters | run by | UNet step | pictures/s | speed-up |"
            f" {''.join(f'{name} | ' for name in more)}peak memory | off PyTorch fp32 |"
        ),
        "|---|---|---|---|---|---|---|---|" + "---|" * len(more),
    ]
    for row in found.rows():
        if row.failed or row.unet_step is None or row.images_per_s is None:
            lines.append(
                f"| {row.model} | {row.parameters / 1e6:,.1f} M | {row.setup} | failed: {row.failed} |"
                + " |" * (4 + len(more))
            )
            continue
        step = row.unet_step
        time = (
            f"{step.median / 1000:.2f} s ({step.low / 1000:.2f} to {step.high / 1000:.2f})"
            if step.median >= 1000
            else f"{step.median:.1f} ms ({step.low:.1f} to {step.high:.1f})"
        )
        cells = [
            row.model,
            f"{row.parameters / 1e6:,.1f} M",
            str(row.setup),
            time + (", noisy" if step.noisy else ""),
            f"{row.images_per_s:.3g}",
            f"{row.speedup:.2f}×" if row.speedup else "–",
        ]
        cells += [f"{row.share_of_peak:.0%}" if row.share_of_peak else "–"] * len(more)
        cells += [f"{row.peak_mib or 0:,.0f} MiB", f"{row.fidelity:.1e}" if row.fidelity is not None else "reference"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def machine(found: Results) -> str:
    return f"{found.environment['cpu']}, {found.environment['cores']} cores"


def limit(value: float | None) -> str:
    return "over 100%" if value is None else f"{value:.2%}"


SECTIONS: dict[str, tuple[Callable[[], str], ...]] = {
    "nano": (nano, distillation, adapting, training, latency),
    "engines": (engines, backends),
    "gpu": (gpu,),
    "bench": (bench_nano, sd15, peers, overhead, gates),
}


def updated(readme: str) -> str:
    """The README with each section's figures between `<!-- results: NAME -->` and `<!-- /results -->`."""
    for name, parts in SECTIONS.items():
        before, opened, rest = readme.partition(f"<!-- results: {name} -->\n")
        _, closed, after = rest.partition("<!-- /results -->")
        if not opened or not closed:
            raise SystemExit(f"README.md has no section of results {name!r}")
        readme = before + opened + "\n".join(part() for part in parts) + closed + after
    return readme


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text()
    new = updated(text)
    if "--check" in sys.argv[1:]:
        sys.exit(
            0 if new == text else "README.md disagrees with bench/results; type: python tools/results_to_readme.py"
        )
    path.write_text(new)


if __name__ == "__main__":
    main()
