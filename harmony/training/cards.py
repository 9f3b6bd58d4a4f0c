"""Model cards: templates of ``assets/cards`` filled with what a run folder says.

A run folder may come from a stranger, so the templates show its texts through ``code`` and ``cell`` alone, and shell
commands are quoted.
"""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from harmony.models.backbone import ASSETS, backbone_path
from harmony.training.run_folder import RunFolder, select

TEMPLATES = ASSETS / "cards"
DEFAULT_BACKBONE = "tiny"  # what commands take without model.path


# --- text that may come from a stranger


def one_line(text: object) -> str:
    """Text without line breaks, ``unknown`` for none."""
    return " ".join(str("" if text is None else text).splitlines()) or "unknown"


def cell(text: object) -> str:
    """Text for a paragraph or a table cell, on one line, with the characters escaped that Markdown or HTML read."""
    return re.sub(r"([\\`*|<>\[\]&])", r"\\\1", one_line(text))


def code(text: object) -> str:
    """Text as inline code, on one line; its fence is longer than any run of backticks in it."""
    line = one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


# --- what cards have in common


def render(templates: Sequence[str], data: ModelCardData, **values: object) -> str:
    """The card that ``templates``, one behind another, make of metadata and values."""
    template = "".join((TEMPLATES / f"{name}.md").read_text(encoding="utf-8") for name in templates)
    return str(ModelCard.from_template(data, template_str=template, code=code, cell=cell, repr=repr, **values)) + "\n"


def metadata(license: str, backbone: str, relation: str, tags: Sequence[str]) -> ModelCardData:
    """The metadata block; a backbone on the hub is the base model, a local one has no page to link to."""
    base = {"base_model": backbone, "base_model_relation": relation} if is_hub_id(backbone) else {}
    return ModelCardData(
        license=license, library_name="diffusers", pipeline_tag="image-to-image", tags=list(tags), **base
    )


def is_hub_id(backbone: str) -> bool:
    """Whether a backbone is owner/name on the hub, not a folder here."""
    try:
        validate_repo_id(backbone)
    except HFValidationError:
        return False
    return "/" in backbone and not os.path.exists(backbone_path(backbone))


def backbone_license(backbone: str) -> str:
    """The license that the card of a local backbone states, ``unknown`` where there is none."""
    card = Path(backbone_path(backbone)) / "README.md"
    try:
        stated = (metadata_load(card) or {}).get("license") if card.is_file() else None
    except (OSError, ValueError, YAMLError):
        stated = None
    return stated if isinstance(stated, str) else "unknown"


def model_option(backbone: str) -> str:
    """What a command must be told of the backbone; nothing of the default one."""
    return "" if backbone == DEFAULT_BACKBONE else shlex.quote(one_line(f"model.path={backbone}"))


def training_values(run: RunFolder, facts: Mapping, without: str) -> dict[str, object]:
    """What the template ``training`` shows. ``facts``: those of ``hint.json`` or ``backbone.json``."""
    numbers, words, limit = run.metrics, run.fact("command", list), run.option("evaluate.limit")
    return {
        "backbone": fact(facts, "backbone"),
        "hashes": {part: fact(facts, part) for part in ("unet", "vae") if part in facts},
        "command": words and one_line(f"python -m harmony.fit {shlex.join(map(str, words[1:]))}"),
        "dataset": run.option("dataset.name"),
        "manifest": run.fact("manifest"),
        "steps": run.option("trainer.max_steps"),
        "batch": run.option("data.batch_size"),
        "seed": run.option("seed"),
        "device": run.fact("device"),
        "seconds": run.fact("wall_time_s"),
        "torch": run.fact("versions.torch"),
        "commit": run.fact("git.commit"),
        "rows": [(n, numbers[f"baseline/{n}"], numbers[n]) for n in sorted(numbers) if f"baseline/{n}" in numbers],
        "without": without,
        "count": run.fact("count") or ("all" if limit is None else limit),
        "split": run.option("evaluate.split"),
        "sampling_steps": run.option("evaluate.steps"),
        "guidance": run.option("evaluate.guidance"),
        "sampling_seed": run.option("evaluate.seed"),
        "protocol": run.fact("protocol"),
    }


def fact(facts: Mapping, name: str) -> str:
    return select(facts, name, str, "hint.json or backbone.json") or "unknown"


# --- one function a card


def controlnet_card(run: RunFolder, facts: Mapping, grid: bool, license: str | None) -> str:
    """The card of a ControlNet; ``facts`` are those of ``hint.json``."""
    backbone, branch = fact(facts, "backbone"), facts.get("branch")
    license = license or backbone_license(backbone)
    arguments = "".join(f", {name}={value!r}" for name, value in facts.get("parameters", {}).items())
    return render(
        ("controlnet", "training"),
        metadata(license, backbone, "adapter", ("controlnet", "inpainting", "image-harmonization")),
        **training_values(run, facts, "without the ControlNet"),
        branch=branch,
        call=f'hint("{branch}", image, mask{arguments})',
        model=model_option(backbone),
        grid=grid,
    )


def painter_card(run: RunFolder, facts: Mapping, all_tokens: bool, tower: bool, grid: bool, license: str | None) -> str:
    """The card of a Paint by Example; ``facts`` are those of ``backbone.json``. ``tower``: CLIP's is among the
    weights.
    """
    backbone = fact(facts, "backbone")
    license = license or backbone_license(backbone)
    return render(
        ("paint_by_example", "training"),
        metadata(license, backbone, "finetune", ("inpainting", "paint-by-example")),
        **training_values(run, facts, "without an exemplar"),
        all_tokens=all_tokens,
        tower=tower,
        model=model_option(backbone),
        grid=grid,
    )


def backbone_card(
    name: str,
    parts: Sequence[str],
    scenes: int,
    photographs: str,
    figures: Sequence[tuple[str, float]],
    pictures: Sequence[str],
) -> str:
    """The card of a backbone of ours; ``parts``: what was trained, in this order."""
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
        parts=parts,
        scenes=scenes,
        photographs=photographs,
        figures=figures,
        pictures=pictures,
    )
