"""Zero-shot harmonization with a generative prior.

Chen 2023 (Zero-Shot Image Harmonization with Generative Model Prior, arXiv 2307.08182). Nothing is trained: a composite
is inverted, its prompt is tuned to its object, and it is made again under the prompt of its surroundings while all
attention stays that of the composite. ``harmonize_once`` is one such round; ``rounds`` decides how many there are.
"""

import functools
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from harmony.core.errors import UserError
from harmony.core.files import write_json
from harmony.data.captions import caption_picture
from harmony.data.descriptions import Describer, Description, VisionLanguageModel, WordScorer
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

NAMELESS = "an object,"  # where nobody says what it is
PIVOT = 10.0  # weight of the trajectory in the null texts' loss, beside the edges
NUMBERS = {"refine": int, "lr": float, "hold": float, "null_lr": float, "edges": float, "deep_share": float}


@dataclass(frozen=True)
class Parts:
    """How a round is made; the defaults, but for ``detail``, are those of the released code of Chen 2023.

    ``refine``: inner iterations a step of the words' refinement (0 = off), at rate ``lr``, held by ``hold``.
    ``null_lr``: rate of the null texts. ``edges``: weight of the edges in their loss (0 = off: nothing is decoded);
    ``deep``: a differentiable edge detector B x 3 x H x W in [0, 1] -> maps, and its share. ``own``: whether
    self-attention is copied too. ``detail``: what the two prompts differ in is added to the composite, which keeps what
    the autoencoder cannot hold; otherwise (Chen 2023) the background prompt's picture takes its place.
    """

    steps: int = 50
    guidance: float = 2.5
    refine: int = 2
    lr: float = 5e-4
    hold: float = 1000.0
    null_lr: float = 0.1
    edges: float = 1.0
    own: bool = True
    detail: bool = True
    deep: torch.nn.Module | None = None
    deep_share: float = 0.1

    def __post_init__(self):
        for name, kind in NUMBERS.items():
            value = getattr(self, name)
            if type(value) not in (int, kind) or value < 0:
                raise UserError(f"{name}={value}: give {'a whole number' if kind is int else 'a number'} of 0 or more")


def descriptors(backbone: Backbone, prompt: str, object: str) -> torch.Tensor:
    """Bool T: where the words behind the object phrase are. UserError for a prompt without any, or one too long."""
    length = backbone.tokenizer.model_max_length
    places, first = spans(prompt, backbone.encode, length), len(object.split())
    if len(places) <= first:
        raise UserError(f"{prompt!r} says nothing of the light: give words behind the object")
    found = torch.zeros(length, dtype=torch.bool)
    found[places[first][0] : places[len(places) - 1][1]] = True
    return found


class Looks:
    """The control that sums up where words look, gradients included: ``seen`` B x positions x T, a mean over layers."""

    def __init__(self, tokens: int):
        self.tokens, self.seen, self.layers = tokens, 0.0, 0

    def wants(self, layer: Layer, tokens: int, step: int) -> bool:
        return layer.is_cross and tokens == self.tokens and layer.place != "mid"

    def __call__(self, probabilities: torch.Tensor, layer: Layer, step: int) -> torch.Tensor:
        self.seen, self.layers = self.seen + probabilities.mean(1), self.layers + 1
        return probabilities

    @property
    def mean(self) -> torch.Tensor:
        return self.seen / self.layers


def attention_loss(mask: torch.Tensor, heat: torch.Tensor) -> torch.Tensor:
    """mean (M - A / max A)^2 of each of B maps, B x N each: 0 where the words look where ``mask`` is 1, at most 1.

    Chen 2023, L_Emb.
    """
    return (mask - heat / heat.amax(1, keepdim=True).clamp(min=1e-12)).square().mean(1)


