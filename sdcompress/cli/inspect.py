"""`sdcompress inspect`"""

from __future__ import annotations

from typing import Any

import click

from sdcompress.cli._console import card, json_option, mib, print_json
from sdcompress.cli._types import NAME


@click.command()
@click.argument("path", type=NAME)
@json_option
def command(path: str, as_json: bool) -> None:
    """Describe PATH: a pipeline, a checkpoint, a LoRA, or any artifact of sdcompress. No weights are loaded.

    \b
      sdcompress inspect nano
      sdcompress inspect realisticVision_v40.safetensors
      sdcompress inspect segmind/small-sd --json
      sdcompress inspect runs/bk-tiny/pipeline
    """
    from dataclasses import asdict

    from sdcompress.models.describe import describe_model

    facts, manifest = describe_model(path)
    if as_json:
        print_json(facts | ({"manifest": asdict(manifest)} if manifest else {}))
        return
    card(path, [(key, _format(key, value)) for key, value in facts.items()])


def _format(key: str, value: Any) -> Any:
    if key == "bytes":
        return mib(float(value))
    if key == "faults" and not value:
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_format('', entry)}" for name, entry in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(str(entry) for entry in value) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
