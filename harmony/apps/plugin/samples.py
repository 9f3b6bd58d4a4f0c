"""What all operators share: which samples they work on, where a dataset is prepared, and errors as one line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fiftyone as fo
import fiftyone.operators as foo
from fiftyone.operators import types

from harmony.core.errors import UserError

NAMES = 3  # of samples that a message gives


class ComposeOperator(foo.Operator):
    """An operator whose result is one line, also where something is wrong that its user can mend."""

    def run(self, ctx: foo.ExecutionContext) -> str:
        """Do the work; returns what was done, in one line."""
        raise NotImplementedError

    def execute(self, ctx: foo.ExecutionContext) -> dict[str, str]:
        """What FiftyOne calls: {"message": line}, or {"error": line}."""
        try:
            return {"message": self.run(ctx)}
        except UserError as error:
            return {"error": str(error)}

    def resolve_output(self, ctx: foo.ExecutionContext) -> types.Property:
        """The form that shows the result."""
        outputs = types.Object()
        for name, view in (("message", types.Success), ("error", types.Error)):
            if line := (ctx.results or {}).get(name):
                outputs.view(name, view(label=line))
        return types.Property(outputs, view=types.View(label=self.config.label))


def place_button(label: str) -> types.Placement:
    """A button above the grid that opens an operator's form."""
    return types.Placement(types.Places.SAMPLES_GRID_SECONDARY_ACTIONS, types.Button(label=label, prompt=True))


def list_ids(ctx: foo.ExecutionContext) -> list[str]:
    """The ids of the selected samples, or of the one that is open. UserError where there is none."""
    ids = list(ctx.selected or ()) or ([ctx.current_sample] if ctx.current_sample else [])
    if not ids:
        raise UserError("nothing is selected: select samples in the grid, or open one")
    return ids


def ask_choice(inputs: types.Object, name: str, choices: Sequence[str], default: str, label: str, **more: Any) -> None:
    """Ask for one of some names; what is none of them, the operator itself refuses, in one line."""
    view = types.DropdownView()
    for choice in choices:
        view.add_choice(choice, label=choice)
    inputs.str(name, default=default, label=label, view=view, **more)


def check_choice(name: str, choices: Sequence[str]) -> str:
    """The name itself. UserError unless it is one of the choices."""
    if name not in choices:
        raise UserError(f"{name} is unknown here: choose one of {', '.join(choices)}")
    return name


def warn_unselected(ctx: foo.ExecutionContext, inputs: types.Object) -> None:
    """Say in a form that nothing is selected, if so."""
    try:
        list_ids(ctx)
    except UserError as error:
        inputs.view("notice", types.Warning(label=str(error)))


def flatten(samples: fo.core.collections.SampleCollection) -> fo.core.collections.SampleCollection:
    """The samples themselves: those of all slices, where they come in groups."""
    return samples.select_group_slices(_allow_mixed=True) if samples.media_type == "group" else samples


def find_work(dataset: fo.Dataset) -> Path:
    """The folder where a dataset is prepared. UserError for one that is not."""
    work = dataset.info.get("work")
    if work is None or not (Path(work) / "manifest.jsonl").is_file():
        raise UserError(
            f"{dataset.name} is not prepared by harmony, or its folder has moved: run harmony.prepare for it"
        )
    return Path(work)


def name_samples(names: Sequence[Any]) -> str:
    """How many samples there are, and the first of them by name."""
    return f"{len(names)}: {', '.join(map(str, names[:NAMES]))}{', ...' if len(names) > NAMES else ''}"


def read_param(ctx: foo.ExecutionContext, name: str, default: Any) -> Any:
    """A value of the form; the default where it was left empty."""
    value = ctx.params.get(name)
    return default if value in (None, "") else value


def set_figures(dataset: fo.Dataset, field: str, key: str, figures: dict[str, dict[str, float]]) -> None:
    """Write ``figures`` of samples, {value of their field ``key``: {metric: number}}, as ``field.metric``.

    UserError where ``field`` holds something else.
    """
    known = dataset.get_field(field)
    if known is not None and getattr(known, "document_type", None) is not fo.DynamicEmbeddedDocument:
        raise UserError(f"{dataset.name} has another field {field}: give another name")
    if known is None:
        dataset.add_sample_field(field, fo.EmbeddedDocumentField, embedded_doc_type=fo.DynamicEmbeddedDocument)
    for metric in {name: None for numbers in figures.values() for name in numbers}:
        if not dataset.has_sample_field(f"{field}.{metric}"):
            dataset.add_sample_field(f"{field}.{metric}", fo.FloatField)
    documents = {value: fo.DynamicEmbeddedDocument(**numbers) for value, numbers in figures.items()}
    dataset.set_values(field, documents, key_field=key)
