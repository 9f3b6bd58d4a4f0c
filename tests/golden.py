"""The golden comparison: two commits give the same numbers and pictures, bit for bit. Not a test that pytest collects.

    python tests/golden.py BEFORE           the commit BEFORE against the working tree
    python tests/golden.py BEFORE AFTER     against another commit
    python tests/golden.py BEFORE --repeat  against a second run of itself: what this machine repeats at all

Both are driven by their commands alone, each from a copy of its own files, so that everything behind the commands may
move. CASES are written with the options of the first commit that was compared; ``tests/golden.yaml`` of each commit
says what has another name there. A case that is finished is not run again: results lie in ``work/golden``, one folder
for each state of the code, so that a killed comparison goes on and BEFORE runs once.
"""

import argparse
import csv
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from string import Template

import numpy as np
import yaml
from PIL import Image
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
CODE = ("harmony", "experiments", "datasets")  # the folders that decide the results
NAMES = "tests/golden.yaml"
LETTERS = ROOT / "tests" / "golden_tokenizers"
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "POLARS_MAX_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "FIFTYONE_DO_NOT_TRACK": "1",
}
FOLDERS = {"prepare": ("work",), "harmonize": ("runs",), "export": ("runs",)}  # options paths.* of commands with one
Value = str | np.ndarray


# --- Cases


@dataclass(frozen=True)
class Case:
    """One command: ``python -m harmony.<command> <words>``.

    In ``words``, $home is the folder of the commit's results, $inputs the pictures that ``lay_inputs`` makes, $shared
    the photographs beside the checkout, $kit the kit that the kit cases train, and $NAME the run folder of the case
    NAME. ``files``: what belongs to the result beside the run folder, relative to $home. ``letters``: tokenizers of
    letters in the place of trained ones, which differ from run to run.
    """

    name: str
    command: str
    words: tuple[str, ...]
    files: tuple[str, ...] = ()
    letters: bool = False

    @cached_property
    def places(self) -> list[str]:
        """What its words refer to, without the dollar signs."""
        return Template(" ".join(self.words)).get_identifiers()

    @property
    def needs(self) -> list[str]:
        """The cases that have to run before."""
        names = [case.name for case in CASES if case.name in self.places]
        if "kit" not in self.places:
            return names
        return [*names, *(KIT[: KIT.index(self.name)] if self.name in KIT else KIT)]


TEN_STEPS = (
    "trainer.max_steps=10",
    "trainer.log_every_n_steps=1",
    "trainer.val_check_interval=10",
    "trainer.accelerator=cpu",
    "logger=none",
    "resume=false",
    "seed=0",
)
PHOTOS = "$photos"  # stands for options that add photographs to the kit's renders, where they lie beside the checkout


def fit(name: str, *words: str, files: tuple[str, ...] = (), letters: bool = False) -> Case:
    """Ten steps of the experiment ``name``."""
    return Case(name, "fit", (f"experiment={name}", *TEN_STEPS, *words), files, letters)


def control(name: str, *words: str) -> Case:
    """Ten steps of a training on cached latents, with a small evaluation."""
    small = ("dataset=studio", "data.batch_size=4", "data.variants=1", "evaluate.limit=4", "evaluate.steps=4")
    return fit(name, *small, "callbacks.samples.steps=4", *words)


def kit(name: str, *words: str, files: tuple[str, ...]) -> Case:
    """Ten steps of one part of the kit."""
    return fit(name, "dataset=kit", "dataset.count=0", PHOTOS, "model.path=$kit", *words, files=files, letters=True)


def harmonize(name: str, *words: str) -> Case:
    return Case(name, "harmonize", ("seed=0", *words))


def edit(name: str, *words: str) -> Case:
    return Case(name, "edit", ("steps=10", *words))


def evaluate(name: str, *words: str) -> Case:
    return Case(name, "evaluate", ("logger=none", "resume=false", "seed=0", *words))


