"""Runs everything that a GPU changes as separate commands: ``python -m harmony.bench gpu``.

Each part has a hard limit, at which it is killed and reported and the next one starts. Logs, figures and the table are
written after each part. Parts that measure nothing run first, side by side; then each part that measures runs alone.
Without a GPU the parts that make sense there run, shortened; the others are listed as skipped.
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
TOTAL_SECONDS = 360  # for all parts together
GRACE = 10  # seconds between SIGTERM and SIGKILL
SD2 = ("model=sd2", "model.weights=random")
SHORT_TRAINING = ("trainer.max_steps=10", "trainer.log_every_n_steps=5", "checkpoint_every=10")
QUICK_TRAINING = (*SHORT_TRAINING, "callbacks.samples=null", "evaluate=null")  # without pictures and figures


@dataclass(frozen=True)
class Part:
    """One command: ``python -m harmony.`` and its ``words``, at most ``limit`` seconds.

    ``alone``: it measures, so nothing may run beside it. ``cpu``: words that are added without a GPU; None: the part
    needs a GPU.
    """

    name: str
    words: tuple[str, ...]
    limit: int
    alone: bool = False
    cpu: tuple[str, ...] | None = ()

    def build_command(self, folder: Path, gpu: bool) -> list[str]:
        """The command line; runs and results go to ``folder``."""
        if self.words[0] == "pytest":
            return [sys.executable, "-m", *self.words]
        words = (*self.words[1:], *(() if gpu else self.cpu))
        return [sys.executable, "-m", f"harmony.{self.words[0]}", *words, f"paths.runs={folder}/runs"]


@dataclass(frozen=True)
class Outcome:
    """The result of a part; ``status``: ended, failed (exit code), killed at its limit, skipped, or not reached."""

    name: str
    status: str
    seconds: float = 0.0
    command: str = ""
    figures: dict[str, float] = field(default_factory=dict)


def compose_fit(experiment: str, *words: str) -> tuple[str, ...]:
    """The words of a training on the studio data."""
    return ("fit", f"experiment={experiment}", "dataset=studio", "logger=none", *words)


def compose_harmonize(method: str, folder: Path, *words: str) -> tuple[str, ...]:
    """The words that harmonize the composite in ``folder`` (see ``write_composite``)."""
    pictures = (f"composite={folder}/composite.png", f"mask={folder}/mask.png")
    return ("harmonize", f"method={method}", *pictures, "prompt=a red car on grass", *words)


def find_gpu_tests() -> list[str]:
    """The files with tests that need a GPU: others may import what a bare machine with a GPU lacks."""
    return sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text())


def list_parts(folder: Path) -> list[Part]:
    """All parts, the most important first."""
    concept = ROOT / "datasets" / "editing" / "concepts" / "pink_car"
    word = ("token=<pink_car>", "init=car", f"dataset.dir={concept}")
    lights = ("prompts=a red car: grey overcast light -> warm sunset light", "rounds=1", "evaluator=null", "steps=10")
    near_exact = ("detail=none", "solver=unipc", "guided=0.5", "encoder_every=2", "guidance=2", "steps=10")
    commands = [
        Part("fit_color", compose_fit("color"), 150, cpu=(*SHORT_TRAINING, "evaluate.limit=4", "evaluate.steps=2")),
        Part("tests", ("pytest", "-q", "-m", "gpu", "--no-header", *find_gpu_tests()), 150, cpu=None),
        Part("fit_joint_compiled", compose_fit("joint", *QUICK_TRAINING, "module.compile=true"), 180, cpu=None),
        *(
            Part(f"harmonize_{name}", compose_harmonize(method, folder, *words, f"output={folder}/{name}"), 60, cpu=cpu)
            for name, method, words, cpu in (
                ("controlnet", "controlnet", ("detail=none",), ()),
                ("controlnet_graphs", "controlnet", ("detail=none", "graphs=true"), None),
                ("near", "controlnet", near_exact, ()),
                ("near_graphs", "controlnet", (*near_exact, "graphs=true"), None),
                ("paint_by_example", "paint_by_example", (), ()),
                ("paint_by_example_graphs", "paint_by_example", ("graphs=true",), None),
                ("zero_shot", "zero_shot", lights, ()),
            )
        ),
        Part(
            "edit",
            ("edit", f"image={folder}/composite.png", "source=a red car on grass", "target=a blue car on grass")
            + ("steps=10", f"output={folder}/edit"),
            60,
        ),
        *(
            Part(f"fit_{name}", compose_fit(experiment, *QUICK_TRAINING, *words), 90)
            for name, experiment, words in (
                ("joint", "joint", ()),
                ("bf16_offload", "color", ("trainer.precision=bf16-mixed", "module.offload=true")),
                ("checkpointing", "structure", ("module.checkpointing=true",)),
                ("paint_by_example", "paint_by_example", ()),
            )
        ),
        Part(
            "fit_textual_inversion", ("fit", "experiment=textual_inversion", *word, *SHORT_TRAINING, "logger=none"), 90
        ),
        Part("fit_judge", compose_fit("judge", *SHORT_TRAINING), 90),
        Part("evaluate", ("evaluate", "experiment=table1", "limit=4", "steps=4", "logger=none"), 90),
    ]
    rates = ("batch=32", "steps=20", "blocks=3")
    measurements = [
        Part("train", ("bench", "train", *SD2, *rates, "compile=true"), 200, alone=True, cpu=None),
        Part("sample", ("bench", "sample", *SD2, "blocks=2", "sampling.steps=50"), 150, alone=True, cpu=None),
        Part("train_eager", ("bench", "train", *SD2, *rates), 100, alone=True, cpu=None),
        Part("joint", ("bench", "joint", *SD2, "batch=32", "steps=6", "blocks=2", "compile=true"), 200, True, None),
        Part("train_cudnn", ("bench", "train", *SD2, *rates, "compile=true", "model.attention=cudnn"), 200, True, None),
        Part("memory", ("bench", "memory", *SD2), 90, alone=True, cpu=None),
    ]
    return commands + measurements


def write_composite(folder: Path) -> None:
    """Write ``composite.png`` and ``mask.png``: a bundled object in its second light on its own plate."""
    split = ROOT / "datasets" / "studio" / "test"
    name = sorted(path.stem for path in (split / "plates").glob("*.jpg"))[0]
    plate, render = read_image(split / "plates" / f"{name}.jpg"), read_image(next(split.glob(f"relit/{name}.*")))
    mask = read_mask(next(split.glob(f"labels/masks/*/{name}*.png")), plate.shape[1::-1], resize=True)
    write_image(folder / "composite.png", copy_paste(plate, render, mask))
    write_image(folder / "mask.png", mask)


def run_part(part: Part, folder: Path, gpu: bool, seconds: float) -> Outcome:
    """Run one part with its output in ``<name>.log``; it and its children end at its limit or after ``seconds``."""
    command, limit, start = part.build_command(folder, gpu), min(part.limit, seconds), time.monotonic()
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
            end_process(process)
    figures = read_figures(folder / f"{part.name}.log") if part.alone and status == "ended" else {}
    return Outcome(part.name, status, round(time.monotonic() - start, 1), shlex.join(command[1:]), figures)


def end_process(process: subprocess.Popen) -> None:
    """End a process, first by SIGTERM, then kill its whole group."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with suppress(ProcessLookupError):  # its group is gone
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_figures(log: Path) -> dict[str, float]:
    """The figures of a part that measures, from the ``bench.json`` that the last line of its log names."""
    last = Path(log.read_text().strip().rpartition("\n")[2])
    return json.loads(last.read_text()) if last.name == "bench.json" else {}


