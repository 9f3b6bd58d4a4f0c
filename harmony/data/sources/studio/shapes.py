"""The objects of the studio as triangle meshes.

A part is (vertices N x 3, faces M x 3, normals N x 3, material); z is up, objects stand on z = 0.
"""

from collections.abc import Callable, Sequence

import numpy as np

Material = str | tuple[float, float, float]
Part = tuple[np.ndarray, np.ndarray, np.ndarray, Material]

BODY = "body"  # the material that carries the scene's color and finish; every other material is a fixed linear RGB
DARK, GRAY, CREAM = (0.03, 0.03, 0.035), (0.30, 0.30, 0.32), (0.72, 0.62, 0.46)
BROWN, BEAK, GLASS = (0.16, 0.08, 0.035), (0.85, 0.33, 0.03), (0.10, 0.14, 0.18)


def lathe(
    profile: Sequence[tuple[float, float]] | np.ndarray, material: Material = BODY, sides: int = 28, smooth: bool = True
) -> Part:
    """Surface of revolution of a polyline of (radius, height), from bottom to top. Repeat a point for a sharp edge."""
    profile = np.asarray(profile, float)
    angle = np.linspace(0, 2 * np.pi, sides + 1)
    ring = np.stack([np.cos(angle), np.sin(angle)], 1)
    tangent = np.gradient(profile, axis=0)
    if not smooth:  # every segment gets its own vertices and so its own normal
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


def ball(radius: float = 1.0, material: Material = BODY, lower: float = -90, upper: float = 90) -> Part:
    """Sphere around the origin between two latitudes in degrees."""
    angle = np.radians(np.linspace(lower, upper, 14))
    return lathe(np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1), material)


def rod(radius: float, height: float, material: Material = BODY, top: float | None = None) -> Part:
    """Closed cylinder from z = 0, or a frustum with another top radius."""
    top = radius if top is None else top
    return lathe([(0, 0), (radius, 0), (top, height), (0, height)], material, smooth=False)


def block(x: float, y: float, z: float, material: Material = BODY) -> Part:
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


def ring(radius: float, thickness: float, material: Material = BODY) -> Part:
    """Torus around the z axis, centered on the origin."""
    angle = np.linspace(0, 2 * np.pi, 13)
    return lathe(np.stack([radius + thickness * np.cos(angle), thickness * np.sin(angle)], 1), material)


def transform(part: Part, matrix: np.ndarray | Sequence, offset: tuple[float, float, float] = (0, 0, 0)) -> Part:
    """Transform a part by a linear map and a shift; normals by the inverse transpose."""
    vertices, faces, normals, material = part
    normals = normals @ np.linalg.inv(matrix)
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)
    return vertices @ np.asarray(matrix).T + offset, faces, normals, material


