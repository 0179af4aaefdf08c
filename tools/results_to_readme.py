"""Write the figures of the README and of docs/loras.md from `bench/results/`, between the marks of each section.

python tools/results_to_readme.py            rewrites them
python tools/results_to_readme.py --check    exit 1 if one disagrees
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sdcompress_bench.gpu.readme_section import gpu_section
from sdcompress_bench.markdown import Cells, section
from sdcompress_bench.readme_few_steps import decoder_section, few_step_section, whole_pictures_section
from sdcompress_bench.readme_loras import adapting_section, student_section, swap_section
from sdcompress_bench.readme_table import answer_cells, answer_head, format_limit, machine, sensitivity_sentences
from sdcompress_bench.report import format_estimate
from sdcompress_bench.results import Results, read_results
from sdcompress_bench.scenario import Sampling

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results"


def load(name: str) -> Any:
    """Returns the content of a file in `bench/results/`."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def percent(figures: Mapping[str, Any]) -> str:
    return f"{figures['share']:.0%}"


def format_error(parity: Mapping[str, Any]) -> str:
    """Returns a graph's error to torch fp32, and torch's own error in the same precision."""
    return f"{parity['relative_l2']:.1e} ({parity['torch_relative_l2']:.1e})"


def nano() -> str:
    """Returns the teacher's quality beside that of real pictures."""
    found = load("nano-teacher.json")
    rows = {
        "seen": "nano, prompts seen in training",
        "seen_real_pictures": "the real pictures of those prompts, which the judge has seen too",
        "seen_real_pictures_through_vae": "the same real pictures, after nano's VAE",
        "heldout": "nano, held-out pairs of style and concept",
        "heldout_real_pictures": "the real pictures of those pairs, which the judge has never seen",
        "heldout_real_pictures_through_vae": "the same real pictures, after nano's VAE",
    }
    return section(
        f"Nano (UNet {found['parameters']['unet'] / 1e6:.1f} M parameters, sha256 `{found['sha256'][:12]}`),"
        f" {found['steps']} steps; VAE reconstruction {found['vae_psnr_db']:.1f} dB:",
        ("pictures", "prompts", "right style", "right caption first", "in the top 5"),
        (
            [label, str(found[key]["style"]["count"]), *(percent(found[key][n]) for n in ("style", "top1", "top5"))]
            for key, label in rows.items()
        ),
        describe_copies(found["nearest_training_picture"]),
    )


def describe_copies(found: Mapping[str, Any]) -> str:
    """Returns what part of nano's pictures is as near to a training picture as a copy of one would be."""
    near = {name: f"{figures['as_near_as_copies']:.0%}" for name, figures in found.items()}
    return (
        "Drawn or remembered? Half of all copies of training pictures, moved a little and passed through the VAE, are"
        f" within an RMSE of {found['copies']['p50']:.3f} of their original, compared at 32 px. So near to a training"
        f" picture are {near['seen']} of nano's pictures of seen prompts, {near['heldout']} of those of held-out pairs,"
        f" and {near['real']} of real pictures that it has not seen."
    )


def distillation() -> str:
    """Returns bk-tiny untrained, trained with the task loss alone, and distilled."""
    found = load("distillation-nano.json")
    seeds = len({row["seed"] for row in found["rows"]} - {None})
    forms = {"style_accuracy": ".0%", "retrieval_top5": ".0%", "output_relative_l2": ".3f"}
    rows = []
    for arm in dict.fromkeys(row["arm"] for row in found["rows"]):
        cells = [arm]
        for name, form in forms.items():
            values = [row[name] for row in found["rows"] if row["arm"] == arm]
            spread = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):{form}}{spread}")
        rows.append(cells)
    return section(
        f"Its bk-tiny student, {found['steps']} steps of batch {found['batch_size']}, {found['prompts']} held-out"
        f" prompts, mean of {seeds} seeds (lowest to highest):",
        (None, "right style", "right caption in the top 5", "noise prediction, relative L2 to the teacher"),
        rows,
    )