def export(name: str, *words: str) -> Case:
    return Case(name, "export", (*words, f"output=$home/exports/{name}"), (f"exports/{name}",))


STUDIO = "datasets/studio/test"
RENDER, PLATE = "833dbe7693ad0d78", "00db2a245f126e2e"  # a boat on sand, and the ground and light of another scene
OBJECT = (f"foreground={STUDIO}/data/{RENDER}.jpg", f"mask={STUDIO}/labels/masks/8/{RENDER}_mboat_9c6c902a.png")
COMPOSITE = (f"background={STUDIO}/plates/{PLATE}.jpg", *OBJECT)
CAR = ("image=datasets/editing/images/23a44a57c8696b79.jpg", "source=a red car on snow, grey overcast light")
CONCEPT = ("dataset.dir=datasets/editing/concepts/teal_mug", "token=<teal_mug>", "init=mug")

KIT = ("kit_vae", "kit_clip", "kit_captioner", "kit_inpaint")  # each reads what those before it have trained
CASES = (
    Case("prepare_studio", "prepare", ("dataset=studio",), ("work/studio/manifest.jsonl",)),
    Case(
        "prepare_photographs",
        "prepare",
        ("dataset=open_images", "dataset.dir=$shared/openimages-mini", "dataset.select.max_samples=8"),
        ("work/open_images/manifest.jsonl",),
    ),
    # trainings
    control("color"),
    control("color_relight", "module.objective.weighting=plain", "module.objective.inside=0.0", "module.offload=true",
            "module.checkpointing=true", "trainer.accumulate_grad_batches=2"),
    control("structure_long"),
    control("raw", "evaluate=null"),
    control("joint"),
    control("paint_by_example"),
    fit("textual_inversion", *CONCEPT, "vectors=2", "data.previews=2", "module.steps=4"),
    kit("kit_vae", "module.config.block_out_channels=[16,32,32]", files=("kit/vae",)),
    kit("kit_clip", "data.batch_size=32", files=("kit/text_encoder", "kit/image_encoder")),
    kit("kit_captioner", "data.batch_size=16", files=("kit/captioner",)),
    kit("kit_inpaint", "module.config.block_out_channels=[32,32,64]", "data.batch_size=8", "data.variants=1",
        files=("kit/unet",)),
    fit("judge", "dataset=kit", "dataset.count=0", PHOTOS, "data.batch_size=8"),
    # each method on photographs
    harmonize("harmonize_default", *COMPOSITE, "steps=10"),
    harmonize("harmonize_color", *COMPOSITE, "box=20,30,90,100", "controlnet=color", "lambda_l=0.8",
              "guidance=3.0", "feather=3", "prompt=a white boat on wood, bright noon light", "steps=10"),
    harmonize("harmonize_near_exact", *COMPOSITE, "controlnet=color", "prompt=a white boat", "guidance=3.0",
              "steps=8", "solver=unipc", "guided=0.5", "encoder_every=2", "raw=true"),
    harmonize("harmonize_run", *COMPOSITE, "controlnet=$color", "solver=dpmsolver++", "steps=5", "prompt=a white boat"),
    harmonize("harmonize_inpainting", "composite=$shared/composites/diff_harmonization/composite/010.jpg",
              "mask=$shared/composites/diff_harmonization/mask/010.png", "controlnet=null", "steps=10", "guidance=2.0"),
    harmonize("harmonize_paint_by_example", "method=paint_by_example", *COMPOSITE, "steps=10"),
    harmonize("harmonize_reference", "method=paint_by_example", "steps=10", "painter=$paint_by_example",
              "background=$shared/composites/paint_by_example/background/example_1.jpg",
              "reference=$shared/composites/paint_by_example/foreground/example_1.jpg",
              "mask=$shared/composites/paint_by_example/region_mask/example_1.png"),
    harmonize("harmonize_zero_shot", "method=zero_shot", *COMPOSITE, "steps=5", "rounds=2", "evaluator=null",
              "prompts=a white boat: grey overcast -> bright noon; a boat: grey -> bright"),
    harmonize("harmonize_zero_shot_words", "method=zero_shot", *COMPOSITE, "steps=4", "rounds=2",
              "zero_shot.detail=false", "zero_shot.hold=500.0", "zero_shot.edges=0.5"),
    harmonize("harmonize_dir", "dir=$inputs/composites", "controlnet=color", "steps=10"),
    # edits
    edit("edit_replace", *CAR, "target=a green car on snow, grey overcast light", "inner=3"),
    edit("edit_insert", *CAR, "target=a red shiny car on snow, grey overcast light", "inner=3",
         "reweight={shiny: 2}", "own=0.4", "cross=0.6", "threshold=0.5"),
    edit("edit_style", f"image={STUDIO}/data/{RENDER}.jpg", "target=a boat on sand, pink neon light", "mode=style",
         "inner=0", "square=8,8,112"),
    edit("edit_word", *CAR, "target=a red <teal_mug> on snow, grey overcast light", "words=$textual_inversion",
         "inner=3"),
    # studies
    evaluate("before_after", "controlnet=$color", "weight=0.8", "limit=8", "steps=4"),
    evaluate("table1", "experiment=table1", "limit=8", "steps=4", "study.lambdas=[0.2,0.6,1]"),
    evaluate("fig6", "experiment=fig6", "limit=4", "steps=4", "study.lambdas=[0.5,1]"),
    evaluate("fig7", "experiment=fig7", "limit=4", "steps=4", "study.degrade=[1,4]", "controlnets.raw=$raw"),
    evaluate("relight", "experiment=relight", "limit=2", "steps=3", "study.lambdas=[0.5,1]",
             "controlnets.color_relight=$color_relight"),
    evaluate("zero_shot", "experiment=zero_shot", "limit=2", "steps=2"),
    evaluate("near_exact", "experiment=near_exact", "limit=2", "steps=5"),
    evaluate("exemplar_bench", "experiment=exemplar_bench", "limit=4", "steps=4"),
    evaluate("editing", "experiment=editing", "limit=1", "steps=3", "study.inner=1"),
    evaluate("judge_bench", "experiment=judge_bench", "limit=8", "study.evaluators.judge=$judge"),
    # exports
    export("export_diffusers", "$color", "half=true"),
    export("export_paint_by_example", "$paint_by_example", "tower=false"),
    export("export_kit", "kit=$kit"),
)  # fmt: skip


