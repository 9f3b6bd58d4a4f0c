"""The panel beside an open sample: before and after in one picture with a divider, and the figures."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import fiftyone as fo
import fiftyone.operators as foo
import numpy as np
from fiftyone.operators import types

from harmony.apps.plugin.harmonize import COMPOSITE
from harmony.apps.plugin.samples import flatten, locate_samples
from harmony.core.errors import UserError
from harmony.evaluation.pages import data_uri
from harmony.methods.inputs import get_size
from harmony.pixels.color_profiles import read_in_space
from harmony.pixels.images import limit_size, resize

SIDE = 1024  # px: longer side of the picture, at most
BEFORE, NO_RESULTS = ("composite", "input", "filepath"), ("truth", "hint", "input", "filepath", "composite")
# the whole picture, large also where it has few pixels, in a panel of any size
LAYOUT = {"image": {"style": {"height": "60vh", "maxWidth": "100%", "objectFit": "contain", "objectPosition": "left"}}}


class Compare(foo.Panel):
    """Shows two pictures of one sample, of which a divider uncovers more or less, and the sample's figures."""

    @property
    def config(self) -> foo.PanelConfig:
        """How the App shows the panel."""
        return foo.PanelConfig(
            name="compare",
            label="Before and after",
            surfaces="modal",
            icon="compare",
            help_markdown="Two pictures of this sample with a divider, and its figures.",
        )

    def on_load(self, ctx: foo.ExecutionContext) -> None:
        """Show the sample that is open."""
        self.show(ctx)

    def on_change_current_sample(self, ctx: foo.ExecutionContext) -> None:
        """Show another sample, the divider where its pictures differ."""
        ctx.panel.state.split = None
        self.show(ctx)

    def choose_before(self, ctx: foo.ExecutionContext) -> None:
        """Take another picture on the left."""
        ctx.panel.state.before = ctx.params.get("value")
        self.show(ctx)

    def choose_after(self, ctx: foo.ExecutionContext) -> None:
        """Take another picture on the right."""
        ctx.panel.state.after = ctx.params.get("value")
        self.show(ctx)

    def move(self, ctx: foo.ExecutionContext) -> None:
        """Move the divider."""
        ctx.panel.state.split = ctx.params.get("value")
        self.show(ctx)

    def show(self, ctx: foo.ExecutionContext) -> None:
        """Read the pictures and figures of the sample, as far as there are some."""
        state = ctx.panel.state
        state.names, state.figures, state.notice, picture = [], "", None, None
        try:
            samples = find_samples(ctx)
            pictures = list_pictures(samples)
            state.names = names = list(pictures)
            results = [name for name in reversed(names) if not name.endswith(COMPOSITE) and name not in NO_RESULTS]
            result = choose(state.after, results, names)
            state.before = choose(state.before, (f"{result}{COMPOSITE}", *BEFORE), names)
            state.after, state.figures = result or state.before, format_figures(samples)
            if names:
                left, right = read_pair(pictures[state.before], pictures[state.after])
                state.split = find_split(left, right) if state.split is None else state.split
                picture = data_uri(wipe(left, right, state.split))
        except UserError as error:
            state.notice = str(error)
        ctx.panel.set_data("picture", picture)

    def render(self, ctx: foo.ExecutionContext) -> types.Property:
        """The panel as it is now."""
        panel, state = types.Object(), ctx.panel.state
        if not state.names:
            panel.md(state.notice or "Open a sample to see it here.", name="empty")
            return types.Property(panel)
        row = panel.h_stack("choices", gap=2)
        for name, label, on_change in (("before", "Left", self.choose_before), ("after", "Right", self.choose_after)):
            row.enum(name, state.names, default=state.get(name), label=label, on_change=on_change)
        slider = types.SliderView(label="Divider", value_precision=0, value_label_display="auto")
        panel.int("split", min=0, max=100, default=state.split, view=slider, on_change=self.move)
        if state.notice:
            panel.view("notice", types.Warning(label=state.notice))
        else:
            panel.str("picture", view=types.ImageView(alt=f"{state.before} and {state.after}", componentsProps=LAYOUT))
        if state.figures:
            panel.md(state.figures, name="figures")
        return types.Property(panel)


def choose(name: str | None, usual_names: Sequence[str], names: Sequence[str]) -> str | None:
    """The picture that was chosen, where the sample has it, else the first usual one that it has."""
    return next((each for each in (name, *usual_names) if each in names), None)


def find_samples(ctx: foo.ExecutionContext) -> dict[str, fo.Sample]:
    """The open sample, or all of its group by slice; none where no sample is open. UserError for one that is gone."""
    if not ctx.current_sample:
        return {}
    dataset, (id_,) = ctx.dataset, locate_samples(ctx, [ctx.current_sample])
    if dataset.media_type != "group":
        return {"": dataset[id_]}
    sample = flatten(dataset)[id_]
    return dataset.get_group(sample[dataset.group_field].id)


def list_pictures(samples: dict[str, fo.Sample]) -> dict[str, str]:
    """Name -> file of each picture: the slices of a group, or the media fields of a sample."""
    if "" not in samples:
        return {title: sample.filepath for title, sample in samples.items()}
    (sample,) = samples.values()
    fields = [name for name in sample.dataset.app_config.media_fields if sample.has_field(name)]
    return {name: sample[name] for name in fields if sample[name]}


@lru_cache(maxsize=4)
def read_picture(path: str, time: int) -> np.ndarray:
    """A picture in sRGB as large as the panel shows it; ``time`` is that of the file, which may be written again."""
    pixels = read_in_space(path, None).pixels
    return resize(pixels, *limit_size(*get_size(pixels), SIDE))


def read_pair(before: str, after: str) -> tuple[np.ndarray, np.ndarray]:
    """Two pictures at the size of the first one."""
    times = (Path(path).stat().st_mtime_ns if Path(path).is_file() else 0 for path in (before, after))
    left, right = (read_picture(path, time) for path, time in zip((before, after), times, strict=True))
    return left, resize(right, left.shape[1], left.shape[0])


def find_split(left: np.ndarray, right: np.ndarray) -> int:
    """The middle of where two pictures differ, in percent of their width."""
    weights = np.abs(left.astype(int) - right).sum(axis=(0, 2))
    return round(100 * np.average(np.arange(len(weights)), weights=weights) / len(weights)) if weights.any() else 50


def wipe(left: np.ndarray, right: np.ndarray, split: float) -> np.ndarray:
    """A picture that shows ``left`` to the left of a divider at ``split`` percent, and ``right`` beyond it."""
    width = left.shape[1]
    picture, place, line = right.copy(), round(width * split / 100), max(1, width // 300)
    picture[:, :place] = left[:, :place]
    picture[:, place : place + line] = 255
    return picture


def format_figures(samples: dict[str, fo.Sample]) -> str:
    """The figures of a sample as a Markdown table, a column for each row of a run; empty where there are none."""
    columns: dict[str, dict[str, float]] = {}
    for title, sample in samples.items():
        for name in sample.field_names:
            value = sample[name]
            if isinstance(value, float):
                columns.setdefault(title, {})[name] = value
            elif type(value) is fo.DynamicEmbeddedDocument:
                columns[name] = {key: value[key] for key in value.field_names if isinstance(value[key], float)}
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    if not names:
        return ""
    lines = [f"| figure | {' | '.join(title or 'sample' for title in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        cells = (f"{column[name]:.4g}" if name in column else "" for column in columns.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