def latency() -> str:
    """Returns the times of `sdcompress demo`."""
    found = load("demo.json")
    env = found["environment"]
    rows = []
    for run in found["latency"]:
        if not run.get("failed"):
            step, whole = (
                statistics.median(sample for samples in run["samples_ms"][stage] for sample in samples)
                for stage in ("unet_step", "end_to_end")
            )
            drawn_in = str(Sampling(run["steps"], run["guidance_scale"]))
            rows.append((run["model"], drawn_in, run["backend"], f"{whole / 1000:.2f}", f"{step:.1f}"))
    return section(
        f"Latency in the demo ({env.get('cpu', 'CPU')}, {env['cores']} cores, no GPU; one picture):",
        ("model", "drawn in", "backend", "whole picture, s", "one UNet step, ms"),
        rows,
    )


def adapting() -> str:
    """Returns nano-tiny before and after a LoRA and a finetuning, and LoRA steps on student and teacher."""
    return adapting_section(load("adapting-nano.json"))


def training() -> str:
    """Returns our training loop beside one in the public scripts' manner."""
    found = load("training-peers-nano.json")
    settings = found["settings"]
    rows = []
    for row in found["rows"]:
        speed = [f"{row['samples_per_s'][name]:.1f}" for name in ("public manner", "ours")]
        cells = [row["precision"], str(row["threads"]), *speed, f"{row['speedup']:.2f}", f"{row['share_of_peak']:.0%}"]
        rows.append(cells)
    return section(
        f"Distilling nano on the CPU ({found['environment']['cpu']}), batch {settings['batch']}, pictures a second;"
        f" the two loops take turns, median of {settings['rounds']} rounds:",
        (
            "precision",
            "threads",
            "method of the public scripts: VAE and text encoder at every step",
            "sdcompress, from its cache",
            "times as fast",
            "sdcompress, share of the matrix-product peak",
        ),
        rows,
    )


def engines() -> str:
    """Returns the cost of a TensorRT engine, and the error of its graph."""
    found = load("engines-cpu.json")
    version = next(row["version"] for row in found["rows"].values() if "version" in row)
    rows = [
        (
            name,
            f"{row['parameters'] / 1e6:,.0f} M",
            f"{row['seconds']:.0f} s",
            f"{row['peak_mib'] / 1024:.1f} GiB",
            f"{row['engine_bytes'] / 2**20:,.0f} MiB",
            format_error(row["parity"]),
        )
        for name, row in found["rows"].items()
        if row["status"] == 0
    ]
    return section(
        f"`sdcompress export --trt` at full size, random weights, fp16, TensorRT for RTX {version},"
        f" {found['environment']['cores']} cores and no GPU:",
        ("UNet", "parameters", "whole command", "peak memory", "engine", "error to torch fp32 (torch fp16's own)"),
        rows,
    )


def backends() -> str:
    """Returns one UNet call on a CPU in every variant that was tried."""
    found = load("backends-cpu.json")
    env, models = found["environment"], found["models"]
    batches = sorted({batch for rows in models.values() for row in rows.values() for batch in row["batch"]})
    heads = [f"{name}, batch {batch}" for name in models for batch in batches]
    lines = []
    for variant in dict.fromkeys(variant for rows in models.values() for variant in rows):
        cells, measured = [], []
        for rows in models.values():
            failed = "failed" in rows.get(variant, {})
            for batch in batches:
                row = rows.get(variant, {}).get("batch", {}).get(batch)
                cells.append("–" if row is None or failed else f"{row['median_ms']:,.0f} ms ({row['speedup']:.2f}×)")
                measured += [] if row is None else [row]
        if measured:
            worst = max(row["relative_l2"] for row in measured)
            gate = "" if all(row["inside"] for row in measured) else ", over the gate"
            lines.append([variant, *cells, f"{worst:.1e}{gate}"])
    return section(
        f"One UNet call on a CPU ({env['cpu']}, {env['cores']} cores), the same weights in every row; an error over"
        " the gate is marked:",
        (None, *heads, "relative L2"),
        lines,
    )


def bench_nano() -> str:
    """Returns the results of `sdcompress bench nano`."""
    found = read_results(RESULTS / "bench-nano.json")
    took = f"; {found.seconds / 60:.1f} minutes in all, with the export of the graphs" if found.seconds else ""
    return section(
        f"`sdcompress bench nano` ({machine(found.environment)}; one picture; {found.settings['rounds']} rounds, 95%"
        f" intervals{took}):",
        answer_head(),
        (answer_cells(row) for row in found.rows()),
        student_sentence(found),
        *sensitivity_sentences(found),
    )


