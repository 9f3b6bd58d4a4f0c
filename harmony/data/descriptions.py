"""Descriptions of a composite: words for the object, its own light and the light around it.

Zero-shot harmonization (Chen 2023) moves an object from its own light to the light around it. The words come from the
user, a file, a vision-language model, word lists that are scored by CLIP and by the colors of the picture, or, on
photographs that the backbone's CLIP does not know, from the brightness of object and surroundings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import cv2
import numpy as np
import torch

from harmony.core.errors import UserError
from harmony.core.foreign import read_json
from harmony.data.sources.files import picture_name
from harmony.metrics.similarity import Clip, crop_to_box, embeddings
from harmony.models.vision_language import load_vision_language_model
from harmony.pixels.composites import to_radiance

FORM = "OBJECT: its own light -> the light around it"
FIELDS = ("object", "foreground", "background")
LIGHTS = {  # source of light (time of day, weather, place) -> its possible looks (brightness, temperature, tone)
    "noon": ("bright", "white", "harsh"),
    "morning": ("soft", "pale", "golden"),
    "sunset": ("warm", "golden", "orange", "red"),
    "dusk": ("dim", "blue", "purple"),
    "night": ("dark", "blue"),
    "moonlight": ("blue", "cold", "dim"),
    "overcast": ("grey", "soft", "dim"),
    "foggy": ("grey", "pale", "white"),
    "rainy": ("grey", "cold", "dark"),
    "snowy": ("white", "cold"),
    "neon": ("pink", "blue", "green", "purple", "red"),
    "studio": ("white", "neutral", "harsh"),
    "indoor": ("dim", "yellow", "warm"),
    "candlelight": ("warm", "orange", "dim"),
    "underwater": ("green", "blue"),
}
PLAIN_LIGHT = "light"  # the word for a light that is uncertain


@dataclass(frozen=True)
class Description:
    """Words for a composite: the ``object``, its own light ``foreground`` and the light around it, ``background``.

    ``strength``: the share that is made of the change from one light to the other.
    """

    object: str
    foreground: str
    background: str
    strength: ClassVar[float] = 1.0

    @property
    def prompts(self) -> tuple[str, str]:
        """The prompts of both lights, which begin with the same words."""
        return f"{self.object} {self.foreground}", f"{self.object} {self.background}"


class MeasuredDescription(Description):
    """A description by measured brightness: half of the change, since the words say more than was measured.

    Over 439 photographs under another light, half of the words' mean change takes 7 % off the squared error; the whole
    of it takes 1 %.
    """

    strength = 0.5


class Describer(Protocol):
    """A function from a composite to words."""

    def __call__(self, composite: np.ndarray, mask: np.ndarray, caption: str | None = None) -> list[Description]:
        """Descriptions of uint8 H x W x 3 with its object (bool H x W), the most probable first.

        ``caption``: what is known of a photograph; None for a render.
        """
        ...


# --- words from the user


def parse_descriptions(text: str) -> list[Description]:
    """Parse ``OBJECT: its own light -> the light around it``, separated by semicolons. UserError for other text."""
    descriptions = []
    for part in filter(None, map(str.strip, text.split(";"))):
        object_, colon, lights = part.rpartition(":")
        foreground, arrow, background = lights.partition("->")
        words = [" ".join(words.split()) for words in (object_, foreground, background)]
        if not (colon and arrow and all(words)) or "->" in words[2]:
            raise UserError(f"prompts={part!r}: write {FORM}, several with semicolons between")
        descriptions.append(Description(*words))
    if not descriptions:
        raise UserError(f"prompts={text!r} holds no description: write {FORM}")
    return descriptions


def read_descriptions(path: Path, name: str) -> list[Description]:
    """Read the descriptions of picture ``name`` from a JSON file.

    The file holds ``{name: [{object, foreground, background}, ...]}``, or one list for all pictures. UserError for
    another content, or if ``name`` is missing.
    """
    data = read_json(path)
    if isinstance(data, dict) and name not in data:
        data = {picture_name(key): items for key, items in data.items()}
    if isinstance(data, dict) and name not in data:
        raise UserError(f"{path} describes {', '.join(list(data)[:3]) or 'nothing'}, but not {name}")
    items = data[name] if isinstance(data, dict) else data
    try:
        descriptions = [Description(*(" ".join(item[field].split()) for field in FIELDS)) for item in items]
    except (KeyError, TypeError, AttributeError):
        descriptions = []
    if not descriptions or not all(all(vars(d).values()) for d in descriptions):
        raise UserError(f"{path}: each description of {name} needs {', '.join(FIELDS)}")
    return descriptions


# --- words from the picture


def light_phrase(adjective: str, source: str) -> str:
    """Words for a light, such as ``warm sunset light``; "light" is not repeated after sources such as moonlight."""
    return f"{adjective} {source}" if source.endswith("light") else f"{adjective} {source} light"


def remove_object(composite: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Remove the object from the photograph: its pixels are filled in from the rim (Telea, 2004)."""
    return cv2.inpaint(composite, mask.astype(np.uint8), 3, cv2.INPAINT_TELEA)


