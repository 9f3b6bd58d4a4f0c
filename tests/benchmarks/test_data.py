"""The bench of selection: annotations of the true schema, and two ways that agree about what is kept."""

import csv

import pytest

from harmony.benchmarks import data
from harmony.benchmarks.data import (
    DATASET_NAME,
    Cost,
    bench_import,
    bench_selection,
    count_by_pandas,
    count_by_selection,
    delete_imports,
    import_by_fiftyone,
    import_by_harmony,
    write_annotations,
    write_photographs,
)
from harmony.data.sources.open_images.layout import FULL_HEADER


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return write_annotations(tmp_path_factory.mktemp("annotations"), 20_000, 4_000, say=lambda line: None)


def test_annotations_have_the_true_schema(split):
    """Guards the bench: 21 columns a box, ten a mask, several boxes on most images, no image cut in two."""
    with open(split / "labels" / "detections.csv", newline="") as file:
        head, *rows = csv.reader(file)
    assert len(head) == 21 and head[:13] == FULL_HEADER["detections.csv"].split(",")
    assert 18_000 < len(rows) < 22_000 and all(len(row) == 21 for row in rows)
    images = [row[0] for row in rows]
    assert 5 < len(images) / len(set(images)) < 12 and len(images[0]) == 16
    with open(split / "labels" / "segmentations.csv", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == FULL_HEADER["segmentations.csv"].split(",") and 3_200 < len(rows) < 4_800


def test_both_ways_keep_the_same_images(split):
    assert count_by_selection(split) == count_by_pandas(split) > 50


def test_the_bench_of_selection(tmp_path, monkeypatch):
    """Guards the figures, that annotations are written once, and that a disagreement is no result."""
    figures = bench_selection(tmp_path, 5_000, 1_000, 1, say=lambda line: None)
    assert {"ours", "ratio", "memory_gib", "reference_memory_gib", "kept"} <= set(figures) and figures["kept"] > 0
    monkeypatch.setattr(data, "write_annotations", lambda *a, **k: 1 / 0)
    monkeypatch.setattr(data, "measure_cost", lambda way, folder: Cost(int(way is count_by_selection), 1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="by pandas"):
        bench_selection(tmp_path, 5_000, 1_000, 1, say=lambda line: None)


def test_the_bench_of_import(fo, tmp_path):
    """Guards the comparison in the real database: both import every photograph with its mask, and leave nothing."""
    folder = write_photographs(tmp_path / "few", 6, say=lambda line: None)
    assert import_by_harmony(folder) == 6
    sample = fo.load_dataset(DATASET_NAME).first()
    assert sample.instance.bounding_box[2:] == pytest.approx([0.5, 0.5]) and sample.mask.get_mask().shape == (768, 1024)
    delete_imports(folder)
    assert import_by_fiftyone(folder) == 6
    (theirs,) = fo.load_dataset(DATASET_NAME).first().segmentations.detections
    assert theirs.mask.shape == (384, 512) and theirs.mask.mean() > 0.99  # cut elsewhere by a pixel
    delete_imports(folder)
    figures = bench_import(tmp_path, 9, 4, 1, say=lambda line: None)
    assert figures["ratio"] > 0 and figures["at_scale"] > 0 and figures["samples"] == 9
    assert not fo.list_datasets(f"{DATASET_NAME}*")
