"""Tables and figures of a study: what stands where."""

import csv

import numpy as np

from harmony.evaluation.tables import curves, heat, mosaics, pictures, to_csv, to_markdown, write_table
from harmony.pixels.images import read_image

TABLE = {
    "inpainting": {"test/pasted/fpsnr": 12.3456, "test/raw/lpips": 1.0, "paper/fid": 18.93},
    "ours": {"test/pasted/fpsnr": 20.0, "test/raw/lpips": 2.0},
}


def test_csv_holds_all_and_markdown_what_matters(tmp_path):
    """Guards the contract: first column, one column a metric, an empty cell where there is no figure, notes below."""
    text = write_table(tmp_path, TABLE, "method", ["n = 2"])
    with open(tmp_path / "table.csv", newline="") as file:
        head, first, second = csv.reader(file)
    assert head == ["method", "test/pasted/fpsnr", "test/raw/lpips", "paper/fid"]
    assert first == ["inpainting", "12.3456", "1", "18.93"] and second == ["ours", "20", "2", ""]
    assert (tmp_path / "table.md").read_text() == text
    assert text.splitlines()[0] == "| method | test/pasted/fpsnr | paper/fid |" and text.endswith("n = 2\n")
    assert "| inpainting | 12.35 | 18.93 |" in text


def test_figures_are_drawn(tmp_path):
    """Guards the three kinds: a panel a metric, a cell a pair of weights, a column a method."""
    table = {f"{v:g}": {"a": v, "b": v**2} for v in (0.1, 0.5, 1)} | {"inpainting": {"a": 0.0, "b": 0.0}}
    curves(tmp_path / "curves.png", table, {"0.1": 0.1, "0.5": 0.5, "1": 1}, ["a", "b"], "lambda")
    heat(tmp_path / "heat.png", {"a": np.arange(4.0).reshape(2, 2)}, [0, 1], [0, 1], ("x", "y"))
    image = np.full((32, 32, 3), 200, np.uint8)
    colours = [[np.full((32, 32, 3), 40 * (2 * i + j), np.uint8) for j in range(2)] for i in range(2)]
    mosaics(tmp_path / "mosaics.png", [colours, colours], [0, 1], [0, 1], ("x", "y"))
    shown = {tuple(c) for c in read_image(tmp_path / "mosaics.png").reshape(-1, 3)}
    assert {(40 * k,) * 3 for k in range(4)} <= shown
    pictures(tmp_path / "pictures.png", [[image, image, image]], ["a", "b", "c"])
    wide, square, row = (read_image(tmp_path / f"{name}.png").shape for name in ("curves", "heat", "pictures"))
    assert wide[1] > 2 * wide[0] and square[0] > 200 and row[1] > 2.5 * row[0] * 0.8


def test_standard_errors_stand_behind_their_figures():
    """Guards the reference row, which has none to show, and a figure of which there is no error."""
    rows = {"a": {"x/pasted/fmse": 4.0, "x/pasted/fid": 9.0}, "b": {"x/pasted/fmse": 3.0, "x/pasted/fid": 8.0}}
    table = {name: row | {"x/pasted/fmse_se": error} for (name, row), error in zip(rows.items(), (0.0, 0.25))}
    assert to_csv(table, "method").splitlines()[0] == "method,x/pasted/fmse,x/pasted/fmse_se,x/pasted/fid"
    lines = to_markdown(table, "method", []).splitlines()
    assert lines[0] == "| method | x/pasted/fmse | x/pasted/fid |"
    assert lines[2:4] == ["| a | 4 | 9 |", "| b | 3 ±0.25 | 8 |"]
