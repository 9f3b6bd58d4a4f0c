"""What each option may be, declared once for all commands and checked before anything is done.

A rule is found by the end of an option's dotted name, the longest first: an option means the same everywhere. ``*``
stands for any last name. Options without a rule must be of the kind of their default.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from harmony.cli.explain import nearest
from harmony.core.errors import UserError


@dataclass(frozen=True)
class Whole:
    """A whole number from ``low`` to ``high``."""

    low: int | None = None
    high: int | None = None
    none: bool = False

    def accepts(self, value: Any) -> bool:
        return type(value) is int and in_range(value, self.low, self.high)

    def __str__(self) -> str:
        return f"a whole number{range_text(self.low, self.high)}"


@dataclass(frozen=True)
class Number:
    """A finite number from ``low`` to ``high``."""

    low: float | None = None
    high: float | None = None
    none: bool = False

    def accepts(self, value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value) and in_range(value, self.low, self.high)

    def __str__(self) -> str:
        return f"a number{range_text(self.low, self.high)}"


@dataclass(frozen=True)
class Switch:
    none: bool = False

    def accepts(self, value: Any) -> bool:
        return isinstance(value, bool)

    def __str__(self) -> str:
        return "true or false"


def is_text(value: str) -> bool:
    """Whether UTF-8 can write it, and the system take it."""
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


@dataclass(frozen=True)
class Text:
    none: bool = False
    empty: bool = False

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and (self.empty or value.strip() != "") and is_text(value)

    def __str__(self) -> str:
        return "text"


@dataclass(frozen=True)
class Choice:
    words: tuple[str, ...]
    none: bool = False

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.words

    def __str__(self) -> str:
        return f"one of {', '.join(self.words)}"


@dataclass(frozen=True)
class Items:
    """A list of ``length`` values (None: of any length), each by ``rule`` (None: of any kind)."""

    rule: "Rule | None" = None
    length: int | None = None
    none: bool = False

    def accepts(self, value: Any) -> bool:
        fits = isinstance(value, list) and self.length in (None, len(value))
        return fits and (self.rule is None or all(map(self.rule.accepts, value)))

    def __str__(self) -> str:
        length = "" if self.length is None else f" of {self.length}"
        return f"a list [a, b, ...]{length}{'' if self.rule is None else f', each {self.rule}'}"


@dataclass(frozen=True)
class Keys:
    """A mapping {NAME: value}, whose values have rules of their own."""

    none: bool = False

    def accepts(self, value: Any) -> bool:
        return isinstance(value, dict)

    def __str__(self) -> str:
        return "a mapping {NAME: value, ...}"


@dataclass(frozen=True)
class Either:
    rules: tuple["Rule", ...]
    none: bool = False

    def accepts(self, value: Any) -> bool:
        return any(rule.accepts(value) for rule in self.rules)

    def __str__(self) -> str:
        return ", or ".join(map(str, self.rules))


Rule = Whole | Number | Switch | Text | Choice | Items | Keys | Either


def in_range(value: float, low: float | None, high: float | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)


def range_text(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return ""
    if high is None:
        return f" of {low} or more"
    return f" from {low} to {high}"


COUNT, SHARE, POSITIVE, SIZE = Whole(1), Number(0, 1), Number(0), Whole(8, 4096)
OPTIONS: dict[str, Rule] = {
    # sampling
    "seed": Whole(0, 2**32 - 1),
    "steps": Whole(1, 999),
    "guidance": Number(0, none=True),
    "method.guidance": Number(0),
    "lambda_l": Number(),
    "lambda_h": Number(),
    "branch": Text(none=True),
    **dict.fromkeys(("data.branch", "module.branch"), Either((Text(), Items(Text())), none=True)),
    "solver": Choice(("ddim", "dpmsolver++", "unipc")),
    "guided": SHARE,
    "encoder_every": COUNT,
    "controlnet": Text(none=True),
    "structure": Text(none=True),
    "painter": Text(none=True),
    "describer": Text(),
    "clip": Text(none=True),
    "evaluator": Text(none=True),
    "rounds": COUNT,
    "zero_shot.refine": Whole(0),
    "zero_shot.lr": POSITIVE,
    "zero_shot.prompt_l2": POSITIVE,
    "zero_shot.null_lr": POSITIVE,
    "zero_shot.edges": POSITIVE,
    "zero_shot.edge_detector_weight": POSITIVE,
    **dict.fromkeys(("zero_shot.detail", "parts.detail"), Switch()),
    "cross_attention_steps": Number(0, 1, none=True),
    "self_attention_steps": Number(0, 1, none=True),
    "threshold": SHARE,
    "inner": Whole(0),
    # pictures
    **dict.fromkeys(("background", "foreground", "composite", "mask", "region", "dir", "image"), Text(none=True)),
    **dict.fromkeys(("prompts", "source", "target"), Text(none=True)),
    "prompt": Text(none=True, empty=True),
    "reference": Text(none=True),
    "box": Items(Number(), 4, none=True),
    "square": Either((Text(), Items(Whole(0))), none=True),
    "feather": Number(0, 10_000),
    "detail": Choice(("auto", "full", "none")),
    "shadow": Switch(),
    "mode": Choice(("replace", "insert", "style", "reweight"), none=True),
    "local": Switch(none=True),
    "words": Either((Text(), Items(Text())), none=True),
    "look_at": Either((Text(), Items(Text())), none=True),
    "reweight": Either((Keys(), Text()), none=True),
    "reweight.*": Number(-1000, 1000),
    "output": Text(none=True),
    # models
    "model.path": Text(),
    "model.weights": Choice(("hub", "random")),
    "model.dtype": Choice(("auto", "float32", "bfloat16")),
    "model.attention": Choice(("native", "cudnn", "flash")),
    # data
    "limit": Whole(1, none=True),
    "batch": COUNT,
    "batch_size": COUNT,
    "workers": Whole(0, 1024),
    "variants": COUNT,
    "split": Choice(("train", "validation", "test")),
    "dataset.name": Text(),
    "dataset.dir": Text(none=True),
    "dataset.photos": Text(none=True),
    "dataset.count": Whole(1, none=True),
    "dataset.size": SIZE,
    "dataset.splits": Items(Choice(("train", "validation", "test"))),
    "min_area": SHARE,
    "max_area": SHARE,
    "max_samples": Whole(1, none=True),
    "mismatch": SHARE,
    "elsewhere": SHARE,
    "recolor": SHARE,
    "data.context": Number(1, 100, none=True),
    "data.photos": Number(0, 1, none=True),
    "noisiest": SHARE,
    "crop": Choice(("center", "jitter", "extended")),
    "low": Number(0, 10_000),
    "high": Number(0, 10_000),
    "blur": Number(0, 64),
    "hints.*": Keys(),
    "data.share": Items(SHARE, 2),
    # training
    **dict.fromkeys(("module.lr", "weight_decay", "encoder_lr"), POSITIVE),
    "zero_init_lr": Number(0, none=True),
    "companion": Text(none=True),
    "warmup": Whole(0),
    "prompt_dropout": SHARE,
    "module.share": SHARE,
    "dropout": SHARE,
    "ema": SHARE,
    "average.decay": Number(0, 0.999999),
    "vectors": Whole(1, 64),
    "in_channels": Whole(1, none=True),
    "t_min": Whole(0, 999),
    "objective.clip": Items(Number(0), 2),
    "objective.weighting": Choice(("plain", "x0")),
    "inside": POSITIVE,
    "checkpoint": Choice(("best", "last")),
    "checkpoint_every": COUNT,
    "best.mode": Choice(("min", "max")),
    "every": COUNT,
    "trainer.accelerator": Choice(("auto", "cpu", "gpu", "cuda", "mps")),
    "trainer.devices": Either((Whole(1), Choice(("auto",)), Items(Whole(0)))),
    "trainer.num_nodes": COUNT,
    "trainer.max_steps": Whole(-1),
    "trainer.max_epochs": Whole(-1, none=True),
    "trainer.accumulate_grad_batches": COUNT,
    "trainer.gradient_clip_val": Number(0, none=True),
    "trainer.val_check_interval": Either((Whole(1), Number(0, 1)), none=True),
    "trainer.check_val_every_n_epoch": Whole(1, none=True),
    "trainer.log_every_n_steps": COUNT,
    "trainer.num_sanity_val_steps": Whole(-1),
    "trainer.limit_train_batches": Either((Whole(0), Number(0, 1)), none=True),
    "trainer.limit_val_batches": Either((Whole(0), Number(0, 1)), none=True),
    "trainer.precision": Text(none=True),
    "trainer.max_time": Text(none=True),
    "trainer.deterministic": Either((Switch(), Choice(("warn",))), none=True),
    "trainer.fast_dev_run": Either((Switch(), Whole(0))),
    # studies
    "study.rows.*": Either((Keys(), Text()), none=True),
    "study.sweep": Keys(none=True),
    "study.paper.*": Keys(),
    "study.methods.*": Text(),
    **dict.fromkeys(("study.evaluators.*", "controlnets.*", "painters.*"), Text(none=True)),
    "eval_set": Choice(("reconstruct", "relight", "exemplar")),
    "lambdas": Items(Number()),
    "pairs": Choice(("same", "square")),
    "radius": Number(0, 512),
    "degrade": Items(COUNT),
    "figure": Choice(("pictures", "curves", "heat")),
    "trials": Whole(1, none=True),
    "shown": COUNT,
    "study.parts": Items(Choice(("reconstruction", "edits", "concepts"))),
    "study.methods": Keys(none=True),
    "unchanged": COUNT,
    "study.answers": Either((Text(), Items(Text())), none=True),
    "study.judge": Text(none=True),
    # commands
    "name": Text(none=True),
    "resume": Either((Switch(), Text())),
    "paths.runs": Text(),
    "paths.work": Text(),
    "run": Text(none=True),
    "format": Choice(("diffusers", "comfyui")),
    **dict.fromkeys(("license", "push"), Text(none=True)),
    "backbone": Either((Text(), Keys()), none=True),
    "port": Whole(1, 65535),
    "address": Text(none=True),
    "host": Text(),
    "waiting": Whole(1),
    "blocks": COUNT,
    **dict.fromkeys(("data.boxes", "data.masks", "data.samples", "data.compared"), COUNT),
}


def find_rule(key: str, default: Any) -> Rule | None:
    """The rule of an option: by the longest end of its name, else by its default; None where nothing is known."""
    parts = key.split(".")
    for i in range(len(parts)):
        for name in (parts[i:], [*parts[i:-1], "*"]):
            if (rule := OPTIONS.get(".".join(name))) is not None:
                return rule
    if isinstance(default, str):
        return None if default == "???" else Text(none=True)
    kinds = {bool: Switch(), int: Whole(), float: Number(), dict: Keys(none=True), list: Items()}
    return kinds.get(type(default))


def flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every option in nested mappings, those of mappings with names before their parts."""
    for key, value in node.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")


