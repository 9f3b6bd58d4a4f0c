"""Boxes that are skimmed: the same selection as by grouping all lines, for every form of a table."""

import numpy as np
import pytest

from harmony.data.sources.open_images import select, skim
from harmony.data.sources.open_images.layout import FULL_HEADER
from harmony.data.sources.selection import KEPT, Rules

HEADER = FULL_HEADER["detections.csv"]
IMAGES = 60


@pytest.fixture
def lines():
    """Boxes of 60 images: one on every third, up to six on the others, some of them groups, too small or too large."""
    rng, lines = np.random.default_rng(0), []
    for n in range(IMAGES):
        id_ = f"{n * 0x9E3779B97F4A7C15 % 2**64:016x}"
        for _ in range(1 if n % 3 == 0 else rng.integers(2, 7)):
            x, y, w, h = rng.random(4) * (0.3, 0.3, 0.7, 0.7)
            corners = ",".join(f"{v:.6f}" for v in (x, x + w, y, y + h))
            lines.append(f"{id_},xclick,/m/{rng.integers(9)},1,{corners},0,0,{int(n % 9 == 0)},0,-1")
    return lines


@pytest.fixture
def choose(tmp_path, monkeypatch, lines):
    """``choose(text)``: (table, damaged rows) of the selection, which must be the same by grouping all boxes."""
    labels = tmp_path / "train" / "labels"
    labels.mkdir(parents=True)
    boxes = [line.split(",") for n, line in enumerate(lines) if n % 4]
    masks = [f"{box[0]}_{n}.png,{box[0]},{box[2]},b,0,1,0,1,0,x" for n, box in enumerate(boxes)]
    (labels / "segmentations.csv").write_text("\n".join([FULL_HEADER["segmentations.csv"], *masks]))

    def choose(text: str | bytes, is_skimmed: bool = True):
        (labels / "detections.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
        assert (skim.skim_boxes(labels / "detections.csv") is not None) == is_skimmed
        result = select.select(tmp_path, ["train"], Rules(), files=False)
        with monkeypatch.context() as patch:
            patch.setattr(select, "skim_boxes", lambda path: None)
            expected = select.select(tmp_path, ["train"], Rules(), files=False)
        assert result.table.equals(expected.table) and result.damage_counts == expected.damage_counts
        return result.table, result.damage_counts.get("train/labels/detections.csv", 0)

    return choose


def write(lines, header=HEADER):
    return "\n".join([header, *lines]) + "\n"


def test_a_skimmed_table_gives_the_same_selection(choose, lines):
    table, damage = choose(write(lines))
    counts = dict(table["reason"].value_counts().iter_rows())
    assert len(table) == IMAGES and damage == 0
    assert counts["several instances"] == IMAGES * 2 // 3 and counts[KEPT] > 3 and counts["group"] > 0


@pytest.mark.parametrize("block", [700, 701, 1000, 4096])
def test_an_image_may_lie_in_two_blocks(choose, lines, monkeypatch, block):
    """Guards the edge of a block: an image whose lines it parts is no image with one box."""
    monkeypatch.setattr(skim, "BLOCK", block)
    assert len(choose(write(lines))[0]) == IMAGES
    assert len(choose(write(lines)[:-1])[0]) == IMAGES


def test_an_image_with_more_lines_than_a_block_is_grouped(choose, lines, monkeypatch):
    monkeypatch.setattr(skim, "BLOCK", 100)
    choose(write(lines), is_skimmed=False)


def test_other_forms_of_the_same_table(choose, lines):
    """Guards tables by other programs: what is not plain is grouped, and the selection stays the same."""
    plain = choose(write(lines))[0]
    columns = [line.split(",") for line in lines]
    turned = [",".join([c[0], *c[:0:-1]]) for c in columns]
    assert choose(write(turned, ",".join(["ImageID", *HEADER.split(",")[:0:-1]])))[0].equals(plain)
    assert choose(write([line + ",0.5,0.5" for line in lines], HEADER + ",XClick1X,XClick1Y"))[0].equals(plain)
    assert choose(write(lines)[:-1])[0].equals(plain), "no line feed at the end"
    quoted = [",".join(f'"{field}"' for field in c) for c in columns]
    for text in (
        write([",".join([*c[1:], c[0]]) for c in columns], HEADER.removeprefix("ImageID,") + ",ImageID"),
        write(lines).replace("\n", "\r\n"),
        "\ufeff" + write(lines),
        write(quoted, ",".join(f'"{name}"' for name in HEADER.split(","))),
        write(
            [line.replace("/m/", '"/m/', 1).replace(",1,", '",1,', 1) for line in lines],
            HEADER.replace("Source", '"Source"'),
        ),
        write(lines[1::2] + lines[::2]),
        write([line + ",more" for line in lines[:2]] + lines[2:]),
    ):
        table, damage = choose(text, is_skimmed=False)
        assert table.equals(plain) and damage == 0
    table, damage = choose(write([*lines[:5], "", *lines[5:]]), is_skimmed=False)
    assert table.equals(plain) and damage == 1, "an empty line is damage of no image"


def test_quotes_in_fields_alone_are_letters(choose, lines):
    assert len(choose(write(['"a' + lines[0][2:], *lines[1:]]))[0]) == IMAGES


@pytest.mark.parametrize("id_", ["a1", "é" * 8, "x" * 17, "a b" * 4, "a,b" * 4, "", "\x80" * 8])
def test_other_ids_are_grouped(choose, lines, id_):
    """Guards ids of another length or with other letters, alone and between the usual ones."""
    data = write([lines[0], id_ + lines[1][16:], *lines[2:]]).encode("latin-1")
    choose(data, is_skimmed=False)
    choose(write([id_ + lines[0][16:]]).encode("latin-1"), is_skimmed=False)


@pytest.mark.parametrize("last", [1, 12, 17, 30, -1])
def test_lines_that_lack_fields_are_counted(choose, lines, last):
    """Guards interrupted downloads: a cut line of an image with several boxes is counted too."""
    cut = lines[-1][:last] if last > 0 else lines[-1][:-2]
    assert choose(write(lines[:-1]) + cut, is_skimmed=False)[1] == 1
    empty = ",".join([*lines[4].split(",")[:-1], ""])
    assert choose(write([*lines[:4], empty, *lines[5:]]), is_skimmed=False)[1] == 1


def test_a_value_that_is_no_number_counts_where_it_matters(choose, lines, tmp_path):
    """Guards damage: it rejects an image with one box; one with several is rejected for these."""
    table, damage = choose(write([lines[0].replace("-1", "x"), *lines[1:]]))
    id_ = lines[0][:16]
    assert damage == 1 and dict(table.select("id", "reason").iter_rows())[id_] == "damaged row"
    (tmp_path / "train/labels/detections.csv").write_text(write([lines[0], lines[1].replace("-1", "x"), *lines[2:]]))
    selection = select.select(tmp_path, ["train"], Rules(), files=False)
    reasons = dict(selection.table.select("id", "reason").iter_rows())
    assert selection.damage_counts == {} and reasons[lines[1][:16]] == "several instances"


def test_a_table_without_boxes(choose):
    assert len(choose(HEADER + "\n")[0]) == len(choose(HEADER)[0]) > 0, "images with masks alone"
