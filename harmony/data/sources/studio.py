"""The studio dataset: physically based renders of one object in one place, with ground truth no photograph has.

A scene is a pure function of (seed, index): kind, colour, finish, ground, light, a second light, camera, backdrop and,
in a third of the scenes, other objects that belong to the background. For each scene Mitsuba 3 (``scalar_rgb``, path
tracer) renders

    image   the object under light A                              data/<id>.jpg
    plate   the place under light A without the object            plates/<id>.jpg
    relit   the same scene under light B                          relit/<id>.jpg
    mask    where the object is visible (shape index, not colour) labels/masks/<HEX>/<...>.png
    shadow  where the object darkens the plate outside the mask   shadows/<id>.png

so that "object of relit pasted on plate" is a composite whose harmonized truth, cast shadow included, is ``image``.
Files lie in Open Images V7 layout, one folder a split; captions name colour, kind, ground and light. Some
(kind, colour, light) combinations exist in the test split alone.
"""

import csv
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from harmony.core.errors import UserError
from harmony.core.files import write_text
from harmony.core.signals import worker_pool
from harmony.pixels.images import write_image
from harmony.pixels.masks import bounding_box, dilate

COLOURS = {
    "red": (0.72, 0.04, 0.04),
    "orange": (0.85, 0.30, 0.02),
    "yellow": (0.85, 0.68, 0.04),
    "green": (0.06, 0.42, 0.08),
    "blue": (0.04, 0.12, 0.62),
    "purple": (0.30, 0.05, 0.45),
    "white": (0.82, 0.82, 0.82),
    "black": (0.025, 0.025, 0.028),
}
NOVEL = {  # no scene of the dataset has them: what an object looks like that words must be learnt for
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
JPEG_QUALITY = 90  # keeps the bundled set under 12 MB


@dataclass(frozen=True)
class Light:
    """Sun elevation in degrees, its irradiance and the sky's radiance (linear RGB, scene units)."""

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

# ---------------------------------------------------------------------------------------------------- geometry
# A part is (vertices N x 3, faces M x 3, normals N x 3, material); z is up, objects stand on z = 0.

BODY = "body"  # the material that carries the scene's colour and finish; every other material is a fixed linear RGB
DARK, GREY, CREAM = (0.03, 0.03, 0.035), (0.30, 0.30, 0.32), (0.72, 0.62, 0.46)
BROWN, BEAK, GLASS = (0.16, 0.08, 0.035), (0.85, 0.33, 0.03), (0.10, 0.14, 0.18)


def lathe(profile, material=BODY, sides=28, smooth=True):
    """Surface of revolution of a polyline of (radius, height), from bottom to top. Repeat a point for a sharp edge."""
    profile = np.asarray(profile, float)
    angle = np.linspace(0, 2 * np.pi, sides + 1)
    ring = np.stack([np.cos(angle), np.sin(angle)], 1)
    tangent = np.gradient(profile, axis=0)
    if not smooth:  # every segment gets vertices of its own, and so its own normal
        tangent = np.repeat(np.diff(profile, axis=0), 2, axis=0)
        profile = np.concatenate([np.stack([a, b]) for a, b in zip(profile[:-1], profile[1:], strict=True)])
    normal = np.stack([tangent[:, 1], -tangent[:, 0]], 1)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
    n = sides + 1
    vertices = np.concatenate([np.c_[r * ring, np.full(n, z)] for r, z in profile])
    normals = np.concatenate([np.c_[r * ring, np.full(n, z)] for r, z in normal])
    faces = [
        f
        for i in range(0, len(profile) - 1, 1 if smooth else 2)
        for j in range(sides)
        for a in [i * n + j]
        for f in [(a, a + 1, a + n + 1), (a, a + n + 1, a + n)]
    ]
    return vertices, np.array(faces), normals, material


def ball(radius=1.0, material=BODY, lower=-90, upper=90):
    """Sphere around the origin between two latitudes in degrees."""
    angle = np.radians(np.linspace(lower, upper, 14))
    return lathe(np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1), material)


def rod(radius, height, material=BODY, top=None):
    """Closed cylinder from z = 0, or a frustum with another top radius."""
    top = radius if top is None else top
    return lathe([(0, 0), (radius, 0), (top, height), (0, height)], material, smooth=False)


