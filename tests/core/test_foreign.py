"""Files that people bring, as their programs write them, and names in them that would be paths."""

from pathlib import Path

import pytest

from harmony.core.errors import UserError
from harmony.core.foreign import is_file_name, parse_json, path_inside, read_csv, read_json, read_lines, read_table

BOM = b"\xef\xbb\xbf"


def test_a_csv_by_a_spreadsheet_is_read_as_any_other(tmp_path):
    file = tmp_path / "index.csv"
    file.write_bytes(BOM + b'id,prompt\r\n0012,"a ""red"" car, new"\r\n\r\n"two","line\nbreak"\r\nthree\r\n')
    assert read_table(file) == [
        {"id": "0012", "prompt": 'a "red" car, new'},
        {"id": "two", "prompt": "line\nbreak"},
        {"id": "three"},
    ]
    file.write_bytes(b"")
    assert read_csv(file) == [] and read_table(file) == []


def test_json_with_a_mark_is_read_and_lone_surrogates_are_replaced(tmp_path):
    file = tmp_path / "captions.json"
    file.write_bytes(BOM + b'{"a": "x\\ud800y \\ud83d\\ude00 \\u2028"}\r\n')
    assert read_json(file) == {"a": "x\ufffdy \U0001f600 \u2028"}
    assert read_json(file)["a"].encode()


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"[" * 200_000, b'{"a": ' + b"1" * 5000 + b"}"])
def test_what_is_no_json_ends_in_one_line(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match="x.json cannot be read") as error:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    for path in (tmp_path / "gone.csv", tmp_path):
        with pytest.raises(UserError, match=f"{path} cannot be read"):
            read_csv(path)


def test_lines_end_at_line_feeds_alone(tmp_path):
    text = "a\u2028b\x85c\x0bd"
    (tmp_path / "x").write_text(f"{text}\n{text}\n")
    assert read_lines(tmp_path / "x") == [text, text]
    assert parse_json('"a\u2028b"') == "a\u2028b"


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc/x", "a\0", "x" * 201, "\udce9"])
def test_names_that_cannot_name_a_file(name):
    assert not is_file_name(name)


@pytest.mark.parametrize("name", ["a", "..a", "shot[1]", "a b", "0012", "é", "a\\b", "x" * 200])
def test_names_that_can(name):
    assert is_file_name(name) and path_inside(Path("work"), f"{name}.png") == Path("work") / f"{name}.png"


@pytest.mark.parametrize(
    "names", [("..", "x"), ("a", "../../x"), ("/etc/x",), ("a", "/etc/x"), ("",), ("a/..",), ("a\0",)]
)
def test_a_path_never_leaves_its_folder(names):
    with pytest.raises(UserError, match="leads out of work"):
        path_inside(Path("work"), *names)
    assert path_inside(Path("work"), "train", "a/../b.png") == Path("work/train/b.png")