def student_sentence(found: Results) -> str:
    """Returns the figures of the first student's pictures."""
    student = found.models[1]["name"]
    pair = found.students[student]
    names = {found.teacher: found.teacher, student: student, "real": "real pictures"}
    judged = {name: found.quality.get(key, {}) for key, name in names.items()}
    shares = ", ".join(f"{percent(figures['top5'])} ({name})" for name, figures in judged.items() if "top5" in figures)
    return (
        f"{student} against {found.teacher}, {found.settings['quality_pictures']} prompts: FID"
        f" {format_estimate(pair['fid'])}, KID {format_estimate(pair['kid'])}, LPIPS {format_estimate(pair['lpips'])};"
        f" right caption in the judge's top 5: {shares}."
    )


def sd15() -> str:
    """Returns full-size SD1.5 shapes on a CPU."""
    found = read_results(RESULTS / "sd15-cpu.json")
    settings = found.settings
    one_round = "one round, so the intervals do not include how processes differ"
    rounds = f"{settings['rounds']} rounds" if settings["rounds"] > 1 else one_round
    return section(
        f"SD1.5 at {settings['sizes_px'][0]} px on a CPU, random weights ({machine(found.environment)};"
        f" `{found.command.partition(' -o ')[0]}`; one picture, guidance, {settings['steps']} steps; {rounds}):",
        answer_head("of peak"),
        (answer_cells(row, peak=True) for row in found.rows()),
    )


def few_steps() -> str:
    """Returns how good few steps are, and what the small decoder changes."""
    return few_step_section(load("few-step-nano.json"))


def whole_pictures() -> str:
    """Returns SD1.5's shapes from 25 steps to four and a small decoder, with that decoder's figures."""
    found = read_results(RESULTS / "sd15-few-step-cpu.json")
    table = whole_pictures_section(found, "SD1.5 at 512 px with random weights")
    return f"{table}\n{decoder_section(load('decoder-nano.json'), found)}"


def peers() -> str:
    """Returns our backends beside what a user would take instead."""
    found = load("peers-cpu.json")
    settings, env = found["settings"], found["environment"]
    return section(
        f"sdcompress and other ways to run {settings['model']}, one run ({env['cpu']}, {env['cores']} cores;"
        f" {settings['rounds']} rounds in turn, 95% intervals; `python bench/peers/latency.py`):",
        (
            None,
            "UNet step, ms",
            None,
            "whole picture, ms",
            None,
            "first picture, s",
            "peak memory, MiB",
            "relative L2 to diffusers fp32",
        ),
        (peer_cells(name, row, found["ways"]["diffusers fp32"]) for name, row in found["ways"].items()),
    )


def peer_cells(name: str, row: Mapping[str, Any], reference: Mapping[str, Any]) -> Cells:
    """Returns a row of the peers' table.

    Args:
        name: of the setup.
        row: its figures.
        reference: the figures of diffusers fp32.
    """
    name = name.replace("ours:", "sdcompress:")
    if "failed" in row:
        return [name, row["failed"], *[None] * 6]
    cells = [name]
    for figure in ("unet_step_ms", "picture_ms"):
        time = row[figure]
        noisy = ", noisy" if time["noisy"] else ""
        cells.append(f"{time['median']:,.1f} ({time['low']:,.1f} to {time['high']:,.1f}){noisy}")
        cells.append(f"{reference[figure]['median'] / time['median']:.2f}×")
    return [*cells, f"{row['first_picture_s']:.1f}", f"{row['peak_mib']:,.0f}", f"{row['relative_l2']:.1e}"]


def overhead() -> str:
    """Returns the time that the WebUI extension adds to a step."""
    found = load("webui-overhead-cpu.json")["summary"]
    return (
        f"A step of nano through the WebUI extension takes {found['added_ms']:.2f} ms ({found['overhead']:.1%}) longer"
        f" than in the runner ({found['calls']:,} calls of each kind; `python bench/studies/webui_overhead.py`).\n"
    )


