"""``index.csv`` of a folder of composites, as spreadsheets and pandas write it."""

import pytest

from harmony.methods.inputs import list_composites, parse_box

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
