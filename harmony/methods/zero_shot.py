"""Zero-shot harmonization with a generative prior.

Chen 2023 (Zero-Shot Image Harmonization with Generative Model Prior, arXiv 2307.08182). Nothing is trained: a composite
is inverted, its prompt is tuned to its object, and it is sampled again under the prompt of its surroundings, with all
attention maps those of the composite. ``harmonize_once`` is one such round; ``run_rounds`` decides how many follow.
"""

import functools
import math
import re
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from harmony.core.errors import UserError
from harmony.core.files import write_json
from harmony.data.captions import caption_picture, find_captioner
from harmony.data.descriptions import (
    BrightnessMeter,
    Describer,
    Description,
    MeasuredDescription,
    VisionLanguageModel,
    WordScorer,
)
from harmony.methods.method import LIGHTS, Composite, Method, Seed, fingerprint
from harmony.models.attention import Layer, conditional_rows, control_attention, map_side
from harmony.models.backbone import DIFFUSION, Backbone, weights_hash
from harmony.models.clip import clip_of
from harmony.models.judge import Evaluator, load_evaluator
from harmony.models.textual_inversion import states_of
from harmony.models.timing import blocks
from harmony.pixels.composites import copy_paste
from harmony.pixels.images import from_model, grid, to_model, write_image
from harmony.sampling.ddim import invert, timesteps
from harmony.sampling.null_text import Search, denoiser, distance, null_texts
from harmony.sampling.prompt_to_prompt import edit_latents, spans

DEFAULT_OBJECT = "an object,"  # where no captioner names it
PICTURE_OF = re.compile(r"^an? (photo|photograph|picture|image) of ", re.IGNORECASE)
PIVOT = 10.0  # weight of the distance to the trajectory in the loss of the null texts, beside the edges
NUMBERS = {
    "refine": int,
    "lr": float,
    "prompt_l2": float,
    "null_lr": float,
    "edges": float,
    "edge_detector_weight": float,
}


@dataclass(frozen=True)
class Parts:
    """Settings of a round; all defaults but ``detail`` are those of the released code of Chen 2023.

    ``refine``: iterations of the words' refinement in each step (0 = off), with learning rate ``lr`` and weight
    ``prompt_l2`` of the penalty on their changes. ``null_lr``: learning rate of the null texts. ``edges``: weight of
    the edges in their loss (0 = off: nothing is decoded). ``edge_detector``: a differentiable edge detector B x 3 x H
    x W in [0, 1] -> maps, which counts with ``edge_detector_weight``. ``self_attention``: copy self-attention too.
    ``detail``: add the difference between the pictures of the two prompts to the composite, which keeps detail that
    the autoencoder loses; otherwise (Chen 2023) return the picture of the background's prompt.
    """

    steps: int = 50
    guidance: float = 2.5
    refine: int = 2
    lr: float = 5e-4
    prompt_l2: float = 1000.0
    null_lr: float = 0.1
    edges: float = 1.0
    self_attention: bool = True
    detail: bool = True
    edge_detector: torch.nn.Module | None = None
    edge_detector_weight: float = 0.1

    def __post_init__(self):
        for name, kind in NUMBERS.items():
            value = getattr(self, name)
            if type(value) not in (int, kind) or value < 0:
                raise UserError(f"{name}={value}: give {'a whole number' if kind is int else 'a number'} of 0 or more")


def find_descriptors(backbone: Backbone, prompt: str, object: str) -> torch.Tensor:
    """The mask, bool T, of the words after the object phrase. UserError for a prompt without any, or one too long."""
    length = backbone.tokenizer.model_max_length
    places, first = spans(prompt, backbone.encode, length), len(object.split())
    if len(places) <= first:
        raise UserError(f"{prompt!r} says nothing of the light: add words for it after the object")
    mask = torch.zeros(length, dtype=torch.bool)
    mask[places[first][0] : places[len(places) - 1][1]] = True
    return mask


class AttentionMean:
    """A control that averages the cross-attention maps of all layers, with gradients: ``mean`` B x positions x T."""

    def __init__(self, tokens: int):
        self.tokens, self.total, self.layers = tokens, 0.0, 0

    def wants(self, layer: Layer, tokens: int, step: int) -> bool:
        return layer.is_cross and tokens == self.tokens and layer.place != "mid"

    def __call__(self, probabilities: torch.Tensor, layer: Layer, step: int) -> torch.Tensor:
        self.total, self.layers = self.total + probabilities.mean(1), self.layers + 1
        return probabilities

    @property
    def mean(self) -> torch.Tensor:
        return self.total / self.layers


