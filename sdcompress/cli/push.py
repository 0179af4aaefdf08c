"""`sdcompress push`"""

from __future__ import annotations

from pathlib import Path

import click

from sdcompress.cli._console import ConsoleReporter, card, echo, mib
from sdcompress.cli._types import NAME, TEXT, FilePath


@click.command()
@click.argument("folder", metavar="DIR", type=FilePath())
@click.argument("repo", type=NAME)
@click.option("--private", is_flag=True, help="Make a new repository private; one that is public is refused.")
@click.option("--force", is_flag=True, help="Replace the model of a repository that holds files.")
@click.option("--dry-run", is_flag=True, help="Print the card and the files, and upload nothing; needs no network.")
@click.option(
    "-o",
    "--output",
    type=FilePath(),
    default=None,
    metavar="DIR",
    help="With --dry-run: write the card and its picture to this folder instead of printing the card.",
)
@click.option("--message", type=TEXT, default=None, help="Message of the commit.  [default: Upload NAME]")
@click.option(
    "--license",
    type=NAME,
    default=None,
    metavar="NAME",
    help="The license, by the hub's name, such as creativeml-openrail-m.  [default: other, to be checked]",
)
@click.option(
    "--base-model",
    type=NAME,
    default=None,
    metavar="HUB-ID",
    help="Hub id of the teacher, or of the LoRA's base model.  [default: the name it was trained under]",
)
def command(
    folder: Path,
    repo: str,
    private: bool,
    force: bool,
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
    from sdcompress.publish.upload import check_repo, require_token, upload, write_card

    if output and not dry_run:
        raise click.UsageError("-o needs --dry-run")
    check_repo(repo)
    check_names(license, base_model)  # before every file is read
    model = find_finished_model(folder)
    text = model_card(model, repo, license, base_model)
    contents = {CARD: text.encode()} | model.contents() | ({PICTURE: model.samples} if model.samples else {})
    sizes = {
        name: len(content) if isinstance(content, bytes) else content.stat().st_size
        for name, content in contents.items()
    }
    if dry_run:
        if output is None:
            echo(text)
        else:
            write_card(output, text, model.samples, [folder])
        width = max(map(len, sizes))
        echo("\n".join(f"{name:<{width}}  {size:>14,} bytes" for name, size in sizes.items()))
        return
    token = require_token()
    total = sum(sizes.values())
    with ConsoleReporter().task(f"upload {mib(total)}"):
        message = message or f"Upload {repo.rpartition('/')[2]}"
        url = upload(contents, repo, token, private=private, message=message, force=force)
    rows: list[tuple[str, object]] = [
        ("repository", url),
        ("files", f"{len(sizes)}, {mib(total)}"),
        ("license", license or "other: to be checked, see the card"),
    ]
    card(
        f"{model.manifest.kind} on the hub",
        rows,
        None if model.manifest.kind == "lora" else f'sdcompress generate {repo} "PROMPT" -o picture.png',
    )