def measure_difference(folder: Path, name: str) -> int | None:
    """The largest difference, of 255, between the pictures with and without graphs; None where one is missing."""
    files = [folder / part / "harmonized.png" for part in (name, f"{name}_graphs")]
    if not all(file.exists() for file in files):
        return None
    a, b = (read_image(file).astype(int) for file in files)
    return int(np.abs(a - b).max())


def format_table(outcomes: Sequence[Outcome], differences: Mapping[str, int | None]) -> str:
    """Markdown: a line for each part, the figures of those that measure, and how much graphs change pictures."""
    lines = ["| part | outcome | seconds |", "|---|---|---|"]
    lines += [f"| {o.name} | {o.status} | {o.seconds:g} |" for o in outcomes]
    figures = {name: value for o in outcomes for name, value in o.figures.items()}
    names = ("ours", "reference", "ratio", "ratio_min", "ratio_max", "tflops", "share_of_peak", "seconds", "memory_gib")
    figures = {name: v for name, v in figures.items() if name.rpartition("/")[2] in names or "measured" in name}
    if figures:
        lines += ["", "| figure | |", "|---|---|", *(f"| {name} | {value:.4g} |" for name, value in figures.items())]
    lines += ["", *(f"{name}: graphs change at most {d} of 255" for name, d in differences.items() if d is not None)]
    return "\n".join(lines).rstrip()


def run_parts(
    parts: Sequence[Part],
    folder: Path,
    gpu: bool,
    workers: int,
    total: float = TOTAL_SECONDS,
    say: Callable[[str], None] = tell,
) -> list[Outcome]:
    """The outcomes of ``parts``, run within ``total`` seconds, those that do not measure ``workers`` at a time.

    ``parts.json`` and ``table.md`` are written anew after each part.
    """
    write_composite(folder)
    start, outcomes = time.monotonic(), {}

    def record(outcome: Outcome) -> None:
        outcomes[outcome.name] = outcome
        reports = [outcomes[part.name] for part in parts if part.name in outcomes]
        write_json(folder / "parts.json", [asdict(o) for o in reports])
        names = ("controlnet", "near", "paint_by_example")
        write_text(folder / "table.md", format_table(reports, {n: measure_difference(folder, n) for n in names}) + "\n")
        if outcome.status != "skipped: wants a GPU":
            say(f"{outcome.name}: {outcome.status}, {outcome.seconds:.0f} s; {folder / outcome.name}.log")

    def run_or_skip(part: Part) -> Outcome:
        seconds = total - (time.monotonic() - start)
        if not gpu and part.cpu is None:
            return Outcome(part.name, "skipped: wants a GPU")
        return run_part(part, folder, gpu, seconds) if seconds > 1 else Outcome(part.name, "not reached")

    with ThreadPoolExecutor(workers) as pool:
        for future in as_completed([pool.submit(run_or_skip, part) for part in parts if not part.alone]):
            record(future.result())
    for part in parts:
        if part.alone:
            record(run_or_skip(part))
    return [outcomes[part.name] for part in parts]
