"""`sdcompress push`"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from sdcompress.cli._console import ConsoleReporter, card, mib


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the repository a private one, where it is new.")
@click.option("--dry-run", is_flag=True, help="Print the card and the files, and upload nothing; needs no network.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=None,
    metavar="DIR",
    help="With --dry-run: write the card and its picture here instead.",
)
@click.option("--message", default=None, help="Of the commit.  [default: Upload NAME]")
@click.option(
    "--license",
    default=None,
    metavar="NAME",
    help="The licence, by the hub's name, such as creativeml-openrail-m.  [default: other, to be checked]",
)
@click.option(
    "--base-model",
    default=None,
    metavar="HUB-ID",
    help="The teacher, or what the LoRA is for, by its hub id.  [default: the name it was trained under]",
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
    """Upload a finished pipeline or LoRA, DIR or the training folder it lies in, to the hub as REPO (OWNER/NAME), with
    a model card.

    \b
      sdcompress push sd-small you/sd-small --license creativeml-openrail-m --dry-run
      sdcompress push sd-small you/sd-small --license creativeml-openrail-m --private
    """
    from sdcompress.publish.model_card import CARD, PICTURE, finished, model_card

    if output and not dry_run:
        raise click.UsageError("-o goes with --dry-run")
    check_repo(repo)
    text = model_card(folder, repo, license, base_model)
    done = finished(folder)
    files = done.files() | ({PICTURE: done.samples} if done.samples else {})
    if dry_run:
        if output is None:
            click.echo(text)
        else:
            write_card(output, text, done.samples)
        sizes = {CARD: len(text.encode())} | {name: path.stat().st_size for name, path in files.items()}
        width = max(map(len, sizes))
        click.echo("\n".join(f"{name:<{width}}  {size:>14,} bytes" for name, size in sizes.items()))
        return
    token = require_token()
    total = sum(path.stat().st_size for path in files.values())
    with upload_folder(files, text) as staged, ConsoleReporter().task(f"upload {mib(total)}"):
        url = upload(staged, repo, token, private=private, message=message or f"Upload {repo.rpartition('/')[2]}")
    rows: list[tuple[str, object]] = [
        ("repository", url),
        ("files", f"{len(files) + 1}, {mib(total)}"),
        ("licence", license or "other: to be checked, see the card"),
    ]
    card(
        f"{done.manifest.kind} on the hub",
        rows,
        None if done.manifest.kind == "lora" else f'sdcompress generate {repo} "PROMPT" -o picture.png',
    )


def write_card(output: Path, text: str, picture: Path | None) -> None:
    """Write the card and the picture it shows to a folder of their own.

    Raises:
        ArtifactError: the folder is in the way. StorageError: no space, no permission.
    """
    from sdcompress_engines.manifest import staged

    from sdcompress.publish.model_card import CARD, PICTURE

    with staged(output) as out:
        (out / CARD).write_text(text, encoding="utf-8")
        if picture:
            shutil.copyfile(picture, out / PICTURE)


def check_repo(repo: str) -> None:
    """Refuse a name the hub would refuse.

    Raises:
        UsageError: not OWNER/NAME, or letters the hub does not take.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id
    from sdcompress_engines.errors import UsageError

    expected = "OWNER/NAME of letters, digits, -, _ and ."
    if repo.count("/") != 1:
        raise UsageError("is no repository", where=repo, expected=expected)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError("is no name the hub takes", where=repo, expected=expected) from error


def require_token() -> str:
    """The token that `hf auth login` has stored, or HF_TOKEN.

    Raises:
        UsageError: there is none.
    """
    from huggingface_hub import get_token
    from sdcompress_engines.errors import UsageError

    token = get_token()
    if token is None:
        raise UsageError(
            "no token for the hub",
            expected="one that may write",
            hint="hf auth login, or set HF_TOKEN; --dry-run needs none",
        )
    return token


@contextmanager
def upload_folder(files: dict[str, Path], text: str) -> Iterator[Path]:
    """A folder of `files` with the card beside them: the finished folder stays as its manifest says."""
    from sdcompress.publish.model_card import CARD

    with tempfile.TemporaryDirectory(prefix="sdcompress-push-") as name:
        staged = Path(name)
        for target, source in files.items():
            (staged / target).parent.mkdir(parents=True, exist_ok=True)
            _put(source.resolve(), staged / target)
        (staged / CARD).write_text(text, encoding="utf-8")
        yield staged


def _put(source: Path, target: Path) -> None:
    """Link a file, in the way that the system lets; copy it where no way is: Windows gives the right to make symbolic
    links to few.
    """
    for link in (os.symlink, os.link):
        try:
            return link(source, target)
        except OSError:
            continue
    shutil.copyfile(source, target)


def upload(folder: Path, repo: str, token: str, *, private: bool, message: str) -> str:
    """Make the repository where it is not there, and upload `folder` in one commit; returns its address.

    Raises:
        ArtifactError: the hub cannot be reached, or refuses; says why.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from sdcompress_engines.errors import ArtifactError

    api = HfApi(token=token)
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except OfflineModeIsEnabled as error:
        raise ArtifactError(
            "was not uploaded: the hub is switched off", where=repo, hint="unset HF_HUB_OFFLINE"
        ) from error
    except HfHubHTTPError as error:
        code = error.response.status_code
        hint = "hf auth login with a token that may write there" if code in (401, 403, 404) else "try again later"
        reason = error.server_message or f"status {code}"
        raise ArtifactError(f"was not uploaded: the hub refused ({reason})", where=repo, hint=hint) from error
    except ValueError as error:  # what create_commit raises for a card the hub does not take
        raise ArtifactError(
            f"was not uploaded: {error}", where=repo, hint="--license and --base-model must be names the hub knows"
        ) from error
    except Exception as error:  # the HTTP library's own, which huggingface_hub has changed more than once
        if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in (
            "httpx",
            "httpx2",
            "httpcore",
            "requests",
        ):
            raise ArtifactError(
                f"was not uploaded: the hub does not answer ({type(error).__name__})",
                where=repo,
                hint="check the network; --dry-run needs none",
            ) from error
        raise
    return str(url)