def attention_loss(mask: torch.Tensor, heat: torch.Tensor) -> torch.Tensor:
    """mean (M - A / max A)^2 of each of B maps, B x N: 0 where attention and ``mask`` agree, at most 1.

    Chen 2023, L_Emb.
    """
    return (mask - heat / heat.amax(1, keepdim=True).clamp(min=1e-12)).square().mean(1)


@dataclass
class Words:
    """The variables of the refinement of B composites.

    ``change`` 2B x T x D: changes of the embeddings of the descriptors, foregrounds first. ``logits`` B x T: of the
    weights of the backgrounds' descriptors. ``descriptors`` bool 2B x T: where they are.
    """

    descriptors: torch.Tensor
    change: torch.Tensor
    logits: torch.Tensor

    @property
    def weights(self) -> torch.Tensor:
        """B x T: weights of the descriptors of each background, which sum to 1."""
        return self.logits.masked_fill(~self.descriptors[len(self.logits) :], -math.inf).softmax(1)

    def compute_penalty(self) -> torch.Tensor:
        """Mean square of the changes, foreground plus background: B."""
        squares = (self.change.square() * self.descriptors[..., None]).sum((1, 2))
        return (squares / (self.descriptors.sum(1) * self.change.shape[2])).view(2, -1).sum(0)


def refine_texts(
    backbone: Backbone,
    trajectory: Sequence[torch.Tensor],
    masks: torch.Tensor,
    tokens: torch.Tensor,
    where: torch.Tensor,
    parts: Parts,
) -> list[torch.Tensor]:
    """Refine the descriptors of both prompts by L_Emb: text states 2B x T x D for each step, foregrounds first.

    ``trajectory`` z_0 .. z_N of B composites; ``masks`` B x 1 x R x R; ``tokens`` and ``where`` (the descriptors)
    2B x T. In the states of the backgrounds each descriptor is replaced by their weighted sum. The masks of the maps
    hold the share of each cell that the object covers, where the released code has 0 or 1.
    """
    steps, eps, count = len(trajectory) - 1, denoiser(backbone), len(masks)
    side = map_side(backbone.unet, trajectory[0].shape[-1])
    mask = F.adaptive_avg_pool2d(masks, side).flatten(1)
    table = backbone.text_encoder.get_input_embeddings()
    words = Words(
        where,
        torch.zeros(*tokens.shape, table.embedding_dim, device=backbone.device, requires_grad=True),
        torch.zeros(count, tokens.shape[1], device=backbone.device, requires_grad=True),
    )
    optimizer = torch.optim.Adam([words.change, words.logits], lr=parts.lr)
    texts = []

    def encode_texts() -> torch.Tensor:
        change = (words.change * where[..., None]).to(table.weight.dtype)
        return states_of(backbone.text_encoder, tokens, lambda rows: rows + change)

    for i, t in enumerate(timesteps(steps, backbone.scheduler.config.steps_offset, len(backbone.alphas_cumprod))):
        z = trajectory[steps - i].repeat(2, 1, 1, 1)
        for _ in range(parts.refine):
            with control_attention(backbone.unet, attention := AttentionMean(side**2)):
                eps(z, t, encode_texts())
            weights = torch.cat([where[:count].float(), words.weights])
            heat = (attention.mean * weights[:, None]).sum(2)
            loss = (
                attention_loss(torch.cat([mask, 1 - mask]), heat).view(2, -1).sum(0)
                + parts.prompt_l2 * words.compute_penalty()
            )
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
        with torch.no_grad():
            text = encode_texts()
            pooled = (text[count:] * words.weights[..., None]).sum(1, keepdim=True)
            text[count:] = torch.where(where[count:, :, None], pooled, text[count:])
            texts.append(text)
    return texts