# --- Names


@dataclass(frozen=True)
class Names:
    """What a commit calls otherwise than CASES, and which results are left out. See ``tests/golden.yaml``."""

    commands: dict[str, str] = field(default_factory=dict)
    words: dict[str, str | list[str] | None] = field(default_factory=dict)
    results: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    titles: dict[str, int] = field(default_factory=dict)

    def translate(self, word: str) -> list[str]:
        """``key=value`` as this commit wants it: no word where it has no such option any more, or several."""
        key, _, value = word.partition("=")
        if word in self.words:
            name = self.words[word]
        elif key in self.words and self.words[key] is not None:
            name = f"{self.words[key]}={value}"
        else:
            name = None if key in self.words else word
        return [] if name is None else [name] if isinstance(name, str) else name

    def first(self, result: str) -> str:
        """The name of a result in the commit that CASES was written for."""
        for pattern, name in self.results.items():
            result = re.sub(pattern, name, result)
        return result


def read_names(tree: Path) -> Names:
    file = tree / NAMES
    tables = yaml.safe_load(file.read_text()) if file.exists() else {}
    return Names(**{name: table or {} for name, table in tables.items()})


# --- One commit


def git(*words: str, **environment: str) -> str:
    """What git prints; its own line ends the script where it fails (no such commit)."""
    call = subprocess.run(["git", *words], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    if call.returncode:
        raise SystemExit(f"git {' '.join(words)}: {call.stderr.strip()}")
    return call.stdout.strip()


def tree_of(commit: str | None) -> str:
    """git's name of the files of a commit, or of the working tree with all that git does not ignore."""
    if commit is not None:
        return git("rev-parse", "--verify", f"{commit}^{{tree}}")
    index = git("rev-parse", "--absolute-git-dir") + "/golden-index"
    try:
        git("read-tree", "HEAD", GIT_INDEX_FILE=index)
        git("add", "--all", GIT_INDEX_FILE=index)
        return git("write-tree", GIT_INDEX_FILE=index)
    finally:
        Path(index).unlink(missing_ok=True)


def state(tree: str) -> str:
    """A name for what decides the results: equal for two commits that differ in tests and documents alone."""
    return hashlib.sha256(git("ls-tree", tree, *CODE).encode()).hexdigest()[:12]


def lay_tree(tree: str, target: Path) -> None:
    """The files of a git tree in the folder ``target``."""
    partial = target.with_name("tree.partial")
    for folder in (partial, target):
        shutil.rmtree(folder, ignore_errors=True)
    partial.mkdir(parents=True)
    archive = subprocess.Popen(["git", "archive", tree], cwd=ROOT, stdout=subprocess.PIPE)
    subprocess.run(["tar", "-x", "-C", str(partial)], stdin=archive.stdout, check=True)
    if archive.wait():
        raise SystemExit(f"git archive {tree} failed")
    partial.rename(target)


def lay_inputs(tree: Path, target: Path) -> None:
    """``target/composites``: three composites of bundled renders, two of them cut-outs with the box they go into."""
    folder = target / "composites"
    folder.mkdir(parents=True, exist_ok=True)
    columns = ("id", "composite", "mask", "background", "foreground", "foreground_mask", "bbox")
    rows = []
    studio = tree / STUDIO
    boxes = (None, "10 20 80 110", "40 30 120 100")
    for mask, box in zip(sorted((studio / "labels" / "masks").glob("*/*.png")), boxes, strict=False):
        name = mask.name.partition("_")[0]
        picture, cut = (os.path.relpath(file, folder) for file in (studio / "data" / f"{name}.jpg", mask))
        plate = os.path.relpath(studio / "plates" / f"{PLATE}.jpg", folder)
        rows.append([name, "", "", plate, picture, cut, box] if box else [name, picture, cut, "", "", "", ""])
    with open(folder / "index.csv", "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


@dataclass
class Side:
    """One of the two that are compared: git's ``tree``, and the folder ``home`` with its files and results."""

    label: str
    tree: str
    home: Path
    shared: Path | None
    runs: dict[str, dict] = field(default_factory=dict)  # case -> what ``run`` recorded

    def lay(self) -> None:
        """Put the files of the tree, and inputs made of them, into ``home``."""
        lay_tree(self.tree, self.home / "tree")
        lay_inputs(self.home / "tree", self.home / "inputs")

    @cached_property
    def names(self) -> Names:
        return read_names(self.home / "tree")

    def words(self, case: Case) -> list[str]:
        """The command line of a case."""
        places = {"home": self.home, "inputs": self.home / "inputs", "kit": self.home / "kit", "shared": self.shared}
        places |= {name: self.runs[name]["folder"] for name in case.needs}
        photos = ("dataset.photos=$shared/openimages-mini", "dataset.sources=[feral_cat]") if self.shared else ()
        words = [part for word in case.words for part in (photos if word == PHOTOS else (word,))]
        words = [Template(part).substitute(places) for word in words for part in self.names.translate(word)]
        return words + [f"paths.{name}={self.home / name}" for name in FOLDERS.get(case.command, ("work", "runs"))]

    def environment(self, letters: bool) -> dict[str, str]:
        rest = {key: value for key, value in os.environ.items() if not key.startswith(("HARMONY_", "FIFTYONE_"))}
        path = f"{self.home / 'tree'}{os.pathsep}{LETTERS}" if letters else str(self.home / "tree")
        return rest | ENVIRONMENT | {"PYTHONPATH": path, "FIFTYONE_DATABASE_DIR": str(self.home / "database")}

    def run(self, case: Case) -> None:
        """Run a case unless it is done, and remember in ``cases/<name>.json`` how and where."""
        if failures := [name for name in case.needs if self.runs[name]["code"]]:
            self.runs[case.name] = {"code": 1, "seconds": 0.0, "why": f"needs {failures[0]}, which failed"}
            return
        record = self.home / "cases" / f"{case.name}.json"
        needs = {name: self.runs[name]["folder"] for name in case.needs}
        order = {"words": self.words(case), "letters": case.letters, "needs": needs}
        last = json.loads(record.read_text()) if record.exists() else {}
        if last.get("code") != 0 or any(last.get(key) != value for key, value in order.items()):
            last = order | self.call(case, order["words"], record.with_suffix(".log"))
            record.write_text(json.dumps(last, indent=1))
        self.runs[case.name] = last

    def call(self, case: Case, words: list[str], log: Path) -> dict:
        """Run a command; its exit code, run folder, last line if it failed, and seconds of processor and clock."""
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", f"harmony.{self.names.commands.get(case.command, case.command)}", *words]
        began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        with open(log, "w") as file:
            place = {"cwd": self.home / "tree", "env": self.environment(case.letters)}
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False, **place).returncode
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1)
        print(f"{self.label}: {case.name}, {seconds} s{f', failed: see {log}' if code else ''}", flush=True)
        lines = log.read_text(errors="replace").splitlines()
        folder = self.run_folder(lines)
        if folder:
            shutil.rmtree(Path(folder) / "checkpoints", ignore_errors=True)  # large, and the export is compared
        why = lines[-1] if lines and code else ""
        wall = round(time.monotonic() - began, 1)
        return {"code": code, "folder": folder, "why": why, "seconds": seconds, "wall": wall}

    def run_folder(self, lines: list[str]) -> str | None:
        """``runs/<name>/<time>`` that the command printed; None for a command that writes elsewhere."""
        runs = self.home / "runs"
        inside = [Path(line).relative_to(runs).parts for line in lines if line.startswith(f"{runs}/")]
        return str(runs.joinpath(*inside[-1][:2])) if inside else None

    def results(self, case: Case) -> dict[str, Value]:
        """All results of a case, by the names of the first commit."""
        folder = self.runs[case.name]["folder"]
        values = dict(read_folder(Path(folder))) if folder else {}
        for name in case.files:
            path = self.home / name
            values |= dict(read_file(path, path.name) if path.is_file() else read_folder(path, f"{path.name}/"))
        return {self.names.first(name): value for name, value in values.items()}


