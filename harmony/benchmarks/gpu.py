"""Everything that a GPU changes, in parts that are commands of their own: ``python -m harmony.bench gpu``.

Each part has a hard limit: it is killed, reported, and the next one begins. Logs, figures and the table are written
after each part. Parts that measure nothing run side by side first; those that measure have the device to themselves.
Without a GPU the parts that make sense there run, shortened, and the others are listed as skipped.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from harmony.core.files import write_json, write_text
from harmony.core.progress import tell
from harmony.pixels.composites import copy_paste
from harmony.pixels.images import read_image, write_image
from harmony.pixels.masks import read_mask

ROOT = Path(__file__).resolve().parents[2]
TOTAL = 360  # seconds for all parts together
GRACE = 10  # seconds between the request to end and the kill
SD2 = ("model=sd2", "model.weights=random")
SHORT = ("trainer.max_steps=10", "trainer.log_every_n_steps=5", "checkpoint_every=10")  # of a training
QUICK = (*SHORT, "callbacks.samples=null", "evaluate=null")  # without pictures and figures


@dataclass(frozen=True)
class Part:
    """One command: ``words`` behind ``python -m harmony.``, at most ``limit`` seconds.

    ``alone``: it measures, so that nothing may run beside it. ``cpu``: words that are added without a GPU; None = the
    part wants one.
    """

    name: str
    words: tuple[str, ...]
    limit: int
    alone: bool = False
    cpu: tuple[str, ...] | None = ()

    def command(self, folder: Path, gpu: bool) -> list[str]:
        """What is run; runs and results go to ``folder``."""
        if self.words[0] == "pytest":
            return [sys.executable, "-m", *self.words]
        more = () if gpu else self.cpu
        return [sys.executable, "-m", f"harmony.{self.words[0]}", *self.words[1:], *more, f"paths.runs={folder}/runs"]


@dataclass(frozen=True)
class Outcome:
    """What became of a part: ended, failed with an exit code, killed at its limit, skipped, or not reached in time."""

    name: str
    status: str
    seconds: float = 0.0
    command: str = ""
    figures: dict[str, float] = field(default_factory=dict)


def fit(experiment: str, *words: str) -> tuple[str, ...]:
    return ("fit", f"experiment={experiment}", "dataset=studio", "logger=none", *words)


def insertion(method: str, folder: Path, *words: str) -> tuple[str, ...]:
    """``harmonize`` of the composite in ``folder`` (see ``write_composite``)."""
    pictures = (f"composite={folder}/composite.png", f"mask={folder}/mask.png")
    return ("harmonize", f"method={method}", *pictures, "prompt=a red car on grass", *words)


def parts(folder: Path) -> list[Part]:
    """All parts, what matters most first."""
    concept = ROOT / "datasets" / "editing" / "concepts" / "pink_car"
    word = ("token=<pink_car>", "init=car", f"dataset.dir={concept}")
    told = ("prompts=a red car: grey overcast light -> warm sunset light", "rounds=1", "evaluator=null", "steps=10")
    near = ("solver=unipc", "guided=0.5", "encoder_every=2", "guidance=2", "steps=10")
    plain = [
        Part("fit_color", fit("color"), 150, cpu=(*SHORT, "evaluate.limit=4", "evaluate.steps=2")),
        Part("tests", ("pytest", "-q", "-m", "gpu", "--no-header", str(ROOT / "tests")), 150, cpu=None),
        Part("fit_joint_compiled", fit("joint", *QUICK, "module.compile=true"), 180, cpu=None),
        *(
            Part(f"harmonize_{name}", insertion(method, folder, *words, f"output={folder}/{name}"), 60, cpu=cpu)
            for name, method, words, cpu in (
                ("controlnet", "controlnet", ("structure=structure",), ()),
                ("controlnet_graphs", "controlnet", ("structure=structure", "graphs=true"), None),
                ("near", "controlnet", near, ()),
                ("near_graphs", "controlnet", (*near, "graphs=true"), None),
                ("paint_by_example", "paint_by_example", (), ()),
                ("paint_by_example_graphs", "paint_by_example", ("graphs=true",), None),
                ("zero_shot", "zero_shot", told, ()),
            )
        ),
        Part(
            "edit",
            ("edit", f"image={folder}/composite.png", "source=a red car on grass", "target=a blue car on grass")
            + ("steps=10", f"output={folder}/edit"),
            60,
        ),
        *(
            Part(f"fit_{name}", fit(experiment, *QUICK, *words), 90)
            for name, experiment, words in (
                ("joint", "joint", ()),
                ("bf16_offload", "color", ("trainer.precision=bf16-mixed", "module.offload=true")),
                ("checkpointing", "structure", ("module.checkpointing=true",)),
                ("paint_by_example", "paint_by_example", ()),
            )
        ),
        Part("fit_textual_inversion", ("fit", "experiment=textual_inversion", *word, *SHORT, "logger=none"), 90),
        Part("fit_judge", fit("judge", *SHORT), 90),
        Part("evaluate", ("evaluate", "experiment=table1", "limit=4", "steps=4", "logger=none"), 90),
    ]
    rates = ("batch=32", "steps=20", "blocks=3")
    measured = [
        Part("train", ("bench", "train", *SD2, *rates, "compile=true"), 200, alone=True, cpu=None),
        Part("sample", ("bench", "sample", *SD2, "blocks=2", "sampling.steps=50"), 150, alone=True, cpu=None),
        Part("train_eager", ("bench", "train", *SD2, *rates), 100, alone=True, cpu=None),
        Part("joint", ("bench", "joint", *SD2, "batch=32", "steps=6", "blocks=2", "compile=true"), 200, True, None),
        Part("train_cudnn", ("bench", "train", *SD2, *rates, "compile=true", "model.attention=cudnn"), 200, True, None),
        Part("memory", ("bench", "memory", *SD2), 90, alone=True, cpu=None),
    ]
    return plain + measured


def write_composite(folder: Path) -> None:
    """``composite.png`` and ``mask.png``: the object of one bundled render, in its second light, on its own plate."""
    split = ROOT / "datasets" / "studio" / "test"
    name = sorted(path.stem for path in (split / "plates").glob("*.jpg"))[0]
    plate, relit = read_image(split / "plates" / f"{name}.jpg"), read_image(next(split.glob(f"relit/{name}.*")))
    mask = read_mask(next(split.glob(f"labels/masks/*/{name}*.png")), plate.shape[1::-1], resize=True)
    write_image(folder / "composite.png", copy_paste(plate, relit, mask))
    write_image(folder / "mask.png", mask)


def run_part(part: Part, folder: Path, gpu: bool, left: float) -> Outcome:
    """Run one part, output to ``<name>.log``; at its limit or after ``left`` seconds it ends, and its children too."""
    command, limit, began = part.command(folder, gpu), min(part.limit, left), time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    with open(folder / f"{part.name}.log", "w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(limit)
            status = "ended" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            status = f"killed after {limit:.0f} s"
        finally:
            end(process)
    figures = bench_figures(folder / f"{part.name}.log") if part.alone and status == "ended" else {}
    return Outcome(part.name, status, round(time.monotonic() - began, 1), shlex.join(command[1:]), figures)


def end(process: subprocess.Popen) -> None:
    """End a process, gently first, and whatever is left of what it started."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with suppress(ProcessLookupError):  # its group is gone
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def bench_figures(log: Path) -> dict[str, float]:
    """The figures of a part that measured: its last line names ``bench.json``."""
    last = Path(log.read_text().strip().rpartition("\n")[2])
    return json.loads(last.read_text()) if last.name == "bench.json" else {}


