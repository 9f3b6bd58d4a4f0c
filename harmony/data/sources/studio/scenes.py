"""The scenes of the studio, each a pure function of seed and index."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from harmony.data.sources.studio.shapes import KINDS

COLORS = {
    "red": (0.72, 0.04, 0.04),
    "orange": (0.85, 0.30, 0.02),
    "yellow": (0.85, 0.68, 0.04),
    "green": (0.06, 0.42, 0.08),
    "blue": (0.04, 0.12, 0.62),
    "purple": (0.30, 0.05, 0.45),
    "white": (0.82, 0.82, 0.82),
    "black": (0.025, 0.025, 0.028),
}
NOVEL = {  # colors that no scene of the dataset has, for objects whose word is learned
    "teal": (0.02, 0.32, 0.30),
    "pink": (0.85, 0.28, 0.42),
    "brown": (0.22, 0.09, 0.03),
    "lime": (0.42, 0.75, 0.05),
    "gold": (0.70, 0.45, 0.10),
    "azure": (0.20, 0.50, 0.85),
    "maroon": (0.25, 0.02, 0.06),
    "mint": (0.45, 0.80, 0.58),
}
FINISHES = {  # roughness, metallic, clearcoat of Mitsuba's principled BSDF
    "matte": (0.9, 0.0, 0.0),
    "glossy": (0.25, 0.0, 0.8),
    "metallic": (0.35, 0.7, 0.0),
}
GROUNDS = ("grass", "sand", "snow", "wood", "brick", "stone")
BACKDROPS = ("sky", "hills", "wall")


@dataclass(frozen=True)
class Light:
    """A light: its words, the sun's elevation in degrees and irradiance, the sky's radiance (linear RGB)."""

    words: str
    elevation: float
    sun: tuple[float, float, float]
    sky: tuple[float, float, float]


LIGHTS = {
    "noon": Light("bright noon light", 58.0, (3.1, 3.0, 2.8), (0.42, 0.52, 0.70)),
    "sunset": Light("warm sunset light", 17.0, (4.6, 1.75, 0.50), (0.50, 0.27, 0.20)),
    "overcast": Light("grey overcast light", 75.0, (0.25, 0.26, 0.27), (0.62, 0.65, 0.68)),
    "moon": Light("blue moonlight", 42.0, (0.28, 0.50, 1.25), (0.035, 0.07, 0.17)),
    "neon": Light("pink neon light", 33.0, (2.7, 0.40, 1.9), (0.12, 0.10, 0.30)),
}


@dataclass(frozen=True)
class Scene:
    """Everything that determines a render. Angles in degrees, lengths in scene units (an object is about 1.5 high)."""

    seed: int
    index: int
    split: str
    kind: str
    color: str
    finish: str
    ground: str
    light: str
    relight: str
    backdrop: str
    backdrop_rgb: tuple[float, float, float]
    yaw: float
    sun: float
    camera: tuple[float, float, float]  # azimuth, elevation, distance
    aim: tuple[float, float, float]
    others: tuple[tuple[str, str, float, float, float], ...]  # kind, color, x, y, yaw

    @property
    def id(self) -> str:
        """Sixteen hexadecimal digits, like an Open Images id."""
        return hashlib.sha256(f"studio {self.seed} {self.index}".encode()).hexdigest()[:16]

    def caption(self, light: str | None = None) -> str:
        """The caption under the scene's light, or under another ``light``."""
        return f"a {self.color} {self.kind} on {self.ground}, {LIGHTS[light or self.light].words}"


def split_of(index: int) -> str:
    """The split of a scene: of every sixteen, 11 are train, 2 validation and 3 test."""
    return "train" if index % 16 < 11 else "validation" if index % 16 < 13 else "test"


def is_test_combination(kind: str, color: str, light: str) -> bool:
    """Whether this combination occurs only in the test split: one in seven, evenly over kinds, colors and lights."""
    return (list(KINDS).index(kind) + 3 * list(COLORS).index(color) + 2 * list(LIGHTS).index(light)) % 7 == 0


def scene(index: int, seed: int = 0) -> Scene:
    """The scene of this index, the same on every machine and in every order."""
    rng = np.random.default_rng([seed, index])
    split = split_of(index)

    def pick(names: Iterable[str]) -> str:
        return str(rng.choice(list(names)))

    while True:
        kind, color, light, relight = pick(KINDS), pick(COLORS), pick(LIGHTS), pick(LIGHTS)
        is_test = is_test_combination(kind, color, light)
        is_training = not is_test and not is_test_combination(kind, color, relight)
        if relight != light and (is_test if split == "test" else is_training):
            break
    others = []
    if rng.random() < 1 / 3:
        for _ in range(rng.integers(1, 3)):
            angle, distance = rng.uniform(0.15, 0.85) * np.pi, rng.uniform(2.0, 4.0)
            others.append(
                (pick(KINDS), pick(COLORS), distance * np.cos(angle), distance * np.sin(angle), rng.uniform(0, 360))
            )
    azimuth = rng.uniform(-25, 25)
    return Scene(
        seed=seed,
        index=index,
        split=split,
        kind=kind,
        color=color,
        finish=pick(FINISHES),
        ground=pick(GROUNDS),
        light=light,
        relight=relight,
        backdrop=pick(BACKDROPS),
        backdrop_rgb=tuple(float(v) for v in rng.uniform(0.08, 0.45, 3)),
        yaw=float(rng.uniform(0, 360)),
        sun=float(rng.uniform(-150, 60)),
        camera=(float(azimuth), float(rng.uniform(12, 34)), float(rng.uniform(4.4, 6.2))),
        aim=(float(rng.uniform(-0.5, 0.5)), 0.0, float(rng.uniform(0.45, 0.9))),
        others=tuple((k, c, float(x), float(y), float(a)) for k, c, x, y, a in others),
    )
