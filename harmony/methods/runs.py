"""Inserting what a person brings, with all that is left behind: one composite, or a folder of them in batches."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from harmony.core.errors import UserError
from harmony.core.files import write_json, write_text
from harmony.core.progress import Progress, tell
from harmony.data.captions import caption_images
from harmony.methods.inputs import Inputs, beside_baselines, read_inputs, sheet
from harmony.methods.insert import Insertion, Result, insert
from harmony.methods.method import CAPTION, Method, fingerprint
from harmony.models.backbone import Backbone
from harmony.models.timing import measure_time, now
from harmony.pixels.images import grid, paste_crop, read_image, sha256, write_image

MADE_OF = "made_of.json"  # beside the pictures: that they are all there, and of what


@dataclass(frozen=True)
class Request:
    """One composite by its ``options`` (see ``read_inputs``) and where its results go; ``prompt`` None: ask the
    captioner.
    """

    options: Mapping[str, Any]
    folder: Path
    prompt: str | None = None


@dataclass
class Inserter:
    """A method with what a command says of every insertion.

    ``raw``: the method's whole square is put back, its background too.
    """

    method: Method
    backbone: Backbone
    seed: int = 0
    feather: float = 0
    raw: bool = False
    say: Callable[[str], None] = tell

    def made_of(self, request: Request) -> dict:
        """What decides the results of a request: method, settings, and the sha256 of the files that it names."""
        files = {
            name: sha256(value)
            for name, value in request.options.items()
            if isinstance(value, str) and os.path.isfile(value)  # unlike Path's, no error for a long prompt
        }
        options = {name: value for name, value in request.options.items() if value is not None}
        how = {"seed": self.seed, "feather": self.feather, "raw": self.raw, "prompt": request.prompt}
        return {"method": self.method.fingerprint, "options": options, "files": files, **how}

    def is_done(self, request: Request) -> bool:
        """Whether the folder of a request holds its results."""
        return (request.folder / MADE_OF).exists() and fingerprint(self.made_of(request)) == (
            request.folder / MADE_OF
        ).read_text().strip()

    def caption(self, path: Path) -> str:
        """What the backbone's captioner says of a picture; empty, and a line that says so, where it has none."""
        try:
            captioner, processor = self.backbone.captioner, self.backbone.processor
        except UserError as error:
            self.say(f"the prompt is empty, add prompt=...: {error}")
            return ""
        return next(caption_images([("composite", path)], captioner, processor, 1, self.backbone.device))[1]

    def run(self, requests: Sequence[Request], inputs: Sequence[Inputs] | None = None) -> list[dict[str, Path]]:
        """Insert a batch, each as it would be alone; the files of each, ``made_of.json`` written last."""
        inputs = [read_inputs(r.options) for r in requests] if inputs is None else list(inputs)
        facts = [self.made_of(r) for r in requests]
        insertions = [self.cut(r, i) for r, i in zip(requests, inputs, strict=True)]
        start = now(self.method.device)
        with measure_time(self.method.networks(), self.method.device) as spent:
            results = insert(self.method, insertions, self.seed, self.feather)
            total = now(self.method.device) - start
        self.say(time_shares(spent, total, len(requests)))
        files = []
        for n, (request, each, result) in enumerate(zip(requests, inputs, results, strict=True)):
            files.append(self.write(request, each, result))
            files[-1] |= self.method.write_beside(n, insertions[n].square, request.folder)
            write_json(request.folder / "facts.json", facts[n] | {"prompt": insertions[n].square.caption})
            write_text(request.folder / MADE_OF, fingerprint(facts[n]) + "\n")
        return files

    def cut(self, request: Request, inputs: Inputs) -> Insertion:
        """The square of a request, with its caption where the method wants one."""
        insertion = inputs.cut(self.method, request.prompt or "")
        request.folder.mkdir(parents=True, exist_ok=True)
        (request.folder / MADE_OF).unlink(missing_ok=True)
        write_image(request.folder / "composite.png", insertion.composite)
        if CAPTION not in self.method.wants:
            return insertion
        prompt = request.prompt
        if prompt is None:
            prompt = self.caption(request.folder / "composite.png")
        self.say(f"prompt {prompt!r}")
        return replace(insertion, square=replace(insertion.square, caption=prompt))

    def write(self, request: Request, inputs: Inputs, result: Result) -> dict[str, Path]:
        """All pictures of one result."""
        names = ("harmonized", "raw", "composite", "hole", "sheet")
        files = {name: request.folder / f"{name}.png" for name in names}
        image = paste_crop(inputs.background, result.raw, result.crop) if self.raw else result.image
        write_image(files["raw"], result.raw)
        write_image(files["hole"], result.hole)
        write_image(files["sheet"], sheet(inputs, result, image))
        write_image(files["harmonized"], image)
        return files

    def run_folder(self, requests: Mapping[str, Request], batch: int) -> tuple[np.ndarray, int]:
        """Insert what is not there yet, ``batch`` at a time; a contact sheet of all, and how many were left out."""
        todo = [name for name, request in requests.items() if not self.is_done(request)]
        if len(todo) < len(requests):
            self.say(f"{len(requests) - len(todo)} of {len(requests)} composites are there already")
        refused, progress = set(), Progress("composites", len(todo), "done", self.say, decimals=2)
        for i in range(0, len(todo), batch):
            part = todo[i : i + batch]
            refused |= self.run_some({name: requests[name] for name in part})
            progress.advance(len(part), part[-1])
        kept = {name: request for name, request in requests.items() if name not in refused}
        if not kept:
            raise UserError(f"none of the {len(requests)} composites could be harmonized: see the lines above")
        rows = [
            beside_baselines(read_inputs(r.options), read_image(r.folder / "harmonized.png")) for r in kept.values()
        ]
        return grid(rows, ["composite", "harmonized", "reinhard", "poisson"]), len(refused)

    def run_some(self, requests: Mapping[str, Request]) -> set[str]:
        """Insert some composites of a folder together; the names of those that could not be, each with a line."""
        inputs, refused = {}, set()
        for name, request in requests.items():
            try:
                inputs[name] = read_inputs(request.options)
            except UserError as error:
                self.say(f"{name} left out: {error}")
                refused.add(name)
        if not inputs:
            return refused
        try:
            self.run([requests[name] for name in inputs], list(inputs.values()))
        except UserError as error:
            if len(inputs) > 1:  # which of them it was shows when each is alone
                return refused.union(*(self.run_some({name: requests[name]}) for name in inputs))
            self.say(f"{', '.join(inputs)} left out: {error}")
            return refused | {*inputs}
        return refused


def time_shares(spent: Counter, total: float, count: int) -> str:
    """Seconds for ``count`` composites, and what part of them each network took."""
    parts = spent + Counter({"the rest": total - sum(spent.values())})
    several = f" for {count} composites" if count > 1 else ""
    return f"{total:.2f} s{several}: {', '.join(f'{name} {100 * s / total:.0f} %' for name, s in parts.most_common())}"
