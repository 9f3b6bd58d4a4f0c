"""Captions of whole photographs by BLIP.

BLIP (Li 2022) gets the full, unmasked image, so that a caption names the instance too. Its prompt prefix and lengths
come from the captioner's generation config, with the values of BLIP's authors as defaults. The number of beams is
always theirs: the configuration that is published with BLIP's weights turns beam search off.
"""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from harmony.core.errors import UserError
from harmony.core.foreign import read_json
from harmony.models.backbone import Backbone
from harmony.models.shipped import CAPTIONER, fetch_weights
from harmony.models.weights import load_network
from harmony.pixels.images import read_image, sha256, write_image

BLIP = "Salesforce/blip-image-captioning-large"  # for backbones without a captioner, as Stable Diffusion
PREFIX, BEAMS, MIN_LENGTH, MAX_LENGTH = "a picture of", 3, 5, 20
HUMAN_CAPTION = "given"  # stored instead of a captioner's name: a caption by people
LABEL_CAPTION = "label"  # likewise: made of the instance's label
NO_LABEL = "object"  # the label of an instance of which nothing is known


def captioner_name(folder: str | Path) -> str:
    """The captioner's name, stored with every caption: the backbone with a hash of the weights, or the hub id.

    Captions of a captioner with another name are written again.
    """
    folder = Path(folder)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        return str(folder)
    owner = folder.parent.name if folder.name == "captioner" else folder.name
    digest = hashlib.sha256("".join(sha256(path) for path in weights).encode()).hexdigest()
    return f"{owner}@{digest[:8]}"


def knows_photographs(folder: str | Path) -> bool:
    """Whether a captioner's captions of photographs are of use; ``photographs: false`` in its config.json denies it."""
    config = Path(folder) / "config.json"
    content = read_json(config) if config.is_file() else {}
    return not (isinstance(content, dict) and content.get("photographs") is False)


def find_captioner(backbone: Backbone) -> tuple[Any, Any]:
    """The backbone's captioner of photographs and its processor. UserError where it has none that knows them."""
    if not knows_photographs(backbone.folder("captioner")):
        raise UserError("the backbone's captioner does not know photographs")
    return backbone.captioner, backbone.processor


def label_caption(label: str | None) -> str:
    """The caption of a photograph of which only the label is known; empty if that says nothing."""
    if label in (None, "", NO_LABEL) or label.startswith("/"):  # a machine id
        return ""
    return f"a photo of {'an' if label[0].lower() in 'aeiou' else 'a'} {label.lower()}"


def load_captioner(folder: str | Path, device: str = "cpu") -> tuple[torch.nn.Module, object]:
    """Load (BlipForConditionalGeneration, BlipProcessor) from a folder or hub id. Raises UserError if there is none."""
    from transformers import BlipForConditionalGeneration, BlipProcessor

    try:
        folder = fetch_weights(CAPTIONER, folder)
        model = load_network(BlipForConditionalGeneration, folder, use_safetensors=True).eval().to(device)
        return model, BlipProcessor.from_pretrained(folder)
    except (OSError, ValueError, UserError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{folder}: no BLIP captioner there ({reason}); give a backbone with a captioner/ folder"
        ) from None


def caption_images(
    paths: Iterable[tuple[str, Path]], captioner: torch.nn.Module, processor: object, batch_size: int, device: str
) -> Iterator[tuple[str, str]]:
    """Yield (id, caption) for (id, image path), batch by batch.

    Raises UserError for an image that cannot be decoded.
    """
    settings = captioner.generation_config
    prefix = PREFIX if getattr(settings, "prefix", None) is None else settings.prefix
    prompt = processor.tokenizer(prefix, return_tensors="pt")["input_ids"].to(device)  # 1 x T, ends in [SEP]
    iterator = iter(paths)
    while batch := list(islice(iterator, batch_size)):
        pixels = processor.image_processor([read_image(path) for _, path in batch], return_tensors="pt")["pixel_values"]
        prompts = prompt.repeat(len(batch), 1)
        with torch.inference_mode():
            words = captioner.generate(
                pixel_values=pixels.to(device, captioner.dtype),
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                num_beams=BEAMS,
                min_length=settings.min_length or MIN_LENGTH,
                max_length=settings.max_length or MAX_LENGTH,
            )
        texts = processor.tokenizer.batch_decode(words, skip_special_tokens=True)
        yield from zip((id_ for id_, _ in batch), (strip_prefix(text, prefix) for text in texts), strict=True)


def caption_picture(image: np.ndarray, captioner: torch.nn.Module, processor: object, device: str) -> str:
    """Caption one picture in memory, uint8 H x W x 3."""
    with TemporaryDirectory() as folder:
        write_image(Path(folder) / "picture.png", image)
        return next(caption_images([("picture", Path(folder) / "picture.png")], captioner, processor, 1, device))[1]


def strip_prefix(text: str, prefix: str) -> str:
    """Remove the prompt from a caption that continues it."""
    return text.strip().removeprefix(prefix).strip()