def sobel(x: torch.Tensor) -> torch.Tensor:
    """B x C x H x W in [0, 1] -> gradient magnitudes sqrt(gx^2 + gy^2 + 1e-6); kernels / 8, edge pixels replicated."""
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=x.device, dtype=x.dtype) / 8
    kernels = torch.stack([kernel, kernel.T])[:, None]
    planes = F.pad(x.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate")
    return (F.conv2d(planes, kernels).square().sum(1) + 1e-6).sqrt().view_as(x)


def edge_loss(x: torch.Tensor, y: torch.Tensor, masks: torch.Tensor, parts: Parts) -> torch.Tensor:
    """Mean squared difference of the edges of two batches in [0, 1] inside ``masks``, B (Chen 2023, L_Edge)."""
    loss = distance(sobel(x) * masks, sobel(y) * masks)
    if parts.edge_detector is not None:
        loss = loss + parts.edge_detector_weight * distance(
            parts.edge_detector(x) * masks, parts.edge_detector(y) * masks
        )
    return loss


class CopyAttention:
    """A control that gives the second half of the prompts the attention maps of the first half.

    ``self_attention=False`` leaves self-attention unchanged.
    """

    def __init__(self, prompts: int, self_attention: bool = True):
        self.prompts, self.self_attention = prompts, self_attention

    def wants(self, layer: Layer, tokens: int, step: int) -> bool:
        return layer.is_cross or self.self_attention

    def __call__(self, probabilities: torch.Tensor, layer: Layer, step: int) -> torch.Tensor:
        source = conditional_rows(probabilities, self.prompts)[: self.prompts // 2]
        return torch.cat([probabilities[: -self.prompts], source, source])


def harmonize_once(
    backbone: Backbone,
    composites: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    descriptions: Sequence[Description],
    parts: Parts = Parts(),
) -> list[np.ndarray]:
    """Run one round: raw outputs, uint8 R x R x 3, of B composites with their masks (bool R x R) and descriptions."""
    pictures = to_model(np.stack(composites)).to(backbone.device)
    inside = torch.from_numpy(np.stack(masks)[:, None]).float().to(backbone.device)
    eps, empty_text = denoiser(backbone), backbone.prompt([""])
    abar, offset = backbone.alphas_cumprod, backbone.scheduler.config.steps_offset
    with torch.no_grad():
        z = backbone.latent(backbone.moments(pictures))
        text = empty_text.expand(len(z), -1, -1)
        trajectory = invert(lambda z, t: eps(z, t, text), z, parts.steps, abar, offset)
    prompts = [d.prompts[0] for d in descriptions] + [d.prompts[1] for d in descriptions]
    tokens = backbone.tokens(prompts).to(backbone.device)
    objects = [d.object for d in descriptions] * 2
    where = torch.stack([find_descriptors(backbone, *pair) for pair in zip(prompts, objects, strict=True)])
    where = where.to(backbone.device)
    if parts.refine:
        texts = refine_texts(backbone, trajectory, inside, tokens, where, parts)
    else:
        texts = [backbone.text(tokens)] * parts.steps
    source = pictures / 2 + 0.5

    def compute_loss(latent: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
        pivot_loss = PIVOT * distance(latent, goal)
        if not parts.edges:
            return pivot_loss
        return pivot_loss + parts.edges * edge_loss(backbone.decode(latent).float() / 2 + 0.5, source, inside, parts)

    search = Search(lambda i, n: 1 + 5 * i // n, lambda i: parts.null_lr, compute_loss, lambda i: -1.0)
    count = len(composites)
    nulls = null_texts(eps, trajectory, [t[:count] for t in texts], empty_text, parts.guidance, abar, offset, search)
    control = CopyAttention(2 * count, parts.self_attention)
    nulls = [null.repeat(2, 1, 1) for null in nulls]
    noise = trajectory[-1].repeat(2, 1, 1, 1)
    outputs = backbone.decode(edit_latents(backbone, noise, texts, nulls, parts.guidance, control)).float()
    reconstruction, result = outputs.split(count)
    change = result - (reconstruction if parts.detail else pictures)
    strengths = torch.tensor([d.strength for d in descriptions], device=change.device).view(-1, 1, 1, 1)
    return list(from_model(pictures + strengths * change))


# --- rounds

CONTINUE, REGENERATE, CONCLUDE = "continue", "regenerate", "conclude"
UNDO = 2  # rounds that are undone when another description is tried


@dataclass(frozen=True)
class Round:
    """The result of a round: ``image`` with the photograph's background, by description number ``prompt``.

    Round 0 is the composite as it is, by no description.
    """

    number: int
    prompt: int | None
    image: np.ndarray
    score: float | None
    decision: str


def decide(scores: Sequence[float], others: int, has_switched: bool) -> str:
    """Decide what follows the ``scores`` of the active description so far.

    After three that fall strictly it is another description, if there are ``others`` and there was no switch yet, and
    the end otherwise.
    """
    if len(scores) < 3 or not scores[-3] > scores[-2] > scores[-1]:
        return CONTINUE
    return REGENERATE if others and not has_switched else CONCLUDE


def run_rounds(
    composite: np.ndarray,
    mask: np.ndarray,
    prompts: int,
    count: int = 10,
    evaluator: Evaluator | None = None,
    say: Callable[[Round], None] = lambda result: None,
) -> Generator[tuple[np.ndarray, int], np.ndarray, list[Round]]:
    """Yield (picture, number of its description) to be harmonized, receive the raw output, and return all rounds.

    This is the policy of Chen 2023. The first round tries each of the ``prompts`` descriptions, and the best continues
    from its own result, at most ``count`` rounds, until ``decide`` switches or ends it. Without an evaluator there are
    ``count`` rounds of the first description. Before them stands round 0, the composite, so that the evaluator may
    choose it; where there are no descriptions it is all. ``say`` is called with each round when it ends.
    """
    results: list[Round] = []

    def add_round(*facts) -> None:
        results.append(Round(*facts))
        say(results[-1])

    def score_output(raw: np.ndarray) -> tuple[np.ndarray, float | None]:
        image = copy_paste(composite, raw, mask)
        return image, None if evaluator is None else evaluator(image, mask)

    add_round(0, None, *score_output(composite), CONTINUE if prompts else CONCLUDE)
    if not prompts:
        return results
    trials = []
    for prompt in range(prompts if evaluator else 1):
        trials.append(score_output((yield composite, prompt)))
    order = sorted(range(len(trials)), key=lambda p: -(trials[p][1] or 0.0))
    for prompt in range(len(trials)):
        add_round(1, prompt, *trials[prompt], CONTINUE if count > 1 else CONCLUDE)
    prompt, others, has_switched = order[0], order[1:], False
    path, scores = [composite, trials[prompt][0]], [trials[prompt][1]]
    for number in range(2, count + 1):
        image, score = score_output((yield path[-1], prompt))
        path.append(image)
        scores.append(score)
        decision = CONTINUE if evaluator is None else decide(scores, len(others), has_switched)
        decision = CONCLUDE if number == count else decision
        add_round(number, prompt, image, score, decision)
        if decision == CONCLUDE:
            break
        if decision == REGENERATE:
            prompt, others, has_switched = others[0], others[1:], True
            path, scores = path[:-UNDO], []
    return results


def choose_best(results: Sequence[Round]) -> Round:
    """The round with the highest score, the earliest of equals; the last where there are no scores."""
    return results[-1] if results[-1].score is None else max(results, key=lambda r: r.score)


def run_together(
    backbone: Backbone,
    generators: Sequence[Generator],
    descriptions: Sequence[Sequence[Description]],
    masks: Sequence[np.ndarray],
    parts: Parts,
) -> list[list[Round]]:
    """Run several ``run_rounds`` side by side; the pictures that they yield at a time are one batch."""
    results: list[list[Round] | None] = [None] * len(generators)
    requests: dict[int, tuple[np.ndarray, int]] = {}

    def advance(i: int, raw: np.ndarray | None) -> None:
        try:
            requests[i] = generators[i].send(raw)
        except StopIteration as end:
            results[i] = end.value
            requests.pop(i, None)

    for i in range(len(generators)):
        advance(i, None)
    while requests:
        indices = list(requests)
        pictures, words = zip(*((requests[i][0], descriptions[i][requests[i][1]]) for i in indices), strict=True)
        outputs = harmonize_once(backbone, pictures, [masks[i] for i in indices], words, parts)
        for i, raw in zip(indices, outputs, strict=True):
            advance(i, raw)
    return results


# --- the method


def make_word_scorer(backbone: Backbone, clip: str | None = None) -> WordScorer:
    """Build the describer that scores lists of words by CLIP.

    ``clip``: open_clip's NAME/WEIGHTS; None: the backbone's own. It uses words that are one token of the backbone. The
    captioner of the backbone names the object: its caption up to the last comma. Where the backbone has none, or none
    that knows photographs, the caption that is known does, as the dataset's label. UserError for a backbone without
    CLIP. Where neither the backbone's captioner nor its CLIP knows photographs, their lights are measured.
    """

    def is_token(word: str) -> bool:
        return len(backbone.encode(word)) == 1

    scores = clip_of(backbone, clip)
    if scores is None:
        raise UserError(
            f"backbone {backbone.name} has no CLIP image tower: give prompts=, clip=NAME/WEIGHTS or describer=MODEL"
        )
    captioner, knows_all = None, False
    try:
        captioner = backbone.captioner, backbone.processor
        knows_all = bool(find_captioner(backbone))
    except UserError as error:
        print(f"an object without a caption is called {DEFAULT_OBJECT!r}, or give prompts=: {error}")

    def name_object(composite: np.ndarray, caption: str | None) -> str:
        if captioner is not None and (knows_all or caption is None):
            caption = caption_picture(composite, *captioner, backbone.device)
        return shorten_caption(caption) if caption else DEFAULT_OBJECT

    photographs = BrightnessMeter(name_object) if clip is None and not knows_all else None
    return WordScorer(scores, name_object, is_token, photographs=photographs)


def shorten_caption(caption: str) -> str:
    """The object phrase of a caption: up to its last comma, behind which the light is described, and no "a photo of".

    It ends in a comma, as in the captions that name a light.
    """
    phrase = PICTURE_OF.sub("", (caption.rpartition(",")[0] or caption).strip(" ,"))
    return f"{phrase}," if phrase else DEFAULT_OBJECT


class ZeroShot(Method):
    """Zero-shot harmonization in up to ``count`` rounds; ``evaluator`` chooses the result (None: the last round).

    ``describer`` None: each composite brings its descriptions (``lights``); otherwise the describer finds them, and
    ``describer_name`` identifies it in the fingerprint.
    """

    radius = 0  # the object alone changes

    def __init__(
        self,
        backbone: Backbone,
        parts: Parts = Parts(),
        describer: Describer | None = None,
        count: int = 1,
        evaluator: Evaluator | None = None,
        describer_name: str = "given",
    ):
        self.backbone, self.parts, self.describer, self.count = backbone, parts, describer, count
        self.evaluator, self.describer_name = evaluator, describer_name
        self.resolution, self.device = backbone.resolution, backbone.device
        self.relights = parts.detail
        self.wants = frozenset({LIGHTS}) if describer is None else frozenset()
        # each composite with its rounds, of the last two fills: ``insert`` fills small and large squares apart
        self.outcomes: deque[list[tuple[Composite, list[Round]]]] = deque(maxlen=2)

    @functools.cached_property
    def fingerprint(self) -> str:
        weights = {part: self.backbone.hash(part) for part in DIFFUSION}
        facts = {name: value for name, value in vars(self.parts).items() if name != "edge_detector"}
        deep = self.parts.edge_detector and weights_hash(self.parts.edge_detector)
        evaluator = ["round 0", self.evaluator.fingerprint] if self.evaluator else None
        kind = str(self.backbone.dtype)
        return fingerprint("zero_shot", weights, kind, facts, deep, self.describer_name, self.count, evaluator)

    def relight(self, composites: Sequence[Composite], seeds: Sequence[Seed]) -> list[tuple[np.ndarray, np.ndarray]]:
        return list(zip([c.copy_paste() for c in composites], self.fill(composites, seeds), strict=True))

    def describe(self) -> str:
        policy = "each round is run" if self.evaluator is None else f"{self.evaluator.name} decides"
        where = f"{self.backbone.name} at {self.resolution} px, {self.device.type}, guidance {self.parts.guidance:g}"
        return f"zero-shot on backbone {where}, {self.count} rounds at most, {policy}"

    def find_descriptions(self, composite: Composite) -> list[Description]:
        """The descriptions of a composite. UserError where there are none."""
        if self.describer is not None:
            caption = composite.caption if composite.is_photograph else None
            return self.describer(composite.copy_paste(), composite.mask, caption)
        if not composite.lights:
            raise UserError("there are no words for both lights: choose describer=words, or give prompts=")
        return list(composite.lights)

    def run_all(self, composites: Sequence[Composite]) -> list[list[Round]]:
        """All rounds of each composite; ``say`` is called with a line for each when it ends."""
        descriptions = [self.find_descriptions(c) for c in composites]
        for items in descriptions:
            if not items:
                self.say("no light can be named: the composite is left as it is, or give prompts=")
            for n, d in enumerate(items):
                share = "" if d.strength == 1 else f", {d.strength:.0%} of the change"
                self.say(f"description {n}: {d.object!r}, from {d.foreground!r} to {d.background!r}{share}")
        pictures = [c.copy_paste() for c in composites]
        masks = [c.mask for c in composites]
        generators = [
            run_rounds(picture, mask, len(items), self.count, self.evaluator, lambda r: self.say(format_round(r)))
            for picture, mask, items in zip(pictures, masks, descriptions, strict=True)
        ]
        return run_together(self.backbone, generators, descriptions, masks, self.parts)

    def fill(self, composites: Sequence[Composite], seeds: Sequence[Seed]) -> list[np.ndarray]:
        """Fill the holes; the seeds are unused, since inversion and sampling are deterministic."""
        outcomes = self.run_all(composites)
        self.outcomes.append(list(zip(composites, outcomes, strict=True)))
        results = [choose_best(outcome) for outcome in outcomes]
        for result, outcome in zip(results, outcomes, strict=True):
            if result.number == 0 and len(outcome) > 1:
                self.say("no round is better: the composite is left as it is (evaluator=null: the last round)")
        return [result.image for result in results]

    def write_beside(self, index: int, composite: Composite, folder: Path) -> dict[str, Path]:
        """Write all rounds: their pictures, ``rounds.json`` (score and decision of each) and a film strip."""
        outcome = next(rounds for fill in reversed(self.outcomes) for square, rounds in fill if square is composite)
        facts = [{key: value for key, value in vars(r).items() if key != "image"} for r in outcome]
        write_json(folder / "rounds.json", facts)
        (folder / "rounds").mkdir(exist_ok=True)
        for r in outcome[1:]:
            write_image(folder / "rounds" / f"{r.number:02d}_{r.prompt}.png", r.image)
        titles = [f"{r.number or 'composite'}" + ("" if r.score is None else f": {r.score:.2f}") for r in outcome]
        write_image(folder / "film.png", grid([[r.image for r in outcome]], titles))
        return {"rounds": folder / "rounds.json", "film": folder / "film.png"}

    def networks(self) -> dict[str, list[torch.nn.Module]]:
        vae = self.backbone.vae
        return {"UNet": blocks(self.backbone.unet), "VAE": [vae.encoder, vae.decoder]}


def format_round(result: Round) -> str:
    """One line about a round."""
    score = "" if result.score is None else f", score {result.score:.3f}"
    title = f"round {result.number}, description {result.prompt}" if result.number else "the composite"
    return f"{title}{score}: {result.decision}"


def load(
    backbone: Backbone,
    describer: str = "words",
    clip: str | None = None,
    evaluator: str | None = "judge",
    rounds: int = 1,
    parts: dict | None = None,
    steps: int = 50,
    guidance: float = 2.5,
) -> ZeroShot:
    """Build ``ZeroShot`` from options.

    ``describer``: ``given`` (each composite brings its descriptions), ``words`` (see ``make_word_scorer``; ``clip``:
    open_clip's NAME/WEIGHTS), or a vision-language model, hub id or folder.
    """
    if type(rounds) is not int or rounds < 1:
        raise UserError(f"rounds={rounds}: must be at least 1")
    names = Parts.__dataclass_fields__
    for name in parts or {}:
        if name not in names:
            raise UserError(f"{name} is not a setting of a zero-shot round: choose among {', '.join(names)}")
    settings = Parts(steps, guidance, **(parts or {}))
    if settings.edge_detector is not None:
        settings.edge_detector.requires_grad_(False).eval().to(backbone.device)
    word_describer = None
    if describer == "words":
        word_describer = make_word_scorer(backbone, clip)
    elif describer != "given":
        word_describer = VisionLanguageModel(describer, backbone.device)
    score = load_evaluator(evaluator, backbone.device)
    facts = [backbone.hash(part) for part in ("image_encoder", "captioner")] if describer == "words" else []
    if describer == "words" and word_describer.photographs is not None:
        meter = word_describer.photographs
        facts += [
            str(v) for v in (meter.USUAL, meter.DEVIATION, meter.FLOOR, meter.LEAST, MeasuredDescription.strength)
        ]
    return ZeroShot(backbone, settings, word_describer, rounds, score, " ".join([describer, clip or "", *facts]))
