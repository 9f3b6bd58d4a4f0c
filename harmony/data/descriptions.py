"""What a composite shows, in words: the object, its own light, and the light around it.

Zero-shot harmonization (Chen 2023) leads an object from the one light to the other. The words come from the user,
a file, a vision-language model, or CLIP scores of word lists together with what can be measured in the picture.
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
from harmony.metrics.similarity import Clip, box_of, embeddings

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
PLAIN = "light"  # said of an object whose light cannot be told


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
    """What finds words for a composite."""

    def __call__(self, composite: np.ndarray, mask: np.ndarray) -> list[Description]:
        """Descriptions of uint8 H x W x 3 with its object (bool H x W), the likeliest first."""
        ...


# --- words that were given


def parsed(text: str) -> list[Description]:
    """``OBJECT: its own light -> the light around it``, several separated by semicolons. UserError for another form."""
    found = []
    for part in filter(None, map(str.strip, text.split(";"))):
        object_, colon, lights = part.rpartition(":")
        foreground, arrow, background = lights.partition("->")
        words = [" ".join(words.split()) for words in (object_, foreground, background)]
        if not (colon and arrow and all(words)) or "->" in words[2]:
            raise UserError(f"prompts={part!r}: write {FORM}, several with semicolons between")
        found.append(Description(*words))
    if not found:
        raise UserError(f"prompts={text!r} holds no description: write {FORM}")
    return found


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
    listed = data[name] if isinstance(data, dict) else data
    try:
        found = [Description(*(" ".join(item[field].split()) for field in FIELDS)) for item in listed]
    except (KeyError, TypeError, AttributeError):
        found = []
    if not found or not all(all(vars(d).values()) for d in found):
        raise UserError(f"{path}: each description of {name} wants {', '.join(FIELDS)}")
    return found


# --- words that are found


def phrase(adjective: str, source: str) -> str:
    """``warm sunset light``; a source that is a light already (moonlight) is not called one twice."""
    return f"{adjective} {source}" if source.endswith("light") else f"{adjective} {source} light"


def surroundings(composite: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The photograph without the object: its place is filled from its rim (Telea, 2004)."""
    return cv2.inpaint(composite, mask.astype(np.uint8), 3, cv2.INPAINT_TELEA)


def alone(composite: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The object's box without the photograph: around it lies its own mean colour."""
    mean = composite[mask].mean(0).round().astype(np.uint8)
    return box_of(np.where(mask[..., None], composite, mean), mask)


def measured(pixels: np.ndarray) -> set[str]:
    """Words that the mean colour of uint8 N x 3 pixels speaks for: its brightness, its temperature, its tone (Lab)."""
    lightness, a, b = cv2.cvtColor(pixels[None].astype(np.float32) / 255, cv2.COLOR_RGB2Lab)[0].mean(0)
    chroma, hue = float(np.hypot(a, b)), float(np.degrees(np.arctan2(b, a)) % 360)
    found = {"dark", "dim"} if lightness < 35 else {"bright"} if lightness > 65 else set()
    if b > 12:
        found |= {"warm", "golden"}
    if b < -6:
        found |= {"cold"}
    if chroma < 8:
        return found | {"grey", "neutral"}
    tones = ((15, "pink"), (45, "red"), (75, "orange"), (105, "yellow"), (195, "green"), (309, "blue"), (335, "purple"))
    return found | {next((tone for end, tone in tones if hue < end), "pink")}


class WordScorer:
    """Words for both lights from the lists above, by CLIP scores of the object alone and of its surroundings and by
    what is measured in their colours.

    ``name`` gives the object phrase of a composite (a captioner, say); ``known``: whether CLIP knows a word. ``count``
    descriptions are given. Of the object the light is said only where it is ``sure``: its colour may be its own, and a
    wrong word leads astray while a plain one does little harm.
    """

    TRUST = 0.03  # by how much a cosine rises for each word that the measurement speaks for
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
        own, likely = self.ranked(object_, alone(composite, mask), composite[mask])[0]
        around = self.ranked(object_, surroundings(composite, mask), composite[~mask])
        own = own if likely >= self.sure else PLAIN
        lights = [light for light, _ in around if light != own]  # what is there already need not be asked for
        return [Description(object_, own, light) for light in lights[: self.count]]

    def ranked(self, object_: str, view: np.ndarray, pixels: np.ndarray) -> list[tuple[str, float]]:
        """Every phrase and its probability for what ``view`` shows, the likeliest first."""
        said = self.clip.texts([f"{object_} {phrase(*light)}" for light in self.lights]).float().cpu()
        cosines = (embeddings([view], self.clip) @ torch.nn.functional.normalize(said).T)[0]
        spoken_for = measured(pixels)
        cosines += torch.tensor([self.TRUST * len(spoken_for.intersection(light)) for light in self.lights])
        found = zip(self.lights, (self.SCALE * cosines).softmax(0).tolist(), strict=True)
        return sorted(((phrase(*light), share) for light, share in found), key=lambda pair: -pair[1])


def bare(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    words = (word.strip(".,:;!?\"'()") for word in text.lower().split())
    return [word for word in words if word]


class VisionLanguageModel:
    """Words from a vision-language model of transformers (BLIP-2, LLaVA and their like), hub id or folder.

    It is asked about the object cut out and about the whole photograph, in a few words each.
    """

    QUESTIONS = {
        "object": "What is the main object of this picture? Answer with the object alone, in at most four words.",
        "light": "What light is in this picture? Answer in at most four words: brightness, colour, time of day.",
    }
    LENGTH = 12  # words of an answer that are kept, at most

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
        """Its answer in lower case, without punctuation."""
        text = f"Question: {question} Answer:"
        if getattr(self.processor, "chat_template", None):
            turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            text = self.processor.apply_chat_template(turn, add_generation_prompt=True)
        inputs = self.processor(images=image, text=text, return_tensors="pt").to(self.model.device)
        made = self.model.generate(**inputs, max_new_tokens=2 * self.LENGTH, do_sample=False)
        prompt = inputs["input_ids"]
        if made.shape[1] >= prompt.shape[1] and torch.equal(made[:, : prompt.shape[1]], prompt):
            made = made[:, prompt.shape[1] :]
        said = self.processor.batch_decode(made, skip_special_tokens=True)[0]
        words = bare(said)
        if "answer" in words:  # some models say the whole question once more
            words = words[len(words) - words[::-1].index("answer") :]
        return " ".join(words[: self.LENGTH])

    def __call__(self, composite: np.ndarray, mask: np.ndarray) -> list[Description]:
        found = Description(
            self.asked(alone(composite, mask), self.QUESTIONS["object"]),
            self.asked(alone(composite, mask), self.QUESTIONS["light"]),
            self.asked(surroundings(composite, mask), self.QUESTIONS["light"]),
        )
        if empty := [field for field, words in vars(found).items() if not words]:
            raise UserError(f"the vision-language model found no words for the {empty[0]}: give prompts=")
        return [found]