def largest_difference(folder: Path, name: str) -> int | None:
    """Of the pictures with and without graphs, of 255; None where one of them is missing."""
    files = [folder / part / "harmonized.png" for part in (name, f"{name}_graphs")]
    if not all(file.exists() for file in files):
        return None
    a, b = (read_image(file).astype(int) for file in files)
    return int(np.abs(a - b).max())


def table(outcomes: Sequence[Outcome], differences: Mapping[str, int | None]) -> str:
    """Markdown: a line a part, the figures of those that measure, and what graphs change."""
    lines = ["| part | outcome | seconds |", "|---|---|---|"]
    lines += [f"| {o.name} | {o.status} | {o.seconds:g} |" for o in outcomes]
    figures = {name: value for o in outcomes for name, value in o.figures.items()}
    shown = ("ours", "reference", "ratio", "ratio_min", "ratio_max", "tflops", "share_of_peak", "seconds", "memory_gib")
    kept = {name: value for name, value in figures.items() if name.rpartition("/")[2] in shown or "measured" in name}
    if kept:
        lines += ["", "| figure | |", "|---|---|", *(f"| {name} | {value:.4g} |" for name, value in kept.items())]
    lines += ["", *(f"{name}: graphs change at most {d} of 255" for name, d in differences.items() if d is not None)]
    return "\n".join(lines).rstrip()


def run_parts(
    chosen: Sequence[Part],
    folder: Path,
    gpu: bool,
    beside: int,
    total: float = TOTAL,
    say: Callable[[str], None] = tell,
) -> list[Outcome]:
    """Run ``chosen`` within ``total`` seconds, ``beside`` at a time where they do not measure; one outcome each, in
    their order, also in ``parts.json`` and ``table.md`` after each part.
    """
    write_composite(folder)
    began, outcomes = time.monotonic(), {}

    def record(outcome: Outcome) -> None:
        outcomes[outcome.name] = outcome
        listed = [outcomes[part.name] for part in chosen if part.name in outcomes]
        write_json(folder / "parts.json", [asdict(o) for o in listed])
        names = ("controlnet", "near", "paint_by_example")
        write_text(folder / "table.md", table(listed, {n: largest_difference(folder, n) for n in names}) + "\n")
        if outcome.status != "skipped: wants a GPU":
            say(f"{outcome.name}: {outcome.status}, {outcome.seconds:.0f} s; {folder / outcome.name}.log")

    def go(part: Part) -> Outcome:
        left = total - (time.monotonic() - began)
        if not gpu and part.cpu is None:
            return Outcome(part.name, "skipped: wants a GPU")
        return run_part(part, folder, gpu, left) if left > 1 else Outcome(part.name, "not reached")

    with ThreadPoolExecutor(beside) as pool:
        for future in as_completed([pool.submit(go, part) for part in chosen if not part.alone]):
            record(future.result())
    for part in chosen:
        if part.alone:
            record(go(part))
    return [outcomes[part.name] for part in chosen]
