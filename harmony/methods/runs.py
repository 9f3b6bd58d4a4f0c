"""Runs insertions of the user's composites, one or a folder of them in batches, and writes their files."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np

from harmony.core.errors import UserError
from harmony.core.files import write_json, write_text
from harmony.core.pieces import make_pieces
from harmony.core.progress import tell
from harmony.data.captions import caption_picture, find_captioner
from harmony.methods.inputs import Inputs, compare_baselines, draw_sheet, read_inputs
from harmony.methods.insert import AUTO, NONE, Insertion, Result, insert
from harmony.methods.method import CAPTION, Method, fingerprint
from harmony.models.backbone import Backbone
from harmony.models.timing import measure_time, now
from harmony.pixels.color_profiles import read_in_space, to_srgb
from harmony.pixels.images import grid, paste_crop, read_image, sha256, write_image

PICTURE_NAMES = ("harmonized", "raw", "composite", "hole", "sheet")  # of the PNG files of a result
FINGERPRINT_FILE = "made_of.json"  # written last: the pictures are complete, and what they depend on


@dataclass(frozen=True)
class Request:
    """One composite by its ``options`` (see ``read_inputs``) and the folder of its results.

    ``prompt`` None: the captioner writes it.
    """

    options: Mapping[str, Any]
    folder: Path
    prompt: str | None = None

    def read_pictures(self) -> dict[str, np.ndarray]:
        """The composite and what became of it, in sRGB."""
        names = ("composite", "harmonized")
        return {name: read_in_space(self.folder / f"{name}.png", None).pixels for name in names}


@dataclass
class Inserter:
    """A method with the settings that all insertions of a command share.

    ``detail``: see ``insert.insert``. ``shadow``: see ``Inputs.cut``; never where the detail is not kept. ``raw``:
    paste the whole square that the method returns, not the hole alone.
    """

    method: Method
    backbone: Backbone
    seed: int = 0
    feather: float = 0
    raw: bool = False
    detail: str = AUTO
    shadow: bool = True
    say: Callable[[str], None] = tell

    def collect_facts(self, request: Request) -> dict:
        """Everything that the results of a request depend on: method, settings, and the sha256 of its files."""
        files = {
            name: sha256(value)
            for name, value in request.options.items()
            if isinstance(value, str) and os.path.isfile(value)  # unlike Path's, no error for a long prompt
        }
        options = {name: value for name, value in request.options.items() if value is not None}
        names = ("seed", "feather", "raw", "detail", "shadow")
        settings = {name: getattr(self, name) for name in names} | {"prompt": request.prompt}
        return {"method": self.method.fingerprint, "options": options, "files": files, **settings}

    def is_done(self, request: Request) -> bool:
        """Whether the folder of a request holds its results."""
        file = request.folder / FINGERPRINT_FILE
        return file.exists() and fingerprint(self.collect_facts(request)) == file.read_text().strip()

    def caption(self, picture: np.ndarray) -> str:
        """A caption by the backbone's captioner; empty where it has none that knows photographs."""
        if self.captioner is None:
            return ""
        return caption_picture(picture, *self.captioner, self.backbone.device)

    @cached_property
    def captioner(self) -> tuple[Any, Any] | None:
        """The captioner and its processor; None, with one message for all composites, where none knows photographs."""
        try:
            return find_captioner(self.backbone)
        except UserError as error:
            self.say(f"the prompt is empty, add prompt=...: {error}")
            return None

    def run(self, requests: Sequence[Request], inputs: Sequence[Inputs] | None = None) -> list[dict[str, Path]]:
        """Insert a batch, with the same results as one at a time; the files of each, ``made_of.json`` last."""
        inputs = [read_inputs(r.options) for r in requests] if inputs is None else list(inputs)
        facts = [self.collect_facts(r) for r in requests]
        insertions = [self.cut(r, i) for r, i in zip(requests, inputs, strict=True)]
        start = now(self.method.device)
        with measure_time(self.method.networks(), self.method.device) as times:
            results = insert(self.method, insertions, self.seed, self.feather, self.detail)
            total = now(self.method.device) - start
        self.say(format_times(times, total, len(requests)))
        files = []
        for n, (request, item, result) in enumerate(zip(requests, inputs, results, strict=True)):
            files.append(self.write(request, item, result))
            files[-1] |= self.method.write_beside(n, insertions[n].square, request.folder)
            write_json(request.folder / "facts.json", facts[n] | {"prompt": insertions[n].square.caption})
            write_text(request.folder / FINGERPRINT_FILE, fingerprint(facts[n]) + "\n")
        return files

    def cut(self, request: Request, inputs: Inputs) -> Insertion:
        """The square of a request, with a caption where the method needs one."""
        for note in inputs.notes:
            self.say(note)
        insertion = inputs.cut(self.method, request.prompt or "", self.shadow and self.detail != NONE)
        request.folder.mkdir(parents=True, exist_ok=True)
        (request.folder / FINGERPRINT_FILE).unlink(missing_ok=True)
        write_image(request.folder / "composite.png", insertion.composite, icc_profile=inputs.profile)
        if CAPTION not in self.method.wants:
            return insertion
        prompt = request.prompt
        if prompt is None:
            prompt = self.caption(to_srgb(insertion.composite, inputs.profile))
        if prompt:
            self.say(f"prompt {prompt!r}")
        if end := self.backbone.unread_ends([prompt])[0]:
            self.say(f"the prompt is too long for the text encoder, its end is not read: {shorten(end, 80)!r}")
        return replace(insertion, square=replace(insertion.square, caption=prompt))

    def write(self, request: Request, inputs: Inputs, result: Result) -> dict[str, Path]:
        """Write all pictures of one result; name -> file."""
        files = {name: request.folder / f"{name}.png" for name in PICTURE_NAMES}
        image = paste_crop(inputs.background, result.output, result.crop) if self.raw else result.image
        write_image(files["hole"], result.hole)
        pictures = {"raw": result.output, "sheet": draw_sheet(inputs, result, image), "harmonized": image}
        for name, picture in pictures.items():
            exif = inputs.exif if name == "harmonized" else None
            write_image(files[name], picture, icc_profile=inputs.profile, exif=exif)
        return files

    def run_folder(self, requests: Mapping[str, Request], batch: int) -> tuple[np.ndarray, dict[str, Request]]:
        """Run the requests without results, ``batch`` at a time; a contact sheet of all, and those with results."""
        names = [name for name, request in requests.items() if not self.is_done(request)]
        if len(names) < len(requests):
            self.say(f"{len(requests) - len(names)} of {len(requests)} composites are there already")
        failures: set[str] = set()
        batches = {tuple(names[i : i + batch]): len(names[i : i + batch]) for i in range(0, len(names), batch)}

        def make(batch: tuple[str, ...]) -> None:
            failures.update(self.run_batch({name: requests[name] for name in batch}))

        make_pieces("composites", batches, lambda batch: False, make, "done", say=self.say, decimals=2, detail=max)
        results = {name: request for name, request in requests.items() if name not in failures}
        if not results:
            raise UserError(f"none of the {len(requests)} composites could be harmonized: see the lines above")
        rows = [
            compare_baselines(read_inputs(r.options), read_image(r.folder / "harmonized.png")) for r in results.values()
        ]
        return grid(rows, ["composite", "harmonized", "reinhard", "poisson"]), results

    def run_batch(self, requests: Mapping[str, Request]) -> set[str]:
        """Insert some composites of a folder together; the names of those that failed, each reported in a line."""
        inputs, failures = {}, set()
        for name, request in requests.items():
            try:
                inputs[name] = read_inputs(request.options)
            except UserError as error:
                self.say(f"{name} left out: {error}")
                failures.add(name)
        if not inputs:
            return failures
        try:
            self.run([requests[name] for name in inputs], list(inputs.values()))
        except UserError as error:
            if len(inputs) > 1:  # run each alone to find the one that failed
                return failures.union(*(self.run_batch({name: requests[name]}) for name in inputs))
            self.say(f"{', '.join(inputs)} left out: {error}")
            return failures | {*inputs}
        return failures


def format_times(times: Counter, total: float, count: int) -> str:
    """A line with the seconds for ``count`` composites and the share of each network."""
    parts = times + Counter({"the rest": total - sum(times.values())})
    number = f" for {count} composites" if count > 1 else ""
    return f"{total:.2f} s{number}: {', '.join(f'{name} {100 * s / total:.0f} %' for name, s in parts.most_common())}"