# --- Results


def read_folder(folder: Path, prefix: str = "") -> Iterator[tuple[str, Value]]:
    """Name and value of everything in a folder that is compared."""
    outputs: set[str] = set()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".npy", ".npz"):
            outputs |= set(read_outputs(path))
        elif path.is_file():
            yield from read_file(path, f"{prefix}{path.relative_to(folder)}")
    if outputs:
        yield f"{prefix}outputs", " ".join(sorted(outputs))


def read_outputs(path: Path) -> Iterator[str]:
    """Hashes of the pictures of a study that a file holds: in which file and order they lie is the study's affair."""
    content = np.load(path)
    for stack in [content] if path.suffix == ".npy" else content.values():
        for picture in stack:
            yield hashlib.sha256(f"{picture.shape} {picture.dtype}".encode() + picture.tobytes()).hexdigest()[:16]


def read_file(path: Path, name: str) -> Iterator[tuple[str, Value]]:
    reader = READERS.get(path.name) or READERS.get(path.suffix)
    if reader:
        for part, value in reader(path):
            yield f"{name}{part}", value


def read_steps(path: Path) -> Iterator[tuple[str, Value]]:
    for step, name, value in list(csv.reader(path.open(newline="")))[1:]:
        yield f": step {step} {name}", value


def read_table(path: Path) -> Iterator[tuple[str, Value]]:
    head, *rows = csv.reader(path.open(newline=""))
    for row in rows:
        for column, cell in zip(head[1:], row[1:], strict=True):
            yield f": {row[0]} {column}", cell


