"""A dataset's selection in a persistent FiftyOne dataset in MongoDB. Beside ``apps/plugin`` this imports ``fiftyone``.

Training processes must not import it: simultaneous imports kill each other's database.

Fields of a sample
    harmony_id        <split>/<id>, unique                 tags   split, and ``kept`` or ``rejected``
    rejected_because  one of selection.REASONS, or None    source of the photograph
    instance          the detection, a box                 mask   the whole mask as the App shows it, a file of any size
    mask_stored       the original mask                    row    hash of the selection's row, to find changes
    mask_file         the whole mask at the image's size
    sha256, mask_sha256, mask_box, mask_area, looked_at    pixel facts, and the files and rules that they belong to
    caption, caption_model
    decision          of a person, keep or reject with a reason, if there is one
"""

import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from harmony.core.errors import UserError
from harmony.core.signals import ignore_ctrl_c_in_children
from harmony.data.sources.open_images.batches import batches
from harmony.data.sources.selection import BAD_NAME, CORNERS, KEPT, Selection

if TYPE_CHECKING:
    from fiftyone import Dataset, Sample
    from pymongo.collection import Collection

REMEDY = "python -m harmony.doctor tells what is missing"
WAIT_SECONDS = 90  # for a database that is slow to come up; FiftyOne itself waits 60 s for each start
END_SECONDS = 10  # for the server of a program that is ending
ORDER = random.Random()  # FiftyOne shuffles samples by a random number of each; the seeds of others stay as they are
slow_services: list = []  # kept, because a service ends with its last reference, and FiftyOne joins it once it is up


def load_fiftyone() -> ModuleType:
    """Load the library and connect to its database. Raises UserError if that fails."""
    os.environ.setdefault("FIFTYONE_DO_NOT_TRACK", "1")
    os.environ.setdefault("FIFTYONE_DATABASE_VALIDATION", "false")  # no message about old servers at each start
    os.environ.setdefault("FIFTYONE_SHOW_PROGRESS_BARS", "false")
    try:
        import fiftyone
    except ImportError as error:
        raise UserError(f"FiftyOne cannot be imported ({error}); {REMEDY}") from None
    connect(fiftyone)
    return fiftyone


def connect(fiftyone: ModuleType) -> None:
    """Connect to FiftyOne's database, again where it is slow to come up. UserError if it does not, or is another's."""
    import psutil
    from eta.core.config import EnvConfigError
    from fiftyone.core.odm import database
    from fiftyone.core.service import ServiceException, ServiceListenTimeout
    from pymongo.errors import PyMongoError

    if not (fiftyone.config.database_uri or os.environ.get("FIFTYONE_PRIVATE_DATABASE_PORT")):  # of this process
        refuse_other_server(Path(fiftyone.config.database_dir))
    end = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            with ignore_ctrl_c_in_children():
                fiftyone.list_datasets()
            return
        except (ServiceException, EnvConfigError, PyMongoError, psutil.Error, RuntimeError, OSError) as error:
            slow = isinstance(error, (ServiceListenTimeout, PyMongoError, psutil.Error, ConnectionError))
            if not slow or time.monotonic() > end:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                place = fiftyone.config.database_dir
                raise UserError(f"FiftyOne's database did not start ({reason}) in {place}; {REMEDY}") from None
        slow_services.append(database._db_service)
        database._disconnect()
        database._db_service = None  # otherwise FiftyOne goes on to the port of somebody else's MongoDB
        time.sleep(1)


def refuse_other_server(folder: Path) -> None:
    """UserError where FiftyOne would join a running server whose database does not lie in ``folder``.

    FiftyOne joins any server of the user, wherever its files are. One that is about to end is waited for.
    """
    end = time.monotonic() + END_SECONDS
    while (other := find_other_server(folder.resolve())) is not None:
        if time.monotonic() > end:
            raise UserError(
                f"FiftyOne would join the database in {other}, which another program of yours runs, instead of that in "
                f"{folder}: end that program first, or set FIFTYONE_DATABASE_DIR={other}"
            )
        time.sleep(0.5)


def find_other_server(folder: Path) -> Path | None:
    """The folder of a running FiftyOne server's database that is not ``folder``, or None."""
    import psutil
    from fiftyone.core.service import DatabaseService
    from fiftyone.service.util import find_processes_by_args

    for process in find_processes_by_args(["--51-service", DatabaseService.service_name]):
        try:
            words = process.cmdline()
        except psutil.Error:  # it has ended
            continue
        if "--dbpath" in words and (other := Path(words[words.index("--dbpath") + 1]).resolve()) != folder:
            return other
    return None