def block(x, y, z, material=BODY):
    """Box of the given edge lengths, standing on z = 0."""
    vertices, faces, normals = [], [], []
    for axis in range(3):
        for sign in (-1, 1):
            normal = np.zeros(3)
            normal[axis] = sign
            u, v = np.eye(3)[(axis + 1) % 3], np.eye(3)[(axis + 2) % 3]
            corners = [normal + a * u + b * v for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
            k = len(vertices)
            vertices += corners[::sign]
            normals += [normal] * 4
            faces += [(k, k + 1, k + 2), (k, k + 2, k + 3)]
    vertices = np.array(vertices) * (np.array([x, y, z]) / 2) + (0, 0, z / 2)
    return vertices, np.array(faces), np.array(normals), material


def ring(radius, thickness, material=BODY):
    """Torus around the z axis, centred on the origin."""
    angle = np.linspace(0, 2 * np.pi, 13)
    return lathe(np.stack([radius + thickness * np.cos(angle), thickness * np.sin(angle)], 1), material)


def transform(part, matrix, offset=(0, 0, 0)):
    """Linear map and shift of a part; normals by the inverse transpose."""
    vertices, faces, normals, material = part
    normals = normals @ np.linalg.inv(matrix)
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)
    return vertices @ np.asarray(matrix).T + offset, faces, normals, material


def move(part, x=0.0, y=0.0, z=0.0):
    return transform(part, np.eye(3), (x, y, z))


def scale(part, x, y=None, z=None):
    return transform(part, np.diag([x, x if y is None else y, x if z is None else z]))


def turn(part, axis, degrees):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    matrix = {
        "x": [[1, 0, 0], [0, c, -s], [0, s, c]],
        "y": [[c, 0, s], [0, 1, 0], [-s, 0, c]],
        "z": [[c, -s, 0], [s, c, 0], [0, 0, 1]],
    }
    return transform(part, np.array(matrix[axis]))


def mushroom():
    dots = [move(ball(0.09, CREAM), 0.5 * np.cos(a), 0.5 * np.sin(a), 1.05) for a in np.arange(5) * 2 * np.pi / 5]
    cap = move(scale(ball(0.75, lower=-12), 1, 1, 0.75), 0, 0, 0.78)
    return [lathe([(0, 0), (0.26, 0), (0.18, 0.4), (0.2, 0.85)], CREAM), cap, *dots]


def snowman():
    nose = move(turn(rod(0.06, 0.3, BEAK, top=0.005), "x", 90), 0, -0.2, 1.5)
    hat = [move(rod(0.32, 0.05, DARK), 0, 0, 1.68), move(rod(0.2, 0.3, DARK), 0, 0, 1.72)]
    return [move(ball(0.5), 0, 0, 0.45), move(ball(0.38), 0, 0, 1.05), move(ball(0.27), 0, 0, 1.5), nose, *hat]


def house():
    roof = turn(lathe([(1.0, 0.8), (0.0, 1.45)], BROWN, sides=4, smooth=False), "z", 45)
    door = move(block(0.26, 0.06, 0.46, DARK), 0.1, -0.55)
    window = move(block(0.06, 0.3, 0.26, GLASS), 0.55, 0, 0.35)
    return [block(1.1, 1.1, 0.82), roof, door, window]


def car():
    wheel = turn(rod(0.2, 0.14, DARK), "x", 90)
    wheels = [move(wheel, x, y, 0.2) for x in (-0.5, 0.5) for y in (-0.32, 0.46)]
    glass = move(block(0.78, 0.64, 0.22, GLASS), -0.05, 0, 0.58)
    return [move(block(1.6, 0.74, 0.38), 0, 0, 0.2), glass, move(block(0.7, 0.66, 0.06), -0.05, 0, 0.8), *wheels]


def tree():
    cones = [move(rod(r, 0.62, top=0.04), 0, 0, z) for r, z in ((0.68, 0.4), (0.54, 0.8), (0.38, 1.2))]
    return [rod(0.13, 0.5, BROWN), *cones]


def chair():
    legs = [move(block(0.1, 0.1, 0.5), x, y) for x in (-0.32, 0.32) for y in (-0.32, 0.32)]
    return [*legs, move(block(0.78, 0.78, 0.12), 0, 0, 0.48), move(block(0.78, 0.12, 0.85), 0, 0.33, 0.55)]