def cut_object(composite: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Cut out the object's box, with the background replaced by the object's mean color."""
    mean = composite[mask].mean(0).round().astype(np.uint8)
    return crop_to_box(np.where(mask[..., None], composite, mean), mask)


def color_words(pixels: np.ndarray) -> set[str]:
    """Words for the brightness, temperature and tone (in Lab) of the mean color of pixels, uint8 N x 3."""
    lightness, a, b = cv2.cvtColor(pixels[None].astype(np.float32) / 255, cv2.COLOR_RGB2Lab)[0].mean(0)
    chroma, hue = float(np.hypot(a, b)), float(np.degrees(np.arctan2(b, a)) % 360)
    words = {"dark", "dim"} if lightness < 35 else {"bright"} if lightness > 65 else set()
    if b > 12:
        words |= {"warm", "golden"}
    if b < -6:
        words |= {"cold"}
    if chroma < 8:
        return words | {"grey", "neutral"}
    tones = ((15, "pink"), (45, "red"), (75, "orange"), (105, "yellow"), (195, "green"), (309, "blue"), (335, "purple"))
    return words | {next((tone for end, tone in tones if hue < end), "pink")}


class BrightnessMeter:
    """Describes a photograph whose object is far darker or brighter than objects are beside their surroundings.

    Otherwise there is nothing to say: objects have brightness and colors of their own, and the warmth of object and
    surroundings tells too little of their lights. ``name``: see ``WordScorer``.
    """

    USUAL, DEVIATION = -0.63, 0.84  # of ``compare`` over 305 photographs as they were taken
    FLOOR = 1e-3  # radiance in 0..1 that is added, so that black has a logarithm
    LEAST = 1.5  # deviations from there at which words are worth it: the direction is right in 85 %
    LIGHTS = ("grey overcast light", "bright noon light")  # of a darker and of a brighter object

    def __init__(self, name: Callable[[np.ndarray, str | None], str]):
        self.name = name

    def __call__(self, composite: np.ndarray, mask: np.ndarray, caption: str | None = None) -> list[Description]:
        deviation = (self.compare(composite, mask) - self.USUAL) / self.DEVIATION
        if abs(deviation) < self.LEAST:
            return []
        foreground, background = self.LIGHTS if deviation < 0 else self.LIGHTS[::-1]
        return [MeasuredDescription(self.name(composite, caption), foreground, background)]

    def compare(self, composite: np.ndarray, mask: np.ndarray) -> float:
        """The logarithm of the object's mean radiance relative to that around it, mean over channels."""
        radiance = to_radiance(composite)
        inside, outside = (np.log(radiance[m].mean(0) + self.FLOOR) for m in (mask, ~mask))
        return float((inside - outside).mean())


class WordScorer:
    """Chooses words for both lights from ``LIGHTS``, by CLIP scores and mean colors of the object and its background.

    ``name`` returns the object phrase of a composite and its caption (by a captioner, say), ``is_known`` tells whether
    CLIP knows a word, and ``count`` is the number of descriptions. The object's light is named only if its probability
    is at least ``min_probability``: the color may be that of the object, and a wrong word is worse than
    ``PLAIN_LIGHT``. Photographs are left to ``photographs``, where that is given.
    """

    TRUST = 0.03  # added to a cosine for each word that fits the mean color
    SCALE = 20.0  # multiplies cosines before the soft-max

    def __init__(
        self,
        clip: Clip,
        name: Callable[[np.ndarray, str | None], str],
        is_known: Callable[[str], bool] = lambda word: True,
        count: int = 2,
        min_probability: float = 0.95,
        photographs: Describer | None = None,
    ):
        self.photographs = photographs
        self.clip, self.name, self.count, self.min_probability = clip, name, count, min_probability
        self.lights = [
            (look, source) for source, looks in LIGHTS.items() for look in looks if is_known(look) and is_known(source)
        ]
        if not self.lights:
            raise UserError("the model knows none of the words for light: give prompts=, or describer=MODEL")

    def __call__(self, composite: np.ndarray, mask: np.ndarray, caption: str | None = None) -> list[Description]:
        if mask.all():
            raise UserError("the mask is white everywhere: there is no light around the object to describe")
        if self.photographs is not None and caption is not None:
            return self.photographs(composite, mask, caption)
        object_ = self.name(composite, caption)
        foreground, probability = self.rank_phrases(object_, cut_object(composite, mask), composite[mask])[0]
        background = self.rank_phrases(object_, remove_object(composite, mask), composite[~mask])
        foreground = foreground if probability >= self.min_probability else PLAIN_LIGHT
        lights = [light for light, _ in background if light != foreground]  # not the object's own light
        return [Description(object_, foreground, light) for light in lights[: self.count]]

    def rank_phrases(self, object_: str, view: np.ndarray, pixels: np.ndarray) -> list[tuple[str, float]]:
        """Every phrase with its probability for ``view``, the most probable first."""
        texts = self.clip.texts([f"{object_} {light_phrase(*light)}" for light in self.lights]).float().cpu()
        cosines = (embeddings([view], self.clip) @ torch.nn.functional.normalize(texts).T)[0]
        words = color_words(pixels)
        cosines += torch.tensor([self.TRUST * len(words.intersection(light)) for light in self.lights])
        shares = zip(self.lights, (self.SCALE * cosines).softmax(0).tolist(), strict=True)
        return sorted(((light_phrase(*light), share) for light, share in shares), key=lambda pair: -pair[1])


def split_words(text: str) -> list[str]:
    """Split a text into words in lower case, without punctuation."""
    words = (word.strip(".,:;!?\"'()") for word in text.lower().split())
    return [word for word in words if word]


class VisionLanguageModel:
    """Words from a vision-language model of transformers (BLIP-2, LLaVA or similar), by hub id or folder.

    It answers questions about the cut-out object and about the background, in a few words each.
    """

    QUESTIONS = {
        "object": "What is the main object of this picture? Answer with the object alone, in at most four words.",
        "light": "What light is in this picture? Answer in at most four words: brightness, colour, time of day.",
    }
    LENGTH = 12  # largest number of words in an answer

    def __init__(self, path: str, device: torch.device | str = "cpu"):
        self.processor, self.model = load_vision_language_model(path, "describer", device)

    @torch.inference_mode()
    def ask(self, image: np.ndarray, question: str) -> str:
        """The model's answer in lower case, without punctuation."""
        text = f"Question: {question} Answer:"
        if getattr(self.processor, "chat_template", None):
            messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = self.processor(images=image, text=text, return_tensors="pt").to(self.model.device)
        tokens = self.model.generate(**inputs, max_new_tokens=2 * self.LENGTH, do_sample=False)
        prompt = inputs["input_ids"]
        if tokens.shape[1] >= prompt.shape[1] and torch.equal(tokens[:, : prompt.shape[1]], prompt):
            tokens = tokens[:, prompt.shape[1] :]
        answer = self.processor.batch_decode(tokens, skip_special_tokens=True)[0]
        words = split_words(answer)
        if "answer" in words:  # some models repeat the question
            words = words[len(words) - words[::-1].index("answer") :]
        return " ".join(words[: self.LENGTH])

    def __call__(self, composite: np.ndarray, mask: np.ndarray, caption: str | None = None) -> list[Description]:
        description = Description(
            self.ask(cut_object(composite, mask), self.QUESTIONS["object"]),
            self.ask(cut_object(composite, mask), self.QUESTIONS["light"]),
            self.ask(remove_object(composite, mask), self.QUESTIONS["light"]),
        )
        if empty_fields := [field for field, words in vars(description).items() if not words]:
            raise UserError(f"the vision-language model found no words for the {empty_fields[0]}: give prompts=")
        return [description]