def leaves(node, name: str = "") -> Iterator[tuple[str, object]]:
    """The leaves of nested lists and mappings, named by their path."""
    if isinstance(node, (dict, list)):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from leaves(value, f"{name}/{key}" if name else f"{key}")
    else:
        yield name, node


def read_numbers(path: Path) -> Iterator[tuple[str, Value]]:
    """The numbers of a JSON file; its texts may be said in other words."""
    for name, value in leaves(json.loads(path.read_text())):
        if not isinstance(value, str):
            yield f": {name}", json.dumps(value)


def read_rows(path: Path) -> Iterator[tuple[str, Value]]:
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        row = json.loads(line)
        for name, value in leaves(row):
            yield f": {row['split']}/{row['id']} {name}", json.dumps(value)


def read_picture(path: Path) -> Iterator[tuple[str, Value]]:
    with Image.open(path) as image:
        yield "", np.array(image)


def read_tensors(path: Path) -> Iterator[tuple[str, Value]]:
    with safe_open(path, "np") as file:
        for name in file.keys():  # noqa: SIM118
            yield f": {name}", file.get_tensor(name)


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Value]]]] = {
    "metrics.csv": read_steps,
    "table.csv": read_table,
    "metrics.json": read_numbers,
    "rounds.json": read_numbers,
    "manifest.jsonl": read_rows,
    ".png": read_picture,
    ".safetensors": read_tensors,
}