def open_images_downloader() -> Callable:
    """FiftyOne's function that downloads a split of Open Images."""
    import fiftyone.utils.openimages

    return fiftyone.utils.openimages.download_open_images_split


def dataset_name(name: str, root: Path) -> str:
    """The FiftyOne name of dataset ``name`` in ``root``: ``name``, or with a hash if it belongs to another folder."""
    fo = load_fiftyone()
    if not fo.dataset_exists(name):
        return name
    owner = fo.load_dataset(name).info.get("root")
    return name if owner in (None, str(root)) else f"{name}-{hashlib.sha256(str(root).encode()).hexdigest()[:8]}"


def open_dataset(name: str, root: Path) -> "Dataset":
    """Open or create the persistent dataset, with its fields and its unique index."""
    fo = load_fiftyone()
    name = dataset_name(name, root)
    dataset = fo.load_dataset(name) if fo.dataset_exists(name) else fo.Dataset(name, persistent=True)
    if dataset.info.get("root") is None:
        dataset.info["root"] = str(root)
        dataset.save()
    declare_fields(dataset)
    if dataset.app_config.active_fields is None:
        dataset.app_config.active_fields = fo.DatasetAppConfig.default_active_fields(dataset)
        dataset.app_config.active_fields.paths.append("mask")  # the App shows no mask unless it is asked to
        dataset.save()
    return dataset


def declare_fields(dataset: "Dataset") -> None:
    """Declare all fields, so that FiftyOne need not search batches for new ones."""
    import fiftyone as fo

    texts = ("harmony_id", "rejected_because", "source", "mask_stored", "mask_file", "row", "looked_at")
    fields = dict.fromkeys((*texts, "sha256", "mask_sha256", "caption", "caption_model"), {"ftype": fo.StringField})
    fields["mask_box"] = {"ftype": fo.ListField, "subfield": fo.FloatField}
    fields["mask_area"] = {"ftype": fo.FloatField}
    for field, label in (("instance", fo.Detection), ("mask", fo.Segmentation)):
        fields[field] = {"ftype": fo.EmbeddedDocumentField, "embedded_doc_type": label}
    for field, kind in fields.items():
        if not dataset.has_sample_field(field):
            dataset.add_sample_field(field, **kind)
    if "harmony_id" not in dataset.list_indexes():
        dataset.create_index("harmony_id", unique=True)


def import_dataset(name: str, selection: Selection) -> "Dataset":
    """Import the selection into the dataset: kept samples with their mask, rejected ones without.

    Only differences are written: a sample with an unchanged row keeps all its facts. Rejected images without a file
    (not downloaded) are left out. No sample is added twice, however often this is killed.
    """
    dataset = open_dataset(name, selection.root)
    digest = selection.digest()
    if dataset.info.get("selection") != digest:
        synchronize(dataset, selection)
        dataset.info["selection"] = digest
        dataset.save()
    return dataset


def synchronize(dataset: "Dataset", selection: Selection) -> None:
    """Delete samples that differ from the selection, and add missing ones."""
    rows = {row["key"]: row for row in selection_rows(selection)}
    samples = zip(*dataset.values(["id", "harmony_id", "row"]), strict=True)
    stale_ids = [id_ for id_, key, row in samples if key not in rows or rows[key]["row"] != row]
    if stale_ids:
        print(
            f"{dataset.name}: {len(stale_ids)} samples no longer agree with the selection and are replaced", flush=True
        )
        dataset.delete_samples(stale_ids)
    missing_keys = set(rows) - set(dataset.values("harmony_id"))
    add_rows(dataset, [rows[key] for key in rows if key in missing_keys])


def selection_rows(selection: Selection) -> Iterator[dict]:
    """Yield the selection's rows that have a name and an image file, with absolute paths, key and hash."""
    root = os.path.abspath(selection.root)
    for row in selection.table.iter_rows(named=True):
        if row["reason"] == BAD_NAME:
            continue
        row["row"] = hashlib.sha256(json.dumps(list(row.values())).encode()).hexdigest()[:16]
        row["key"] = f"{row['split']}/{row['id']}"
        row["image"] = os.path.join(root, row["image"])
        row["mask"] = None if row["mask"] is None else os.path.join(root, row["mask"])
        if row["reason"] in (KEPT, "image file missing") or os.path.isfile(row["image"]):
            yield row


def add_rows(dataset: "Dataset", rows: list[dict]) -> None:
    """Add samples in batches: the first with a set of fields by FiftyOne, the others as copies of its document."""
    templates: dict[tuple, dict] = {}
    for batch in batches(rows, f"import into FiftyOne dataset {dataset.name}"):
        add_batch(dataset, [sample_values(row) for row in batch], templates)