@dataclass
class Words:
    """The variables of the refinement for B composites: changes of the rows of both prompts' descriptors, 2B x T x D
    (those of the foreground first), and the logits of the background's weights, B x T. ``where`` 2B x T bool.
    """

    where: torch.Tensor
    change: torch.Tensor
    logits: torch.Tensor

    @property
    def weights(self) -> torch.Tensor:
        """B x T, a simplex over the descriptors of each background."""
        return self.logits.masked_fill(~self.where[len(self.logits) :], -math.inf).softmax(1)

    def held(self) -> torch.Tensor:
        """Mean square of the changes, B: foreground plus background."""
        moved = (self.change.square() * self.where[..., None]).sum((1, 2))
        return (moved / (self.where.sum(1) * self.change.shape[2])).view(2, -1).sum(0)


def refined_texts(
    backbone: Backbone,
    trajectory: Sequence[torch.Tensor],
    masks: torch.Tensor,
    tokens: torch.Tensor,
    where: torch.Tensor,
    parts: Parts,
) -> list[torch.Tensor]:
    """For each step the text states 2B x T x D, foregrounds first, whose words look where they should (L_Emb).

    ``trajectory`` z_0 .. z_N of B composites; ``masks`` B x 1 x R x R; ``tokens`` and ``where`` (the descriptors)
    2B x T. In the background's states all descriptors are their weighted sum.
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
    optimiser = torch.optim.Adam([words.change, words.logits], lr=parts.lr)
    found = []

    def states() -> torch.Tensor:
        moved = (words.change * where[..., None]).to(table.weight.dtype)
        return states_of(backbone.text_encoder, tokens, lambda rows: rows + moved)

    for i, t in enumerate(timesteps(steps, backbone.scheduler.config.steps_offset, len(backbone.alphas_cumprod))):
        z = trajectory[steps - i].repeat(2, 1, 1, 1)
        for _ in range(parts.refine):
            with control_attention(backbone.unet, looks := Looks(side**2)):
                eps(z, t, states())
            weights = torch.cat([where[:count].float(), words.weights])
            heat = (looks.mean * weights[:, None]).sum(2)
            loss = attention_loss(torch.cat([mask, 1 - mask]), heat).view(2, -1).sum(0) + parts.hold * words.held()
            optimiser.zero_grad()
            loss.sum().backward()
            optimiser.step()
        with torch.no_grad():
            text = states()
            pooled = (text[count:] * words.weights[..., None]).sum(1, keepdim=True)
            text[count:] = torch.where(where[count:, :, None], pooled, text[count:])
            found.append(text)
    return found


def sobel(x: torch.Tensor) -> torch.Tensor:
    """B x C x H x W in [0, 1] -> gradient magnitudes sqrt(gx^2 + gy^2 + 1e-6), kernels divided by 8, rims repeated."""
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=x.device, dtype=x.dtype) / 8
    kernels = torch.stack([kernel, kernel.T])[:, None]
    padded = F.pad(x.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate")
    return (F.conv2d(padded, kernels).square().sum(1) + 1e-6).sqrt().view_as(x)


def edge_loss(x: torch.Tensor, y: torch.Tensor, masks: torch.Tensor, parts: Parts) -> torch.Tensor:
    """Squared differences inside ``masks`` of the edges of two batches in [0, 1], B (Chen 2023, L_Edge)."""
    loss = distance(sobel(x) * masks, sobel(y) * masks)
    if parts.deep is not None:
        loss = loss + parts.deep_share * distance(parts.deep(x) * masks, parts.deep(y) * masks)
    return loss


class CopyAttention:
    """Every attention map of the second half of the prompts is that of the first half, position by position.

    ``own=False`` leaves self-attention alone.
    """

    def __init__(self, prompts: int, own: bool = True):
        self.prompts, self.own = prompts, own

    def wants(self, layer: Layer, tokens: int, step: int) -> bool:
        return layer.is_cross or self.own

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
    """One round: raw outputs uint8 R x R x 3 of B composites with their masks (bool R x R), each led by its words."""
    pictures = to_model(np.stack(composites)).to(backbone.device)
    inside = torch.from_numpy(np.stack(masks)[:, None]).float().to(backbone.device)
    eps, abar, offset, empty = (
        denoiser(backbone),
        backbone.alphas_cumprod,
        backbone.scheduler.config.steps_offset,
        backbone.prompt([""]),
    )
    with torch.no_grad():
        z = backbone.latent(backbone.moments(pictures))
        blank = empty.expand(len(z), -1, -1)
        trajectory = invert(lambda z, t: eps(z, t, blank), z, parts.steps, abar, offset)  # without words
    prompts = [d.prompts[0] for d in descriptions] + [d.prompts[1] for d in descriptions]
    tokens = backbone.tokens(prompts).to(backbone.device)
    objects = [d.object for d in descriptions] * 2
    where = torch.stack([descriptors(backbone, *pair) for pair in zip(prompts, objects, strict=True)]).to(
        backbone.device
    )
    if parts.refine:
        texts = refined_texts(backbone, trajectory, inside, tokens, where, parts)
    else:
        texts = [backbone.text(tokens)] * parts.steps
    source = pictures / 2 + 0.5

    def loss(reached: torch.Tensor, aim: torch.Tensor) -> torch.Tensor:
        missed = PIVOT * distance(reached, aim)
        if not parts.edges:
            return missed
        return missed + parts.edges * edge_loss(backbone.decode(reached).float() / 2 + 0.5, source, inside, parts)

    search = Search(lambda i, n: 1 + 5 * i // n, lambda i: parts.null_lr, loss, lambda i: -1.0)
    count = len(composites)
    nulls = null_texts(eps, trajectory, [t[:count] for t in texts], empty, parts.guidance, abar, offset, search)
    control = CopyAttention(2 * count, parts.own)
    both = [null.repeat(2, 1, 1) for null in nulls]
    noise = trajectory[-1].repeat(2, 1, 1, 1)
    made = backbone.decode(edit_latents(backbone, noise, texts, both, parts.guidance, control)).float()
    reconstructed, led = made.split(count)
    return list(from_model(pictures + led - reconstructed if parts.detail else led))


# --- rounds

CONTINUE, REGENERATE, CONCLUDE = "continue", "regenerate", "conclude"
BACK = 2  # rounds that are taken back when another description is tried


@dataclass(frozen=True)
class Round:
    """What came of a round: ``image`` with the photograph's background, by description number ``prompt``."""

    number: int
    prompt: int
    image: np.ndarray
    score: float | None
    decision: str


