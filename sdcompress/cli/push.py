"""`sdcompress push`"""

from __future__ import annotations

from pathlib import Path

import click

from sdcompress.cli._console import ConsoleReporter, card, mib


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--dry-run", is_flag=True, help="Print the card and the files, and upload nothing; needs no network.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=None,
    metavar="DIR",
    help="With --dry-run: write the card and its picture to this folder instead of printing the card.",
)
@click.option("--message", default=None, help="Message of the commit.  [default: Upload NAME]")
@click.option(
    "--license",
    default=None,
    metavar="NAME",
    help="The license, by the hub's name, such as creativeml-openrail-m.  [default: other, to be checked]",
)
@click.option(
    "--base-model",
    default=None,
    metavar="HUB-ID",
    help="Hub id of the teacher, or of the LoRA's base model.  [default: the name it was trained under]",
)
def command(
    folder: Path,
    repo: str,
    private: bool,
    dry_run: bool,
    output: Path | None,
    message: str | None,
    license: str | None,
    base_model: str | None,
) -> None:
    """Upload a finished pipeline or LoRA to the hub as REPO (OWNER/NAME), with a model card. DIR is its folder or the
    training folder that holds it.

    \b
      sdcompress push sd-small you/sd-small --license creativeml-openrail-m --dry-run
      sdcompress push sd-small you/sd-small --license creativeml-openrail-m --private
    """
    from sdcompress.publish.finished_model import CARD, PICTURE, find_finished_model
    from sdcompress.publish.model_card import check_names, model_card
    from sdcompress.publish.upload import check_repo, require_token, upload, upload_folder, write_card

    if output and not dry_run:
        raise click.UsageError("-o needs --dry-run")
    check_repo(repo)
    check_names(license, base_model)  # before every file is read
    model = find_finished_model(folder)
    text = model_card(model, repo, license, base_model)
    files = model.files() | ({PICTURE: model.samples} if model.samples else {})
    if dry_run:
        if output is None:
            click.echo(text)
        else:
            write_card(output, text, model.samples, [folder])
        sizes = {CARD: len(text.encode())} | {name: path.stat().st_size for name, path in files.items()}
        width = max(map(len, sizes))
        click.echo("\n".join(f"{name:<{width}}  {size:>14,} bytes" for name, size in sizes.items()))
        return
    token = require_token()
    total = sum(path.stat().st_size for path in files.values())
    with upload_folder(files, text) as collected, ConsoleReporter().task(f"upload {mib(total)}"):
        url = upload(collected, repo, token, private=private, message=message or f"Upload {repo.rpartition('/')[2]}")
    rows: list[tuple[str, object]] = [
        ("repository", url),
        ("files", f"{len(files) + 1}, {mib(total)}"),
        ("license", license or "other: to be checked, see the card"),
    ]
    card(
        f"{model.manifest.kind} on the hub",
        rows,
        None if model.manifest.kind == "lora" else f'sdcompress generate {repo} "PROMPT" -o picture.png',
    )