def check_groups(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """UserError for a value in the place of several options, as in ``module=true``."""
    for key, value in flatten(values):
        default = defaults.get(key)
        if isinstance(default, dict) and default and not isinstance(value, dict) and value is not None:
            option = next(name for name in default if name[0] != "_")
            raise UserError(f"{key}={value}: it holds options of its own, give one of them: {key}.{option}=...")


def check_values(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """UserError for the first value that its option cannot have.

    ``values``: the resolved configuration; ``defaults``: dotted name -> value without the user's own. An option may be
    null where its default or its rule says so.
    """
    for key, value in flatten(values):
        default, name = defaults.get(key), key.rpartition(".")[2]
        if name.startswith("_"):
            continue
        is_off = value is None and name != "backbone"  # a callback or logger may be
        if isinstance(default, Mapping) and "_target_" in default and not is_off and "_target_" not in (value or {}):
            raise UserError(f"{key}={value}: leave it out, or give one of its options: {key}.OPTION=...")
        rule = find_rule(key, default)
        if rule is None or (value is None and (rule.none or defaults.get(key) is None)):
            continue
        if not rule.accepts(value):
            hint = nearest(value, rule.words) if isinstance(rule, Choice) and isinstance(value, str) else ""
            raise UserError(f"{key}={value}: give {rule}{', or null' if rule.none else ''}{hint}")