def decide(scores: Sequence[float], others: int, switched: bool) -> str:
    """What follows the active description's ``scores`` so far: after three that fall strictly another description, if
    there are ``others`` and none has been ``switched`` to yet, else the end.
    """
    if len(scores) < 3 or not scores[-3] > scores[-2] > scores[-1]:
        return CONTINUE
    return REGENERATE if others and not switched else CONCLUDE


def rounds(
    composite: np.ndarray,
    mask: np.ndarray,
    prompts: int,
    count: int = 10,
    evaluator: Evaluator | None = None,
    say: Callable[[Round], None] = lambda made: None,
) -> Generator[tuple[np.ndarray, int], np.ndarray, list[Round]]:
    """Asks for (picture, number of its description) to be harmonized, is sent the raw output, and returns all rounds.

    The policy of Chen 2023. The first round tries each of the ``prompts`` descriptions; the best goes on from its own
    result, and ``decide`` has the last word, for ``count`` rounds at most. Without an evaluator there are ``count``
    rounds of the first description. ``say`` is told each round as it ends.
    """
    made: list[Round] = []

    def add(*facts) -> None:
        made.append(Round(*facts))
        say(made[-1])

    def judged(raw: np.ndarray) -> tuple[np.ndarray, float | None]:
        image = copy_paste(composite, raw, mask)
        return image, None if evaluator is None else evaluator(image, mask)

    first = []
    for prompt in range(prompts if evaluator else 1):
        first.append(judged((yield composite, prompt)))
    order = sorted(range(len(first)), key=lambda p: -(first[p][1] or 0.0))
    for prompt in range(len(first)):
        add(1, prompt, *first[prompt], CONTINUE if count > 1 else CONCLUDE)
    active, others, switched = order[0], order[1:], False
    path, scores = [composite, first[active][0]], [first[active][1]]
    for number in range(2, count + 1):
        image, score = judged((yield path[-1], active))
        path.append(image)
        scores.append(score)
        decision = CONTINUE if evaluator is None else decide(scores, len(others), switched)
        decision = CONCLUDE if number == count else decision
        add(number, active, image, score, decision)
        if decision == CONCLUDE:
            break
        if decision == REGENERATE:
            active, others, switched = others[0], others[1:], True
            path, scores = path[:-BACK], []
    return made


