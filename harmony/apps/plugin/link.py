"""Links the plugin into FiftyOne's folder of plugins."""

from pathlib import Path

from harmony.core.progress import tell
from harmony.data.sources.open_images.database import load_fiftyone

NAME = "harmony-compose"  # of the link
PLUGIN = Path(__file__).resolve().parent


def link_plugin() -> None:
    """Link this plugin into FiftyOne's one folder of plugins, where it stays; other plugins are left alone.

    Where that cannot be done, a line says so: the App works without it.
    """
    link = Path(load_fiftyone().config.plugins_dir) / NAME
    if link.resolve() == PLUGIN:
        return
    try:
        if link.is_symlink() and link.readlink().parts[-3:] == PLUGIN.parts[-3:]:  # of another or an older harmony
            link.unlink()
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(PLUGIN, target_is_directory=True)
    except OSError as error:
        tell(
            f"the App comes without harmony's operators, {link} cannot be made ({error.strerror}): rename what is there"
        )
