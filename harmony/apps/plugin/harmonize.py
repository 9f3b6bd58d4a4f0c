"""The operator that harmonizes the selected samples."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import fiftyone as fo
import fiftyone.operators as foo
from fiftyone.operators import types
from fiftyone.operators.operator import RiskLevel
from omegaconf import DictConfig, OmegaConf

from harmony.apps.plugin.samples import (
    MARK,
    ComposeOperator,
    ask_choice,
    check_choice,
    check_field,
    find_work,
    flatten,
    list_ids,
    name_samples,
    place_button,
    read_param,
    warn_unselected,
)
from harmony.cli.compose import CONFIGS, compose, one_line
from harmony.cli.methods import FOLDER, build, load_backbone, method_file
from harmony.core.errors import UserError
from harmony.core.row import Row
from harmony.data.manifest import read_manifest
from harmony.evaluation.eval_sets import is_render_pair
from harmony.methods.runs import Inserter, Request
from harmony.models.shipped import check_places
from harmony.pixels.images import check_file, open_image, write_image

BATCH = 8  # samples at a time
METHOD, MODEL, STEPS, SEED = "controlnet", "tiny", 50, 0  # as ``harmonize`` has them
FIELD, COMPOSITE = "harmonized", "_composite"  # COMPOSITE: the end of the name of a second field
COMPOSING = Lock()  # Hydra has one state for the process, and the App runs operators in threads


class Harmonize(ComposeOperator):
    """Harmonizes the object of each selected sample; the results are a field with a path, which the App can show."""

    @property
    def config(self) -> foo.OperatorConfig:
        """How the App shows the operator."""
        return foo.OperatorConfig(
            name="harmonize",
            label="Harmonize selected",
            description="Fit the object of each selected sample to its surroundings",
            icon="auto_fix_high",
            allow_delegated_execution=True,
            risk_level=RiskLevel.MEDIUM,
        )

    def resolve_placement(self, ctx: foo.ExecutionContext) -> types.Placement:
        """The button above the grid."""
        return place_button("Harmonize")

    def resolve_input(self, ctx: foo.ExecutionContext) -> types.Property:
        """The form: by which method, and into which field."""
        inputs = types.Object()
        warn_unselected(ctx, inputs)
        ask_choice(inputs, "method", list_methods(), METHOD, "Method")
        ask_choice(inputs, "model", list_models(), MODEL, "Backbone")
        inputs.int("steps", min=1, max=999, default=STEPS, label="Steps", description="Of the solver")
        inputs.int("seed", min=0, max=2**32 - 1, default=SEED, label="Seed", description="Of the noise")
        inputs.str("field", default=FIELD, label="Field", description="Of the results: the paths of pictures")
        inputs.str("label", label="Label", description="Of the object, where a sample has several with masks")
        return types.Property(inputs, view=types.View(label="Harmonize the selected samples"))

    def run(self, ctx: foo.ExecutionContext) -> str:
        """Harmonize in batches; samples that cannot be are named. The same command makes no picture twice."""
        start, field = time.monotonic(), read_param(ctx, "field", FIELD)
        check_field(ctx.dataset, field)
        check_field(ctx.dataset, f"{field}{COMPOSITE}")
        requests, names, failures = collect_requests(ctx, find_results(ctx.dataset) / field)
        lines: list[str] = []
        if requests:
            inserter = load_inserter(ctx.params, lines.append)
            waiting = [id_ for id_, request in requests.items() if not inserter.is_done(request)]
            for n in range(0, len(waiting), BATCH):
                ctx.set_progress(n / len(waiting), f"{n} of {len(waiting)} samples")
                batch = inserter.run_batch({id_: requests[id_] for id_ in waiting[n : n + BATCH]})
                failures |= {id_: find_reason(id_, lines) for id_ in batch}
        results = {id_: request for id_, request in requests.items() if id_ not in failures}
        reasons = dict.fromkeys(failures.values())
        rest = f"; left out {name_samples([names[id_] for id_ in failures])} ({'; '.join(reasons)})" if failures else ""
        if not results:
            raise UserError(f"nothing was harmonized{rest}")
        show_results(ctx.dataset, field, results)
        ctx.ops.reload_dataset()
        seconds = time.monotonic() - start
        return f"{len(results)} harmonized in {seconds:.1f} s, shown as media field {field}{rest}"


def find_reason(id_: str, lines: Sequence[str]) -> str:
    """Why a sample was left out, as the lines of ``run_batch`` say it."""
    return next(line.partition("left out: ")[2] for line in lines if line.startswith(f"{id_} left out: "))


def list_methods() -> list[str]:
    """The methods that need no more than a composite."""
    names = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    return [name for name in names if "???" not in OmegaConf.to_container(method_file(name)).values()]


def list_models() -> list[str]:
    """The backbones that have a name."""
    return sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))


def find_results(dataset: fo.Dataset) -> Path:
    """The folder of the results on a dataset, a folder for each field: in its work folder if it is prepared."""
    try:
        return find_work(dataset) / "harmonized"
    except UserError:
        return Path(fo.config.default_dataset_dir) / dataset.slug / "harmonized"


def collect_requests(
    ctx: foo.ExecutionContext, folder: Path
) -> tuple[dict[str, Request], dict[str, str], dict[str, str]]:
    """The request of each selected sample by its id, the names of all, and the reasons of those that have none."""
    rows, requests, names, failures = read_rows(ctx.dataset), {}, {}, {}
    label = read_param(ctx, "label", None)
    for sample in flatten(ctx.dataset).select(list_ids(ctx)):
        key = sample["harmony_id"] if sample.has_field("harmony_id") else None
        names[sample.id] = key or Path(sample.filepath).stem
        place = folder / (key or sample.id)
        try:
            check_file(sample.filepath, "picture")
            if key in rows:
                options = describe_row(*rows[key])
            else:
                options = {"composite": sample.filepath, "mask": find_mask(sample, place, label)}
        except (UserError, OSError, ValueError) as error:  # FiftyOne's own of a damaged mask
            failures[sample.id] = one_line(error)
            continue
        requests[sample.id] = Request(options, place, sample["caption"] if sample.has_field("caption") else None)
    return requests, names, failures


def read_rows(dataset: fo.Dataset) -> dict[str, tuple[Row, Path]]:
    """The rows of a prepared dataset by <split>/<id>, each with the folder of its paths; none of any other."""
    try:
        work = find_work(dataset)
    except UserError:
        return {}
    return {f"{row.split}/{row.id}": (row, work) for row in read_manifest(work / "manifest.jsonl")[1]}


def describe_row(row: Row, root: Path) -> dict[str, Any]:
    """The options of ``read_inputs`` for a row: its object under another light where it has one, else as it is."""
    mask = str(root / row.mask)
    if is_render_pair(row):
        return {
            "background": str(root / row.extras["plate"]),
            "foreground": str(root / row.extras["relit"]),
            "mask": mask,
        }
    plate = None if row.has_truth else str(root / row.image)
    return {"composite": str(root / row.extras.get("composite", row.image)), "mask": mask, "plate": plate}


def find_mask(sample: fo.Sample, folder: Path, label: str | None = None) -> str:
    """The file of a sample's mask, written into ``folder`` where it is in the database.

    Of several detections the one with the ``label``. UserError where there is none, or no single one.
    """
    for name in sample.field_names:
        value = sample[name]
        if isinstance(value, fo.Segmentation) and value.mask_path:
            return value.mask_path
        if isinstance(value, (fo.Detection, fo.Detections)):
            value = choose_detection(value, label)
        if isinstance(value, fo.Detection):
            value = value.to_segmentation(frame_size=open_image(sample.filepath).size)
        if isinstance(value, fo.Segmentation) and value.mask is not None:
            write_image(folder / "mask.png", value.mask > 0)
            return str(folder / "mask.png")
    raise UserError("no mask: a kept sample, a segmentation or a detection with a mask has one")


def choose_detection(value: fo.Detection | fo.Detections, label: str | None) -> fo.Detection | None:
    """The one detection with a mask, and with the ``label`` if there is one; None for none, UserError for several."""
    detections = value.detections if isinstance(value, fo.Detections) else [value]
    detections = [d for d in detections if d.has_mask and label in (None, d.label)]
    if len(detections) > 1:
        labels = ", ".join(dict.fromkeys(str(d.label) for d in detections))
        raise UserError(f"{len(detections)} objects with masks ({labels}), give the label of one")
    return detections[0] if detections else None


def load_inserter(params: Mapping[str, Any], say: Any) -> Inserter:
    """The method of the form on its backbone, as ``harmonize`` has it."""
    cfg = compose_options(params)
    options = OmegaConf.to_container(cfg.method, resolve=True)
    check_places(options)
    backbone = load_backbone(cfg)
    return Inserter(build(options, backbone), backbone, cfg.seed, cfg.feather, cfg.raw, cfg.detail, cfg.shadow, say)


def compose_options(params: Mapping[str, Any]) -> DictConfig:
    """The configuration of ``harmonize`` with the values of the form. UserError for an unknown method or backbone."""
    method = check_choice(params.get("method") or METHOD, list_methods())
    model = check_choice(params.get("model") or MODEL, list_models())
    numbers = {"steps": STEPS, "seed": SEED} | {n: params[n] for n in ("steps", "seed") if params.get(n) is not None}
    with COMPOSING:
        words = [f"method={method}", f"model={model}", *(f"{name}={int(value)}" for name, value in numbers.items())]
        return compose("harmonize", words)


def show_results(dataset: fo.Dataset, field: str, requests: Mapping[str, Request]) -> None:
    """Write the paths of composites and results into fields that the App can show in place of the photographs."""
    for name, picture in ((f"{field}{COMPOSITE}", "composite"), (field, "harmonized")):
        if not dataset.has_sample_field(name):
            dataset.add_sample_field(name, fo.StringField, info=MARK)
        paths = {id_: str(request.folder / f"{picture}.png") for id_, request in requests.items()}
        flatten(dataset).set_values(name, paths, key_field="id")
        if name not in dataset.app_config.media_fields:
            dataset.app_config.media_fields.append(name)
    dataset.save()
