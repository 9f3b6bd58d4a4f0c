"""The panel beside an open sample: before and after in one picture with a divider, and the figures."""

from functools import lru_cache
from pathlib import Path

import fiftyone as fo
import fiftyone.operators as foo
import numpy as np
from fiftyone.operators import types

from harmony.core.errors import UserError
from harmony.evaluation.pages import data_uri
from harmony.pixels.color_profiles import read_in_space
from harmony.pixels.images import resize

SIDE = 1024  # px: longer side of the picture, at most
BEFORE, AFTER = ("composite", "input", "filepath"), ("truth", "hint", "input", "filepath", "composite")
WIDTH = 3  # px of the divider


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
        """Show another sample."""
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
        samples = find_samples(ctx)
        pictures = list_pictures(samples)
        names = list(pictures)
        before = next((name for name in (state.before, *BEFORE) if name in pictures), None)
        after = next(
            (name for name in (state.after, *reversed([n for n in names if n not in AFTER])) if name in pictures), None
        )
        state.names, state.before, state.after = names, before, after or before
        state.figures, state.notice = format_figures(samples), None
        state.split = 50 if state.split is None else state.split
        try:
            picture = wipe(*(pictures[name] for name in (state.before, state.after)), state.split) if names else None
        except UserError as error:
            picture, state.notice = None, str(error)
        ctx.panel.set_data("picture", picture)

    def render(self, ctx: foo.ExecutionContext) -> types.Property:
        """The panel as it is now."""
        panel, state = types.Object(), ctx.panel.state
        if not state.names:
            panel.md("Open a sample to see it here.", name="empty")
            return types.Property(panel)
        row = panel.h_stack("choices", gap=2)
        for name, label, on_change in (("before", "Left", self.choose_before), ("after", "Right", self.choose_after)):
            row.enum(name, state.names, default=state.get(name), label=label, on_change=on_change)
        panel.float("split", min=0, max=100, default=50, label="Divider", view=types.SliderView(), on_change=self.move)
        if state.notice:
            panel.view("notice", types.Warning(label=state.notice))
        else:
            panel.str("picture", view=types.ImageView(width="100%", alt=f"{state.before} and {state.after}"))
        panel.md(state.figures, name="figures")
        return types.Property(panel)


def find_samples(ctx: foo.ExecutionContext) -> dict[str, fo.Sample]:
    """The open sample, or all of its group by slice; none where no sample is open."""
    if not ctx.current_sample:
        return {}
    dataset = ctx.dataset
    if dataset.media_type != "group":
        return {"": dataset[ctx.current_sample]}
    sample = dataset.select_group_slices(_allow_mixed=True)[ctx.current_sample]
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
    scale = min(1, SIDE / max(pixels.shape[:2]))
    return resize(pixels, *(max(1, round(scale * length)) for length in pixels.shape[1::-1])) if scale < 1 else pixels


def wipe(before: str, after: str, split: float) -> str:
    """A picture that shows ``before`` left of the divider, at ``split`` percent, and ``after`` right of it."""
    left, right = (
        read_picture(path, Path(path).stat().st_mtime_ns if Path(path).is_file() else 0) for path in (before, after)
    )
    height, width = left.shape[:2]
    picture = resize(right, width, height).copy()
    place = round(width * split / 100)
    picture[:, :place] = left[:, :place]
    if 0 < place < width:
        picture[:, max(0, place - WIDTH // 2) : place + WIDTH // 2 + 1] = 255
    return data_uri(picture)


def format_figures(samples: dict[str, fo.Sample]) -> str:
    """The figures of a sample as a Markdown table, a column for each row of a run; empty where there are none."""
    columns: dict[str, dict[str, float]] = {}
    for title, sample in samples.items():
        for name in sample.field_names:
            value = sample[name]
            if isinstance(value, float):
                columns.setdefault(title, {})[name] = value
            elif isinstance(value, fo.DynamicEmbeddedDocument):
                columns[name] = {key: value[key] for key in value.field_names if isinstance(value[key], float)}
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    if not names:
        return ""
    lines = [f"| figure | {' | '.join(title or 'sample' for title in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        cells = (f"{column[name]:.4g}" if name in column else "" for column in columns.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
