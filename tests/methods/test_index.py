"""``index.csv`` of a folder of composites, as spreadsheets and pandas write it."""

import numpy as np
import pytest

from harmony.methods.inputs import compare_baselines, list_composites, parse_box, read_inputs
from harmony.pixels.images import write_image

HEAD = "background,id,foreground,foreground_mask,bbox\r\n"


@pytest.mark.parametrize("text", ["20 20 90 90", "[20, 20, 90, 90]", "(20.0,20,90,90)", "20;20;90;90"])
def test_a_box_in_any_writing(text):
    assert parse_box(text) == [20, 20, 90, 90]


@pytest.mark.parametrize("text", ["", "20 20 90", "20 20 90 9O", "nan 0 1 1", "0 0 inf 1", "1 2 3 4 5"])
def test_what_is_no_box(text):
    assert parse_box(text) is None


def test_a_spreadsheets_index_is_read_and_a_wrong_row_left_out_with_a_line(tmp_path, capsys):
    rows = 'b.png,007,f.png,m.png,"[20, 20, 90, 90]"\r\nb.png,bad,f.png,m.png,20 20 9O 90\r\nb.png,cut\r\n'
    (tmp_path / "index.csv").write_bytes(b"\xef\xbb\xbf" + (HEAD + rows).encode())
    paths = {name: str(tmp_path / f"{name[0]}.png") for name in ("background", "foreground", "mask")}
    assert list_composites(tmp_path) == ([("007", paths | {"box": [20, 20, 90, 90]})], ["bad", "cut"])
    assert capsys.readouterr().out == (
        "2 left out, the row of index.csv names neither a composite with its mask nor a foreground with mask and box: "
        "['bad', 'cut']\n"
    )


def test_the_background_of_a_finished_composite_serves_poisson_alone(tmp_path):
    """Guards the contact sheet: a gray square where nobody knows what was behind the object, Poisson where a row says
    it; the result starts from the composite either way, and a background of another size is not used.
    """
    rng = np.random.default_rng(0)
    composite, plate = rng.integers(0, 256, (2, 40, 60, 3)).astype(np.uint8)
    mask = np.zeros((40, 60), bool)
    mask[10:30, 20:40] = True
    for name, picture in {"c": composite, "m": mask, "b": plate, "small": plate[:20]}.items():
        write_image(tmp_path / f"{name}.png", picture)
    rows = "1,c.png,m.png,b.png\n2,c.png,m.png,\n3,c.png,m.png,small.png\n4,c.png,m.png,none.png\n"
    (tmp_path / "index.csv").write_text(f"id,composite,mask,background\n{rows}")
    items, _ = list_composites(tmp_path)
    inputs = [read_inputs(options) for _, options in items]
    assert all(np.array_equal(each.background, composite) for each in inputs)
    blended = [compare_baselines(each, composite)[-1] for each in inputs]
    assert [int(np.ptp(picture)) > 0 for picture in blended] == [True, False, False, False]