def table():
    legs = [move(block(0.1, 0.1, 0.66, BROWN), x, y) for x in (-0.55, 0.55) for y in (-0.38, 0.38)]
    return [*legs, move(block(1.4, 1.05, 0.16), 0, 0, 0.66)]


def lamp():
    shade = lathe([(0.52, 1.0), (0.26, 1.62), (0.26, 1.62), (0.0, 1.64)], smooth=False)
    return [rod(0.34, 0.08, DARK), move(rod(0.05, 1.1, GREY), 0, 0, 0.05), shade, rod(0.16, 0.5)]


def rocket():
    body = lathe([(0, 0.25), (0.26, 0.25), (0.34, 0.6), (0.34, 1.0), (0.22, 1.4)])
    fins = [turn(move(block(0.34, 0.06, 0.5, GREY), 0.4), "z", a) for a in (0, 120, 240)]
    return [body, lathe([(0.22, 1.4), (0.12, 1.65), (0.0, 1.8)], CREAM), *fins]


def duck():
    head = [move(ball(0.32), -0.42, 0, 1.0), move(scale(ball(0.14, BEAK), 1.5, 1, 0.45), -0.8, 0, 0.97)]
    eyes = [move(ball(0.06, DARK), -0.62, y, 1.12) for y in (-0.2, 0.2)]
    tail = move(turn(rod(0.18, 0.4, top=0.02), "y", 55), 0.5, 0, 0.55)
    return [move(scale(ball(0.5), 1.4, 1, 0.9), 0, 0, 0.44), *head, *eyes, tail]


def mug():
    inside = lathe([(0.5, 1.1), (0.44, 1.1), (0.44, 0.35), (0.0, 0.35)], CREAM, smooth=False)
    cup = lathe([(0, 0), (0.5, 0), (0.5, 1.1)], smooth=False)
    return [cup, inside, move(turn(ring(0.3, 0.08), "x", 90), 0.56, 0, 0.55)]


def robot():
    legs = [move(block(0.2, 0.24, 0.4, GREY), x) for x in (-0.2, 0.2)]
    arms = [move(block(0.14, 0.16, 0.56, GREY), x, 0, 0.52) for x in (-0.46, 0.46)]
    eyes = [move(ball(0.08, (0.9, 0.85, 0.5)), x, -0.24, 1.4) for x in (-0.12, 0.12)]
    return [*legs, *arms, *eyes, move(block(0.74, 0.46, 0.72), 0, 0, 0.4), move(block(0.5, 0.44, 0.4), 0, 0, 1.18)]


def bottle():
    body = lathe([(0, 0), (0.36, 0), (0.38, 0.1), (0.38, 0.85), (0.3, 1.05), (0.13, 1.2), (0.13, 1.5)])
    return [body, move(rod(0.16, 0.18, DARK), 0, 0, 1.46), move(rod(0.39, 0.36, CREAM), 0, 0, 0.34)]


def boat():
    hull = scale(lathe([(0.0, 0.0), (0.35, 0.03), (0.5, 0.2), (0.56, 0.45), (0.48, 0.42), (0.0, 0.4)]), 1.75, 0.85, 1)
    sail = transform(block(0.75, 0.03, 1.05, (0.8, 0.78, 0.72)), [[1, 0, -0.3], [0, 1, 0], [0, 0, 1]], (0.28, 0, 0.6))
    return [hull, move(rod(0.04, 1.4, BROWN), 0, 0, 0.35), sail]


KINDS: dict[str, Callable] = {
    f.__name__: f
    for f in (mushroom, snowman, house, car, tree, chair, table, lamp, rocket, duck, mug, robot, bottle, boat)
}

# ---------------------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Scene:
    """Everything that decides a render. Angles in degrees, lengths in scene units (an object is about 1.5 high)."""

    seed: int
    index: int
    split: str
    kind: str
    colour: str
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
    others: tuple[tuple[str, str, float, float, float], ...]  # kind, colour, x, y, yaw

    @property
    def id(self) -> str:
        """Sixteen hexadecimal digits, like an Open Images id."""
        return hashlib.sha256(f"studio {self.seed} {self.index}".encode()).hexdigest()[:16]

    def caption(self, light: str | None = None) -> str:
        return f"a {self.colour} {self.kind} on {self.ground}, {LIGHTS[light or self.light].words}"


