"""The operators on finished runs: their figures as fields, and their pictures as a dataset."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import fiftyone as fo
import fiftyone.operators as foo
import numpy as np
from fiftyone.core.utils import to_slug
from fiftyone.operators import types
from fiftyone.operators.operator import RiskLevel

from harmony.apps.plugin.samples import (
    ComposeOperator,
    ask_choice,
    check_choice,
    check_field,
    find_work,
    read_param,
    set_figures,
)
from harmony.core.errors import UserError
from harmony.core.files import replace_folder
from harmony.data.manifest import manifest_hash
from harmony.evaluation.eval_sets import RELIGHT, EvalSet, with_holes
from harmony.evaluation.run_outputs import Run, RunOutputs, list_runs, open_run
from harmony.pixels.hints import hint
from harmony.pixels.images import write_image

OTHERS = ("composite", "input", "hint", "truth", "mask")  # pictures of a group that are no outputs
PICTURES = "fiftyone"  # folder of a run with the pictures that the App shows
FIRST_FIGURES = ("fpsnr", "color_de")  # figures that the App shows from the start


class Score(ComposeOperator):
    """Writes the figures of one row of a run into fields of the samples, by which the App can sort."""

    @property
    def config(self) -> foo.OperatorConfig:
        """How the App shows the operator."""
        return foo.OperatorConfig(
            name="score",
            label="Score by a run",
            description="Write the figures of a method in a finished run into fields of the samples",
            icon="leaderboard",
            dynamic=True,
            allow_delegated_execution=True,
            risk_level=RiskLevel.MEDIUM,
        )

    def resolve_input(self, ctx: foo.ExecutionContext) -> types.Property:
        """The form: which run, and which of its rows."""
        inputs = types.Object()
        ask_run(inputs)
        if ctx.params.get("run"):
            try:
                rows = read_run(ctx).rows
                ask_choice(inputs, "row", rows, rows[-1], "Row of its table")
                inputs.str("field", label="Field", description="Of the figures; empty: the name of the row")
            except UserError as error:
                inputs.view("notice", types.Warning(label=str(error)))
        return types.Property(inputs, view=types.View(label="Score the samples by a run"))

    def run(self, ctx: foo.ExecutionContext) -> str:
        """Measure each stored output again, and write the figures."""
        run = read_run(ctx)
        manifest = find_work(ctx.dataset) / "manifest.jsonl"
        if manifest_hash(manifest) != run.manifest:
            raise UserError(
                f"{run.folder} is a run of {run.dataset} and not of {ctx.dataset.name} as it is prepared "
                "now: choose a run of this dataset, or evaluate again"
            )
        row = check_choice(read_param(ctx, "row", run.rows[-1]), run.rows)
        field = read_param(ctx, "field", name_fields(run.rows)[row])
        check_field(ctx.dataset, field, fo.DynamicEmbeddedDocument)
        outputs = run.read(manifest, [row])
        set_figures(ctx.dataset, field, "harmony_id", dict(zip(outputs.keys, outputs.score(row), strict=True)))
        ctx.ops.reload_dataset()
        return f"{len(outputs.keys)} samples have the figures of {row}: sort by {field}.fpsnr or {field}.color_de"


class OpenRun(ComposeOperator):
    """Opens the pictures of a run as a dataset: each composite is a group of input, hint, every method and truth."""

    @property
    def config(self) -> foo.OperatorConfig:
        """How the App shows the operator."""
        return foo.OperatorConfig(
            name="open_run",
            label="Open a run",
            description="Show the pictures of a finished run: input, hint, every method and truth side by side",
            icon="collections",
            allow_delegated_execution=True,
            risk_level=RiskLevel.LOW,
        )

    def resolve_input(self, ctx: foo.ExecutionContext) -> types.Property:
        """The form: which run."""
        inputs = types.Object()
        ask_run(inputs)
        return types.Property(inputs, view=types.View(label="Open a run"))

    def run(self, ctx: foo.ExecutionContext) -> str:
        """Write the pictures into the run folder, make a dataset of them, and open it."""
        run = read_run(ctx)
        work = ctx.dataset.info.get("work") if ctx.dataset else None
        outputs = run.read(run.find_manifest([Path(work) / "manifest.jsonl"] if work else []))
        dataset = make_dataset(run, outputs)
        ctx.ops.open_dataset(dataset.name)
        slices = ", ".join(dataset.group_slices)
        return f"{len(outputs.items)} composites are in the dataset {dataset.name}, each as {slices}"


def ask_run(inputs: types.Object) -> None:
    """Ask for a run folder, and offer those below ``runs/``."""
    choices = [
        types.Choice(str(run), label=f"{run.parent.name}/{run.name}") for run in list_runs(Path("runs").resolve())
    ]
    description = "The folder of a finished comparison, such as runs/table1/<timestamp>"
    view = types.AutocompleteView(choices=choices)
    inputs.str("run", required=True, label="Run", description=description, view=view)


def read_run(ctx: foo.ExecutionContext) -> Run:
    """The run of the form. UserError where it is none."""
    text = str(read_param(ctx, "run", "."))
    try:
        return open_run(Path(text).expanduser().resolve())
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{text[:100]!r}: no finished run there ({reason}); give the folder of one") from None


def name_field(name: str) -> str:
    """A row's name as one that FiftyOne takes: letters, digits and _, not too long."""
    text = re.sub(r"\W+", "_", name)[:50]
    return text if text.isidentifier() and text[0] != "_" else f"row_{text}"


