"""The editing bench: pictures brought back, one word changed, words learned; every figure against a render.

Of photographs no edited truth is known (PIE-Bench): their edits are measured by words, and outside the mask.
Reconstruction stands between two bounds: the autoencoder's own above, plain DDIM inversion under guidance below. An
edit is measured against the render of the scene so changed, its background (outside the object of source and truth)
against the source. A learned word is measured by views that it was not learned from.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from harmony.core.errors import UserError
from harmony.core.files import replace_file, write_text
from harmony.core.pieces import await_files, make_pieces
from harmony.core.progress import MINUTE, tell
from harmony.data.sources.editing import Case, concepts, read_cases
from harmony.data.sources.files import folder_captions
from harmony.evaluation.blocks import blocks
from harmony.evaluation.eval_sets import subsample
from harmony.evaluation.pages import ROWS as PAGE_ROWS
from harmony.evaluation.pages import PageRow
from harmony.evaluation.report import Report
from harmony.evaluation.study import Study, StudyRun
from harmony.evaluation.tables import flat, pictures, to_csv, to_markdown
from harmony.methods.method import fingerprint, make_seeds
from harmony.methods.prompt_editing import (
    MODES,
    EditResult,
    Inversion,
    Mode,
    edit_picture,
    find_mode,
    invert_latents,
    invert_pictures,
    plan_edit,
    reconstruct,
)
from harmony.metrics.fidelity import fmse, fpsnr, mse, psnr
from harmony.metrics.pie_bench import background_metrics, blacken, network_metrics
from harmony.metrics.similarity import cosines, embeddings
from harmony.models.backbone import DIFFUSION
from harmony.models.textual_inversion import learn, read_word, word_file
from harmony.pixels.composites import paste_back
from harmony.pixels.images import from_model, read_image, resize, sha256
from harmony.pixels.masks import read_mask
from harmony.sampling.null_text import denoiser, shared_null_text
from harmony.sampling.text_to_image import text_to_image

PARTS = ("reconstruction", "edits", "concepts")
ALONE = Mode(0, 0, 1, False)  # the target prompt from the same noise and null texts, attention its own
# what a user would ask for each word of the renders; of other edits the prompts decide
MODE_OF = {"color": "replace", "kind": "replace", "light": "style", "change style": "style"}
DRAWS = 4  # pictures of each view that a word is judged by
ROWS = 6  # pictures on the figure


@dataclass(frozen=True)
class Item:
    """A scene at the backbone's resolution: uint8 R x R x 3, its caption, and its cases with truth (uint8 R x R x 3)
    and mask (bool R x R), None where there is none.
    """

    image: np.ndarray
    prompt: str
    cases: list[Case]
    truths: list[np.ndarray | None]
    masks: list[np.ndarray | None]


def load_items(file: Path, side: int, limit: int | None = None) -> list[Item]:
    """Up to ``limit`` scenes of an ``edits.jsonl`` with their cases."""
    root, scenes = file.parent, {}
    for case in read_cases(file):
        scenes.setdefault(case.id, []).append(case)
    items = []
    for cases in subsample(list(scenes.values()), limit):
        truths = [None if c.truth is None else resize(read_image(root / c.truth), side, side) for c in cases]
        masks = [None if c.mask is None else read_mask(root / c.mask, (side, side), resize=True) for c in cases]
        items.append(Item(resize(read_image(root / cases[0].image), side, side), cases[0].source, cases, truths, masks))
    return items


@dataclass
class EditingStudy(Study):
    """The study of ``experiment=editing``; its options are those of ``configs/study/editing.yaml``.

    Pictures are made in blocks that are kept, so that the same command goes on and several processes share them. Where
    ``words`` is None, the rows of learned words are left out.
    """

    run: StudyRun
    words: str | None
    parts: Sequence[str]
    inner: int
    self_attention_steps: float
    threshold: float

    def __post_init__(self) -> None:
        self.notes: list[str] = []
        if unknown := set(self.parts) - set(PARTS):
            raise UserError(f"study.parts={unknown.pop()}: choose among {', '.join(PARTS)}")
        self.backbone, self.settings, self.file = self.run.backbone, self.run.settings, self.run.manifest
        self.clip = self.run.embedder
        if self.clip is None:
            name = self.backbone.name
            raise UserError(f"backbone {name} has no CLIP image tower: give clip=NAME/WEIGHTS of open_clip")

    @cached_property
    def items(self) -> list[Item]:
        """The scenes; those with prompts that the backbone cannot take are left out with a note."""
        items = load_items(self.file, self.backbone.resolution, self.run.limit)
        problems = [self.problem(item) for item in items]
        if not all(problems):  # otherwise the first edit raises its own error
            items = [item for item, problem in zip(items, problems, strict=True) if problem is None]
            problems = [problem for problem in problems if problem is not None]
            self.notes += [f"{len(problems)} scenes left out, such as {problems[0]}"] if problems else []
        return items

    def problem(self, item: Item) -> str | None:
        """Why an item cannot be edited, or None."""
        try:
            for case in item.cases:
                plan_edit(self.backbone, case.source, case.target, self.mode(case))
        except UserError as error:
            return f"{item.cases[0].id}: {error}"
        return None

    @cached_property
    def made_of(self) -> dict[str, str]:
        """Hashes of all that decides the figures and is not in the configuration."""
        facts = {f"backbone/{part}": self.backbone.hash(part) for part in DIFFUSION} | {"edits": sha256(self.file)}
        return facts | {f"words/{name}": sha256(file) for name, file in self.word_files().items()}

    @property
    def store(self) -> Path:
        """Where reconstructions and edits lie; another word is no reason to make them again."""
        weights = {name: value for name, value in self.made_of.items() if not name.startswith("words/")}
        options = {name: getattr(self, name) for name in ("inner", "self_attention_steps", "threshold", "parts")}
        return self.run.folder / "outputs" / fingerprint(weights, self.settings, options)[:16]

    def word_files(self) -> dict[str, Path]:
        """Name of each concept that a word was learned for -> its file."""
        if self.words is None or "concepts" not in self.parts:
            return {}
        names = concepts(self.file.parent)
        return {name: word_file(f"{self.words}/{name}") for name in names}

    # --- pictures

    def invert(self, items: Sequence[Item]) -> list[Inversion]:
        s, prompts = self.settings, [item.prompt for item in items]
        images = [item.image for item in items]
        return invert_pictures(self.backbone, images, prompts, s.steps, s.guidance, self.inner)

    def reconstructions(self, items: Sequence[Item], inversions: Sequence[Inversion]) -> dict[str, list[np.ndarray]]:
        """Row -> the pictures brought back."""
        backbone, w, n = self.backbone, self.settings.guidance, self.settings.steps
        prompts = [item.prompt for item in items]
        plain = [replace(inversion, nulls=[backbone.prompt([""])] * n) for inversion in inversions]
        fast = [replace(v, nulls=[backbone.prompt([p])] * n) for v, p in zip(inversions, prompts, strict=True)]
        path, text = invert_latents(backbone, [item.image for item in items], prompts, n)
        schedule = backbone.alphas_cumprod, backbone.scheduler.config.steps_offset, self.inner
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
        mode = MODES[MODE_OF.get(case.word) or find_mode(case.source, case.target)]
        return replace(mode, self_attention_steps=self.self_attention_steps) if mode.local else mode

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
                    edit = edit_picture(
                        backbone, start, plan_edit(backbone, case.source, case.target, how), w, self.threshold
                    )
                    rows.setdefault(row, []).append(edit.pictures[1])
                rows.setdefault(f"{row}, pasted", []).append(paste_edit(edit, item.image))
        return rows

    def outputs(self) -> dict[str, np.ndarray]:
        """``part/row`` -> pictures N x R x R x 3, made where they are not there yet; nothing on further ranks."""
        makers = {"reconstruction": self.reconstructions, "edits": self.edits}
        makers = {part: make for part, make in makers.items() if part in self.parts}
        jobs = {self.store / f"{block.start:05d}.npz": block for block in blocks(len(self.items)) if makers}

        def make(file: Path) -> None:
            items = [self.items[i] for i in jobs[file]]
            inversions = self.invert(items)
            write_arrays(
                file, {f"{part}/{row}": v for part, f in makers.items() for row, v in f(items, inversions).items()}
            )

        sizes = {file: len(block) for file, block in jobs.items()}
        run = self.run
        make_pieces(run.name, sizes, Path.exists, make, "scenes", run.rank, run.world, per=MINUTE)
        await_files(list(jobs))
        if self.run.rank > 0 or not jobs:
            return {}
        stored = [np.load(file) for file in jobs]
        return {row: np.concatenate([some[row] for some in stored]) for row in stored[0].files}

    def concept_pictures(self) -> dict[str, dict[str, list[np.ndarray]]]:
        """Concept -> ``held out`` views, and what the plain word and the learned word give for their captions."""
        root, pictures_of, side = self.file.parent, {}, self.backbone.resolution
        files = self.word_files()
        for name, (_, held_out) in concepts(root).items() if files else ():
            word = read_word(files[name])
            if word.token.lower() not in self.backbone.words:
                learn(self.backbone, word)
            captions = folder_captions(held_out[0].parent)
            views = [(resize(read_image(f), side, side), captions[f.stem][0]) for f in held_out for _ in range(DRAWS)]
            prompts = [prompt for _, prompt in views]
            indices = list(range(len(views)))
            pictures_of[name] = {"held out": [image for image, _ in views]}
            for row, word_text in (("plain word", name.partition("_")[2]), ("learned word", word.token)):
                text = self.backbone.prompt([prompt.replace("{}", word_text) for prompt in prompts])
                pictures_of[name][row] = text_to_image(
                    self.backbone, text, self.settings, make_seeds(self.run.seed, indices)
                )
        return pictures_of

    # --- figures

    def reconstruction_figures(self, outputs_of: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
        truths = [item.image for item in self.items]
        table = {}
        for row, outputs in part_of(outputs_of, "reconstruction").items():
            pairs = list(zip(outputs, truths, strict=True))
            table[row] = {"test/psnr": mean(psnr(*pair) for pair in pairs), "test/mse": mean(mse(*p) for p in pairs)}
        return table

    def edit_figures(self, outputs_of: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
        """``<word>/<figure>``: ``psnr`` to the truth, ``fpsnr`` inside the mask, ``bg_mse`` to the source outside.

        Without a truth there are ``clip_t`` and ``bg_mse`` alone, and the figures of PIE-Bench over all words.
        """
        cases = [(item, case, t, m) for item in self.items for case, t, m in zip(item.cases, item.truths, item.masks)]
        # where there is no truth, the source's features fill the place: their figure is not used
        truths = embeddings([item.image if truth is None else truth for item, _, truth, _ in cases], self.clip)
        words = torch.nn.functional.normalize(self.clip.texts([c.target for _, c, _, _ in cases]).float().cpu(), dim=1)
        table = {}
        for row, outputs in part_of(outputs_of, "edits").items():
            looks = embeddings(list(outputs), self.clip)
            image_scores, text_scores = 100 * (looks * truths).sum(1), 100 * (looks * words).sum(1)
            figures: dict[str, list[float]] = {}
            for y, (item, case, truth, mask), i, t in zip(
                outputs, cases, image_scores.tolist(), text_scores.tolist(), strict=True
            ):
                numbers = {"clip_t": t}
                if truth is not None:
                    numbers |= {"psnr": psnr(y, truth), "clip_i": i}
                if truth is not None and mask is not None:
                    numbers["fpsnr"] = fpsnr(y, truth, mask)
                if mask is not None:
                    numbers["bg_mse"] = fmse(y, item.image, ~mask)
                for name, value in numbers.items():
                    figures.setdefault(f"{case.word}/{name}", []).append(value)
            table[row] = {name: mean(values) for name, values in figures.items()}
            marks = [n for n, (_, _, truth, _) in enumerate(cases) if truth is None]
            if marks:
                features = looks[marks], words[marks]
                table[row] |= self.pie_figures([outputs[n] for n in marks], [cases[n] for n in marks], *features)
        return table

    def pie_figures(
        self, outputs: Sequence[np.ndarray], cases: Sequence[tuple], looks: torch.Tensor, words: torch.Tensor
    ) -> dict[str, float]:
        """``pie/<figure>`` of edits of photographs: clip_whole and clip_edited to the target's words, and the rest.

        ``looks``, ``words``: CLIP's features N x P of the outputs and of the targets.
        An edit without a mask may change the whole picture: it has no background, and counts for the others alone.
        """
        sources = [item.image for item, *_ in cases]
        masks = [np.ones(y.shape[:2], bool) if m is None else m for y, (*_, m) in zip(outputs, cases, strict=True)]
        rows = [background_metrics(*triple) for triple in zip(outputs, sources, masks, strict=True)]
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        columns |= network_metrics(outputs, sources, masks, self.run.metrics[0])
        edited = [blacken(y, ~mask) for y, mask in zip(outputs, masks, strict=True)]
        for name, features in (("clip_whole", looks), ("clip_edited", embeddings(edited, self.clip))):
            columns[f"pie/{name}"] = [100 * cosine for cosine in cosines(features, words)]
        return {name: float(np.nanmean(values)) for name, values in columns.items() if not np.isnan(values).all()}

    def concept_figures(self, views_of: dict[str, dict[str, list[np.ndarray]]]) -> dict[str, dict[str, float]]:
        """``concept/clip_i`` to the held-out view whose caption it was, ``clip_t`` to that caption in plain words."""
        table = {}
        for row in ("plain word", "learned word") if views_of else ():
            image_scores, text_scores = [], []
            for name, views in views_of.items():
                captions = folder_captions(concepts(self.file.parent)[name][1][0].parent).values()
                plain = [texts[0].replace("{}", name.partition("_")[2]) for texts in captions for _ in range(DRAWS)]
                looks, truths = (embeddings(views[which], self.clip) for which in (row, "held out"))
                words = torch.nn.functional.normalize(self.clip.texts(plain).float().cpu(), dim=1)
                image_scores += (looks * truths).sum(1).tolist()
                text_scores += (looks * words).sum(1).tolist()
            table[row] = {"concept/clip_i": 100 * mean(image_scores), "concept/clip_t": 100 * mean(text_scores)}
        return table

    def measure(self) -> Report:
        """The report; on other ranks than the first the share of pictures alone is made."""
        run, s = self.run, self.settings
        protocol = f"DDIM {s.steps} steps, guidance {s.guidance:g}, {self.inner} inner steps, seed {run.seed}"
        line = f"{run.name}: n = {len(self.items)} scenes of {self.file.parent.name}, {protocol}"
        if run.rank == 0:
            tell(line)
        if "concepts" in self.parts and self.words is None:
            self.notes.append("concepts: left out, give study.words=FOLDER with a learned word for each")
        elif "concepts" in self.parts and not self.word_files():
            self.notes.append("concepts: left out, the dataset has none")
        outputs = self.outputs()
        if run.rank > 0:
            return Report()
        views = self.concept_pictures()
        tables = [self.reconstruction_figures(outputs), self.edit_figures(outputs), self.concept_figures(views)]
        table = {row: figures for part in tables for row, figures in part.items()}
        write_text(run.folder / "table.csv", to_csv(table, "method"))
        metrics, lines = run.metrics
        figures = flat(table)
        for metric in metrics:
            is_there = any(name.endswith(f"pie/{metric.name}") for name in figures)
            lines = [*lines, metric.protocol if is_there else f"{metric.name}: not measured on these edits"]
        notes = [f"{line}; clip on {self.clip.name} embeddings", *self.notes, *lines]
        texts = [to_markdown(part, "method", [], every=True) for part in tables if part]
        text = "\n".join([*texts, *notes]) + "\n"
        write_text(run.folder / "table.md", text)
        facts = {"protocol": f"clip on {self.clip.name} embeddings", "count": len(self.items), "made_of": self.made_of}
        facts |= {"manifest": sha256(self.file)}
        samples = {item.cases[0].id: {"caption": item.prompt} for item in self.items} if outputs else {}
        return Report(flat(table), facts, text, self.draw(outputs, views), self.page_rows(outputs), samples)

    def columns(self, few: Sequence[int], outputs: dict[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
        """Title -> a picture for each of the items ``few``: the source, brought back and edited."""
        back, edits = part_of(outputs, "reconstruction"), part_of(outputs, "edits")
        columns: dict[str, list[np.ndarray]] = {"source": [self.items[i].image for i in few]}
        columns |= {row: [images[i] for i in few] for row, images in back.items() if "null" in row or "ddim" in row}
        first = np.cumsum([0, *(len(item.cases) for item in self.items)])
        for n, case in enumerate(self.items[few[0]].cases if edits else ()):
            word = case.word if all(self.items[i].cases[n].word == case.word for i in few) else "edit"
            for row, title in (("prompt alone", "alone"), ("null text and prompt-to-prompt", "edit")):
                columns[f"{word}: {title}"] = [edits[row][first[i] + n] for i in few]
            if all(self.items[i].truths[n] is not None for i in few):
                columns[f"{word}: truth"] = [self.items[i].truths[n] for i in few]
        return columns

    def page_rows(self, outputs: dict[str, np.ndarray]) -> list[PageRow]:
        """The rows of the page: some scenes, each with the words of its own cases."""
        rows = []
        for i in subsample(list(range(len(self.items))), PAGE_ROWS) if outputs else ():
            item, columns = self.items[i], self.columns([i], outputs)
            key, images = item.cases[0].id, {title: column[0] for title, column in columns.items()}
            rows.append(PageRow(f"{key}: {item.prompt}", images, key))
        return rows

    def draw(self, outputs: dict[str, np.ndarray], views_of: dict) -> list[Path]:
        """``figure.png``: sources brought back and edited; ``concepts.png``: what the words have learned."""
        files, few = [], subsample(list(range(len(self.items))), ROWS)
        if outputs:
            columns = self.columns(few, outputs)
            files.append(self.run.folder / "figure.png")
            pictures(files[-1], list(zip(*columns.values(), strict=True)), list(columns))
        if views_of:
            files.append(self.run.folder / "concepts.png")
            side, rows = self.backbone.resolution, []
            for name, views in views_of.items():
                examples = [resize(read_image(f), side, side) for f in concepts(self.file.parent)[name][0][:2]]
                two = [views[row][i] for row in ("held out", "plain word", "learned word") for i in (0, DRAWS)]
                rows.append([*examples, *two])
            titles = ["learned from"] * 2 + ["held out"] * 2 + ["plain word"] * 2 + ["learned word"] * 2
            pictures(files[-1], rows, titles)
        return files


def paste_edit(edit: EditResult, photograph: np.ndarray) -> np.ndarray:
    """The edit as ``harmony.edit`` hands it out: outside a local one every pixel is the photograph's."""
    if edit.masks is None:
        return edit.pictures[1]
    return paste_back(edit.pictures[1], photograph, edit.masks[0] | edit.masks[1])


def part_of(outputs_of: dict[str, np.ndarray], part: str) -> dict[str, np.ndarray]:
    return {row.partition("/")[2]: images for row, images in outputs_of.items() if row.startswith(f"{part}/")}


def mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def write_arrays(path: Path, arrays: dict[str, list[np.ndarray]]) -> None:
    """Write named stacks of pictures into one file, whole or not at all."""
    with replace_file(path) as partial, open(partial, "wb") as file:
        np.savez(file, **{name: np.stack(pictures) for name, pictures in arrays.items()})
