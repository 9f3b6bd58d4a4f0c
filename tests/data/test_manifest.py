"""The manifest: round trip, order, and one clear line for each thing that can be wrong with it."""

import json
import os
from dataclasses import asdict, replace

import pytest

from harmony.core.errors import UserError
from harmony.core.row import SCHEMA_VERSION, Row
from harmony.data.manifest import manifest_hash, read_manifest, read_split, write_manifest

ROW = Row("a", "../a.jpg", "../a.png", (1.0, 2.0, 30.0, 20.0), "Cat", "a cat – où?", "train", 40, 32, "0" * 64)
ROWS = [replace(ROW, id="z", split="test"), replace(ROW, id="b", extras={"plate": "p.jpg"}), ROW]


def test_rows_come_back_in_order_and_by_split(tmp_path):
    path = tmp_path / "work" / "manifest.jsonl"
    header = write_manifest(path, ROWS, "mini", selection="abc")
    assert header == {"schema": SCHEMA_VERSION, "dataset": "mini", "rows": 3, "selection": "abc"}
    assert read_manifest(path) == (header, [ROWS[2], ROWS[1], ROWS[0]])
    assert read_manifest(str(path), "test")[1] == [ROWS[0]]
    assert [p.name for p in path.parent.iterdir()] == ["manifest.jsonl"]


def test_captions_from_the_web_come_back(tmp_path):
    """Guards the lines: U+2028, U+0085 and other ends of a line stand inside a caption."""
    rows = [replace(ROW, caption="a\u2028b\x85c\x0bd\re\nf\x1c"), replace(ROW, id="b")]
    write_manifest(tmp_path / "m.jsonl", rows, "mini")
    assert read_manifest(tmp_path / "m.jsonl")[1] == rows


def test_hash_is_that_of_the_rows_alone(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_manifest(first, ROWS, "mini", fiftyone="mini")
    write_manifest(second, ROWS[::-1], "mini", fiftyone="mini-12345678")
    assert manifest_hash(first) == manifest_hash(second)
    write_manifest(second, [*ROWS[1:], replace(ROWS[0], caption="another")], "mini")
    assert manifest_hash(first) != manifest_hash(second)


def test_a_failed_write_leaves_the_old_manifest(tmp_path, monkeypatch):
    path = tmp_path / "manifest.jsonl"
    write_manifest(path, ROWS[:1], "mini")
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="disk full"):
        write_manifest(path, ROWS, "mini")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"box": [0, 0, 41, 32]}, "line 3: box .* within 40 x 32"),
        ({"box": [5, 5, 5, 9]}, "line 3: box"),
        ({"box": "none"}, "line 3: box"),
        ({"width": 0}, "line 3: size 0 x 32"),
        ({"split": "dev"}, "line 3: split 'dev'"),
        ({"caption": None}, "line 3: caption must be text"),
        ({"colour": "red"}, "line 3: unknown field colour"),
        ({"extras": ["plate"]}, "line 3: extras .* must be texts by name"),
        ({"extras": {"plate": 5}}, "line 3: extras .* must be texts by name"),
        ({"id": "../../a"}, "line 3: id '../../a' cannot name a file"),
        ({"id": "a"}, "line 3: train/a stands there twice"),
        (None, "line 3: field mask, sha256 missing"),
    ],
)
def test_a_wrong_row_is_named_by_its_line(tmp_path, change, message):
    path = tmp_path / "manifest.jsonl"
    header = {"schema": SCHEMA_VERSION, "dataset": "mini", "rows": 2}
    wrong = asdict(replace(ROW, id="b")) | (change or {})
    if change is None:
        del wrong["mask"], wrong["sha256"]
    path.write_text("\n".join(json.dumps(line) for line in (header, asdict(ROW), wrong)))
    with pytest.raises(UserError, match=message):
        read_manifest(path)


def test_a_manifest_that_is_not_whole_is_refused(tmp_path):
    path = tmp_path / "manifest.jsonl"
    with pytest.raises(UserError, match="no manifest"):
        read_manifest(path)
    with pytest.raises(UserError, match="no manifest"):
        manifest_hash(path)
    path.write_text("")
    with pytest.raises(UserError, match="empty"):
        read_manifest(path)
    write_manifest(path, ROWS, "mini")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match="2 rows where the header promises 3"):
        read_manifest(path)
    path.write_text("".join(lines)[:-40])
    with pytest.raises(UserError, match="line 4: not JSON"):
        read_manifest(path)
    path.write_text("".join([lines[0].replace(f'"schema": {SCHEMA_VERSION}', '"schema": 99'), *lines[1:]]))
    with pytest.raises(UserError, match="line 1: schema 99"):
        read_manifest(path)
    write_manifest(path, ROWS, "mini")
    with pytest.raises(UserError, match="'dev' does not exist"):
        read_manifest(path, "dev")


def test_an_empty_split_is_named_with_the_way_out(tmp_path):
    path = tmp_path / "manifest.jsonl"
    write_manifest(path, ROWS, "mini")
    assert read_split(path, "test") == [ROWS[0]]
    with pytest.raises(UserError, match=r"no rows in split validation \(train 2, validation 0, test 1\)"):
        read_split(path, "validation")