def name_fields(rows: Sequence[str]) -> dict[str, str]:
    """Row -> name of a field or slice; no two are alike, and none is that of another picture of a group."""
    names: dict[str, str] = {}
    for row in rows:
        names[row] = name_field(row)
        while names[row] in (*OTHERS, *(name for other, name in names.items() if other != row)):
            names[row] += "_2"
    return names


def make_dataset(run: Run, outputs: RunOutputs) -> fo.Dataset:
    """The grouped dataset of a run, made anew where it is there. UserError where another one has its name."""
    name = f"{run.folder.parent.name}-{run.folder.name}"
    try:
        to_slug(name)
    except ValueError as error:
        raise UserError(f"{run.folder} cannot name a dataset of FiftyOne ({error}): rename the folder") from None
    if fo.dataset_exists(name) and fo.load_dataset(name).info.get("run") != str(run.folder):
        raise UserError(f"FiftyOne has another dataset {name}: rename that")
    names = name_fields(run.rows)
    columns = draw_columns(outputs.items, {names[row]: pictures for row, pictures in outputs.pictures.items()})
    write_pictures(run.folder / PICTURES, outputs.items, columns)
    figures = {names[row]: outputs.score(row) for row in outputs.pictures}
    dataset = fo.Dataset(name, persistent=True, overwrite=True)
    dataset.info["run"] = str(run.folder)
    dataset.add_group_field("group", default=next(iter(columns)))
    samples = []
    for n, composite in enumerate(outputs.items.composites):
        group = fo.Group()
        mask = str(run.folder / PICTURES / "mask" / f"{composite.name}.png")
        for title in columns:
            sample = fo.Sample(
                filepath=str(run.folder / PICTURES / title / f"{composite.name}.png"),
                group=group.element(title),
                composite_id=f"{outputs.items.name}/{composite.name}",
                caption=composite.caption,
                mask=fo.Segmentation(mask_path=mask),
                **figures[title][n] if title in figures else {},
            )
            samples.append(sample)
    dataset.add_samples(samples)
    dataset.app_config.active_fields = fo.DatasetAppConfig.default_active_fields(dataset)
    dataset.app_config.active_fields.paths = [name for name in FIRST_FIGURES if dataset.has_sample_field(name)]
    dataset.save()
    return dataset


def draw_columns(items: EvalSet, methods: Mapping[str, Sequence[np.ndarray]]) -> dict[str, Sequence[np.ndarray]]:
    """Title -> a picture for each item: what a method is given, the hint of color, every method, the truth."""
    composites = {"composite": [c.copy_paste() for c in items.composites]} if items.kind == RELIGHT else {}
    hints = [hint("color", c.instance, c.mask) for c in items.composites]
    return composites | {"input": with_holes(items), "hint": hints, **methods, "truth": items.truths}


def write_pictures(folder: Path, items: EvalSet, columns: Mapping[str, Sequence[np.ndarray]]) -> None:
    """Write ``folder/title/NAME.png`` and the masks, all or none."""
    masks = {"mask": [c.mask for c in items.composites]}
    with replace_folder(folder) as place:
        for title, pictures in {**columns, **masks}.items():
            (place / title).mkdir()
            for composite, picture in zip(items.composites, pictures, strict=True):
                write_image(place / title / f"{composite.name}.png", picture)