def best(made: Sequence[Round]) -> Round:
    """The round of the highest score; the last where nobody scored."""
    return made[-1] if made[-1].score is None else max(made, key=lambda r: r.score)


def run_together(
    backbone: Backbone,
    asked: Sequence[Generator],
    descriptions: Sequence[Sequence[Description]],
    masks: Sequence[np.ndarray],
    parts: Parts,
) -> list[list[Round]]:
    """Several ``rounds`` side by side: what they ask for at a time is one batch."""
    found: list[list[Round] | None] = [None] * len(asked)
    wanted = {i: next(generator) for i, generator in enumerate(asked)}
    while wanted:
        each = list(wanted)
        pictures, words = zip(*((wanted[i][0], descriptions[i][wanted[i][1]]) for i in each), strict=True)
        outputs = harmonize_once(backbone, pictures, [masks[i] for i in each], words, parts)
        for i, raw in zip(each, outputs, strict=True):
            try:
                wanted[i] = asked[i].send(raw)
            except StopIteration as end:
                found[i] = end.value
                del wanted[i]
    return found


# --- the method


def word_scorer(backbone: Backbone, clip: str | None = None) -> WordScorer:
    """CLIP, the backbone's own or open_clip's NAME/WEIGHTS, scores the lists of words that are one token of the
    backbone; the backbone's captioner, if it has one, says what the object is, up to its last comma. UserError for a
    backbone without CLIP.
    """

    def known(word: str) -> bool:
        return len(backbone.encode(word)) == 1

    scores = clip_of(backbone, clip)
    if scores is None:
        raise UserError(
            f"backbone {backbone.name} has no CLIP image tower: give prompts=, clip=NAME/WEIGHTS or describer=MODEL"
        )
    try:
        captioner, processor = backbone.captioner, backbone.processor
    except UserError as error:
        print(f"every object is called {NAMELESS!r}, or give prompts=: {error}")
        return WordScorer(scores, lambda composite: NAMELESS, known)

    def object_of(composite: np.ndarray) -> str:
        caption = caption_picture(composite, captioner, processor, backbone.device)
        return f"{caption.rpartition(',')[0]}," if "," in caption else caption

    return WordScorer(scores, object_of, known)


