"""F1. Agreement in CLIP's space: of outputs with instances (CLIP-I) and with captions (CLIP-T)."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from harmony.errors import UserError
from harmony.masks import bounding_box
from harmony.metrics.frechet import clean_resize, normalise_clip


class Clip(Protocol):
    """What both wrappers below are: ``name``, and embeddings N x P of uint8 H x W x 3 pictures and of texts."""

    name: str

    def images(self, images: list[np.ndarray]) -> torch.Tensor: ...

    def texts(self, texts: list[str]) -> torch.Tensor: ...


def embeddings(images: Sequence[np.ndarray], clip: Clip, batch: int = 32) -> torch.Tensor:
    """N x P of unit length, on the CPU."""
    parts = [clip.images(list(images[i : i + batch])).float().cpu() for i in range(0, len(images), batch)]
    return F.normalize(torch.cat(parts), dim=1)


def box_of(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The box around ``mask``: what the likeness of an object is judged by."""
    x0, y0, x1, y1 = bounding_box(mask)
    return image[y0:y1, x0:x1]


def clip_i(features_a: torch.Tensor, features_b: torch.Tensor) -> float:
    """Mean cosine in [-1, 1] of paired image features N x P."""
    return _mean_cosine(features_a, features_b)


def clip_t(image_features: torch.Tensor, text_features: torch.Tensor) -> float:
    """Mean cosine in [-1, 1] of image features and those of their captions, N x P each (not multiplied by 100)."""
    return _mean_cosine(image_features, text_features)


def _mean_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape:
        raise ValueError(f"features are compared in pairs, but have shapes {tuple(a.shape)} and {tuple(b.shape)}")
    return float(F.cosine_similarity(a.double(), b.double(), dim=-1).mean())


class KitClip:
    """A kit's own CLIP: the two towers of transformers and their projections into the common space.

    ``vision`` is a CLIPVisionModelWithProjection, ``text`` a CLIPTextModel, ``text_projection`` the linear layer that
    follows it.
    """

    name = "kit-clip"

    def __init__(self, vision: torch.nn.Module, text: torch.nn.Module, text_projection: torch.nn.Module, tokenizer):
        self.vision, self.text, self.text_projection, self.tokenizer = vision, text, text_projection, tokenizer

    @torch.no_grad()
    def images(self, images: list[np.ndarray]) -> torch.Tensor:
        """Features N x P of uint8 images."""
        size = self.vision.config.image_size
        pixels = normalise_clip(clean_resize(images, size), size).to(self.vision.device, self.vision.dtype)
        return self.vision(pixel_values=pixels).image_embeds.float()

    @torch.no_grad()
    def texts(self, texts: list[str]) -> torch.Tensor:
        """Features N x P of captions, cut off at the length that the tower knows."""
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=self.text.config.max_position_embeddings,
            return_tensors="pt",
        )
        pooled = self.text(input_ids=tokens.input_ids.to(self.text.device)).pooler_output
        return self.text_projection(pooled).float()


class OpenClip:
    """Any model of open_clip: NAME/WEIGHTS, the latter its name for them or a path. UserError where there is none."""

    def __init__(self, name: str, device: str | torch.device = "cpu"):
        import open_clip

        self.name, self.device = name, device
        model, _, weights = name.partition("/")
        if not weights:
            raise UserError(f"clip={name}: give open_clip's NAME/WEIGHTS, ViT-B-32/laion2b_s34b_b79k for instance")
        try:
            made = open_clip.create_model_and_transforms(model, pretrained=weights, device=device)
        except Exception as error:  # an unknown name, a hub that is not reached, a torn file: each raises its own
            raise UserError(f"clip={name} cannot be loaded: {(str(error) or repr(error)).splitlines()[0]}") from error
        self.preprocess, self.model, self.tokenizer = made[2], made[0].eval(), open_clip.get_tokenizer(model)

    @torch.no_grad()
    def images(self, images: list[np.ndarray]) -> torch.Tensor:
        """Features N x P of uint8 images, by the model's own preprocessing."""
        from PIL import Image

        pixels = torch.stack([self.preprocess(Image.fromarray(image)) for image in images])
        return self.model.encode_image(pixels.to(self.device)).float()

    @torch.no_grad()
    def texts(self, texts: list[str]) -> torch.Tensor:
        """Features N x P of captions."""
        return self.model.encode_text(self.tokenizer(texts).to(self.device)).float()