def split_of(index: int) -> str:
    """11 : 2 : 3 of every sixteen scenes are train, validation and test."""
    return "train" if index % 16 < 11 else "validation" if index % 16 < 13 else "test"


def held_out(kind: str, colour: str, light: str) -> bool:
    """Whether this combination is kept for the test split: one in seven, spread evenly over kinds, colours, lights."""
    return (list(KINDS).index(kind) + 3 * list(COLOURS).index(colour) + 2 * list(LIGHTS).index(light)) % 7 == 0


def scene(index: int, seed: int = 0) -> Scene:
    """The scene of this index: the same on every machine, whatever was rendered before."""
    rng = np.random.default_rng([seed, index])
    split = split_of(index)

    def pick(names):
        return str(rng.choice(list(names)))

    while True:
        kind, colour, light, relight = pick(KINDS), pick(COLOURS), pick(LIGHTS), pick(LIGHTS)
        unseen = held_out(kind, colour, light)
        if relight != light and (unseen if split == "test" else not unseen and not held_out(kind, colour, relight)):
            break
    others = []
    if rng.random() < 1 / 3:
        for _ in range(rng.integers(1, 3)):
            around, away = rng.uniform(0.15, 0.85) * np.pi, rng.uniform(2.0, 4.0)
            others.append(
                (pick(KINDS), pick(COLOURS), away * np.cos(around), away * np.sin(around), rng.uniform(0, 360))
            )
    azimuth = rng.uniform(-25, 25)
    return Scene(
        seed=seed,
        index=index,
        split=split,
        kind=kind,
        colour=colour,
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


# ---------------------------------------------------------------------------------------------------- rendering


@lru_cache
def mitsuba():
    """Mitsuba 3 in its scalar variant, one thread (processes are the parallelism); UserError when not installed."""
    try:
        import drjit
        import mitsuba
    except ImportError as error:
        raise UserError(
            "rendering the studio needs Mitsuba 3: install the extra, pip install -e '.[studio]'"
        ) from error
    mitsuba.set_variant("scalar_rgb")
    drjit.set_thread_count(1)
    mitsuba.set_log_level(mitsuba.LogLevel.Error)
    return mitsuba


@lru_cache
def ground_texture(name: str, side: int = 256) -> np.ndarray:
    """Linear RGB side x side x 3 in [0, 1], tileable: filtered noise, planks, bricks or slabs."""
    rng = np.random.default_rng(list(name.encode()))

    def noise(power):
        frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]) + 1 / side
        field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((side, side))) / frequency**power, (side, side))
        return (field / field.std())[..., None]

    y, x = np.mgrid[:side, :side]
    fine, coarse = noise(0.5), noise(1.3)
    if name == "grass":
        return np.clip(np.array([0.07, 0.17, 0.03]) * np.exp(0.35 * fine + 0.25 * coarse), 0, 1)
    if name == "sand":
        return np.clip(np.array([0.50, 0.36, 0.19]) * np.exp(0.08 * fine + 0.14 * coarse), 0, 1)
    if name == "snow":
        return np.clip(np.array([0.80, 0.83, 0.88]) * np.exp(0.03 * fine + 0.06 * coarse), 0, 1)
    if name == "wood":
        plank = (x // 32)[..., None]
        tone = 1 + 0.25 * np.sin(plank * 12.9898)
        grain = np.roll(fine, 1, 1).mean(0, keepdims=True) + 0.4 * coarse
        return np.clip(
            np.array([0.30, 0.15, 0.06]) * tone * np.exp(0.15 * grain) * np.where(x % 32 < 2, 0.45, 1)[..., None], 0, 1
        )
    if name == "brick":
        joint = ((y % 16 < 2) | ((x + 16 * (y // 16 % 2)) % 32 < 2))[..., None]
        return np.clip(np.where(joint, [0.34, 0.32, 0.30], np.array([0.34, 0.11, 0.07]) * np.exp(0.12 * coarse)), 0, 1)
    joint = ((y % 64 < 3) | (x % 64 < 3))[..., None]
    return np.clip(
        np.where(joint, [0.10, 0.10, 0.10], np.array([0.30, 0.30, 0.31]) * np.exp(0.12 * fine + 0.1 * coarse)), 0, 1
    )


def mesh(part, name: str, bsdf: dict):
    """A Mitsuba mesh from a part."""
    mi = mitsuba()
    vertices, faces, normals, _ = part
    props = mi.Properties()
    props["bsdf"] = mi.load_dict({"type": "twosided", "nested": bsdf})
    shape = mi.Mesh(name, len(vertices), len(faces), props=props, has_vertex_normals=True)
    params = mi.traverse(shape)
    params["vertex_positions"] = np.ascontiguousarray(vertices, np.float32).ravel()
    params["vertex_normals"] = np.ascontiguousarray(normals, np.float32).ravel()
    params["faces"] = np.ascontiguousarray(faces, np.uint32).ravel()
    params.update()
    return shape


def principled(rgb, finish: str = "matte") -> dict:
    roughness, metallic, clearcoat = FINISHES[finish]
    base = {"type": "rgb", "value": list(rgb)}
    return {
        "type": "principled",
        "base_color": base,
        "roughness": roughness,
        "metallic": metallic,
        "clearcoat": clearcoat,
    }


def instance(kind: str, colour: str, finish: str, x: float, y: float, yaw: float, prefix: str) -> dict:
    """Named shapes of one object standing at (x, y)."""
    shapes, paint = {}, (COLOURS | NOVEL)[colour]
    for i, part in enumerate(KINDS[kind]()):
        part = move(turn(part, "z", yaw), x, y)
        bsdf = principled(paint, finish) if part[3] == BODY else principled(part[3])
        shapes[f"{prefix}_{i}"] = mesh(part, f"{prefix}_{i}", bsdf)
    return shapes


def place(s: Scene) -> dict:
    """Ground, backdrop and the objects that belong to the background; no lights, no camera."""
    mi = mitsuba()
    to_world = mi.ScalarTransform4f
    texture = {"type": "bitmap", "bitmap": mi.Bitmap(ground_texture(s.ground).astype(np.float32)), "raw": True}
    texture["to_uv"] = to_world().scale([24, 24, 1])
    diffuse = {"type": "twosided", "bsdf": {"type": "diffuse", "reflectance": texture}}
    shapes = {"ground": {"type": "rectangle", "to_world": to_world().scale([60, 60, 1]), "bsdf": diffuse}}
    if s.backdrop == "wall":
        wall = move(block(80, 0.4, 8), 0, 6.5)
        shapes["backdrop_0"] = mesh(wall, "backdrop_0", principled(s.backdrop_rgb))
    if s.backdrop == "hills":
        rng = np.random.default_rng([s.seed, s.index, 1])
        for i, x in enumerate((-22, -11, 0, 11, 22)):
            hill = move(scale(ball(1.0), 9, 5, rng.uniform(1.5, 4.5)), x + rng.uniform(-4, 4), 26)
            shapes[f"backdrop_{i}"] = mesh(hill, f"backdrop_{i}", principled(s.backdrop_rgb))
    for i, (kind, colour, x, y, yaw) in enumerate(s.others):
        shapes |= instance(kind, colour, "matte", x, y, yaw, f"other{i}")
    return shapes


def lights(s: Scene, name: str) -> dict:
    light = LIGHTS[name]
    azimuth, elevation = np.radians(s.sun), np.radians(light.elevation)
    towards = -np.array([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)])
    sun = {
        "type": "directional",
        "direction": towards.tolist(),
        "irradiance": {"type": "rgb", "value": list(light.sun)},
    }
    return {"sun": sun, "sky": {"type": "constant", "radiance": {"type": "rgb", "value": list(light.sky)}}}


def sensor(s: Scene, size: int, samples: int) -> dict:
    mi = mitsuba()
    azimuth, elevation, distance = np.radians(s.camera[0] - 90), np.radians(s.camera[1]), s.camera[2]
    toward = np.array([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)])
    origin = np.array(s.aim) + distance * toward
    film = {"type": "hdrfilm", "width": size, "height": size, "rfilter": {"type": "box"}}
    view = mi.ScalarTransform4f().look_at(origin=origin.tolist(), target=list(s.aim), up=[0, 0, 1])
    sampler = {"type": "independent", "sample_count": samples}
    return {"type": "perspective", "fov": 32, "to_world": view, "film": film, "sampler": sampler}


def tone_map(radiance: np.ndarray) -> np.ndarray:
    """Linear radiance to uint8 sRGB with a soft shoulder: 1 - exp(-1.35 L), then the usual gamma."""
    display = 1 - np.exp(-1.35 * np.maximum(np.nan_to_num(radiance[..., :3]), 0))
    return np.round(255 * np.where(display < 0.0031308, 12.92 * display, 1.055 * display ** (1 / 2.4) - 0.055)).astype(
        np.uint8
    )


@dataclass(frozen=True)
class Frames:
    """uint8 H x W x 3 pictures and bool H x W masks of one scene; None where ``plate=False`` left them out."""

    image: np.ndarray
    relit: np.ndarray
    mask: np.ndarray
    plate: np.ndarray | None = None
    shadow: np.ndarray | None = None


def render(s: Scene, size: int = 128, samples: int = 32, plate: bool = True) -> Frames:
    """All frames of a scene. The same sampler seed for every frame keeps the noise of image and plate correlated."""
    mi = mitsuba()
    background = place(s)
    shapes = background | instance(s.kind, s.colour, s.finish, 0, 0, s.yaw, "object")
    path = {"type": "path", "max_depth": 3}

    def frame(contents, light, integrator=path, pixels=size, spp=samples):
        world = {"type": "scene", "integrator": integrator, "sensor": sensor(s, pixels, spp)}
        return mi.load_dict(world | contents | lights(s, light))

    def picture(world):
        return np.array(mi.render(world, seed=s.index))

    image = picture(frame(shapes, s.light))
    relit = picture(frame(shapes, s.relight))
    world = frame(shapes, s.light, {"type": "aov", "aovs": "shape:shape_index"}, pixels=2 * size, spp=1)
    ours = [i for i, shape in enumerate(world.shapes(), 1) if shape.id().startswith("object_")]
    index = picture(world)[..., -1].round().astype(int)
    mask = np.isin(index, ours).reshape(size, 2, size, 2).mean((1, 3)) >= 0.5
    if not plate:
        return Frames(tone_map(image), tone_map(relit), mask)
    empty = picture(frame(background, s.light))
    luminance = np.array([0.2126, 0.7152, 0.0722])
    darker = (image[..., :3] @ luminance + 1e-4) / (empty[..., :3] @ luminance + 1e-4) < 0.82
    shadow = open_small(darker & ~dilate(mask, 1))
    return Frames(tone_map(image), tone_map(relit), mask, tone_map(empty), shadow)


def open_small(mask: np.ndarray) -> np.ndarray:
    """Morphological opening by 3 x 3: single noisy pixels are no shadow."""
    import cv2

    return cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8)).astype(bool)


# ---------------------------------------------------------------------------------------------------- files


def mid(kind: str) -> str:
    return f"/m/{kind}"


def box_id(s: Scene) -> str:
    return hashlib.sha256(f"box {s.id}".encode()).hexdigest()[:8]


def mask_name(s: Scene) -> str:
    return f"{s.id}_{mid(s.kind).replace('/', '')}_{box_id(s)}.png"


def files(s: Scene, root: Path) -> dict[str, Path]:
    """Where the frames of a scene lie. ``image`` is written last: when it is there, the scene is complete."""
    folder = root / s.split
    return {
        "relit": folder / "relit" / f"{s.id}.jpg",
        "plate": folder / "plates" / f"{s.id}.jpg",
        "shadow": folder / "shadows" / f"{s.id}.png",
        "mask": folder / "labels" / "masks" / s.id[0].upper() / mask_name(s),
        "image": folder / "data" / f"{s.id}.jpg",
    }


def render_to(job: tuple[Scene, Path, int, int, bool]) -> Scene:
    """Render one scene into the dataset folder."""
    s, root, size, samples, plate = job
    frames = render(s, size, samples, plate)
    for name, path in files(s, root).items():
        picture = getattr(frames, name)
        if picture is None:
            continue
        save(path, picture)
    return s


def save(path: Path, picture: np.ndarray) -> None:
    """Write a frame, uint8 H x W x 3 or a bool mask, into a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, picture, **({"quality": JPEG_QUALITY, "optimize": True} if path.suffix == ".jpg" else {}))


def write_table(path: Path, header: Iterable[str] | None, rows: Iterable[Iterable]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_labels(scenes: list[Scene], root: Path) -> None:
    """The annotation files of Open Images V7, human_captions.json (light A, then light B) and scenes.csv of a split."""
    import cv2

    detections, segmentations, table, captions = [], [], [], {}
    for s in scenes:
        mask = cv2.imread(str(files(s, root)["mask"]), cv2.IMREAD_GRAYSCALE) > 122
        if not mask.any():
            continue
        x0, y0, x1, y1 = bounding_box(mask)
        height, width = mask.shape
        cut = int(x0 == 0 or y0 == 0 or x1 == width or y1 == height)
        box = [f"{v:.6f}" for v in (x0 / width, x1 / width, y0 / height, y1 / height)]
        detections.append([s.id, "xclick", mid(s.kind), 1, *box, 0, cut, 0, 0, 0])
        segmentations.append(
            [mask_name(s), s.id, mid(s.kind), box_id(s), box[0], box[1], box[2], box[3], "0.00000", ""]
        )
        table.append([s.id, s.index, s.kind, s.colour, s.finish, s.ground, s.light, s.relight])
        captions[s.id] = [s.caption(), s.caption(s.relight)]
    folder = root / scenes[0].split
    columns = (
        "ImageID Source LabelName Confidence XMin XMax YMin YMax IsOccluded IsTruncated IsGroupOf IsDepiction IsInside"
    )
    write_table(folder / "labels" / "detections.csv", columns.split(), detections)
    columns = "MaskPath ImageID LabelName BoxID BoxXMin BoxXMax BoxYMin BoxYMax PredictedIoU Clicks"
    write_table(folder / "labels" / "segmentations.csv", columns.split(), segmentations)
    write_table(folder / "metadata" / "classes.csv", None, [(mid(k), k.capitalize()) for k in sorted(KINDS)])
    write_table(folder / "metadata" / "segmentation_classes.csv", None, [(mid(k),) for k in sorted(KINDS)])
    write_table(folder / "metadata" / "image_ids.csv", ["ImageID"], [(s.id,) for s in scenes])
    columns = "ImageID index kind colour finish ground light relight"
    write_table(folder / "metadata" / "scenes.csv", columns.split(), table)
    hierarchy = {"LabelName": "Entity", "Subcategory": [{"LabelName": k.capitalize()} for k in sorted(KINDS)]}
    write_text(folder / "metadata" / "hierarchy.json", json.dumps(hierarchy) + "\n")
    write_text(folder / "metadata" / "human_captions.json", json.dumps(captions, indent=0) + "\n")


def generate(
    root: Path,
    count: int,
    size: int = 128,
    samples: int = 32,
    seed: int = 0,
    start: int = 0,
    splits: tuple[str, ...] = ("train", "validation", "test"),
    plate: bool = True,
    workers: int | None = None,
) -> Path:
    """Render scenes ``start .. start + count - 1`` of the wanted splits into ``root``; finished scenes are not redone.

    ``size`` in pixels, ``samples`` per pixel; ``plate=False`` leaves out plate and shadow (enough to train a kit).
    """
    root = Path(root)
    scenes = [s for s in (scene(i, seed) for i in range(start, start + count)) if s.split in splits]
    todo = [s for s in scenes if not files(s, root)["image"].exists()]
    began = time.monotonic()
    if todo:
        mitsuba()
        jobs = [(s, root, size, samples, plate) for s in todo]
        with worker_pool(workers or os.cpu_count()) as pool:
            for done, _ in enumerate(pool.imap_unordered(render_to, jobs, chunksize=4), 1):
                if done % 50 == 0 or done == len(todo):
                    rate = done / (time.monotonic() - began)
                    left = (len(todo) - done) / rate
                    print(f"studio: {done}/{len(todo)} scenes, {rate:.1f} a second, {left:.0f} s left", flush=True)
    for split in splits:
        if members := [s for s in scenes if s.split == split]:
            write_labels(members, root)
    return root
