"""The bench of selection: annotations of the true schema, and two ways that agree about what is kept."""

import csv

import pytest

from harmony.data.select import FULL_HEADER
from harmony.speed import data
from harmony.speed.data import alone, bench_data, ours, with_pandas, write_annotations


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
    assert ours(split) == with_pandas(split) > 50


def test_the_bench_of_data(tmp_path, monkeypatch):
    """Guards the figures, that annotations are written once, and that a disagreement is no result."""
    figures = bench_data(tmp_path, 5_000, 1_000, 1, say=lambda line: None)
    assert {"ours", "ratio", "memory_gib", "reference_memory_gib", "kept"} <= set(figures) and figures["kept"] > 0
    monkeypatch.setattr(data, "write_annotations", lambda *a, **k: 1 / 0)
    monkeypatch.setattr(data, "alone", lambda way, folder: (way is ours, 1.0, 1.0))
    with pytest.raises(ValueError, match="by pandas"):
        bench_data(tmp_path, 5_000, 1_000, 1, say=lambda line: None)
    assert alone is not data.alone