# --- Comparison


def difference(before: Value, after: Value | None, top: int = 0) -> str:
    """What differs between two values of a result, in a few words; empty where nothing does.

    ``top``: rows of a picture that are left out.
    """
    if after is None:
        return "is missing"
    if isinstance(before, str) or isinstance(after, str):
        return "" if isinstance(after, str) and before == after else f"{brief(before)} became {brief(after)}"
    if before.shape != after.shape or before.dtype != after.dtype:
        return f"{brief(before)} became {brief(after)}"
    before, after = (np.ascontiguousarray(value[top:] if top else value) for value in (before, after))
    if before.tobytes() == after.tobytes():
        return ""
    count = int((before != after).sum())
    worst = np.abs(before.astype(np.float64) - after.astype(np.float64)).max()
    return f"{count} of {before.size} values differ, by {worst:.3g} at most"


def brief(value: Value) -> str:
    if not isinstance(value, str):
        return f"{value.dtype} {value.shape}"
    if len(value) < 60:
        return value
    return f"{len(value)} characters with sha256 {hashlib.sha256(value.encode()).hexdigest()[:8]}"


def summary(results: dict[str, Value]) -> str:
    """``70 values, pictures: 2 of 0.20 M pixels``."""
    pixels = [value for name, value in results.items() if name.endswith(".png")]
    outputs = [text for name, value in results.items() if name.endswith("outputs") for text in value.split()]
    tensors = [v for name, v in results.items() if isinstance(v, np.ndarray) and not name.endswith(".png")]
    texts = [v for name, v in results.items() if isinstance(v, str) and not name.endswith("outputs")]
    area, numbers = (
        sum(counts) / 1e6 for counts in ((p.shape[0] * p.shape[1] for p in pixels), (t.size for t in tensors))
    )
    parts = {
        f"{len(texts)} values": texts,
        f"{len(outputs)} outputs of methods": outputs,
        f"pictures: {len(pixels)} of {area:.2f} M pixels": pixels,
        f"tensors: {len(tensors)} of {numbers:.2f} M numbers": tensors,
    }
    return ", ".join(text for text, present in parts.items() if present)


