"""Upload a finished model to the Hugging Face Hub."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcompress_engines.errors import ArtifactError, UsageError, shorten
from sdcompress_engines.files import write_atomically
from sdcompress_engines.output_folders import staged

from sdcompress.families.registry import families
from sdcompress.families.schemas.index import component_classes
from sdcompress.publish.finished_model import CARD, PICTURE

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

# huggingface_hub has changed its HTTP library more than once.
_HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "requests")


def write_card(output: Path, text: str, picture: Path | None, inputs: Iterable[Path] = ()) -> None:
    """Write the card and the picture in it to a folder of their own.

    Args:
        output: the new folder.
        text: of the card.
        picture: None where the card shows none.
        inputs: the folder of the model.

    Raises:
        ArtifactError: the folder exists and is not empty, or lies in the model's.
        StorageError: there is no space or no permission.
    """
    with staged(output, inputs=inputs) as out:
        write_atomically(out / CARD, text)
        if picture:
            shutil.copyfile(picture, out / PICTURE)


def check_repo(repo: str) -> None:
    """Refuse a repository name that the hub would refuse.

    Raises:
        UsageError: it is not OWNER/NAME, or has characters that the hub does not accept.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    expected = "OWNER/NAME of letters, digits, -, _ and ."
    if repo.count("/") != 1:
        raise UsageError("is not a repository name", where=repo, expected=expected)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError("is not a name that the hub accepts", where=repo, expected=expected) from error


def require_token() -> str:
    """Returns the token that `hf auth login` has stored, or HF_TOKEN.

    Raises:
        UsageError: there is none.
    """
    from huggingface_hub import get_token

    token = get_token()
    if token is None:
        raise UsageError(
            "no token for the hub",
            expected="a token with write access",
            hint="hf auth login, or set HF_TOKEN; --dry-run needs none",
        )
    return token


def upload(
    contents: Mapping[str, Path | bytes], repo: str, token: str, *, private: bool, message: str, force: bool = False
) -> str:
    """Create the repository where it does not exist, and upload files in one commit; returns its address.

    Args:
        contents: name in the repository → file or content.
        repo: OWNER/NAME.
        token: with write access.
        private: whether a new repository is private. An existing one has to be so already.
        message: of the commit.
        force: replace the model of a repository that holds files. Its history keeps them.

    Raises:
        ArtifactError: the hub cannot be reached, or refuses; the message gives the reason. Or the repository is public,
            and `private` is set; or it holds files.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi(token=token)
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        info = api.model_info(repo)
        if private and not info.private:
            raise ArtifactError(
                "is public, and --private was given",
                where=repo,
                hint="make it private on the hub, or leave out --private",
            )
        there = {file.rfilename for file in info.siblings or ()} - {".gitattributes"}
        if there and not force:
            raise _refuse_files(there, repo)
        # Of two models in one repository, diffusers could load a part of each.
        components = {name for family in families().values() for name in component_classes(family.pipeline_class)}
        old = sorted(name for name in there - contents.keys() if name.partition("/")[0] in components)
        changes: list[Any] = [CommitOperationAdd(name, content) for name, content in contents.items()]
        api.create_commit(repo, changes + [CommitOperationDelete(name) for name in old], commit_message=message)
    except OfflineModeIsEnabled as error:
        raise ArtifactError(
            "was not uploaded: HF_HUB_OFFLINE is set", where=repo, hint="unset HF_HUB_OFFLINE"
        ) from error
    except HfHubHTTPError as error:
        raise _explain_refusal(error, repo) from error
    except ValueError as error:  # create_commit raises it for a card that the hub does not accept
        raise ArtifactError(
            f"was not uploaded: {error}", where=repo, hint="--license and --base-model must be names the hub knows"
        ) from error
    except Exception as error:
        if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _HTTP_LIBRARIES:
            raise ArtifactError(
                f"was not uploaded: the hub does not answer ({type(error).__name__})",
                where=repo,
                hint="check the network; --dry-run needs none",
            ) from error
        raise
    return str(url)


def _refuse_files(there: set[str], repo: str) -> ArtifactError:
    return ArtifactError(
        f"holds {len(there)} files already, such as {shorten(min(there), 80)}",
        where=repo,
        expected="a new repository, or an empty one",
        hint="--force, which replaces its model by one commit; its history keeps the earlier one",
    )


def _explain_refusal(error: HfHubHTTPError, repo: str) -> ArtifactError:
    code = error.response.status_code
    hint = "hf auth login, with a token that has write access to it" if code in (401, 403, 404) else "try again later"
    reason = error.server_message or f"status {code}"
    return ArtifactError(f"was not uploaded: the hub refused ({reason})", where=repo, hint=hint)
