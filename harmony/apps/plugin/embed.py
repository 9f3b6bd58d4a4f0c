"""The operator that embeds pictures by the backbone's CLIP: a map of the dataset, and search by similarity."""

from collections.abc import Iterable
from importlib.util import find_spec

import fiftyone as fo
import fiftyone.brain as fob
import fiftyone.operators as foo
import numpy as np
from fiftyone.operators import types
from fiftyone.operators.operator import RiskLevel

from harmony.apps.plugin.harmonize import MODEL, compose_options, list_models
from harmony.apps.plugin.samples import (
    PATCHES,
    ComposeOperator,
    ask_choice,
    check_choice,
    flatten,
    locate_samples,
    name_samples,
    read_param,
)
from harmony.cli.methods import load_backbone
from harmony.core.errors import UserError
from harmony.metrics.similarity import Clip
from harmony.models.clip import clip_of
from harmony.pixels.color_profiles import read_in_space

BATCH = 32  # pictures at a time
METHODS = ("pca", "tsne", "umap")  # of drawing the map
FEWEST = 3  # pictures that a map can be made of
MAP, SIMILARITY = "clip_map", "clip_similarity"  # brain keys


class Embed(ComposeOperator):
    """Embeds the pictures of the view, for the App's panel of embeddings and its sorting by similarity."""

    @property
    def config(self) -> foo.OperatorConfig:
        """How the App shows the operator."""
        return foo.OperatorConfig(
            name="embed",
            label="Map and sort by CLIP",
            description="Embed the pictures by the backbone's CLIP, for the embeddings panel and sorting by similarity",
            icon="scatter_plot",
            allow_delegated_execution=True,
            risk_level=RiskLevel.MEDIUM,
        )

    def resolve_input(self, ctx: foo.ExecutionContext) -> types.Property:
        """The form: by which backbone, and how the map is drawn."""
        inputs = types.Object()
        ask_choice(inputs, "model", list_models(), MODEL, "Backbone")
        ask_choice(inputs, "method", METHODS, METHODS[0], "Map", description="umap wants the package umap-learn")
        return types.Property(inputs, view=types.View(label="Embed the pictures of the current view"))

    def run(self, ctx: foo.ExecutionContext) -> str:
        """Embed, and store both results in the dataset; pictures that cannot be read are named."""
        method = check_choice(read_param(ctx, "method", METHODS[0]), METHODS)
        if method == "umap" and not find_spec("umap"):
            raise UserError("method umap wants the package umap-learn: pip install umap-learn, or choose pca")
        cfg = compose_options({"model": ctx.params.get("model")})
        backbone = load_backbone(cfg)
        if (clip := clip_of(backbone)) is None:
            raise UserError(f"backbone {backbone.name} has no CLIP image tower: choose another one")
        is_whole = not isinstance(ctx.view, PATCHES)
        view = flatten(ctx.view) if is_whole else ctx.dataset.select(locate_samples(ctx, ctx.view.values("id")))
        embeddings, failures = embed_pictures(ctx, view, clip)
        if len(embeddings) < FEWEST:
            raise UserError(f"{len(embeddings)} pictures that can be read: a map needs {FEWEST} at least")
        view = view.select(list(embeddings), ordered=True)
        store_results(ctx.dataset, view, np.stack(list(embeddings.values())), method)
        ctx.ops.reload_dataset()
        rest = f"; cannot be read {name_samples(failures)}" if failures else ""
        return f"{len(embeddings)} pictures embedded by {clip.name} of {backbone.name}: {MAP}, {SIMILARITY}{rest}"


def embed_pictures(
    ctx: foo.ExecutionContext, view: fo.DatasetView, clip: Clip
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The embedding of each sample by its id, and the paths of those that cannot be read."""
    paths, embeddings, failures = dict(zip(*view.values(["id", "filepath"]), strict=True)), {}, []
    ids = list(paths)
    for n in range(0, len(ids), BATCH):
        ctx.set_progress(n / len(ids), f"{n} of {len(ids)} pictures")
        pictures = {}
        for id_ in ids[n : n + BATCH]:
            try:
                pictures[id_] = read_in_space(paths[id_], None).pixels
            except UserError:
                failures.append(paths[id_])
        if pictures:
            rows = clip.images(list(pictures.values())).cpu().numpy()
            embeddings |= dict(zip(pictures, rows, strict=True))
    return embeddings, failures


def store_results(dataset: fo.Dataset, view: fo.DatasetView, embeddings: np.ndarray, method: str) -> None:
    """Store the map and the index of a view, which take the place of earlier ones when both are there."""
    temporary_keys = {key: f"{key}_new" for key in (MAP, SIMILARITY)}
    common = {"embeddings": embeddings, "progress": False}
    few = {"perplexity": min(30, len(embeddings) - 1), "pca_dims": min(50, *embeddings.shape)}
    options = {"seed": 0, "verbose": False, **common, **(few if method == "tsne" else {})}
    try:
        remove_results(dataset, temporary_keys.values())  # of a process that was killed
        fob.compute_visualization(view, method=method, brain_key=temporary_keys[MAP], **options)
        fob.compute_similarity(view, brain_key=temporary_keys[SIMILARITY], backend="sklearn", **common)
        remove_results(dataset, temporary_keys)
        for key, temporary_key in temporary_keys.items():
            dataset.rename_brain_run(temporary_key, key)
    finally:
        remove_results(dataset, temporary_keys.values())


def remove_results(dataset: fo.Dataset, keys: Iterable[str]) -> None:
    """Remove the brain runs with these keys, as far as there are some."""
    for key in {*keys} & {*dataset.list_brain_runs()}:
        dataset.delete_brain_run(key)
