"""Renders model cards: the templates of ``assets/cards`` with the values of a run folder.

A run folder may come from a stranger, so the templates show its texts only by ``code`` and ``cell``, and shell commands
are quoted.
"""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load
from yaml import YAMLError

from harmony.core.hub import is_repository
from harmony.models.shipped import ASSETS, backbone_path
from harmony.training.checkpoints import Facts, describe
from harmony.training.run_folder import RunFolder, select

TEMPLATES = ASSETS / "cards"
DEFAULT_BACKBONE = "tiny"  # of commands without model.path


# --- text that may come from a stranger


def join_lines(text: object) -> str:
    """Text without line breaks; ``unknown`` for an empty text."""
    return " ".join(str("" if text is None else text).splitlines()) or "unknown"


def escape_cell(text: object) -> str:
    """Text for a paragraph or a table cell, on one line, with the special characters of Markdown and HTML escaped."""
    return re.sub(r"([\\`*|<>\[\]&])", r"\\\1", join_lines(text))


def format_code(text: object) -> str:
    """Text as inline code, on one line; its fence is longer than any run of backticks in it."""
    line = join_lines(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


# --- parts of all cards


def render(templates: Sequence[str], data: ModelCardData, **values: object) -> str:
    """The card that the joined ``templates`` make of metadata and values."""
    template = "".join((TEMPLATES / f"{name}.md").read_text(encoding="utf-8") for name in templates)
    functions = {"code": format_code, "cell": escape_cell, "repr": repr}
    return f"{ModelCard.from_template(data, template_str=template, **functions, **values)}\n"


def make_metadata(license: str, backbone: str, relation: str, tags: Sequence[str]) -> ModelCardData:
    """The metadata block; a backbone on the hub becomes the base model, a local one has no page to link to."""
    base = {"base_model": backbone, "base_model_relation": relation} if is_hub_id(backbone) else {}
    return ModelCardData(
        license=license, library_name="diffusers", pipeline_tag="image-to-image", tags=list(tags), **base
    )


def is_hub_id(backbone: str) -> bool:
    """Whether a backbone is owner/name on the hub and no local folder."""
    return is_repository(backbone) and not os.path.exists(backbone_path(backbone))


def read_license(backbone: str) -> str:
    """The license in the card of a local backbone; ``unknown`` where there is none."""
    card = Path(backbone_path(backbone)) / "README.md"
    try:
        license = (metadata_load(card) or {}).get("license") if card.is_file() else None
    except (OSError, ValueError, YAMLError):
        license = None
    return license if isinstance(license, str) else "unknown"


def format_model_option(backbone: str) -> str:
    """The option of a command for the backbone; empty for the default one."""
    return "" if backbone == DEFAULT_BACKBONE else shlex.quote(join_lines(f"model.path={backbone}"))


def hide_folder(word: str) -> str:
    """A word of a command, KEY=VALUE, with FOLDER in the place of an absolute path."""
    key, sign, value = word.partition("=")
    return f"{key}=FOLDER" if sign and os.path.isabs(value) else word


def collect_training_values(
    run: RunFolder, facts: Mapping[str, Any], baseline: str, checkpoint: Facts | None, home: str | None = None
) -> dict[str, object]:
    """The values of the template ``training``; with a ``home`` on a hub no folder of this machine is named.

    ``facts``: those of ``hint.json`` or ``backbone.json``; ``checkpoint``: those of the weights. The figures of the run
    are left out where they were measured with other weights.
    """
    exported = run.checkpoint
    if checkpoint and exported and all(checkpoint[name] == exported[name] for name in ("kind", "step")):
        checkpoint = exported
    figures = run.metrics if checkpoint == exported else {}
    words, limit = run.read_fact("command", list), run.read_option("evaluate.limit")
    words = words and [hide_folder(str(word)) if home else str(word) for word in words]
    return {
        "backbone": read_fact(facts, "backbone"),
        "hashes": {part: read_fact(facts, part) for part in ("unet", "vae") if part in facts},
        "command": words and join_lines(f"python -m harmony.fit {shlex.join(words[1:])}"),
        "dataset": run.read_option("dataset.name"),
        "manifest": run.read_fact("manifest"),
        "checkpoint": checkpoint and describe(checkpoint),
        "steps": run.read_option("trainer.max_steps"),
        "batch": run.read_option("data.batch_size"),
        "seed": run.read_option("seed"),
        "device": run.read_fact("device"),
        "seconds": run.read_fact("wall_time_s"),
        "torch": run.read_fact("versions.torch"),
        "commit": run.read_fact("git.commit"),
        "rows": [(n, figures[f"baseline/{n}"], figures[n]) for n in sorted(figures) if f"baseline/{n}" in figures],
        "without": baseline,
        "count": run.read_fact("count") or ("all" if limit is None else limit),
        "split": run.read_option("evaluate.split"),
        "sampling_steps": run.read_option("evaluate.steps"),
        "guidance": run.read_option("evaluate.guidance"),
        "sampling_seed": run.read_option("evaluate.seed"),
        "protocol": run.read_fact("protocol"),
    }


def read_fact(facts: Mapping[str, Any], name: str) -> str:
    """A fact of ``hint.json`` or ``backbone.json``; ``unknown`` where it is missing."""
    return select(facts, name, str, "hint.json or backbone.json") or "unknown"


# --- one function a card


def render_controlnet_card(
    run: RunFolder,
    facts: Mapping[str, Any],
    grid: bool,
    license: str | None,
    checkpoint: Facts | None = None,
    home: str | None = None,
) -> str:
    """The card of a ControlNet; ``facts``: those of ``hint.json``; ``checkpoint``: those of the weights.

    ``home``: the repository on a hub where the card is read; None: in its folder.
    """
    backbone, branch = read_fact(facts, "backbone"), facts.get("branch")
    license = license or read_license(backbone)
    parameters = facts.get("parameters", {})
    arguments = ", image, hole" if parameters.get("surroundings") else ""
    arguments += f", cell={facts.get('cell', 8)}" if branch == "color" else ""
    arguments += "".join(f", {name}={value!r}" for name, value in parameters.items())
    return render(
        ("controlnet", "training"),
        make_metadata(license, backbone, "adapter", ("controlnet", "inpainting", "image-harmonization")),
        **collect_training_values(run, facts, "without the ControlNet", checkpoint, home),
        branch=branch,
        home=home or ".",
        is_on_hub=is_hub_id(backbone),
        surroundings=bool(parameters.get("surroundings")),
        call=f'hint("{branch}", image, mask{arguments})',
        model=format_model_option(backbone),
        grid=grid,
    )


def render_painter_card(
    run: RunFolder, facts: Mapping[str, Any], all_tokens: bool, tower: bool, grid: bool, license: str | None
) -> str:
    """The card of a Paint by Example; ``facts``: those of ``backbone.json``; ``tower``: the weights include CLIP's."""
    backbone = read_fact(facts, "backbone")
    license = license or read_license(backbone)
    return render(
        ("paint_by_example", "training"),
        make_metadata(license, backbone, "finetune", ("inpainting", "paint-by-example")),
        **collect_training_values(run, facts, "without an exemplar", run.checkpoint),
        all_tokens=all_tokens,
        tower=tower,
        model=format_model_option(backbone),
        grid=grid,
    )


def render_backbone_card(
    name: str,
    experiments: Sequence[str],
    scenes: int,
    photographs: str,
    figures: Sequence[tuple[str, float]],
    pictures: Sequence[str],
) -> str:
    """The card of one of our backbones; ``experiments``: its trainings, in their order."""
    data = ModelCardData(
        license="apache-2.0",
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=["inpainting", "stable-diffusion"],
    )
    return render(
        ("backbone",),
        data,
        name=name,
        experiments=experiments,
        scenes=scenes,
        photographs=photographs,
        figures=figures,
        pictures=pictures,
    )
