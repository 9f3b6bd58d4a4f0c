"""Downloads from a model hub, and uploads to it."""

from collections.abc import Sequence
from pathlib import Path

from harmony.core.errors import UserError


def fetch_folder(
    name: str,
    part: str = "",
    remedy: str = "fetch it on a machine with a network and give its folder",
    weights: bool = True,
) -> Path:
    """Fetch the hub repository ``name``, or its folder ``part``, into the hub's cache and return the folder.

    Only files that are not in the cache yet are fetched: configurations, vocabularies and, with ``weights``,
    safetensors. Files that would have to be unpickled are never fetched. Raises UserError, which ends in ``remedy``, if
    the hub cannot be reached or has no such id.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = [f"{part}/*.{kind}" if part else f"*.{kind}" for kind in ("json", "txt", *["safetensors"] * weights)]
    exclusions = ["*.fp16.*", "*.non_ema.*", *([] if part else ["*/*"])]
    try:
        folder = snapshot_download(name, allow_patterns=patterns, ignore_patterns=exclusions)
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).splitlines()[0].removeprefix("Got: ")
        raise UserError(f"cannot fetch {part or 'weights'} of {name} from the hub ({reason}): {remedy}") from error
    return Path(folder) / part


def is_repository(name: str) -> bool:
    """Whether ``name`` can be a repository on the hub, owner/name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def check_repository(name: str) -> None:
    """UserError unless ``name`` can be a repository on the hub, owner/name."""
    if not is_repository(name):
        raise UserError(f"push={name}: give a repository on the hub, owner/name")


def upload_files(folder: Path, files: Sequence[str], name: str) -> str:
    """Upload ``files`` of a folder, by names or patterns, to the hub repository ``name``; the repository's address.

    A repository that does not exist is made, and is private until its owner opens it. UserError where the hub cannot
    be reached or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    api = HfApi()
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=list(files), commit_message="Export")
    except Exception as error:  # of the disk, the hub, or whichever HTTP library this version of its client has
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        status = getattr(getattr(error, "response", None), "status_code", None)
        mend = "give the same command again"
        if status in (401, 403) or isinstance(error, LocalTokenNotFoundError):
            mend = "log in by hf auth login as somebody who may write there, and give the same command again"
        raise UserError(f"{folder} is complete, but cannot be uploaded to {name} ({reason}): {mend}") from error
    return str(address)
