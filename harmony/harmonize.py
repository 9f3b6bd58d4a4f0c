"""``python -m harmony.harmonize``: put one object into one photograph so that it belongs there.

Pixels outside the hole (the mask and a small rim) stay as they are, bit for bit.
  background=B.jpg foreground=F.jpg mask=M.png             all of one size
  background=B.jpg foreground=F.png box=x0,y0,x1,y1        a cut-out with alpha, placed in a box
  composite=C.jpg mask=M.png                               the object has been pasted already
  dir=FOLDER                                               many, from index.csv or composite/ and mask/
  method=paint_by_example background=B.jpg reference=R.jpg mask=M.png    what R shows, painted where M is white
  method=zero_shot composite=C.jpg mask=M.png              by words for two lights, with nothing trained
"""

import csv
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from harmony.cli.config import entry, literal, make_folder, new_folder, unfinished
from harmony.core.errors import UserError
from harmony.core.files import write_json, write_text
from harmony.data.captions import caption_images
from harmony.data.descriptions import Description, VisionLanguageModel, parsed, read_descriptions
from harmony.methods.insert import (
    Branch,
    Insertion,
    Result,
    asked_settings,
    check_sizes,
    cut,
    fill_composites,
    load_branch,
    working_square,
)
from harmony.methods.paint_by_example import fill_by_example
from harmony.methods.zero_shot import Parts, Round, best, rounds, run_together, word_scorer
from harmony.models.backbone import Kit
from harmony.models.controlnet import net_hash
from harmony.models.judge import evaluator, judge_hash
from harmony.models.paint_by_example import load_painter, painter_hash
from harmony.models.timing import blocks, now, timed
from harmony.pixels.composites import copy_paste, place, poisson, reinhard
from harmony.pixels.exemplars import cut_out, exemplar
from harmony.pixels.images import crop_resize, grid, open_image, paste_crop, read_image, resize, sha256, write_image
from harmony.pixels.masks import OBJECT, TEST_RADIUS, read_mask
from harmony.sampling.ddim import timesteps
from harmony.sampling.guidance import Settings

PATHS = (
    "dir",
    "background",
    "foreground",
    "composite",
    "mask",
    "region",
    "reference",
    "painter",
    "controlnet",
    "structure",
    "output",
    "model.path",
    "prompts",
    "describer",
    "evaluator",
    "clip",
)
PICTURES = ("background", "foreground", "composite", "mask", "box", "region", "reference")
READ = (*PICTURES, "prompts")  # what may be a file
NUMBERS = {
    "steps": int,
    "batch": int,
    "seed": int,
    "rounds": int,
    "guidance": float,
    "lambda_l": float,
    "lambda_h": float,
    "feather": float,
}
GUIDANCE = {"controlnet": 1.0, "paint_by_example": 3.0, "zero_shot": 2.5}  # by method, where none is given
MADE_OF = "made_of.json"  # beside the pictures: that they are all there, and of what
SHEET_SIDE = 384  # pixels: the longer side of a picture on the contact sheet


@dataclass(frozen=True)
class Inputs:
    """``background``, ``foreground`` uint8 H x W x 3, ``mask`` and (or None) ``region`` bool H x W, all of one size.

    ``reference`` uint8 of any size: the exemplar, where it is a picture of its own.
    """

    background: np.ndarray
    foreground: np.ndarray
    mask: np.ndarray
    region: np.ndarray | None
    reference: np.ndarray | None = None


def overrides(words: list[str]) -> list[str]:
    """The command line for Hydra: paths and prompts are text, and ``box=1,2,3,4`` is a list rather than a sweep."""
    boxed = [f"box=[{w[4:]}]" if w.startswith("box=") and "," in w and "[" not in w else w for w in words]
    return [literal(word, (*PATHS, "prompt")) for word in boxed]


def size(image: np.ndarray) -> tuple[int, int]:
    return image.shape[1], image.shape[0]


