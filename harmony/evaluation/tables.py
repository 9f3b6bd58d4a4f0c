"""What a study leaves behind: one table as CSV and Markdown, and one figure."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from harmony.core.files import write_text
from harmony.pixels.images import grid, write_image

Table = Mapping[str, Mapping[str, float]]  # row -> column -> figure

# what the Markdown table shows; the CSV holds every figure
SHOWN = (
    "pasted/fpsnr", "pasted/fmse", "pasted/psnr", "pasted/mse", "pasted/ssim", "pasted/lpips", "pasted/structure",
    "pasted/color_de", "pasted/edge_f1", "pasted/shadow_mse", "pasted/seam", "pasted/sharpness", "pasted/clip_i",
    "pasted/clip_t", "pasted/dino_i", "pasted/qs_own", "pasted/copying", "pasted/clip_fid", "pasted/fid", "pasted/kid",
    "pasted/bg_drift", "raw/fpsnr", "raw/fmse", "raw/psnr", "raw/mse", "raw/fid", "raw/kid", "raw/bg_drift",
    "raw/shift",
)  # fmt: skip


ERROR = "_se"  # ends the name of a column of standard errors


def columns(table: Table) -> list[str]:
    """All columns of a table, in the order in which its rows name them, a standard error behind its figure."""
    names = dict.fromkeys(name for row in table.values() for name in row)
    heads = [name for name in names if not (name.endswith(ERROR) and name.removesuffix(ERROR) in names)]
    return [name for head in heads for name in (head, f"{head}{ERROR}") if name in names]


def flat(table: Table) -> dict[str, float]:
    """``row/column`` -> figure."""
    return {f"{row}/{name}": value for row, figures in table.items() for name, value in figures.items()}


def to_csv(table: Table, first: str) -> str:
    """``first`` names the first column: ``method`` or ``lambda``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([first, *columns(table)])
    for name, row in table.items():
        writer.writerow([name, *(f"{row[c]:.6g}" if c in row else "" for c in columns(table))])
    return text.getvalue()


def to_markdown(table: Table, first: str, notes: Sequence[str], every: bool = False) -> str:
    """The columns of SHOWN and those of printed figures (or ``every`` one), then ``notes``, a line each.

    A figure's standard error, column ``<figure>_se``, stands behind it.
    """
    errors = {f"{name}{ERROR}" for name in columns(table)}
    names = [c for c in columns(table) if every or c.partition("/")[2] in SHOWN or c.startswith("paper/")]
    names = [name for name in names if name not in errors]
    lines = [f"| {first} | {' | '.join(names)} |", "|" + "---|" * (len(names) + 1)]
    for name, row in table.items():
        lines.append(f"| {name} | {' | '.join(format_cell(row, c) for c in names)} |")
    return "\n".join([*lines, "", *notes]) + "\n"


def format_cell(row: Mapping[str, float], name: str) -> str:
    """A figure of a row, with its standard error unless that is 0; empty where there is no figure."""
    if name not in row:
        return ""
    error = row.get(f"{name}{ERROR}")
    return f"{row[name]:.4g} ±{error:.2g}" if error else f"{row[name]:.4g}"


def write_table(folder: Path, table: Table, first: str, notes: Sequence[str], every: bool = False) -> str:
    """``table.csv`` and ``table.md``; returns the latter's text."""
    text = to_markdown(table, first, notes, every)
    write_text(folder / "table.csv", to_csv(table, first))
    write_text(folder / "table.md", text)
    return text


def pictures(path: Path, rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str]) -> None:
    """One row a picture, one column a method."""
    write_image(path, grid([list(row) for row in rows], list(titles)))


def curves(path: Path, table: Table, points: Mapping[str, float], metrics: Sequence[str], label: str) -> None:
    """One panel a metric; ``points``: row -> where it lies on the axis ``label``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(metrics), 2.8), layout="constrained")
    for axis, metric in zip(np.atleast_1d(figure.subplots(1, len(metrics))), metrics, strict=True):
        axis.plot(list(points.values()), [table[row][metric] for row in points], "o-", color="#1f6f8b")
        axis.set(title=metric, xlabel=label)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def mosaics(
    path: Path, squares: Sequence[Sequence[Sequence[np.ndarray]]], x: Sequence[float], y: Sequence[float], labels: tuple
) -> None:
    """One panel for each of ``squares``, whose picture [i][j] belongs to y[i], x[j]; y grows upwards."""
    from matplotlib.figure import Figure

    side = len(squares[0][0][0])
    figure = Figure(figsize=(3.6 * len(squares), 3.7), layout="constrained")
    for axis, square in zip(np.atleast_1d(figure.subplots(1, len(squares))), squares, strict=True):
        axis.imshow(np.concatenate([np.concatenate(list(row), axis=1) for row in reversed(square)]))
        axis.set(xlabel=labels[0], ylabel=labels[1])
        axis.set_xticks([side * (j + 0.5) for j in range(len(x))], [f"{v:g}" for v in x])
        axis.set_yticks([side * (i + 0.5) for i in range(len(y))], [f"{v:g}" for v in reversed(y)])
    figure.savefig(path, dpi=160)


def heat(path: Path, values: Mapping[str, np.ndarray], x: Sequence[float], y: Sequence[float], labels: tuple) -> None:
    """One panel a metric: ``values[metric][i, j]`` at y[i], x[j], written into its cell."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(values), 3.2), layout="constrained")
    for axis, (metric, square) in zip(np.atleast_1d(figure.subplots(1, len(values))), values.items(), strict=True):
        axis.imshow(square, cmap="viridis", origin="lower")
        low, high = square.min(), square.max()
        for (i, j), value in np.ndenumerate(square):
            dark = value < (low + high) / 2
            axis.text(j, i, f"{value:.3g}", ha="center", va="center", size=8, color="white" if dark else "black")
        axis.set(title=metric, xlabel=labels[0], ylabel=labels[1])
        axis.set_xticks(range(len(x)), [f"{v:g}" for v in x])
        axis.set_yticks(range(len(y)), [f"{v:g}" for v in y])
    figure.savefig(path, dpi=120)
