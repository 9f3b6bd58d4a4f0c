"""What all operators share: which samples they work on, where a dataset is prepared, and errors as one line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fiftyone as fo
import fiftyone.operators as foo
from bson import ObjectId
from fiftyone.core.odm import validate_field_name
from fiftyone.core.patches import EvaluationPatchesView, PatchesView
from fiftyone.operators import types

from harmony.cli.command import find_user_error
from harmony.cli.compose import one_line
from harmony.core.errors import UserError
from harmony.core.foreign import is_file_name

NAMES = 3  # of samples that a message gives
PATCHES = (PatchesView, EvaluationPatchesView)
MARK = {"made_by": "@harmony/compose"}  # on fields, which the same operator may write again


class ComposeOperator(foo.Operator):
    """An operator whose result is one line, also where something is wrong that its user can mend."""

    def run(self, ctx: foo.ExecutionContext) -> str:
        """Do the work; returns what was done, in one line."""
        raise NotImplementedError

    def execute(self, ctx: foo.ExecutionContext) -> dict[str, str]:
        """What FiftyOne calls: {"message": line}, or {"error": line}."""
        try:
            return {"message": self.run(ctx)}
        except Exception as error:
            failure = find_user_error(error)
            if not isinstance(failure, UserError):
                raise
            return {"error": one_line(failure)}

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
    """The ids of the selected samples, or of the one that is open. UserError where there is none, or no more."""
    ids = list(ctx.selected or ()) or ([ctx.current_sample] if ctx.current_sample else [])
    if not ids:
        raise UserError("nothing is selected: select samples in the grid, or open one")
    return locate_samples(ctx, ids)


def locate_samples(ctx: foo.ExecutionContext, ids: Sequence[str]) -> list[str]:
    """The ids of samples, for patches those of their samples. UserError where one is not in the dataset."""
    ids = list(dict.fromkeys(map(str, ids)))
    if isinstance(ctx.view, PATCHES):
        owners = dict(zip(*select(ctx.view, ids).values(["id", "sample_id"]), strict=True))
        ids = list(dict.fromkeys(owners.get(id_, id_) for id_ in ids))
    there = set(select(flatten(ctx.dataset), ids).values("id"))
    if missing_ids := [id_ for id_ in ids if id_ not in there]:
        raise UserError(f"{ctx.dataset.name} has no more sample {name_samples(missing_ids)}; reload the App and select")
    return ids


def select(samples: fo.core.collections.SampleCollection, ids: Sequence[str]) -> fo.DatasetView:
    """The samples with these ids, as far as they are ids."""
    return samples.select([id_ for id_ in ids if ObjectId.is_valid(id_)])


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


def check_field(dataset: fo.Dataset, field: Any, document_type: type | None = None) -> None:
    """UserError unless FiftyOne takes the name of a field, which is new or was made by an operator like this.

    ``document_type``: of the documents in it; None for texts.
    """
    if not (isinstance(field, str) and field.isidentifier() and field[0] != "_" and is_file_name(field)):
        raise UserError(f"{str(field)[:100]!r} cannot be a field: give a new name of letters, digits and _")
    try:
        validate_field_name(field, media_type=dataset.media_type)
    except ValueError as error:
        raise UserError(f"{one_line(error)}: give another name") from None
    old_field = dataset.get_field(field)
    is_ours = (getattr(old_field, "info", None) or {}) == MARK
    if old_field is not None and not (is_ours and getattr(old_field, "document_type", None) is document_type):
        raise UserError(f"{field} cannot be the field: {dataset.name} has another field {field}, give another name")


def set_figures(dataset: fo.Dataset, field: str, key: str, figures: dict[str, dict[str, float]]) -> None:
    """Write ``figures`` of samples, {value of their field ``key``: {metric: number}}, as ``field.metric``."""
    if not dataset.has_sample_field(field):
        dataset.add_sample_field(
            field, fo.EmbeddedDocumentField, embedded_doc_type=fo.DynamicEmbeddedDocument, info=MARK
        )
    for metric in {name: None for numbers in figures.values() for name in numbers}:
        if not dataset.has_sample_field(f"{field}.{metric}"):
            dataset.add_sample_field(f"{field}.{metric}", fo.FloatField)
    documents = {value: fo.DynamicEmbeddedDocument(**numbers) for value, numbers in figures.items()}
    dataset.set_values(field, documents, key_field=key)
