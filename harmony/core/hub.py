"""Downloads from a model hub."""

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
