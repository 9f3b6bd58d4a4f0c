"""From a folder to the manifest through a persistent FiftyOne dataset in a MongoDB of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from harmony.core.errors import UserError
from harmony.data.manifest import manifest_hash, read_manifest
from harmony.data.sources.folder import FOLDER, select_folder
from harmony.data.sources.open_images import batches, captions, database, pixel_facts, preparation
from harmony.data.sources.open_images.database import dataset_name
from harmony.data.sources.open_images.download import forget_interrupted, write_id_file
from harmony.data.sources.open_images.select import select
from harmony.data.sources.open_images.source import OPEN_IMAGES
from harmony.data.sources.selection import Rules
from harmony.models.shipped import ASSETS
from harmony.pixels.images import sha256, write_image
from harmony.pixels.masks import bounding_box, read_mask

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {"open_images": OPEN_IMAGES, "folder": FOLDER}


def prepare_dataset(recipe: dict, work: Path, captioner: str | Path | None = None) -> Path:
    return preparation.prepare_dataset(recipe, work, SOURCES[recipe["layout"]], captioner)


@pytest.fixture
def recipe(fo, tmp_path, request):
    """A recipe whose FiftyOne dataset is gone after the test."""
    name = f"test-{request.node.name[:40]}"
    yield {
        "name": name,
        "layout": "open_images",
        "dir": str(tmp_path / "data"),
        "splits": ["train"],
        "select": {"min_area": 0.02, "max_area": 0.8},
        "captions": {"given": True, "captioner": "backbone"},
        "download": {"examples": 2},
    }
    for each in fo.list_datasets(f"{name}*"):
        fo.delete_dataset(each)


@pytest.fixture
def folder(tmp_path, make_folder):
    """Three good images with captions, and one group."""
    folder = make_folder(tmp_path / "data")
    for id_ in ("a0", "a1", "b2"):
        folder.single(id_)
    folder.single("c3", group=1)
    folder.write()
    caption(folder, {id_: [f"a cat called {id_}", "the same cat at night"] for id_ in ("a0", "a1", "b2")})
    return folder


def caption(folder, captions):
    (folder.folder / "metadata" / "human_captions.json").write_text(json.dumps(captions))


def samples(fo, name):
    return {s.harmony_id: s for s in fo.load_dataset(name)}


def test_a_folder_becomes_a_dataset_and_a_manifest(fo, recipe, folder, tmp_path):
    path = prepare_dataset(recipe, tmp_path / "work")
    header, rows = read_manifest(path)
    assert header["dataset"] == header["fiftyone"] == recipe["name"]
    assert [(r.id, r.split, r.label, r.width, r.height) for r in rows] == [
        (id_, "train", "Cat", 40, 32) for id_ in ("a0", "a1", "b2")
    ]
    for row in rows:
        image, mask = path.parent / row.image, path.parent / row.mask
        assert sha256(image) == row.sha256
        assert row.box == bounding_box(read_mask(mask, (row.width, row.height)))
        assert row.caption == f"a cat called {row.id}" and row.extras == {
            "caption_source": "given",
            "mask_sha256": sha256(mask),
        }
    dataset = fo.load_dataset(recipe["name"])
    assert dataset.persistent and dataset.count_sample_tags() == {"train": 4, "kept": 3, "rejected": 1}
    assert set(dataset.list_saved_views()) == {"kept", "rejected", "rejected: group"}
    assert dataset.load_saved_view("rejected: group").values("harmony_id") == ["train/c3"]
    assert dataset.app_config.active_fields.paths == ["instance", "mask"], "the App shows both from the start"
    sample = dataset.load_saved_view("kept").first()
    assert sample.instance.label == "Cat" and sample.instance.bounding_box == [0.25, 0.25, 0.5, 0.5]
    mask = sample.mask.get_mask()
    assert sample.mask.mask_path == sample.mask_stored and mask.shape == (32, 40)
    assert (mask[8:24, 10:30] == 255).all() and mask.sum() == 255 * 16 * 20


def test_the_same_command_again_changes_nothing(fo, recipe, folder, tmp_path, monkeypatch):
    path = prepare_dataset(recipe, tmp_path / "work")
    before, ids = path.read_bytes(), fo.load_dataset(recipe["name"]).values("id")
    monkeypatch.setattr(pixel_facts, "pixel_facts", None)  # nothing is looked at twice
    prepare_dataset(recipe, tmp_path / "work")
    assert path.read_bytes() == before and fo.load_dataset(recipe["name"]).values("id") == ids


STEPS = {"add_batch": (database, 2), "pixel_facts": (pixel_facts, 3), "set_captions": (captions, 1)}


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_between_batches_is_made_good_by_the_same_command(fo, recipe, folder, tmp_path, monkeypatch, step):
    name, unbroken = recipe["name"], recipe["name"] + "-whole"
    whole = prepare_dataset(recipe | {"name": unbroken}, tmp_path / "whole").read_text().splitlines()[1:]
    (module, last_call), calls = STEPS[step], []
    function = getattr(module, step)

    def killed(*args):
        calls.append(args)
        if len(calls) == last_call:
            raise KeyboardInterrupt
        return function(*args)

    with monkeypatch.context() as patch:
        patch.setattr(batches, "BATCH", 2)
        patch.setattr(module, step, killed)
        with pytest.raises(KeyboardInterrupt):
            prepare_dataset(recipe, tmp_path / "work")
        assert not (tmp_path / "work" / recipe["name"] / "manifest.jsonl").exists()
    path = prepare_dataset(recipe, tmp_path / "work")
    assert path.read_text().splitlines()[1:] == whole
    assert sorted(fo.load_dataset(name).values("harmony_id")) == [f"train/{i}" for i in ("a0", "a1", "b2", "c3")]


def test_what_only_pixels_tell(fo, recipe, folder, tmp_path):
    for id_ in ("d0", "d1", "d2", "d3", "d4", "d5"):
        folder.image(id_)
        folder.box(id_)
    folder.mask("d0", fill=0)
    folder.mask("d1", size=(32, 40))
    folder.mask("d2", size=(80, 64))  # the same shape at another size is good
    folder.mask("d3", fill=0.05)
    folder.mask("d4")
    folder.mask("d5")
    folder.write()
    image = folder.folder / "data" / "d4.jpg"
    image.write_bytes(image.read_bytes()[:-200])
    (folder.folder / "labels" / "masks" / "D" / folder.masks[-1][0]).write_bytes(b"not a picture")
    caption(folder, {id_: ["a cat"] for id_ in ("a0", "a1", "b2", "d2")})
    recipe["select"]["min_area"] = 0.1
    path = prepare_dataset(recipe, tmp_path / "work")
    found = {key: s.rejected_because for key, s in samples(fo, recipe["name"]).items() if s.rejected_because}
    assert found == {
        "train/c3": "group",
        "train/d0": "mask empty",
        "train/d1": "mask shape differs",
        "train/d3": "mask area too small",
        "train/d4": "image undecodable",
        "train/d5": "mask undecodable",
    }
    row = next(r for r in read_manifest(path)[1] if r.id == "d2")
    assert read_mask(path.parent / row.mask, (row.width, row.height)).mean() == pytest.approx(0.25)
    counts = json.loads((path.parent / "selection.json").read_text())["counts"]["train"]
    assert counts["kept"] == 4 and counts["mask empty"] == 1 and sum(counts.values()) == 10
    recipe["select"]["min_area"] = 0.001  # other limits are applied to pixels that were looked at before
    caption(folder, {id_: ["a cat"] for id_ in ("a0", "a1", "b2", "d2", "d3")})
    assert "d3" in [r.id for r in read_manifest(prepare_dataset(recipe, tmp_path / "work"))[1]]


def test_only_what_changed_is_done_anew(fo, recipe, folder, tmp_path):
    path = prepare_dataset(recipe, tmp_path / "work")
    ids, digest = {k: s.id for k, s in samples(fo, recipe["name"]).items()}, manifest_hash(path)
    write_image(folder.folder / "data" / "a0.jpg", np.zeros((32, 40, 3), np.uint8))
    folder.single("e5")
    folder.boxes[1][10] = 1  # a1 becomes a group ...
    folder.boxes[1][9] = 0
    folder.boxes[1][11] = 0
    folder.write()
    caption(folder, {id_: ["a better caption"] for id_ in ("a0", "a1", "b2", "e5")})
    rows = read_manifest(prepare_dataset(recipe, tmp_path / "work"))[1]
    assert [r.id for r in rows] == ["a0", "b2", "e5"] and {r.caption for r in rows} == {"a better caption"}
    assert rows[0].sha256 == sha256(folder.folder / "data" / "a0.jpg") and manifest_hash(path) != digest
    after = {k: s.id for k, s in samples(fo, recipe["name"]).items()}
    assert {k for k in ids if after[k] == ids[k]} == {"train/a0", "train/b2", "train/c3"}


def read_documents(dataset):
    """The documents of samples as the database holds them, without ids, times and random numbers; and their types."""
    documents = {document["harmony_id"]: document for document in dataset._sample_collection.find()}
    types = {key: {name: type(value) for name, value in document.items()} for key, document in documents.items()}
    ids = []
    for document in documents.values():
        assert document.pop("_dataset_id") == dataset._doc.id and 0.999 <= document.pop("_rand") < 1
        assert document.pop("created_at") == document.pop("last_modified_at")
        ids += [document.pop("_id"), *(document[n].pop("_id") for n in ("instance", "mask") if n in document)]
    assert len(set(ids)) == len(ids)
    return documents, types


def test_bulk_insertion_makes_the_documents_that_fiftyone_makes(fo, recipe, folder, monkeypatch):
    """Guards the copies of documents: field by field those of the public way, for every kind of sample; and that one is
    the way where FiftyOne's collection has another name.
    """
    folder.single("d4", group=1)
    for id_ in ("e5", "e6"):
        folder.image(id_)
    for id_ in ("f6", "f7"):
        folder.image(id_)
        for _ in range(2):
            folder.box(id_)
    for id_ in ("a8", "a9"):
        folder.single(id_)
        (folder.folder / "data" / f"{id_}.jpg").rename(folder.folder / "data" / f"{id_}.webp")
    folder.sources = [source for source in folder.sources if source[0] not in ("f6", "f7")]
    folder.write()
    (folder.folder / "metadata" / "image_ids.csv").write_text("ImageID\ne5\ne6\n")
    selection = select(folder.root, ["train"], Rules())
    calls, make_document = [], database.make_document
    monkeypatch.setattr(database, "make_document", lambda *args: (calls.append(args), make_document(*args))[1])
    copies = database.import_dataset(recipe["name"], selection)
    assert len(calls) == 7 and len(copies) == 11, "one of each of the four kinds is made by FiftyOne"
    documents, types = read_documents(copies)
    assert database.find_collection(copies) is not None and database.find_collection(object()) is None
    monkeypatch.setattr(database, "find_collection", lambda dataset: None)
    originals = database.import_dataset(recipe["name"] + "-public", selection)
    monkeypatch.undo()
    assert len(calls) == 7, "no document is copied without the collection"
    assert (documents, types) == read_documents(originals)
    assert copies.reload() is None and copies.values("harmony_id") == originals.values("harmony_id")
    assert copies.media_type == "image" and copies.match_tags("kept").take(2, seed=0).count() == 2


def test_a_damaged_row_is_a_rejected_sample(fo, recipe, folder, tmp_path):
    """Guards the import: a corner that is no number ended the preparation."""
    folder.single("d4")
    folder.boxes[-1][6] = "x"
    folder.write()
    prepare_dataset(recipe, tmp_path / "work")
    sample = samples(fo, recipe["name"])["train/d4"]
    assert sample.rejected_because == "damaged row" and sample.instance is None


def test_masks_that_the_app_would_misread_are_shown_by_a_copy(fo, recipe, folder, tmp_path):
    """Guards the App: it shows the mask as it is read here, also of a file with alpha. A lost copy is made again."""
    wide = np.zeros((32, 40, 4), np.uint8)
    wide[..., :3], wide[8:24, 10:20, 3] = 255, 255
    stored = folder.folder / "labels" / "masks" / "A" / folder.masks[0][0]
    Image.fromarray(wide).save(stored)
    path = prepare_dataset(recipe, tmp_path / "work")
    copy = path.parent / "masks" / "train" / "a0.png"
    for _ in range(2):
        sample = samples(fo, recipe["name"])["train/a0"]
        mask = sample.mask.get_mask()
        assert sample.mask.mask_path == str(copy) and sample.mask_file == sample.mask_stored == str(stored)
        assert (mask[8:24, 10:20] == 255).all() and mask.sum() == 255 * 16 * 10
        copy.unlink()
        prepare_dataset(recipe, tmp_path / "work")
    assert [p.name for p in copy.parent.iterdir()] == ["a0.png"]


def test_blip_captions_the_rest_once_for_each_captioner(fo, recipe, folder, tmp_path, monkeypatch):
    caption(folder, {"a0": ["given"]})
    with pytest.raises(UserError, match="2 images lack a caption"):
        prepare_dataset(recipe, tmp_path / "work")
    asked = []

    def fake(batch, *_):
        asked.extend(path.stem for _, path in batch)
        return ((id_, f"blip sees {path.stem}") for id_, path in batch)

    monkeypatch.setattr(preparation, "load_captioner", lambda *_: (None, None))
    monkeypatch.setattr(preparation, "caption_images", fake)
    path = prepare_dataset(recipe, tmp_path / "work", captioner="hub/blip")
    assert {r.id: (r.caption, r.extras["caption_source"]) for r in read_manifest(path)[1]} == {
        "a0": ("given", "given"),
        "a1": ("blip sees a1", "hub/blip"),
        "b2": ("blip sees b2", "hub/blip"),
    }
    prepare_dataset(recipe, tmp_path / "work", captioner="hub/blip")
    assert asked == ["a1", "b2"]
    prepare_dataset(recipe, tmp_path / "work", captioner="hub/other")
    assert asked == ["a1", "b2"] * 2
    recipe["captions"] = {
        "given": False,
        "captioner": "hub/other",
    }  # named in the recipe, it comes before the backbone's
    prepare_dataset(recipe, tmp_path / "work", captioner="hub/blip")
    assert asked == ["a1", "b2"] * 2 + ["a0"]
    write_image(folder.folder / "data" / "a1.jpg", np.zeros((32, 40, 3), np.uint8))
    prepare_dataset(recipe, tmp_path / "work", captioner="hub/blip")
    assert asked == ["a1", "b2"] * 2 + ["a0", "a1"], "another picture under the same name wants a caption of its own"


def test_photographs_get_their_label_from_a_captioner_that_does_not_know_them(fo, recipe, folder, tmp_path, capsys):
    """Guards training texts: the shipped captioner says nonsense of photographs, and is asked for renders alone."""
    caption(folder, {"a0": ["given"]})
    classes = folder.folder / "metadata" / "classes.csv"
    path = prepare_dataset(recipe, tmp_path / "work", ASSETS / "tiny" / "captioner")
    expected = {"a0": ("given", "given"), "a1": ("a photo of a cat", "label"), "b2": ("a photo of a cat", "label")}
    assert {r.id: (r.caption, r.extras["caption_source"]) for r in read_manifest(path)[1]} == expected
    assert "2 are captioned by their label and 0 have none: write captions" in capsys.readouterr().out
    classes.unlink()
    path = prepare_dataset(recipe, tmp_path / "work", ASSETS / "tiny" / "captioner")
    assert [r.caption for r in read_manifest(path)[1]] == ["given", "", ""]
    (folder.folder / "metadata" / "scenes.csv").write_text("ImageID\n")
    path = prepare_dataset(recipe, tmp_path / "work", ASSETS / "tiny" / "captioner")
    assert all(r.caption and r.extras["caption_source"].startswith("tiny@") for r in read_manifest(path)[1][1:])


def test_captions_go_on_where_they_were_stopped(fo, recipe, folder, tmp_path, monkeypatch):
    """Guards restarts: a kill in the second shard loses that shard alone; then nothing is left behind but captions."""
    caption(folder, {})
    asked = []

    def fake(batch, *_):
        asked.append(batch[0][1].stem)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return ((id_, f"blip sees {path.stem}") for id_, path in batch)

    monkeypatch.setattr(preparation, "CAPTIONS", 1)
    monkeypatch.setattr(preparation, "load_captioner", lambda *_: (None, None))
    monkeypatch.setattr(preparation, "caption_images", fake)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(recipe, tmp_path / "work", captioner="hub/blip")
    signal.signal(signal.SIGINT, handler)
    path = prepare_dataset(recipe, tmp_path / "work", captioner="hub/blip")
    assert asked == ["a0", "a1", "a1", "b2"]
    assert [r.caption for r in read_manifest(path)[1]] == [f"blip sees {i}" for i in ("a0", "a1", "b2")]
    assert not (path.parent / "captions").exists()


def test_captions_are_not_made_twice(fo, recipe, folder, tmp_path, monkeypatch):
    """Guards the last step: stopped while captions go into the database, none is made again; one of a picture that has
    changed since is.
    """
    caption(folder, {})
    asked, written, original = [], [], preparation.set_captions

    def fake(batch, *_):
        asked.extend(path.stem for _, path in batch)
        return ((id_, f"blip sees {path.stem}") for id_, path in batch)

    def stop_at_the_second(dataset, captions, model):
        written.extend(captions)
        if len(written) == 2:
            raise KeyboardInterrupt
        original(dataset, captions, model)

    monkeypatch.setattr(preparation, "CAPTIONS", 1)
    monkeypatch.setattr(preparation, "load_captioner", lambda *_: (None, None))
    monkeypatch.setattr(preparation, "caption_images", fake)
    monkeypatch.setattr(preparation, "set_captions", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(recipe, tmp_path / "work", captioner="hub/blip")
    monkeypatch.setattr(preparation, "set_captions", original)
    write_image(folder.folder / "data" / "b2.jpg", np.zeros((32, 40, 3), np.uint8))
    path = prepare_dataset(recipe, tmp_path / "work", captioner="hub/blip")
    assert asked == ["a0", "a1", "b2", "b2"]
    assert [r.caption for r in read_manifest(path)[1]] == [f"blip sees {i}" for i in ("a0", "a1", "b2")]


def test_two_processes_caption_as_one(fo, recipe, tmp_path, make_folder):
    """Guards preparation over ranks by the real command: each captions its shards with the backbone's BLIP, only the
    first knows FiftyOne, and the manifest is that of one process.
    """
    folder = make_folder(tmp_path / "data")
    for n in range(preparation.CAPTIONS + 2):
        folder.single(f"{n:04x}")
    folder.write()
    (folder.folder / "metadata" / "scenes.csv").write_text("ImageID\n")  # renders, which the shipped captioner knows
    (tmp_path / "datasets" / "many").mkdir(parents=True)
    OmegaConf.save(recipe, tmp_path / "datasets" / "many" / "recipe.yaml")
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif os.environ.get('LOCAL_RANK') == '1':\n    sys.modules['fiftyone'] = None\n"
    )
    paths = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "HARMONY_DATASETS": str(tmp_path / "datasets")}
    words = ["dataset=many", "trainer=ddp2", f"paths.work={tmp_path / 'two'}"]
    command = [sys.executable, "-m", "harmony.prepare", *words]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    path = tmp_path / "two" / recipe["name"] / "manifest.jsonl"
    assert done.stdout.splitlines()[-1] == str(path)
    assert all(f"captions: shard {n}/2" in done.stdout for n in (1, 2)) and done.stdout.count("captions: shard") == 2
    bad = subprocess.run(
        [*command, "dataset.dir=nowhere"], cwd=tmp_path, env=os.environ | paths, capture_output=True, text=True
    )
    said = [line for line in bad.stderr.splitlines() if line.startswith("harmony: error:")]
    assert bad.returncode == 2 and len(said) == 1 and "no such folder" in said[0], bad.stderr[-3000:]
    fo.delete_dataset(recipe["name"])
    alone = prepare_dataset(recipe, tmp_path / "one", captioner=ASSETS / "tiny" / "captioner")
    assert path.read_text() == alone.read_text() and len(read_manifest(path)[1]) == preparation.CAPTIONS + 2


def test_studio_truths_go_to_extras(fo, recipe, folder, tmp_path):
    for name in ("plates/a0.jpg", "relit/a0.jpg", "shadows/a0.png", "plates/a1.jpg"):
        path = folder.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    path = prepare_dataset(recipe, tmp_path / "work")
    extras = {r.id: r.extras for r in read_manifest(path)[1]}
    assert {k: (path.parent / v).resolve() for k, v in extras["a0"].items() if k in ("plate", "relit", "shadow")} == {
        "plate": folder.folder / "plates/a0.jpg",
        "relit": folder.folder / "relit/a0.jpg",
        "shadow": folder.folder / "shadows/a0.png",
    }
    assert extras["a0"]["relit_caption"] == "the same cat at night"
    assert extras["a0"]["relit_sha256"] == sha256(folder.folder / "relit/a0.jpg")
    assert set(extras["a1"]) == {"plate", "caption_source", "mask_sha256"}
    assert set(extras["b2"]) == {"caption_source", "mask_sha256"}


def test_another_folder_of_the_same_name_gets_a_dataset_of_its_own(fo, recipe, folder, tmp_path, make_folder):
    prepare_dataset(recipe, tmp_path / "work")
    other = make_folder(tmp_path / "other")
    other.single("f0")
    other.write()
    caption(other, {"f0": ["a cat"]})
    header, rows = read_manifest(prepare_dataset(recipe | {"dir": str(tmp_path / "other")}, tmp_path / "elsewhere"))
    assert header["fiftyone"] == dataset_name(recipe["name"], tmp_path / "other") != recipe["name"]
    assert [r.id for r in rows] == ["f0"] and len(fo.load_dataset(recipe["name"])) == 4


def test_own_photographs_and_masks(fo, recipe, tmp_path):
    images, masks = tmp_path / "data" / "images", tmp_path / "data" / "masks"
    images.mkdir(parents=True)
    masks.mkdir()
    mask = np.zeros((32, 40), bool)
    mask[8:24, 10:30] = True
    for name in ("one", "two", "no_mask", "other_size", "empty"):
        write_image(images / f"{name}.png", np.full((32, 40, 3), 90, np.uint8))
    for name, pixels in {"one": mask, "two": mask, "other_size": mask.T, "empty": mask & False}.items():
        write_image(masks / f"{name}.png", pixels)
    (tmp_path / "data" / "captions.json").write_text(json.dumps({"one": "a box", "two": ["a crate"]}))
    recipe |= {"layout": "folder", "splits": ["train", "validation", "test"]}
    rows = read_manifest(prepare_dataset(recipe, tmp_path / "work"))[1]
    box = (10, 8, 30, 24)
    assert {r.id: (r.caption, r.box) for r in rows} == {"one": ("a box", box), "two": ("a crate", box)}
    reasons = {s.harmony_id.split("/")[1]: s.rejected_because for s in samples(fo, recipe["name"]).values()}
    assert reasons["no_mask"] == "mask file missing"
    assert reasons["other_size"] == "mask shape differs" and reasons["empty"] == "mask empty"


def test_the_reason_comes_from_the_mask_and_not_from_its_path(tmp_path):
    root = tmp_path / "empty"
    for name, color in (("black", 0), ("dark_red", (90, 0, 0))):
        write_image(root / "images" / f"{name}.png", np.full((8, 8, 3), 90, np.uint8))
        write_image(root / "masks" / f"{name}.png", np.full((8, 8, 3), color, np.uint8))
    table = select_folder(root, ["train", "validation", "test"], Rules()).table
    assert dict(table.select("id", "reason").iter_rows()) == {"black": "mask empty", "dark_red": "mask undecodable"}


def test_folders_that_are_not_there_are_named(fo, recipe, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        prepare_dataset(recipe | {"dir": str(tmp_path / "lost")}, tmp_path / "work")
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="no such split"):
        prepare_dataset(recipe, tmp_path / "work")
    with pytest.raises(UserError, match="neither images/"):
        prepare_dataset(recipe | {"layout": "folder"}, tmp_path / "work")
    with pytest.raises(UserError, match="dataset.dir is not set"):
        prepare_dataset(recipe | {"layout": "folder", "dir": None}, tmp_path / "work")


def test_nothing_kept_is_said(recipe, tmp_path, make_folder):
    folder = make_folder(tmp_path / "data")
    folder.single("a0", group=1)
    folder.write()
    with pytest.raises(UserError, match="no image is kept"):
        prepare_dataset(recipe, tmp_path / "work")


def test_download_asks_for_annotations_then_for_what_is_selected(fo, recipe, tmp_path, make_folder, monkeypatch):
    import fiftyone.utils.openimages as fouo

    monkeypatch.setattr(fo.config, "dataset_zoo_dir", str(tmp_path / "zoo"))
    asked = []

    def fetch(folder, split, version, label_types, image_ids):
        ids = Path(image_ids).read_text().split()
        asked.append((split, version, label_types, ids))
        remote = make_folder(Path(folder).parent, split)
        for id_ in ("a0", "a1", "a2", "a3", "a4"):
            remote.box(id_, group=int(id_ != "a0"))
            remote.mask(id_)
            if f"{split}/{id_}" in ids:
                remote.image(id_)
        remote.write()
        caption(remote, {"a0": ["a cat"]})

    monkeypatch.setattr(fouo, "download_open_images_split", fetch)
    rows = read_manifest(prepare_dataset(recipe | {"dir": None}, tmp_path / "work"))[1]
    assert [r.id for r in rows] == ["a0"]
    kinds = ["detections", "segmentations"]
    assert asked == [("train", "v7", kinds, []), ("train", "v7", kinds, ["train/a0", "train/a1", "train/a2"])]
    assert set(samples(fo, recipe["name"])) == {"train/a0", "train/a1", "train/a2"}


def test_download_without_network_is_one_clear_line(fo, recipe, tmp_path, monkeypatch):
    import fiftyone.utils.openimages as fouo

    def offline(*_, **__):
        raise ConnectionError("Name or service not\nknown")

    monkeypatch.setattr(fo.config, "dataset_zoo_dir", str(tmp_path / "zoo"))
    monkeypatch.setattr(fouo, "download_open_images_split", offline)
    with pytest.raises(UserError, match="download failed .*check the network and run the same command again") as error:
        prepare_dataset(recipe | {"dir": None}, tmp_path / "work")
    assert "\n" not in str(error.value)


def test_id_file(tmp_path):
    path = write_id_file(tmp_path / "new" / "ids.txt", "train", ["a", "b"])
    assert path.read_text() == "train/a\ntrain/b\n" and list(path.parent.iterdir()) == [path]


def test_half_fetched_files_are_forgotten_and_whole_ones_kept(tmp_path):
    def write(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("x")

    write("labels/detections.csv", "labels/masks/A/1.png")
    forget_interrupted(tmp_path)
    write("labels/segmentations.csv", "labels/masks/B.zip", "labels/masks/B/2.png", "data/a.jpg")
    forget_interrupted(tmp_path)  # the record is still there: the run before was interrupted
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert left == [".fetching", "data/a.jpg", "labels/detections.csv", "labels/masks/A/1.png"]


def test_batches_hold_everything_and_end_with_a_line(monkeypatch):
    monkeypatch.setattr(batches, "BATCH", 2)
    lines = []
    assert list(batches.batches(list(range(5)), "count", lines.append)) == [[0, 1], [2, 3], [4]]
    assert len(lines) == 1 and lines[0].startswith("count: 5/5, ")
