"""The editing bench: pictures brought back, one word changed, words learnt; every figure against a render.

Reconstruction stands between two bounds: the autoencoder's own above, plain DDIM inversion under guidance below. An
edit is measured against the render of the scene so changed, its background (outside the object of source and truth)
against the source. A learnt word is measured by views that it was not learnt from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from harmony.core.errors import UserError
from harmony.core.files import replace_file, write_text
from harmony.core.progress import MINUTE, Progress
from harmony.data.sources.editing import Case, concepts, read_cases
from harmony.data.sources.files import folder_captions
from harmony.evaluation.blocks import await_files, blocks
from harmony.evaluation.eval_sets import subsample
from harmony.evaluation.report import Report
from harmony.evaluation.tables import pictures, to_csv, to_markdown
from harmony.methods.method import fingerprint, seeds_of
from harmony.methods.prompt_editing import (
    MODES,
    Edited,
    Inversion,
    Mode,
    edit_picture,
    invert_pictures,
    plan,
    reconstruct,
    trajectories,
)
from harmony.metrics.fidelity import fmse, fpsnr, mse, psnr
from harmony.metrics.similarity import embeddings
from harmony.models.backbone import DIFFUSION, Backbone
from harmony.models.clip import clip_of
from harmony.models.textual_inversion import learn, read_word, word_file
from harmony.pixels.composites import paste_back
from harmony.pixels.images import from_model, read_image, resize, sha256
from harmony.pixels.masks import read_mask
from harmony.sampling.guidance import Settings
from harmony.sampling.null_text import denoiser, shared_null_text
from harmony.sampling.text_to_image import text_to_image

PARTS = ("reconstruction", "edits", "concepts")
ALONE = Mode(0, 0, 1, False)  # the target prompt from the same noise and null texts, attention its own
MODE_OF = {"colour": "replace", "kind": "replace", "light": "style"}  # what a user would ask for each word
DRAWS = 4  # pictures of each view that a word is judged by
ROWS = 6  # pictures on the figure


@dataclass(frozen=True)
class Item:
    """A scene at the backbone's resolution: uint8 R x R x 3, its caption, and its cases with truth and mask (bool R x
    R).
    """

    image: np.ndarray
    prompt: str
    cases: list[Case]
    truths: list[np.ndarray]
    masks: list[np.ndarray | None]


def load_items(file: Path, side: int, limit: int | None = None) -> list[Item]:
    """Up to ``limit`` scenes of an ``edits.jsonl`` with their cases."""
    root, scenes = file.parent, {}
    for case in read_cases(file):
        scenes.setdefault(case.id, []).append(case)
    items = []
    for cases in subsample(list(scenes.values()), limit):
        truths = [resize(read_image(root / case.truth), side, side) for case in cases]
        masks = [None if c.mask is None else read_mask(root / c.mask, (side, side), resize=True) for c in cases]
        items.append(Item(resize(read_image(root / cases[0].image), side, side), cases[0].source, cases, truths, masks))
    return items


class EditingStudy:
    """The study of ``experiment=editing``, with the interface of ``Comparison``.

    ``spec``: the node ``study`` of configs/evaluate.yaml; ``words``: a folder with a learnt word for each concept
    (None: their rows are left out). Pictures are made in blocks that are kept, so that the same
    command goes on and several processes share them.
    """

    def __init__(
        self,
        name: str,
        spec: dict,
        words: str | None,
        backbone: Backbone,
        file: Path,
        folder: Path,
        settings: Settings,
        seed: int = 0,
        limit: int | None = None,
        rank: int = 0,
        world: int = 1,
        clip: str | None = None,
    ):
        if unknown := set(spec["parts"]) - set(PARTS):
            raise UserError(f"study.parts={unknown.pop()}: choose among {', '.join(PARTS)}")
        self.name, self.spec, self.words, self.backbone, self.file, self.folder = (
            name,
            spec,
            words,
            backbone,
            file,
            folder,
        )
        self.settings, self.seed, self.limit, self.rank, self.world, self.notes = settings, seed, limit, rank, world, []
        self.clip = clip_of(backbone, clip)
        if self.clip is None:
            raise UserError(f"backbone {backbone.name} has no CLIP image tower: give clip=NAME/WEIGHTS of open_clip")

    @cached_property
    def items(self) -> list[Item]:
        return load_items(self.file, self.backbone.resolution, self.limit)

    @cached_property
    def made_of(self) -> dict[str, str]:
        """Hashes of all that decides the figures and is not in the configuration."""
        facts = {f"backbone/{part}": self.backbone.hash(part) for part in DIFFUSION} | {"edits": sha256(self.file)}
        return facts | {f"words/{name}": sha256(file) for name, file in self.learnt().items()}

    @property
    def made(self) -> Path:
        """Where reconstructions and edits lie; another word is no reason to make them again."""
        weights = {name: value for name, value in self.made_of.items() if not name.startswith("words/")}
        options = {name: self.spec[name] for name in ("inner", "own", "threshold", "parts")}
        return self.folder / "outputs" / fingerprint(weights, self.settings, options)[:16]

    def learnt(self) -> dict[str, Path]:
        """Name of each concept that a word was learnt for -> its file."""
        if self.words is None or "concepts" not in self.spec["parts"]:
            return {}
        names = concepts(self.file.parent)
        return {name: word_file(f"{self.words}/{name}") for name in names}

    # --- pictures

    def inverted(self, items: Sequence[Item]) -> list[Inversion]:
        s, prompts = self.settings, [item.prompt for item in items]
        images = [item.image for item in items]
        return invert_pictures(self.backbone, images, prompts, s.steps, s.guidance, self.spec["inner"])

    def reconstructions(self, items: Sequence[Item], inversions: Sequence[Inversion]) -> dict[str, list[np.ndarray]]:
        """Row -> the pictures brought back."""
        backbone, w, n = self.backbone, self.settings.guidance, self.settings.steps
        prompts = [item.prompt for item in items]
        plain = [replace(inversion, nulls=[backbone.prompt([""])] * n) for inversion in inversions]
        fast = [replace(v, nulls=[backbone.prompt([p])] * n) for v, p in zip(inversions, prompts, strict=True)]
        path, text = trajectories(backbone, [item.image for item in items], prompts, n)
        schedule = backbone.alphas_cumprod, backbone.scheduler.config.steps_offset, self.spec["inner"]
        one = shared_null_text(denoiser(backbone), path, text, backbone.prompt([""]), w, *schedule)
        shared = [replace(v, nulls=[null] * n) for v, null in zip(inversions, one.split(1), strict=True)]
        latents = torch.cat([inversion.latent for inversion in inversions])
        return {
            "autoencoder": list(from_model(backbone.decode(latents))),
            "ddim, w = 1": reconstruct(backbone, plain, prompts, 1.0),
            f"ddim, w = {w:g}": reconstruct(backbone, plain, prompts, w),
            "one null text": reconstruct(backbone, shared, prompts, w),
            "null text a step": reconstruct(backbone, inversions, prompts, w),
            "fast (null = condition)": reconstruct(backbone, fast, prompts, w),
        }

    def mode(self, case: Case) -> Mode:
        """What a user would ask for, local edits with the study's share of self-attention."""
        mode = MODES[MODE_OF[case.word]]
        return replace(mode, own=self.spec["own"]) if mode.local else mode

    def edits(self, items: Sequence[Item], inversions: Sequence[Inversion]) -> dict[str, list[np.ndarray]]:
        """Row -> the edited pictures, all cases of an item one after the other."""
        backbone, w, n = self.backbone, self.settings.guidance, self.settings.steps
        rows: dict[str, list[np.ndarray]] = {}
        for item, inversion in zip(items, inversions, strict=True):
            plain = replace(inversion, nulls=[backbone.prompt([""])] * n)
            fast = replace(inversion, nulls=[backbone.prompt([item.prompt])] * n)
            for case in item.cases:
                mode = self.mode(case)
                ways = {
                    "prompt alone": (inversion, ALONE),
                    "ddim and prompt-to-prompt": (plain, mode),
                    "fast and prompt-to-prompt": (fast, mode),
                    "null text and prompt-to-prompt": (inversion, mode),
                }
                rows.setdefault("source as it is", []).append(item.image)
                for row, (start, how) in ways.items():
                    made = edit_picture(
                        backbone, start, plan(backbone, case.source, case.target, how), w, self.spec["threshold"]
                    )
                    rows.setdefault(row, []).append(made.pictures[1])
                rows.setdefault(f"{row}, pasted", []).append(pasted(made, item.image))
        return rows

    def run(self) -> dict[str, np.ndarray]:
        """``part/row`` -> pictures N x R x R x 3, made where they are not there yet; nothing on further ranks."""
        makers = {"reconstruction": self.reconstructions, "edits": self.edits}
        makers = {part: make for part, make in makers.items() if part in self.spec["parts"]}
        jobs = [(block, self.made / f"{block.start:05d}.npz") for block in blocks(len(self.items)) if makers]
        mine = [(block, file) for block, file in jobs[self.rank :: self.world] if not file.exists()]
        progress = Progress(self.name, sum(len(block) for block, _ in mine), "scenes", per=MINUTE)
        for block, file in mine:
            items = [self.items[i] for i in block]
            inversions = self.inverted(items)
            made = {f"{part}/{r}": v for part, make in makers.items() for r, v in make(items, inversions).items()}
            store(file, made)
            progress.advance(len(block))
        await_files([file for _, file in jobs])
        if self.rank > 0 or not jobs:
            return {}
        stored = [np.load(file) for _, file in jobs]
        return {row: np.concatenate([some[row] for some in stored]) for row in stored[0].files}

    def spoken(self) -> dict[str, dict[str, list[np.ndarray]]]:
        """Concept -> ``held out`` views, and what the plain word and the learnt word give for their captions."""
        root, found, side = self.file.parent, {}, self.backbone.resolution
        learnt = self.learnt()
        for name, (_, held_out) in concepts(root).items() if learnt else ():
            word = read_word(learnt[name])
            if word.token.lower() not in self.backbone.words:
                learn(self.backbone, word)
            captions = folder_captions(held_out[0].parent)
            views = [(resize(read_image(f), side, side), captions[f.stem][0]) for f in held_out for _ in range(DRAWS)]
            prompts = [prompt for _, prompt in views]
            indices = list(range(len(views)))
            found[name] = {"held out": [image for image, _ in views]}
            for row, spoken in (("plain word", name.partition("_")[2]), ("learnt word", word.token)):
                text = self.backbone.prompt([prompt.replace("{}", spoken) for prompt in prompts])
                found[name][row] = text_to_image(self.backbone, text, self.settings, seeds_of(self.seed, indices))
        return found

    # --- figures

    def brought_back(self, made: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
        truths = [item.image for item in self.items]
        table = {}
        for row, outputs in part_of(made, "reconstruction").items():
            pairs = list(zip(outputs, truths, strict=True))
            table[row] = {"test/psnr": mean(psnr(*pair) for pair in pairs), "test/mse": mean(mse(*p) for p in pairs)}
        return table

    def changed(self, made: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
        """``<word>/<figure>``: ``psnr`` to the truth, ``fpsnr`` inside the mask, ``bg_mse`` to the source outside."""
        listed = [(item, case, t, m) for item in self.items for case, t, m in zip(item.cases, item.truths, item.masks)]
        truths = embeddings([truth for _, _, truth, _ in listed], self.clip)
        words = torch.nn.functional.normalize(self.clip.texts([c.target for _, c, _, _ in listed]).float().cpu(), dim=1)
        table = {}
        for row, outputs in part_of(made, "edits").items():
            looks = embeddings(list(outputs), self.clip)
            alike, said = 100 * (looks * truths).sum(1), 100 * (looks * words).sum(1)
            figures: dict[str, list[float]] = {}
            for y, (item, case, truth, mask), i, t in zip(outputs, listed, alike.tolist(), said.tolist(), strict=True):
                found = {"psnr": psnr(y, truth), "clip_i": i, "clip_t": t}
                if mask is not None:
                    found |= {"fpsnr": fpsnr(y, truth, mask), "bg_mse": fmse(y, item.image, ~mask)}
                for name, value in found.items():
                    figures.setdefault(f"{case.word}/{name}", []).append(value)
            table[row] = {name: mean(values) for name, values in figures.items()}
        return table

    def understood(self, spoken: dict[str, dict[str, list[np.ndarray]]]) -> dict[str, dict[str, float]]:
        """``concept/clip_i`` to the held-out view whose caption it was, ``clip_t`` to that caption in plain words."""
        table = {}
        for row in ("plain word", "learnt word") if spoken else ():
            alike, said = [], []
            for name, views in spoken.items():
                captions = folder_captions(concepts(self.file.parent)[name][1][0].parent).values()
                plain = [texts[0].replace("{}", name.partition("_")[2]) for texts in captions for _ in range(DRAWS)]
                looks, truths = (embeddings(views[which], self.clip) for which in (row, "held out"))
                words = torch.nn.functional.normalize(self.clip.texts(plain).float().cpu(), dim=1)
                alike += (looks * truths).sum(1).tolist()
                said += (looks * words).sum(1).tolist()
            table[row] = {"concept/clip_i": 100 * mean(alike), "concept/clip_t": 100 * mean(said)}
        return table

    def measure(self) -> Report:
        """The report; on other ranks than the first the share of pictures alone is made."""
        s = self.settings
        protocol = f"DDIM {s.steps} steps, guidance {s.guidance:g}, {self.spec['inner']} inner steps, seed {self.seed}"
        line = f"{self.name}: n = {len(self.items)} scenes of {self.file.parent.name}, {protocol}"
        if self.rank == 0:
            print(line, flush=True)
        if "concepts" in self.spec["parts"] and self.words is None:
            self.notes.append("concepts: left out, give words=FOLDER with a learnt word for each")
        made = self.run()
        if self.rank > 0:
            return Report()
        spoken = self.spoken()
        tables = [self.brought_back(made), self.changed(made), self.understood(spoken)]
        whole = {row: figures for table in tables for row, figures in table.items()}
        write_text(self.folder / "table.csv", to_csv(whole, "method"))
        notes = [f"{line}; clip on {self.clip.name} embeddings", *self.notes]
        shown = [to_markdown(table, "method", [], every=True) for table in tables if table]
        text = "\n".join([*shown, *notes]) + "\n"
        write_text(self.folder / "table.md", text)
        flat = {f"{row}/{name}": value for row, numbers in whole.items() for name, value in numbers.items()}
        facts = {"protocol": f"clip on {self.clip.name} embeddings", "count": len(self.items), "made_of": self.made_of}
        return Report(flat, facts | {"manifest": sha256(self.file)}, text, self.draw(made, spoken))

    def draw(self, made: dict[str, np.ndarray], spoken: dict) -> list[Path]:
        """``figure.png``: sources brought back and edited; ``concepts.png``: what the words have learnt."""
        drawn, few = [], subsample(list(range(len(self.items))), ROWS)
        back, edits = part_of(made, "reconstruction"), part_of(made, "edits")
        columns: dict[str, list[np.ndarray]] = {"source": [self.items[i].image for i in few]}
        columns |= {row: [outputs[i] for i in few] for row, outputs in back.items() if "null" in row or "ddim" in row}
        first = np.cumsum([0, *(len(item.cases) for item in self.items)])
        for n, case in enumerate(self.items[0].cases if edits else ()):
            for row, title in (("prompt alone", "alone"), ("null text and prompt-to-prompt", "edit")):
                columns[f"{case.word}: {title}"] = [edits[row][first[i] + n] for i in few]
            columns[f"{case.word}: truth"] = [self.items[i].truths[n] for i in few]
        if made:
            drawn.append(self.folder / "figure.png")
            pictures(drawn[-1], list(zip(*columns.values(), strict=True)), list(columns))
        if spoken:
            drawn.append(self.folder / "concepts.png")
            side, rows = self.backbone.resolution, []
            for name, views in spoken.items():
                seen = [resize(read_image(f), side, side) for f in concepts(self.file.parent)[name][0][:2]]
                two = [views[row][i] for row in ("held out", "plain word", "learnt word") for i in (0, DRAWS)]
                rows.append([*seen, *two])
            titles = ["learnt from"] * 2 + ["held out"] * 2 + ["plain word"] * 2 + ["learnt word"] * 2
            pictures(drawn[-1], rows, titles)
        return drawn


def pasted(made: Edited, photograph: np.ndarray) -> np.ndarray:
    """The edit as ``harmony.edit`` hands it out: outside a local one every pixel is the photograph's."""
    if made.masks is None:
        return made.pictures[1]
    return paste_back(made.pictures[1], photograph, made.masks[0] | made.masks[1])


def part_of(made: dict[str, np.ndarray], part: str) -> dict[str, np.ndarray]:
    return {row.partition("/")[2]: outputs for row, outputs in made.items() if row.startswith(f"{part}/")}


def mean(values) -> float:
    return float(np.mean(list(values)))


def store(path: Path, arrays: dict[str, list[np.ndarray]]) -> None:
    """Write named stacks of pictures into one file, whole or not at all."""
    with replace_file(path) as partial, open(partial, "wb") as file:
        np.savez(file, **{name: np.stack(pictures) for name, pictures in arrays.items()})