def alpha_mask(path: str) -> np.ndarray:
    """Bool H x W: where a cut-out is opaque. UserError for a picture without transparency."""
    image = open_image(path)
    opaque = np.asarray(image.convert("RGBA"))[..., 3] > OBJECT
    if opaque.all():
        raise UserError(f"{path} has no transparent background and no mask was given; add mask=PATH")
    if not opaque.any():
        raise UserError(f"{path} is transparent everywhere; give the cut-out with its object opaque")
    return opaque


def on_white(path: str) -> np.ndarray:
    """A picture, uint8 H x W x 3, on white where it is transparent."""
    pixels, opaque = read_image(path), np.asarray(open_image(path).convert("RGBA"))[..., 3:] / 255
    return np.rint(opaque * pixels + (1 - opaque) * 255).astype(np.uint8)


def read_box(box: ListConfig | None) -> tuple[float, ...] | None:
    if box is None:
        return None
    numbers = OmegaConf.is_list(box) and len(box) == 4 and all(type(v) in (int, float) for v in box)
    if not numbers:
        raise UserError(f"box={box}: give four numbers, box=x0,y0,x1,y1, in pixels of the background")
    return tuple(box)


def read_inputs(cfg: DictConfig) -> Inputs:
    """Read, place and check what the command line names. UserError in one line for anything that does not fit."""
    if cfg.reference is not None:
        return read_reference(cfg)
    if (cfg.composite is None) == (cfg.background is None) or (cfg.background is None) != (cfg.foreground is None):
        raise UserError("give background=PATH and foreground=PATH, or composite=PATH alone, which has the object in it")
    box = read_box(cfg.box)
    if cfg.composite is not None and box is not None:
        raise UserError("box= places a foreground of its own; with composite= the object stays where it is")
    background = read_image(cfg.composite or cfg.background)
    foreground = background if cfg.composite else read_image(cfg.foreground)
    mask = read_mask(cfg.mask, size(foreground)) if cfg.mask else alpha_mask(cfg.composite or cfg.foreground)
    if box is not None:
        foreground, mask = place(foreground, mask, box, *size(background))
    region = read_mask(cfg.region, size(background)) if cfg.region else None
    check_sizes(background, foreground=foreground, mask=mask, region=region)
    return Inputs(background, foreground, mask, region)


def read_reference(cfg: DictConfig) -> Inputs:
    """Background, where to paint, and what: the object of the exemplar is not cut out."""
    if cfg.method != "paint_by_example":
        raise UserError("reference= goes with method=paint_by_example; a ControlNet wants foreground= or composite=")
    others = any(cfg[name] is not None for name in ("foreground", "composite", "box"))
    if cfg.background is None or cfg.mask is None or others:
        raise UserError("reference= wants background=PATH and mask=PATH, white where to paint, and nothing else")
    background, reference = read_image(cfg.background), on_white(cfg.reference)
    mask = read_mask(cfg.mask, size(background))
    region = read_mask(cfg.region, size(background)) if cfg.region else None
    return Inputs(background, background, mask, region, reference)


def check_numbers(cfg: DictConfig) -> None:
    if cfg.method not in GUIDANCE:
        raise UserError(f"method={cfg.method}: choose one of {', '.join(GUIDANCE)}")
    if cfg.guidance is None:
        cfg.guidance = GUIDANCE[cfg.method]
    for name, kind in NUMBERS.items():
        if type(cfg[name]) not in (int, kind):
            raise UserError(f"{name}={cfg[name]}: give {'a whole number' if kind is int else 'a number'}")
    for name in ("rounds", "batch"):
        if cfg[name] < 1:
            raise UserError(f"{name}={cfg[name]}: must be at least 1")
    if cfg.method == "zero_shot" and cfg.region is not None:
        raise UserError("region= goes with methods that paint anew; method=zero_shot changes the object alone")
    near = asked_settings(cfg)
    if cfg.method == "zero_shot" and near != Settings(near.steps, near.guidance, near.seed):
        raise UserError(
            "method=zero_shot inverts and samples by DDIM: leave out solver=, guided=, encoder_every=, graphs="
            " and compile="
        )
    timesteps(cfg.steps)  # refuses a number of steps that there cannot be


