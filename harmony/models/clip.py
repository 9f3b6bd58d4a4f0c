"""CLIP models behind one interface: a backbone's own towers, or any model of open_clip."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from harmony.core.errors import UserError
from harmony.metrics.frechet import clean_resize, normalize_clip
from harmony.metrics.similarity import Clip
from harmony.models.backbone import Backbone
from harmony.models.weights import check_tensors

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


class BackboneClip:
    """A backbone's own CLIP: the two towers of transformers and their projections into the shared space.

    ``vision`` is a CLIPVisionModelWithProjection, ``text`` a CLIPTextModel, ``text_projection`` the linear layer that
    follows it.
    """

    name = "backbone-clip"

    def __init__(
        self,
        vision: torch.nn.Module,
        text: torch.nn.Module,
        text_projection: torch.nn.Module,
        tokenizer: "CLIPTokenizer",
    ):
        self.vision, self.text, self.text_projection, self.tokenizer = vision, text, text_projection, tokenizer

    @torch.no_grad()
    def images(self, images: list[np.ndarray]) -> torch.Tensor:
        """Features N x P of uint8 images."""
        size = self.vision.config.image_size
        pixels = normalize_clip(clean_resize(images, size), size).to(self.vision.device, self.vision.dtype)
        return self.vision(pixel_values=pixels).image_embeds.float()

    @torch.no_grad()
    def texts(self, texts: list[str]) -> torch.Tensor:
        """Features N x P of captions, truncated to the text tower's length."""
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=self.text.config.max_position_embeddings,
            return_tensors="pt",
        )
        features = self.text(input_ids=tokens.input_ids.to(self.text.device)).pooler_output
        return self.text_projection(features).float()


class OpenClip:
    """Any model of open_clip: NAME/WEIGHTS, weights by open_clip's name or a path. UserError if there is none."""

    def __init__(self, name: str, device: str | torch.device = "cpu"):
        import open_clip

        self.name, self.device = name, device
        model, _, weights = name.partition("/")
        if not weights:
            raise UserError(f"clip={name}: give open_clip's NAME/WEIGHTS, ViT-B-32/laion2b_s34b_b79k for instance")
        try:
            self.model, _, self.preprocess = open_clip.create_model_and_transforms(
                model, pretrained=weights, device=device
            )
        except Exception as error:  # an unknown name, no connection and a damaged file raise different exceptions
            raise UserError(f"clip={name} cannot be loaded: {(str(error) or repr(error)).splitlines()[0]}") from error
        check_tensors(self.model.state_dict(), f"clip={name}")
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(model)

    @torch.no_grad()
    def images(self, images: list[np.ndarray]) -> torch.Tensor:
        """Features N x P of uint8 images, with the model's own preprocessing."""
        from PIL import Image

        pixels = torch.stack([self.preprocess(Image.fromarray(image)) for image in images])
        return self.model.encode_image(pixels.to(self.device)).float()

    @torch.no_grad()
    def texts(self, texts: list[str]) -> torch.Tensor:
        """Features N x P of captions."""
        return self.model.encode_text(self.tokenizer(texts).to(self.device)).float()


def backbone_clip(backbone: Backbone) -> BackboneClip:
    """The backbone's own CLIP. UserError for a backbone without an image tower."""
    return BackboneClip(
        backbone.image_encoder, backbone.text_tower.text_model, backbone.text_tower.text_projection, backbone.tokenizer
    )


def clip_of(backbone: Backbone, name: str | None = None) -> Clip | None:
    """The open_clip model NAME/WEIGHTS, else the backbone's own CLIP; None if the backbone has no image tower."""
    if name is not None:
        return OpenClip(name, backbone.device)
    try:
        return backbone_clip(backbone)
    except UserError:
        return None
