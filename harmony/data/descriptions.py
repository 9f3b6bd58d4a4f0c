"""Words for a composite: the object, its own light, and the light around it.

Zero-shot harmonization (Chen 2023) leads an object from the one light to the other. The words come from the user, a
file, a vision-language model, or from word lists scored by CLIP and by the colors of the picture.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import torch
from safetensors import SafetensorError

from harmony.core.errors import UserError
from harmony.metrics.similarity import Clip, crop_to_box, embeddings

FORM = "OBJECT: its own light -> the light around it"
FIELDS = ("object", "foreground", "background")
LIGHTS = {  # where light comes from (time of day, weather, place) -> how it may look (brightness, temperature, tone)
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
PLAIN = "light"  # the word for a light that is not sure


@dataclass(frozen=True)
class Description:
    """``object``: a phrase; ``foreground`` and ``background``: words for its light and for that around it."""

    object: str
    foreground: str
    background: str

    @property
    def prompts(self) -> tuple[str, str]:
        """Both begin with the same words."""
        return f"{self.object} {self.foreground}", f"{self.object} {self.background}"


class Describer(Protocol):
    """A function from a composite to words."""

    def __call__(self, composite: np.ndarray, mask: np.ndarray) -> list[Description]:
        """Descriptions of uint8 H x W x 3 with its object (bool H x W), the likeliest first."""
        ...


# --- words from the user


def parsed(text: str) -> list[Description]:
    """``OBJECT: its own light -> the light around it``, several separated by semicolons. UserError for another form."""
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
    """Those of ``name`` in a JSON file ``{name: [{object, foreground, background}, ...]}``, or a list for all pictures.

    UserError for a file of another form, or without ``name``.
    """
    try:
        data = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"prompts={path} cannot be read: {str(error).splitlines()[0]}") from None
    if isinstance(data, dict) and name not in data:
        raise UserError(f"{path} describes {', '.join(list(data)[:3]) or 'nothing'}, but not {name}")
    items = data[name] if isinstance(data, dict) else data
    try:
        descriptions = [Description(*(" ".join(item[field].split()) for field in FIELDS)) for item in items]
    except (KeyError, TypeError, AttributeError):
        descriptions = []
    if not descriptions or not all(all(vars(d).values()) for d in descriptions):
        raise UserError(f"{path}: each description of {name} wants {', '.join(FIELDS)}")
    return descriptions


# --- words from the picture


def phrase(adjective: str, source: str) -> str:
    """``warm sunset light``; a source that is a light already (moonlight) is not called one twice."""
    return f"{adjective} {source}" if source.endswith("light") else f"{adjective} {source} light"


def surroundings(composite: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The photograph without the object: its place is filled from its rim (Telea, 2004)."""
    return cv2.inpaint(composite, mask.astype(np.uint8), 3, cv2.INPAINT_TELEA)


