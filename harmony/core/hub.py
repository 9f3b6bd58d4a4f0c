"""What comes from a model hub."""

from pathlib import Path

from harmony.core.errors import UserError


def fetched(
    name: str, part: str = "", mend: str = "fetch it where there is a network and give its folder", weights: bool = True
) -> Path:
    """The folder of hub id ``name``, or of its ``part``, in the hub's cache; what is not there yet is fetched:
    configurations, vocabularies and (``weights``) safetensors, nothing that would have to be unpickled.

    UserError with ``mend``, at once, where the hub cannot be reached or has no such id.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    wanted = [f"{part}/*.{kind}" if part else f"*.{kind}" for kind in ("json", "txt", *["safetensors"] * weights)]
    others = ["*.fp16.*", "*.non_ema.*", *([] if part else ["*/*"])]
    try:
        folder = snapshot_download(name, allow_patterns=wanted, ignore_patterns=others)
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).splitlines()[0].removeprefix("Got: ")
        raise UserError(f"cannot fetch {part or 'weights'} of {name} from the hub ({reason}): {mend}") from error
    return Path(folder) / part