def move(part: Part, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> Part:
    """Move a part."""
    return transform(part, np.eye(3), (x, y, z))


def scale(part: Part, x: float, y: float | None = None, z: float | None = None) -> Part:
    """Scale a part; ``y`` and ``z`` default to ``x``."""
    return transform(part, np.diag([x, x if y is None else y, x if z is None else z]))


def turn(part: Part, axis: str, degrees: float) -> Part:
    """Rotate a part around an axis."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    matrix = {
        "x": [[1, 0, 0], [0, c, -s], [0, s, c]],
        "y": [[c, 0, s], [0, 1, 0], [-s, 0, c]],
        "z": [[c, -s, 0], [s, c, 0], [0, 0, 1]],
    }
    return transform(part, np.array(matrix[axis]))


def mushroom() -> list[Part]:
    dots = [move(ball(0.09, CREAM), 0.5 * np.cos(a), 0.5 * np.sin(a), 1.05) for a in np.arange(5) * 2 * np.pi / 5]
    cap = move(scale(ball(0.75, lower=-12), 1, 1, 0.75), 0, 0, 0.78)
    return [lathe([(0, 0), (0.26, 0), (0.18, 0.4), (0.2, 0.85)], CREAM), cap, *dots]


def snowman() -> list[Part]:
    nose = move(turn(rod(0.06, 0.3, BEAK, top=0.005), "x", 90), 0, -0.2, 1.5)
    hat = [move(rod(0.32, 0.05, DARK), 0, 0, 1.68), move(rod(0.2, 0.3, DARK), 0, 0, 1.72)]
    return [move(ball(0.5), 0, 0, 0.45), move(ball(0.38), 0, 0, 1.05), move(ball(0.27), 0, 0, 1.5), nose, *hat]


def house() -> list[Part]:
    roof = turn(lathe([(1.0, 0.8), (0.0, 1.45)], BROWN, sides=4, smooth=False), "z", 45)
    door = move(block(0.26, 0.06, 0.46, DARK), 0.1, -0.55)
    window = move(block(0.06, 0.3, 0.26, GLASS), 0.55, 0, 0.35)
    return [block(1.1, 1.1, 0.82), roof, door, window]


def car() -> list[Part]:
    wheel = turn(rod(0.2, 0.14, DARK), "x", 90)
    wheels = [move(wheel, x, y, 0.2) for x in (-0.5, 0.5) for y in (-0.32, 0.46)]
    glass = move(block(0.78, 0.64, 0.22, GLASS), -0.05, 0, 0.58)
    return [move(block(1.6, 0.74, 0.38), 0, 0, 0.2), glass, move(block(0.7, 0.66, 0.06), -0.05, 0, 0.8), *wheels]


def tree() -> list[Part]:
    cones = [move(rod(r, 0.62, top=0.04), 0, 0, z) for r, z in ((0.68, 0.4), (0.54, 0.8), (0.38, 1.2))]
    return [rod(0.13, 0.5, BROWN), *cones]


def chair() -> list[Part]:
    legs = [move(block(0.1, 0.1, 0.5), x, y) for x in (-0.32, 0.32) for y in (-0.32, 0.32)]
    return [*legs, move(block(0.78, 0.78, 0.12), 0, 0, 0.48), move(block(0.78, 0.12, 0.85), 0, 0.33, 0.55)]


def table() -> list[Part]:
    legs = [move(block(0.1, 0.1, 0.66, BROWN), x, y) for x in (-0.55, 0.55) for y in (-0.38, 0.38)]
    return [*legs, move(block(1.4, 1.05, 0.16), 0, 0, 0.66)]


def lamp() -> list[Part]:
    shade = lathe([(0.52, 1.0), (0.26, 1.62), (0.26, 1.62), (0.0, 1.64)], smooth=False)
    return [rod(0.34, 0.08, DARK), move(rod(0.05, 1.1, GRAY), 0, 0, 0.05), shade, rod(0.16, 0.5)]


def rocket() -> list[Part]:
    body = lathe([(0, 0.25), (0.26, 0.25), (0.34, 0.6), (0.34, 1.0), (0.22, 1.4)])
    fins = [turn(move(block(0.34, 0.06, 0.5, GRAY), 0.4), "z", a) for a in (0, 120, 240)]
    return [body, lathe([(0.22, 1.4), (0.12, 1.65), (0.0, 1.8)], CREAM), *fins]


def duck() -> list[Part]:
    head = [move(ball(0.32), -0.42, 0, 1.0), move(scale(ball(0.14, BEAK), 1.5, 1, 0.45), -0.8, 0, 0.97)]
    eyes = [move(ball(0.06, DARK), -0.62, y, 1.12) for y in (-0.2, 0.2)]
    tail = move(turn(rod(0.18, 0.4, top=0.02), "y", 55), 0.5, 0, 0.55)
    return [move(scale(ball(0.5), 1.4, 1, 0.9), 0, 0, 0.44), *head, *eyes, tail]


def mug() -> list[Part]:
    inside = lathe([(0.5, 1.1), (0.44, 1.1), (0.44, 0.35), (0.0, 0.35)], CREAM, smooth=False)
    cup = lathe([(0, 0), (0.5, 0), (0.5, 1.1)], smooth=False)
    return [cup, inside, move(turn(ring(0.3, 0.08), "x", 90), 0.56, 0, 0.55)]


def robot() -> list[Part]:
    legs = [move(block(0.2, 0.24, 0.4, GRAY), x) for x in (-0.2, 0.2)]
    arms = [move(block(0.14, 0.16, 0.56, GRAY), x, 0, 0.52) for x in (-0.46, 0.46)]
    eyes = [move(ball(0.08, (0.9, 0.85, 0.5)), x, -0.24, 1.4) for x in (-0.12, 0.12)]
    return [*legs, *arms, *eyes, move(block(0.74, 0.46, 0.72), 0, 0, 0.4), move(block(0.5, 0.44, 0.4), 0, 0, 1.18)]


def bottle() -> list[Part]:
    body = lathe([(0, 0), (0.36, 0), (0.38, 0.1), (0.38, 0.85), (0.3, 1.05), (0.13, 1.2), (0.13, 1.5)])
    return [body, move(rod(0.16, 0.18, DARK), 0, 0, 1.46), move(rod(0.39, 0.36, CREAM), 0, 0, 0.34)]


def boat() -> list[Part]:
    hull = scale(lathe([(0.0, 0.0), (0.35, 0.03), (0.5, 0.2), (0.56, 0.45), (0.48, 0.42), (0.0, 0.4)]), 1.75, 0.85, 1)
    sail = transform(block(0.75, 0.03, 1.05, (0.8, 0.78, 0.72)), [[1, 0, -0.3], [0, 1, 0], [0, 0, 1]], (0.28, 0, 0.6))
    return [hull, move(rod(0.04, 1.4, BROWN), 0, 0, 0.35), sail]


KINDS: dict[str, Callable[[], list[Part]]] = {
    f.__name__: f
    for f in (mushroom, snowman, house, car, tree, chair, table, lamp, rocket, duck, mug, robot, bottle, boat)
}