def load_branches(cfg: DictConfig, kit: Kit) -> list[Branch]:
    """The ControlNets that are asked for, each with the weight of what it sees."""
    weights = {"color": cfg.lambda_l, "structure": cfg.lambda_h, "raw": cfg.lambda_l}
    branches = [load_branch(cfg.controlnet, kit, weights, cfg.branch)] if cfg.controlnet else []
    if cfg.structure:
        second = load_branch(cfg.structure, kit, weights, "structure")
        if second.name != "structure" or any(b.name == "structure" for b in branches):
            raise UserError(f"structure={cfg.structure} sees {second.name}: give one ControlNet of each branch")
        branches.append(second)
    return branches


def caption(kit: Kit, path: Path) -> str:
    """What the kit's captioner says of a picture; an empty prompt, and a line that says so, where the kit has none."""
    try:
        captioner, processor = kit.captioner, kit.processor
    except UserError as error:
        print(f"the prompt is empty, add prompt=...: {error}")
        return ""
    return next(caption_images([("composite", path)], captioner, processor, 1, kit.device))[1]


def sheet(inputs: Inputs, result: Result, image: np.ndarray) -> np.ndarray:
    """Contact sheet: the whole pictures above, the square that the model worked on below.

    Where an exemplar was painted there is no composite: the exemplar stands in its place.
    """
    background, reference = inputs.background, inputs.reference
    scale = min(1, SHEET_SIDE / max(background.shape[:2]))
    width, height = (max(1, round(scale * length)) for length in size(background))
    shown = [background, result.composite, image]
    whole = [resize(picture, width, height) for picture in shown]
    close = [crop_resize(picture, result.crop, min(width, height)) for picture in shown]
    if reference is not None:
        whole[1] = close[1] = resize(reference, *(min(width, height),) * 2)
    return grid([whole, close], ["background", "composite" if reference is None else "exemplar", "harmonized"])


