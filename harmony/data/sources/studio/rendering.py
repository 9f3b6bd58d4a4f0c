"""Renders of scenes by Mitsuba 3. The only file that imports ``mitsuba``."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from harmony.core.errors import UserError
from harmony.data.sources.studio.scenes import COLORS, FINISHES, LIGHTS, NOVEL, Scene
from harmony.data.sources.studio.shapes import BODY, KINDS, Part, ball, block, move, scale, turn
from harmony.pixels.images import write_image
from harmony.pixels.masks import dilate

if TYPE_CHECKING:
    from mitsuba import Mesh
    from mitsuba import Scene as World

JPEG_QUALITY = 90  # keeps the bundled set under 12 MB


@lru_cache
def mitsuba() -> ModuleType:
    """Load Mitsuba 3 in its scalar variant on one thread, because scenes run in parallel. UserError without it."""
    try:
        import drjit
        import mitsuba
    except ImportError as error:
        message = "rendering the studio needs Mitsuba 3: make install in a clone, or pip install 'mitsuba>=3.9,<4'"
        raise UserError(message) from error
    mitsuba.set_variant("scalar_rgb")
    drjit.set_thread_count(1)
    mitsuba.set_log_level(mitsuba.LogLevel.Error)
    return mitsuba


@lru_cache
def ground_texture(name: str, side: int = 256) -> np.ndarray:
    """Linear RGB side x side x 3 in [0, 1], tileable: filtered noise, planks, bricks or slabs."""
    rng = np.random.default_rng(list(name.encode()))

    def noise(power: float) -> np.ndarray:
        frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]) + 1 / side
        field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((side, side))) / frequency**power, (side, side))
        return (field / field.std())[..., None]

    y, x = np.mgrid[:side, :side]
    fine_noise, coarse_noise = noise(0.5), noise(1.3)
    if name == "grass":
        return np.clip(np.array([0.07, 0.17, 0.03]) * np.exp(0.35 * fine_noise + 0.25 * coarse_noise), 0, 1)
    if name == "sand":
        return np.clip(np.array([0.50, 0.36, 0.19]) * np.exp(0.08 * fine_noise + 0.14 * coarse_noise), 0, 1)
    if name == "snow":
        return np.clip(np.array([0.80, 0.83, 0.88]) * np.exp(0.03 * fine_noise + 0.06 * coarse_noise), 0, 1)
    if name == "wood":
        plank = (x // 32)[..., None]
        tone = 1 + 0.25 * np.sin(plank * 12.9898)
        grain = np.roll(fine_noise, 1, 1).mean(0, keepdims=True) + 0.4 * coarse_noise
        return np.clip(
            np.array([0.30, 0.15, 0.06]) * tone * np.exp(0.15 * grain) * np.where(x % 32 < 2, 0.45, 1)[..., None], 0, 1
        )
    if name == "brick":
        joint = ((y % 16 < 2) | ((x + 16 * (y // 16 % 2)) % 32 < 2))[..., None]
        return np.clip(
            np.where(joint, [0.34, 0.32, 0.30], np.array([0.34, 0.11, 0.07]) * np.exp(0.12 * coarse_noise)), 0, 1
        )
    joint = ((y % 64 < 3) | (x % 64 < 3))[..., None]
    return np.clip(
        np.where(
            joint, [0.10, 0.10, 0.10], np.array([0.30, 0.30, 0.31]) * np.exp(0.12 * fine_noise + 0.1 * coarse_noise)
        ),
        0,
        1,
    )


def build_mesh(part: Part, name: str, bsdf: dict) -> "Mesh":
    """Build a Mitsuba mesh from a part."""
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


def principled_bsdf(rgb: Sequence[float], finish: str = "matte") -> dict:
    """Mitsuba's principled BSDF of a color and finish."""
    roughness, metallic, clearcoat = FINISHES[finish]
    base = {"type": "rgb", "value": list(rgb)}
    return {
        "type": "principled",
        "base_color": base,
        "roughness": roughness,
        "metallic": metallic,
        "clearcoat": clearcoat,
    }


def instance(kind: str, color: str, finish: str, x: float, y: float, yaw: float, prefix: str) -> dict:
    """The named shapes of one object that stands at (x, y)."""
    shapes, paint = {}, (COLORS | NOVEL)[color]
    for i, part in enumerate(KINDS[kind]()):
        part = move(turn(part, "z", yaw), x, y)
        bsdf = principled_bsdf(paint, finish) if part[3] == BODY else principled_bsdf(part[3])
        shapes[f"{prefix}_{i}"] = build_mesh(part, f"{prefix}_{i}", bsdf)
    return shapes