def compare(case: Case, before: Side, after: Side) -> tuple[str, str, bool]:
    """What was compared, the verdict, and whether all is equal."""
    for side in (before, after):
        if side.runs[case.name]["code"]:
            return "", f"failed in {side.label}: {side.runs[case.name]['why']}", False
    skip = [*before.names.ignored, *after.names.ignored]
    titles = before.names.titles | after.names.titles
    old, new = (
        {name: v for name, v in side.results(case).items() if not any(re.search(pattern, name) for pattern in skip)}
        for side in (before, after)
    )
    if not old:
        return "", "nothing to compare", False
    faults = {}
    for name, value in old.items():
        top = max((rows for pattern, rows in titles.items() if re.search(pattern, name)), default=0)
        if text := difference(value, new.get(name), top):
            faults[name] = text
    more = sorted(set(new) - set(old))
    extra = f" ({len(more)} more in {after.label}: {more[0]}, ...)" if more else ""
    if not faults:
        return summary(old), f"equal{extra}", True
    name, text = next(iter(faults.items()))
    return summary(old), f"{len(faults)} of {len(old)} differ, first {name}: {text}{extra}", False


def photographs() -> Path | None:
    """The photographs that lie beside the main checkout, which a linked working tree shares."""
    main = Path(git("rev-parse", "--path-format=absolute", "--git-common-dir")).parent
    folder = main.parent / "shared" / "data"
    return folder if folder.is_dir() else None


def choose(only: str | None, shared: Path | None) -> list[Case]:
    """The cases to run, and those that they need, in the order of CASES."""
    cases = {case.name: case for case in CASES if shared or "shared" not in case.places}
    names, queue = set(), list(cases) if only is None else only.split(",")
    while queue:
        if (name := queue.pop()) not in cases:
            raise SystemExit(f"there is no case {name}; there are: {', '.join(cases)}")
        names.add(name)
        queue += cases[name].needs
    return [case for case in cases.values() if case.name in names]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="a commit")
    parser.add_argument("after", nargs="?", help="a commit; the working tree without it")
    parser.add_argument("--repeat", action="store_true", help="compare BEFORE with a second run of itself")
    parser.add_argument("--only", help="names of cases with commas between; what they need runs too")
    parser.add_argument("--results", type=Path, default=ROOT / "work" / "golden", help="folder of the results")
    args = parser.parse_args()
    shared = photographs()
    cases = choose(args.only, shared)
    trees = tree_of(args.before), tree_of(args.before if args.repeat else args.after)
    homes = [args.results.resolve() / state(tree) for tree in trees]
    if args.repeat:
        homes[1] = homes[1].with_name(f"{homes[1].name}-again")
    labels = args.before, "the second run" if args.repeat else args.after or "the working tree"
    sides = [Side(*facts, shared) for facts in zip(labels, trees, homes, strict=True)]
    for side in sides:
        side.lay()
        for case in cases:
            side.run(case)
        shutil.rmtree(side.home / "database", ignore_errors=True)  # of FiftyOne: large, and what is prepared stays
    return report(cases, *sides)


def report(cases: list[Case], before: Side, after: Side) -> int:
    """Print the table; the exit code, 0 where all is equal."""
    print("\n| case | s before | s after | compared | verdict |\n|---|---|---|---|---|")
    verdicts = []
    for case in cases:
        text, verdict, same = compare(case, before, after)
        verdicts.append(same)
        seconds = " | ".join(f"{side.runs[case.name]['seconds']:.1f}" for side in (before, after))
        print(f"| {case.name} | {seconds} | {text} | {verdict} |")
    totals = [sum(side.runs[case.name]["seconds"] for case in cases) for side in (before, after)]
    seconds = f"{totals[0]:.0f} and {totals[1]:.0f} s of one core"
    print(f"\n{sum(verdicts)} of {len(cases)} cases equal; {seconds}")
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
