"""The FiftyOne App on a prepared dataset."""

import logging
from typing import TYPE_CHECKING

from harmony.core.errors import UserError
from harmony.core.signals import ignore_ctrl_c_in_children
from harmony.data.sources.files import locate
from harmony.data.sources.open_images.database import dataset_name, load_fiftyone

if TYPE_CHECKING:
    from harmony.data.sources.open_images.database import Dataset

LOCAL = "127.0.0.1"  # where the App listens unless it is told otherwise; FiftyOne itself would open it to the network


def find_dataset(recipe: dict) -> "Dataset":
    """Find the FiftyOne dataset of a recipe. Raises UserError for one that is not prepared."""
    fo = load_fiftyone()
    name = recipe["name"] if recipe["dir"] is None else dataset_name(recipe["name"], locate(recipe))
    if not fo.dataset_exists(name):
        names = ", ".join(fo.list_datasets()) or "none yet"
        raise UserError(f"FiftyOne has no dataset {name} (it has: {names}); run harmony.prepare first")
    return fo.load_dataset(name)


def serve(dataset: "Dataset", port: int, address: str | None) -> None:
    """Serve the FiftyOne App for a dataset until interrupted."""
    views = ", ".join(dataset.list_saved_views())
    print(f"{dataset.name}: {dataset.count_sample_tags()}; saved views: {views}", flush=True)
    logging.getLogger("fiftyone.core.session.session").setLevel(logging.WARNING)  # a banner, and how to use ssh
    with ignore_ctrl_c_in_children():
        session = load_fiftyone().launch_app(dataset, remote=True, port=port, address=address or LOCAL)
    print(f"{session.url}\nCtrl-C ends it.", flush=True)
    session.wait(-1)