def gates() -> str:
    """Returns the results of the bench's own checks, with planted faults and changes."""
    planted, found = load("statistics.json")["planted"], load("faults-nano.json")
    names = {
        "scaled": "a weight × 1.02",
        "head": "an attention head zeroed",
        "overflow": "values beyond fp16, infinite",
        "saturated": "values beyond fp16, clamped",
    }
    kinds = [names[kind] for kind in dict.fromkeys(row["kind"] for row in found["rows"])]
    layers, limit = found["census"]["scaled"].values(), found["gates"]["fp32"]["limits"][0]
    caught = sum(row["error"] > limit for row in layers)
    used = [row["error"] > limit for row in layers if row["removed"] >= found["in_use"]]
    by_change = {(row["rounds"], row["planted"]): row for row in planted if row["noise"] == "quiet"}
    five, none = by_change[5, 1.05], by_change[5, 1.0]
    return section(
        "Faults planted into nano, ten places each, that the gate detects at each timestep (`python"
        " bench/studies/faults.py`). In use: layers whose removal moves the output by 1% or more.",
        ("gate", "places", *kinds, "smallest detected change of one layer's weights, median (lowest)"),
        gate_rows(found),
        f"The fp32 gate detects a weight off by 2% in {caught} of {len(layers)} layers, among them {sum(used)} of the"
        f" {len(used)} in use. In the other layers, such a fault changes the output by less than the fp32 limit.",
        "`sdcompress bench compare` on synthetic rounds (5 of 20 samples, 200 seeds; `python"
        f" bench/studies/stats.py`): a planted slowdown of 5% is detected in {five['slower']:.1%} of the runs, a change"
        f" where none was planted in {none['slower'] + none['faster']:.1%}.",
    )


def gate_rows(found: Mapping[str, Any]) -> Iterator[Cells]:
    """Yields the rows of the gates in each precision, for both draws of places."""
    for precision, gate in found["gates"].items():
        least = gate["least"]["by timestep"]
        seen = f"{format_limit(least['least'])} ({format_limit(least['least_low'])}); none detected at"
        for drawn in ("in use", "anywhere"):
            rows = [row for row in found["rows"] if (row["precision"], row["places"]) == (precision, drawn)]
            cells = [f"{row['caught_by_timestep']} of {row['count']}" for row in rows]
            blind = f"{seen} {least['blind']} of {least['places']}" if drawn == "anywhere" else ""
            yield [precision, drawn, *cells, blind]


def gpu() -> str:
    """Returns the results of `bench/gpu.py`: a table for each card in bench/results/gpu-*.json."""
    tables = [gpu_section(json.loads(path.read_text(encoding="utf-8"))) for path in sorted(RESULTS.glob("gpu-*.json"))]
    return "\n".join(tables) if tables else "`bench/gpu.py` has not been run yet, so there are no GPU figures here.\n"


def lora_swaps() -> str:
    """Returns how fast a LoRA goes into a running UNet, and what it leaves behind."""
    return swap_section(load("lora-swaps-cpu.json"))


def student_loras() -> str:
    """Returns how well LoRAs of the whole model work on its students."""
    return student_section(load("lora-remap-nano.json"))


DOCUMENTS: dict[str, dict[str, tuple[Callable[[], str], ...]]] = {
    "README.md": {
        "nano": (nano, distillation, adapting, training, latency),
        "few-step": (few_steps, whole_pictures),
        "engines": (engines, backends),
        "gpu": (gpu,),
        "bench": (bench_nano, sd15, peers, overhead, gates),
    },
    "docs/loras.md": {"swaps": (lora_swaps,), "students": (student_loras,)},
}
"""Document → its sections, each with the parts that write it."""


def updated(name: str, text: str) -> str:
    """Returns a document with the figures of its sections between `<!-- results: NAME -->` and `<!-- /results -->`.

    Args:
        name: of the document, a key of `DOCUMENTS`.
        text: its content.
    """
    for title, parts in DOCUMENTS[name].items():
        before, opened, rest = text.partition(f"<!-- results: {title} -->\n")
        _, closed, after = rest.partition("<!-- /results -->")
        if not opened or not closed:
            raise SystemExit(f"{name} has no section of results {title!r}")
        text = before + opened + "\n".join(part() for part in parts) + closed + after
    return text


def main() -> None:
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        new = updated(name, text)
        if "--check" not in sys.argv[1:]:
            path.write_text(new, encoding="utf-8")
        elif new != text:
            sys.exit(f"{name} disagrees with bench/results; type: python tools/results_to_readme.py")


if __name__ == "__main__":
    main()