class ZeroShot(Method):
    """Zero-shot harmonization in up to ``count`` rounds, of which ``evaluator`` chooses (None: the last).

    ``describer`` None: each composite brings its words (``lights``); otherwise they are looked for, by what is called
    ``describer_name``.
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
        self.carries_detail = parts.detail
        self.wants = frozenset({LIGHTS}) if describer is None else frozenset()
        self.outcomes: list[list[Round]] = []  # of the last ``fill``

    @functools.cached_property
    def fingerprint(self) -> str:
        weights = {part: self.backbone.hash(part) for part in DIFFUSION}
        facts = {name: value for name, value in vars(self.parts).items() if name != "deep"}
        deep = self.parts.deep and weights_hash(self.parts.deep)
        chooses = self.evaluator.fingerprint if self.count > 1 and self.evaluator else None
        kind = str(self.backbone.dtype)
        return fingerprint("zero_shot", weights, kind, facts, deep, self.describer_name, self.count, chooses)

    def describe(self) -> str:
        judged = "each round is made" if self.evaluator is None else f"{self.evaluator.name} decides"
        where = f"{self.backbone.name} at {self.resolution} px, {self.device.type}, guidance {self.parts.guidance:g}"
        return f"zero-shot on backbone {where}, {self.count} rounds at most, {judged}"

    def words(self, composite: Composite) -> list[Description]:
        """The descriptions of a composite. UserError where nobody knows any."""
        if self.describer is not None:
            return self.describer(composite.copy_paste(), composite.mask)
        if not composite.lights:
            raise UserError("nobody knows the words for both lights: choose describer=words, or give prompts=")
        return list(composite.lights)

    def rounds(self, composites: Sequence[Composite]) -> list[list[Round]]:
        """All rounds of each composite; ``say`` is told each as it ends."""
        words = [self.words(c) for c in composites]
        for descriptions in words:
            for n, d in enumerate(descriptions):
                self.say(f"description {n}: {d.object!r}, from {d.foreground!r} to {d.background!r}")
        pictures = [c.copy_paste() for c in composites]
        masks = [c.mask for c in composites]
        asked = [
            rounds(*item, len(w), self.count, self.evaluator, lambda r: self.say(round_line(r)))
            for *item, w in zip(pictures, masks, words, strict=True)
        ]
        return run_together(self.backbone, asked, words, masks, self.parts)

    def fill(self, composites: Sequence[Composite], seeds: Sequence[Seed]) -> list[np.ndarray]:
        """Nothing here is random: inversion and sampling are deterministic."""
        self.outcomes = self.rounds(composites)
        return [best(outcome).image for outcome in self.outcomes]

    def write_beside(self, index: int, composite: Composite, folder: Path) -> dict[str, Path]:
        """All rounds: their pictures, ``rounds.json`` (score and decision of each) and a film strip."""
        outcome = self.outcomes[index]
        facts = [{key: value for key, value in vars(r).items() if key != "image"} for r in outcome]
        write_json(folder / "rounds.json", facts)
        (folder / "rounds").mkdir(exist_ok=True)
        for r in outcome:
            write_image(folder / "rounds" / f"{r.number:02d}_{r.prompt}.png", r.image)
        titles = ["composite", *(f"{r.number}" + ("" if r.score is None else f": {r.score:.2f}") for r in outcome)]
        write_image(folder / "film.png", grid([[composite.copy_paste(), *(r.image for r in outcome)]], titles))
        return {"rounds": folder / "rounds.json", "film": folder / "film.png"}

    def networks(self) -> dict[str, list[torch.nn.Module]]:
        vae = self.backbone.vae
        return {"UNet": blocks(self.backbone.unet), "VAE": [vae.encoder, vae.decoder]}


def round_line(made: Round) -> str:
    score = "" if made.score is None else f", score {made.score:.3f}"
    return f"round {made.number}, description {made.prompt}{score}: {made.decision}"


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
    """``ZeroShot`` by options. ``describer``: ``given`` (each composite brings its words), ``words`` (scored by CLIP:
    ``clip``, open_clip's NAME/WEIGHTS, or the backbone's own), or a vision-language model, hub id or folder.
    """
    if type(rounds) is not int or rounds < 1:
        raise UserError(f"rounds={rounds}: must be at least 1")
    if unknown := {*(parts or {})} - {*Parts.__dataclass_fields__}:
        raise UserError(f"{unknown.pop()} is no part of a zero-shot round")
    settings = Parts(steps, guidance, **(parts or {}))
    if settings.deep is not None:
        settings.deep.requires_grad_(False).eval().to(backbone.device)
    describe = None
    if describer != "given":
        by_clip = describer == "words"
        describe = word_scorer(backbone, clip) if by_clip else VisionLanguageModel(describer, backbone.device)
    score = load_evaluator(evaluator, backbone.device)
    return ZeroShot(backbone, settings, describe, rounds, score, f"{describer} {clip or ''}".strip())
