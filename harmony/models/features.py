"""Feature extractors of FID and KID: clean-fid's Inception if its weights are on disk, else CLIP's image tower."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from harmony.core.errors import UserError
from harmony.metrics.frechet import normalize_clip
from harmony.models.backbone import Backbone
from harmony.models.weights import check_tensors

INCEPTION_FILE = "inception-2015-12-05.pt"  # clean-fid's weights
INCEPTION_SIZE = 299


class BackboneFeatures:
    """Pooled features of a backbone's CLIP vision model of transformers, before its projection."""

    protocol = "backbone-clip"

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.size = model.config.image_size

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Float N x 3 x H x W in [0, 255] to N x D; images of another side are resized to the tower's."""
        pixels = normalize_clip(images.to(self.model.device, torch.float32), self.size)
        return self.model.vision_model(pixel_values=pixels.to(self.model.dtype)).pooler_output


class InceptionFeatures:
    """Features of clean-fid's Inception-v3, 2048-d."""

    protocol = "inception-clean"
    size = INCEPTION_SIZE

    def __init__(self, folder: Path, device: str | torch.device):
        from cleanfid.inception_torchscript import InceptionV3W

        self.device = device
        self.model = InceptionV3W(str(folder), download=False).to(device)
        check_tensors(self.model.state_dict(), str(folder / INCEPTION_FILE))

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Float N x 3 x 299 x 299 in [0, 255] to N x 2048."""
        return self.model(images.to(self.device))


def inception_features(
    folder: str | Path | None = None, device: str | torch.device = "cpu"
) -> InceptionFeatures | None:
    """clean-fid's Inception if its weights are on disk already, else None; never downloads.

    ``folder`` holds the weights, by default clean-fid's folder (the temporary folder). Raises UserError for a file that
    cannot be loaded: clean-fid writes it in place, so an interrupted download leaves a damaged file.
    """
    path = Path(folder or tempfile.gettempdir()) / INCEPTION_FILE
    if not path.is_file():
        return None
    try:
        return InceptionFeatures(path.parent, device)
    except RuntimeError:
        raise UserError(f"the Inception weights {path} cannot be loaded; delete the file and fetch it again") from None


def feature_extractor(backbone: Backbone) -> Callable:
    """clean-fid's Inception if its weights are on disk, else the backbone's CLIP tower; ``.protocol`` names it."""
    return inception_features(device=backbone.device) or BackboneFeatures(backbone.image_encoder)