def compare(inputs: Inputs, image: np.ndarray) -> list[np.ndarray]:
    """Small pictures of the working square: composite, harmonized, and the composites without a network.

    Poisson blending wants the object's old surroundings or its new ones: a composite has neither, its place stays grey.
    """
    background, foreground, mask = inputs.background, inputs.foreground, inputs.mask
    recoloured = copy_paste(background, reinhard(foreground, mask, background), mask)
    whole = foreground is background
    blended = np.full_like(background, 128) if whole else poisson(background, foreground, mask)
    pictures = [copy_paste(background, foreground, mask), image, recoloured, blended]
    crop = working_square(mask, inputs.region)
    return [crop_resize(picture, crop, SHEET_SIDE // 2) for picture in pictures]


@dataclass(frozen=True)
class Job:
    """One composite on its way: what is asked for it, what was read, and the square to be worked on."""

    cfg: DictConfig
    inputs: Inputs
    insertion: Insertion

    def paste(self, raw: np.ndarray, detail: bool = False) -> Result:
        return self.insertion.paste(raw, self.cfg.feather, detail)


@dataclass(frozen=True)
class Method:
    """``make`` harmonizes a batch of composites by ``kit``, each as it would be alone; ``radius`` (of the inputs) is
    that of the hole around the mask, px at 512. ``parts`` are the networks that it runs, by the names under which their
    time is told; ``words``: whether it wants a prompt.
    """

    make: Callable[[Sequence[Job]], list[Result]]
    kit: Kit
    parts: dict[str, list[torch.nn.Module]]
    words: bool = False
    radius: Callable[[Inputs], float] = lambda inputs: TEST_RADIUS

    def modules(self) -> dict[str, list[torch.nn.Module]]:
        """All parts, loaded."""
        kit = self.kit
        text = {"text encoder": [kit.text_encoder]} if self.words else {}
        return {"UNet": blocks(kit.unet), **self.parts, "VAE": [kit.vae.encoder, kit.vae.decoder], **text}

    def job(self, cfg: DictConfig, inputs: Inputs) -> Job:
        pictures = (inputs.background, inputs.foreground, inputs.mask, inputs.region)
        return Job(cfg, inputs, cut(self.kit.resolution, *pictures, self.radius(inputs)))


def by_controlnets(cfg: DictConfig) -> Method:
    """Load kit and ControlNets, say what they are, and give what harmonizes composites."""
    kit = instantiate(cfg.model).to("cuda" if torch.cuda.is_available() else "cpu")
    branches = load_branches(cfg, kit)
    seen = " and ".join(f"{b.name} (weight {b.weight:g})" for b in branches) or "no ControlNet, plain inpainting"
    print(f"kit {kit.name} at {kit.resolution} px on {kit.device.type}, {seen}")

    def make(jobs: Sequence[Job]) -> list[Result]:
        squares, prompts = [job.insertion.square for job in jobs], [job.cfg.prompt for job in jobs]
        raws = fill_composites(kit, squares, prompts, branches, asked_settings(cfg))
        return [job.paste(raw) for job, raw in zip(jobs, raws, strict=True)]

    return Method(make, kit, {f"{b.name} ControlNet": blocks(b.net) for b in branches}, words=True)


def by_example(cfg: DictConfig) -> Method:
    """Load Paint by Example and give what paints exemplars: the reference, or the instance's own box."""
    kit = instantiate(cfg.model).to("cuda" if torch.cuda.is_available() else "cpu")
    painter = load_painter(cfg.painter, kit)
    kit = painter.kit
    print(f"Paint by Example on {kit.name} at {kit.resolution} px, {kit.device.type}, guidance {cfg.guidance:g}")

    def shown(inputs: Inputs) -> np.ndarray:
        picture = cut_out(inputs.foreground, inputs.mask) if inputs.reference is None else inputs.reference
        return exemplar(picture, painter.encoder.size)

    def make(jobs: Sequence[Job]) -> list[Result]:
        images = [job.insertion.square.background for job in jobs]
        holes = [job.insertion.square.hole for job in jobs]
        exemplars = [shown(job.inputs) for job in jobs]
        raws = fill_by_example(painter, images, exemplars, holes, asked_settings(cfg), [0] * len(jobs))
        return [job.paste(raw) for job, raw in zip(jobs, raws, strict=True)]

    def radius(inputs: Inputs) -> float:
        return TEST_RADIUS if inputs.reference is None else 0  # a mask that was painted by hand is the hole itself

    return Method(make, kit, {"exemplar encoder": [painter.encoder]}, radius=radius)


def given_words(cfg: DictConfig) -> list[Description] | None:
    """The descriptions of the command line, or of its file; None where a model looks for them."""
    if cfg.prompts is None:
        return None
    given = str(cfg.prompts)
    name = Path(cfg.composite or cfg.foreground or cfg.dir).stem
    return read_descriptions(Path(given), name) if given.endswith(".json") else parsed(given)


def by_zero_shot(cfg: DictConfig) -> Method:
    """Load kit, describer and evaluator, and give what harmonizes one composite in rounds."""
    kit = instantiate(cfg.model).to("cuda" if torch.cuda.is_available() else "cpu")
    score = evaluator(cfg.evaluator, kit.device)
    parts = Parts(cfg.steps, cfg.guidance, **instantiate(cfg.zero_shot, _convert_="all"))
    if parts.deep is not None:
        parts.deep.requires_grad_(False).eval().to(kit.device)
    judged = "each round is made" if score is None else f"{cfg.evaluator} decides"
    where = f"{kit.name} at {kit.resolution} px, {kit.device.type}, guidance {cfg.guidance:g}"
    print(f"zero-shot on kit {where}, {cfg.rounds} rounds at most, {judged}")
    describe = None
    if cfg.prompts is None:
        by_clip = cfg.describer == "words"
        describe = word_scorer(kit, cfg.clip) if by_clip else VisionLanguageModel(cfg.describer, kit.device)

    def words(job: Job) -> list[Description]:
        square = job.insertion.square
        descriptions = given_words(job.cfg) or describe(square.instance, square.mask)
        for n, d in enumerate(descriptions):
            print(f"description {n}: {d.object!r}, from {d.foreground!r} to {d.background!r}")
        return descriptions

    def make(jobs: Sequence[Job]) -> list[Result]:
        masks = [job.insertion.square.mask for job in jobs]
        told = [words(job) for job in jobs]
        asked = [
            rounds(job.insertion.square.instance, mask, len(w), cfg.rounds, score, say_round)
            for job, mask, w in zip(jobs, masks, told, strict=True)
        ]
        outcomes = run_together(kit, asked, told, masks, parts)
        return [
            replace(job.paste(best(outcome).image, parts.detail), rounds=outcome)
            for job, outcome in zip(jobs, outcomes, strict=True)
        ]

    return Method(make, kit, {}, radius=lambda inputs: 0)


def say_round(made: Round) -> None:
    score = "" if made.score is None else f", score {made.score:.3f}"
    print(f"round {made.number}, description {made.prompt}{score}: {made.decision}", flush=True)


def write_rounds(result: Result, folder: Path) -> dict[str, Path]:
    """The rounds of a result: their pictures, ``rounds.json`` (score and decision of each) and a film strip."""
    facts = [{key: value for key, value in vars(r).items() if key != "image"} for r in result.rounds]
    write_json(folder / "rounds.json", facts)
    for r in result.rounds:
        write_image(make_folder(folder / "rounds") / f"{r.number:02d}_{r.prompt}.png", r.image)
    pictures = [crop_resize(result.composite, result.crop, len(result.raw)), *(r.image for r in result.rounds)]
    titles = ["composite", *(f"{r.number}" + ("" if r.score is None else f": {r.score:.2f}") for r in result.rounds)]
    write_image(folder / "film.png", grid([pictures], titles))
    return {"rounds": folder / "rounds.json", "film": folder / "film.png"}


METHODS = {"controlnet": by_controlnets, "paint_by_example": by_example, "zero_shot": by_zero_shot}


def shares(spent: Counter, total: float, count: int) -> str:
    """Seconds for ``count`` composites, and what part of them each network took."""
    parts = spent + Counter({"the rest": total - sum(spent.values())})
    several = f" for {count} composites" if count > 1 else ""
    return f"{total:.2f} s{several}: {', '.join(f'{name} {100 * s / total:.0f} %' for name, s in parts.most_common())}"


def harmonize_jobs(jobs: Sequence[Job], method: Method, folders: Sequence[Path]) -> list[dict[str, Path]]:
    """Harmonize a batch of composites, each into its folder; the files of each. ``made_of.json`` is written last."""
    each = list(zip(jobs, folders, strict=True))
    asked = [made_of(job.cfg) for job in jobs]
    for job, folder in each:
        (folder / MADE_OF).unlink(missing_ok=True)
        write_image(folder / "composite.png", job.insertion.composite)
    for job, folder in each if method.words else ():
        if job.cfg.prompt is None:
            job.cfg.prompt = caption(method.kit, folder / "composite.png")
        print(f"prompt {job.cfg.prompt!r}")
    modules, device = method.modules(), method.kit.device
    began = now(device)
    with timed(modules, device) as spent:
        results = method.make(jobs)
        ended = now(device)
    print(shares(spent, ended - began, len(jobs)))
    files = [write_result(job, result, folder) for (job, folder), result in zip(each, results, strict=True)]
    for folder, facts in zip(folders, asked, strict=True):
        write_json(folder / MADE_OF, facts)
    return files


def write_result(job: Job, result: Result, folder: Path) -> dict[str, Path]:
    """All pictures of one result; its configuration beside them."""
    files = {name: folder / f"{name}.png" for name in ("harmonized", "raw", "composite", "hole", "sheet")}
    image = paste_crop(job.inputs.background, result.raw, result.crop) if job.cfg.raw else result.image
    write_image(files["raw"], result.raw)
    write_image(files["hole"], result.hole)
    write_image(files["sheet"], sheet(job.inputs, result, image))
    write_image(files["harmonized"], image)
    if result.rounds:
        files |= write_rounds(result, folder)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(job.cfg, resolve=True))
    return files


def made_of(cfg: DictConfig) -> dict:
    """What was asked, and the sha256 of the pictures and the weights that it names."""
    hashes = {name: sha256(cfg[name]) for name in READ if isinstance(cfg[name], str) and Path(cfg[name]).is_file()}
    if cfg.method == "paint_by_example":
        hashes["painter"] = painter_hash(cfg.painter)
    elif cfg.method == "zero_shot":
        hashes["evaluator"] = judge_hash(cfg.evaluator)
    else:
        hashes |= {name: net_hash(cfg[name]) for name in ("controlnet", "structure") if cfg[name]}
    asked = OmegaConf.to_container(cfg, resolve=True)
    return {"asked": {k: v for k, v in asked.items() if k not in ("output", "paths", "dir", "batch")}, "sha256": hashes}


def finished(cfg: DictConfig, folder: Path) -> bool:
    """Whether ``folder`` holds what ``cfg`` asks for, of the same pictures and weights."""
    file = folder / MADE_OF
    return file.exists() and json.loads(file.read_text()) == made_of(cfg)


def listed(folder: Path) -> list[tuple[str, dict]]:
    """(id, settings) of each composite of a folder: the rows of ``index.csv``, or else ``composite/`` with ``mask/``.

    A row names ``composite`` and ``mask``, or ``background``, ``foreground``, ``foreground_mask`` and ``bbox`` (x0 y0
    x1 y1 in pixels of the background), paths relative to the folder.
    """
    if not folder.is_dir():
        raise UserError(f"dir={folder}: there is no such folder")
    if not (folder / "index.csv").exists():
        pairs = [(p, q) for p in sorted(folder.glob("composite/*")) for q in folder.glob(f"mask/{p.stem}.*")]
        if not pairs:
            raise UserError(f"{folder} has neither index.csv nor composite/NAME with mask/NAME: nothing to harmonize")
        return distinct(folder, [(p.stem, {"composite": str(p), "mask": str(q)}) for p, q in pairs])
    items, short = [], []
    with open(folder / "index.csv", newline="", encoding="utf-8") as file:
        for i, row in enumerate(csv.DictReader(file)):
            name, at = (
                row.get("id") or str(i),
                {key: str(folder / value) for key, value in row.items() if key and value},
            )
            if row.get("composite") and row.get("mask"):
                items.append((name, {"composite": at["composite"], "mask": at["mask"]}))
            elif all(row.get(key) for key in ("background", "foreground", "foreground_mask", "bbox")):
                box = [float(v) for v in row["bbox"].replace(",", " ").split()]
                places = {"background": at["background"], "foreground": at["foreground"], "mask": at["foreground_mask"]}
                items.append((name, places | {"box": box}))
            else:
                short.append(name)
    if short:
        print(f"{len(short)} rows name neither a composite with its mask nor a foreground with mask and box: {short}")
    return distinct(folder, items)


def distinct(folder: Path, items: list[tuple[str, dict]]) -> list[tuple[str, dict]]:
    """``items`` themselves. UserError unless each id is a name of a folder that no other has."""
    names = Counter(name for name, _ in items)
    for name, count in names.items():
        if count > 1 or name in ("", "..") or Path(name).name != name:
            raise UserError(f"{folder}: '{name}' must be a file name that no other composite has")
    return items


def folder_of(cfg: DictConfig) -> Path:
    """Where the results go: ``output``, the newest unfinished folder of the same ``dir=`` command, or a new one."""
    if cfg.output:
        return make_folder(cfg.output)
    parent = Path(cfg.paths.runs).resolve() / "harmonize"
    if cfg.dir is None:
        return new_folder(parent)
    text = OmegaConf.to_yaml(cfg, resolve=True)
    folder = unfinished(parent, text) or new_folder(parent)
    write_text(folder / "config.yaml", text)
    return folder


def many(cfg: DictConfig, method: Method, folder: Path) -> dict[str, Path]:
    """Harmonize every composite of ``cfg.dir`` into a folder of its own, and draw them on one contact sheet.

    ``cfg.batch`` at a time; what ``folder`` holds already is not made again.
    """
    items = {name: OmegaConf.merge(cfg, settings) for name, settings in listed(Path(cfg.dir))}
    todo = [name for name, own in items.items() if not finished(own, folder / name)]
    if len(todo) < len(items):
        print(f"{len(items) - len(todo)} of {len(items)} composites are there already")
    refused, began = set(), time.monotonic()
    for i in range(0, len(todo), cfg.batch):
        batch = todo[i : i + cfg.batch]
        refused |= harmonize_batch({name: items[name] for name in batch}, method, folder)
        done = i + len(batch)
        rate = done / (time.monotonic() - began)
        left = (len(todo) - done) / rate
        print(f"{batch[-1]}: {done}/{len(todo)}, {rate:.2f} a second, {left:.0f} s left", flush=True)
    kept = {name: own for name, own in items.items() if name not in refused}
    if not kept:
        raise UserError(f"none of the {len(items)} composites in {cfg.dir} could be harmonized: see the lines above")
    rows = [compare(read_inputs(own), read_image(folder / name / "harmonized.png")) for name, own in kept.items()]
    write_image(folder / "sheet.png", grid(rows, ["composite", "harmonized", "reinhard", "poisson"]))
    write_json(folder / "metrics.json", {"composites": len(rows), "left_out": len(items) - len(rows)})
    return {"sheet": folder / "sheet.png"}


def harmonize_batch(items: dict[str, DictConfig], method: Method, folder: Path) -> set[str]:
    """Harmonize some composites of a folder together; the names of those that could not be, each with a line."""
    jobs, refused = {}, set()
    for name, own in items.items():
        try:
            jobs[name] = method.job(own.copy(), read_inputs(own))
        except UserError as error:
            print(f"{name} left out: {error}")
            refused.add(name)
    if not jobs:
        return refused
    try:
        harmonize_jobs(list(jobs.values()), method, [make_folder(folder / name) for name in jobs])
    except UserError as error:
        if len(jobs) > 1:  # which of them it was shows when each is alone
            return refused.union(*(harmonize_batch({name: items[name]}, method, folder) for name in jobs))
        print(f"{', '.join(jobs)} left out: {error}")
        return refused | {*jobs}
    return refused


@entry("harmonize", read=overrides)
def main(cfg: DictConfig) -> None:
    """Harmonize one composite or a folder of them; every run writes a folder of its own."""
    check_numbers(cfg)
    if cfg.dir is None:
        read_inputs(cfg)  # bad input is refused before any weights are loaded
        given_words(cfg)
    elif own := [name for name in PICTURES if cfg[name] is not None]:
        raise UserError(f"dir= brings pictures of its own: leave out {', '.join(own)}")
    method = METHODS[cfg.method](cfg)
    folder = folder_of(cfg)
    if cfg.dir is None:
        (files,) = harmonize_jobs([method.job(cfg, read_inputs(cfg))], method, [folder])
    else:
        files = many(cfg, method, folder)
    print(*files.values(), sep="\n")


if __name__ == "__main__":
    main()