def background_shapes(s: Scene) -> dict:
    """Ground, backdrop and the objects that belong to the background; no lights, no camera."""
    mi = mitsuba()
    to_world = mi.ScalarTransform4f
    texture = {"type": "bitmap", "bitmap": mi.Bitmap(ground_texture(s.ground).astype(np.float32)), "raw": True}
    texture["to_uv"] = to_world().scale([24, 24, 1])
    diffuse = {"type": "twosided", "bsdf": {"type": "diffuse", "reflectance": texture}}
    shapes = {"ground": {"type": "rectangle", "to_world": to_world().scale([60, 60, 1]), "bsdf": diffuse}}
    if s.backdrop == "wall":
        wall = move(block(80, 0.4, 8), 0, 6.5)
        shapes["backdrop_0"] = build_mesh(wall, "backdrop_0", principled_bsdf(s.backdrop_rgb))
    if s.backdrop == "hills":
        rng = np.random.default_rng([s.seed, s.index, 1])
        for i, x in enumerate((-22, -11, 0, 11, 22)):
            hill = move(scale(ball(1.0), 9, 5, rng.uniform(1.5, 4.5)), x + rng.uniform(-4, 4), 26)
            shapes[f"backdrop_{i}"] = build_mesh(hill, f"backdrop_{i}", principled_bsdf(s.backdrop_rgb))
    for i, (kind, color, x, y, yaw) in enumerate(s.others):
        shapes |= instance(kind, color, "matte", x, y, yaw, f"other{i}")
    return shapes


def lights(s: Scene, name: str) -> dict:
    """Sun and sky of the light ``name`` in a scene."""
    light = LIGHTS[name]
    azimuth, elevation = np.radians(s.sun), np.radians(light.elevation)
    direction = -np.array([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)])
    sun = {
        "type": "directional",
        "direction": direction.tolist(),
        "irradiance": {"type": "rgb", "value": list(light.sun)},
    }
    return {"sun": sun, "sky": {"type": "constant", "radiance": {"type": "rgb", "value": list(light.sky)}}}


def sensor(s: Scene, size: int, samples: int) -> dict:
    """The camera of a scene."""
    mi = mitsuba()
    azimuth, elevation, distance = np.radians(s.camera[0] - 90), np.radians(s.camera[1]), s.camera[2]
    direction = np.array([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)])
    origin = np.array(s.aim) + distance * direction
    film = {"type": "hdrfilm", "width": size, "height": size, "rfilter": {"type": "box"}}
    view = mi.ScalarTransform4f().look_at(origin=origin.tolist(), target=list(s.aim), up=[0, 0, 1])
    sampler = {"type": "independent", "sample_count": samples}
    return {"type": "perspective", "fov": 32, "to_world": view, "film": film, "sampler": sampler}


def tone_map(radiance: np.ndarray) -> np.ndarray:
    """Convert linear radiance to uint8 sRGB with a soft shoulder: 1 - exp(-1.35 L), then the sRGB gamma."""
    display = 1 - np.exp(-1.35 * np.maximum(np.nan_to_num(radiance[..., :3]), 0))
    return np.round(255 * np.where(display < 0.0031308, 12.92 * display, 1.055 * display ** (1 / 2.4) - 0.055)).astype(
        np.uint8
    )


@dataclass(frozen=True)
class Frames:
    """The frames of one scene: pictures uint8 H x W x 3, masks bool H x W; None if not rendered (``plate=False``)."""

    image: np.ndarray
    relit: np.ndarray
    mask: np.ndarray
    plate: np.ndarray | None = None
    shadow: np.ndarray | None = None


def render(s: Scene, size: int = 128, samples: int = 32, plate: bool = True) -> Frames:
    """Render all frames of a scene, with one sampler seed, so that the noise of image and plate is correlated."""
    mi = mitsuba()
    background = background_shapes(s)
    shapes = background | instance(s.kind, s.color, s.finish, 0, 0, s.yaw, "object")
    path = {"type": "path", "max_depth": 3}

    def frame(contents: dict, light: str, integrator: dict = path, pixels: int = size, spp: int = samples) -> "World":
        world = {"type": "scene", "integrator": integrator, "sensor": sensor(s, pixels, spp)}
        return mi.load_dict(world | contents | lights(s, light))

    def picture(world: "World") -> np.ndarray:
        return np.array(mi.render(world, seed=s.index))

    image = picture(frame(shapes, s.light))
    relit = picture(frame(shapes, s.relight))
    world = frame(shapes, s.light, {"type": "aov", "aovs": "shape:shape_index"}, pixels=2 * size, spp=1)
    parts = [i for i, shape in enumerate(world.shapes(), 1) if shape.id().startswith("object_")]
    index = picture(world)[..., -1].round().astype(int)
    mask = np.isin(index, parts).reshape(size, 2, size, 2).mean((1, 3)) >= 0.5
    if not plate:
        return Frames(tone_map(image), tone_map(relit), mask)
    empty_scene = picture(frame(background, s.light))
    luminance = np.array([0.2126, 0.7152, 0.0722])
    is_darker = (image[..., :3] @ luminance + 1e-4) / (empty_scene[..., :3] @ luminance + 1e-4) < 0.82
    shadow = open_small(is_darker & ~dilate(mask, 1))
    return Frames(tone_map(image), tone_map(relit), mask, tone_map(empty_scene), shadow)


def open_small(mask: np.ndarray) -> np.ndarray:
    """Morphological opening by 3 x 3, which removes single noisy pixels from the shadow."""
    import cv2

    return cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8)).astype(bool)


def save(path: Path, picture: np.ndarray) -> None:
    """Write a frame, uint8 H x W x 3 or a bool mask, and create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, picture, **({"quality": JPEG_QUALITY, "optimize": True} if path.suffix == ".jpg" else {}))