def add_batch(dataset: "Dataset", batch: list[dict], templates: dict[tuple, dict]) -> None:
    """Add samples of such values in their order; ``templates`` collects the first document of each set of fields.

    FiftyOne makes an object of each sample, which takes most of the time of an import.
    """
    collection, documents = find_collection(dataset), []
    if collection is None:
        add_samples(dataset, batch)
        return
    for values in batch:
        kind = tuple(values)
        if kind in templates:
            documents.append(make_document(templates[kind], values))
            continue
        if documents:
            collection.insert_many(documents)
            documents = []
        add_samples(dataset, [values])
        templates[kind] = collection.find_one({"harmony_id": values["harmony_id"]})
    if documents:
        collection.insert_many(documents)


def add_samples(dataset: "Dataset", batch: list[dict]) -> None:
    """Add samples by FiftyOne."""
    samples = [make_sample(values) for values in batch]
    dataset.add_samples(samples, expand_schema=False, validate=False, progress=False)


def find_collection(dataset: "Dataset") -> "Collection | None":
    """The collection of the samples' documents; None, so that FiftyOne adds all samples, where it has another name."""
    return getattr(dataset, "_sample_collection", None)


def sample_values(row: dict) -> dict:
    """The fields of a sample, kept or rejected, that have a value; labels as dictionaries."""
    is_kept, has_box = row["reason"] == KEPT, None not in (row[side] for side in CORNERS)
    values = {
        "filepath": row["image"],
        "tags": [row["split"], "kept" if is_kept else "rejected"],
        "harmony_id": row["key"],
        "rejected_because": None if is_kept else row["reason"],
        "instance": {"label": row["label"], "bounding_box": box_xywh(row)} if has_box else None,
        "mask": {"mask_path": row["mask"]} if is_kept else None,
        "mask_stored": row["mask"],
        "source": row["source"],
        "row": row["row"],
    }
    return {name: value for name, value in values.items() if value is not None}


def box_xywh(row: dict) -> list[float]:
    """The box of a selection row as FiftyOne writes it: x, y, width, height in fractions of the image."""
    return [row["x0"], row["y0"], row["x1"] - row["x0"], row["y1"] - row["y0"]]


def make_sample(values: dict) -> "Sample":
    """Build one sample by FiftyOne."""
    import fiftyone as fo

    labels = {"instance": fo.Detection, "mask": fo.Segmentation}
    return fo.Sample(**{name: labels[name](**v) if name in labels else v for name, v in values.items()})


def make_document(template: dict, values: dict) -> dict:
    """Make the document of a sample of other values than that of ``template``, with new ids and times."""
    from bson import ObjectId

    now = datetime.now(UTC)
    document = template | values | {"_rand": ORDER.uniform(0.999, 1), "created_at": now, "last_modified_at": now}
    del document["_id"]
    labels = {name: template[name] | {"_id": ObjectId()} | v for name, v in values.items() if isinstance(v, dict)}
    return document | labels


def save_views(dataset: "Dataset") -> None:
    """Save the views ``kept``, ``rejected`` and one for each reason; remove views of reasons that no longer occur."""
    from fiftyone import ViewField as F

    reasons = [r for r in dataset.distinct("rejected_because") if r is not None]
    views = {"kept": dataset.match_tags("kept"), "rejected": dataset.match_tags("rejected")}
    views |= {f"rejected: {r}": dataset.match(F("rejected_because") == r) for r in reasons}
    for name in dataset.list_saved_views():
        if name.startswith("rejected: ") and name not in views:
            dataset.delete_saved_view(name)
    for name, view in views.items():
        dataset.save_view(name, view, overwrite=True)


def note_work(dataset: "Dataset", folder: Path) -> None:
    """Note in the dataset where it is prepared, so that the App finds its manifest."""
    if dataset.info.get("work") != str(folder):
        dataset.info["work"] = str(folder)
        dataset.save()


def show_decisions(dataset: "Dataset", decisions: Mapping[str, object]) -> None:
    """Show {<split>/<id>: decision} in the field ``decision``, and no others."""
    import fiftyone as fo

    if not dataset.has_sample_field("decision"):
        dataset.add_sample_field("decision", fo.StringField)
    old = dict(zip(*dataset.values(["harmony_id", "decision"]), strict=True))
    new = {key: str(decisions[key]) if key in decisions else None for key in old}
    dataset.set_values("decision", {key: new[key] for key in old if new[key] != old[key]}, key_field="harmony_id")


def rejections(dataset: "Dataset") -> dict[str, str]:
    """{<split>/<id>: reason} of the rejected samples."""
    view = dataset.match_tags("rejected")
    return dict(zip(*view.values(["harmony_id", "rejected_because"]), strict=True))