def alone(composite: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The object's box without the photograph: filled with the object's mean color instead."""
    mean = composite[mask].mean(0).round().astype(np.uint8)
    return crop_to_box(np.where(mask[..., None], composite, mean), mask)


def measured(pixels: np.ndarray) -> set[str]:
    """Words that fit the mean color of uint8 N x 3 pixels: its brightness, its temperature, its tone (Lab)."""
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


class WordScorer:
    """Words for both lights from ``LIGHTS``, by CLIP scores and mean colors of the object and of its surroundings.

    ``name`` gives the object phrase of a composite (a captioner, say), ``known`` tells whether CLIP knows a word, and
    ``count`` is the number of descriptions. The object's light is named only with probability ``sure`` or more: its
    color may be its own, and a wrong word does more harm than a plain one.
    """

    TRUST = 0.03  # by how much a cosine rises for each word that fits the mean color
    SCALE = 20.0  # of cosines, to make probabilities

    def __init__(
        self,
        clip: Clip,
        name: Callable[[np.ndarray], str],
        known: Callable[[str], bool] = lambda word: True,
        count: int = 2,
        sure: float = 0.95,
    ):
        self.clip, self.name, self.count, self.sure = clip, name, count, sure
        self.lights = [
            (look, source) for source, looks in LIGHTS.items() for look in looks if known(look) and known(source)
        ]
        if not self.lights:
            raise UserError("the model knows none of the words for light: give prompts=, or describer=MODEL")

    def __call__(self, composite: np.ndarray, mask: np.ndarray) -> list[Description]:
        if mask.all():
            raise UserError("the mask is white everywhere: there is no light around the object to be told")
        object_ = self.name(composite)
        foreground, share = self.ranked(object_, alone(composite, mask), composite[mask])[0]
        background = self.ranked(object_, surroundings(composite, mask), composite[~mask])
        foreground = foreground if share >= self.sure else PLAIN
        lights = [light for light, _ in background if light != foreground]  # the object has that light already
        return [Description(object_, foreground, light) for light in lights[: self.count]]

    def ranked(self, object_: str, view: np.ndarray, pixels: np.ndarray) -> list[tuple[str, float]]:
        """Every phrase with its probability for ``view``, the likeliest first."""
        texts = self.clip.texts([f"{object_} {phrase(*light)}" for light in self.lights]).float().cpu()
        cosines = (embeddings([view], self.clip) @ torch.nn.functional.normalize(texts).T)[0]
        words = measured(pixels)
        cosines += torch.tensor([self.TRUST * len(words.intersection(light)) for light in self.lights])
        shares = zip(self.lights, (self.SCALE * cosines).softmax(0).tolist(), strict=True)
        return sorted(((phrase(*light), share) for light, share in shares), key=lambda pair: -pair[1])


def bare(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    words = (word.strip(".,:;!?\"'()") for word in text.lower().split())
    return [word for word in words if word]


class VisionLanguageModel:
    """Words from a vision-language model of transformers (BLIP-2, LLaVA and their like), hub id or folder.

    It answers questions about the object cut out and about its surroundings, in a few words each.
    """

    QUESTIONS = {
        "object": "What is the main object of this picture? Answer with the object alone, in at most four words.",
        "light": "What light is in this picture? Answer in at most four words: brightness, colour, time of day.",
    }
    LENGTH = 12  # most words of an answer

    def __init__(self, path: str, device: torch.device | str = "cpu"):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            self.processor = AutoProcessor.from_pretrained(path)
            self.model = AutoModelForImageTextToText.from_pretrained(path).eval().to(device)
        except (OSError, ValueError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"describer={path}: no vision-language model of transformers there ({reason})") from None

    @torch.inference_mode()
    def asked(self, image: np.ndarray, question: str) -> str:
        """The model's answer in lower case, without punctuation."""
        text = f"Question: {question} Answer:"
        if getattr(self.processor, "chat_template", None):
            turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            text = self.processor.apply_chat_template(turn, add_generation_prompt=True)
        inputs = self.processor(images=image, text=text, return_tensors="pt").to(self.model.device)
        tokens = self.model.generate(**inputs, max_new_tokens=2 * self.LENGTH, do_sample=False)
        prompt = inputs["input_ids"]
        if tokens.shape[1] >= prompt.shape[1] and torch.equal(tokens[:, : prompt.shape[1]], prompt):
            tokens = tokens[:, prompt.shape[1] :]
        answer = self.processor.batch_decode(tokens, skip_special_tokens=True)[0]
        words = bare(answer)
        if "answer" in words:  # some models repeat the question
            words = words[len(words) - words[::-1].index("answer") :]
        return " ".join(words[: self.LENGTH])

    def __call__(self, composite: np.ndarray, mask: np.ndarray) -> list[Description]:
        description = Description(
            self.asked(alone(composite, mask), self.QUESTIONS["object"]),
            self.asked(alone(composite, mask), self.QUESTIONS["light"]),
            self.asked(surroundings(composite, mask), self.QUESTIONS["light"]),
        )
        if empty := [field for field, words in vars(description).items() if not words]:
            raise UserError(f"the vision-language model found no words for the {empty[0]}: give prompts=")
        return [description]
