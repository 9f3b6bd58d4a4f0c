"""The manifest row, and the shapes and value ranges that all code shares.

Shapes
    B  batch            H, W  pixels             h, w  latent cells (H / factor, W / factor)
    C  latent channels  T     tokens of a prompt  D    width of the text states

Value ranges
    image  uint8 H x W x 3 RGB on disk and in NumPy, float B x 3 x H x W in [-1, 1] ("model range") in front
           of a network
    hint   float B x 3 x H x W in [0, 1] ("hint range"), 0 outside the instance
    mask   {0, 1}; 1 = hole, 0 = keep. M is the instance, M_e (the hole) contains M
"""

import hashlib
from dataclasses import dataclass, field

SCHEMA_VERSION = 1
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Row:
    """One instance in one photograph: a line of ``manifest.jsonl``. Paths are relative to the manifest's folder.

    ``box`` is (x0, y0, x1, y1) in pixels of the stored image, x1 and y1 exclusive. ``sha256`` is the hash of the
    image file. ``extras`` holds the values that only some datasets have: ``plate``, ``relit``, ``shadow`` (paths),
    ``composite`` (the path of the image with its object under another light, or with one of another picture),
    ``exemplar`` (the path of a picture of that other object),
    ``relit_caption``, ``source`` (``studio``), ``caption_source`` (``given``, ``label`` or the captioner's name), and
    ``mask_sha256``, ``relit_sha256``, ``composite_sha256`` and ``exemplar_sha256``, the hashes of those files.
    """

    id: str
    image: str
    mask: str
    box: tuple[float, float, float, float]
    label: str
    caption: str
    split: str
    width: int
    height: int
    sha256: str
    extras: dict[str, str] = field(default_factory=dict)

    @property
    def has_truth(self) -> bool:
        """Whether the image shows the object as it should look; not where another picture's object is to go in."""
        return "exemplar" not in self.extras

    @property
    def number(self) -> int:
        """A number below 2^32 that depends on the id alone: what is drawn at random for a row starts from it."""
        return int(hashlib.sha256(self.id.encode()).hexdigest()[:8], 16)
