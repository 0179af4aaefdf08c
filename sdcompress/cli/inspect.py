"""`sdcompress inspect`"""

from __future__ import annotations

from pathlib import Path

import click

from ._console import card, json_option, mib


@click.command()
@click.argument("path")
@json_option
def command(path: str, as_json: bool) -> None:
    """Say what PATH is: a pipeline, or anything sdcompress has made.

    \b
      sdcompress inspect nano
      sdcompress inspect runs/bk-tiny/pipeline
    """
    import json
    from dataclasses import asdict

    from sdcompress_engines.manifest import faults, read_manifest

    from sdcompress.prune.student import count_parameters, meta_unet
    from sdcompress.teacher import model_index, resolve, unet_config

    folder = Path(path)
    manifest = read_manifest(folder) if folder.is_dir() else None
    facts: dict[str, object] = {}
    if manifest is None or manifest.kind in ("student", "teacher"):
        folder = resolve(path)
        manifest = read_manifest(folder)
        index = model_index(folder)
        config = unet_config(path)
        facts["class"] = index.get("_class_name")
        facts["unet_parameters"] = count_parameters(meta_unet({k: v for k, v in config.items() if not k.startswith("_")}))
        facts["levels"] = config["block_out_channels"]
        facts["cross_attention_dim"] = config["cross_attention_dim"]
        scheduler = folder / "scheduler/scheduler_config.json"
        facts["prediction_type"] = json.loads(scheduler.read_text()).get("prediction_type", "epsilon") if scheduler.is_file() else None
    facts["bytes"] = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    if manifest is not None:
        facts |= {"kind": manifest.kind, "created": manifest.created, "inputs": manifest.inputs, "faults": faults(folder), "figures": manifest.figures, "versions": manifest.versions}
    if as_json:
        click.echo(json.dumps(facts | ({"manifest": asdict(manifest)} if manifest else {})))
        return
    rows: list[tuple[str, object]] = []
    for key, value in facts.items():
        shown = mib(float(value)) if key == "bytes" and isinstance(value, int) else f"{value:,}" if isinstance(value, int) else value
        rows.append((key, "none: whole" if key == "faults" and not value else shown))
    card(path, rows)
