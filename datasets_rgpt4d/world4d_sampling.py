"""Draw World4D scenes from integer seeds, and decide which combinations of shape, colour and motion each split may
show.

Times, speeds and sizes come from short grids, so that answers form a small vocabulary and are exact as written.
Duration and distance travelled are drawn independently of each other: how fast something moves cannot be told without
knowing how long the clip is.
"""

import math

import numpy as np

from .world4d_render import instance_masks
from .world4d_scene import CAMERA_MOTIONS, COLORS, MOTIONS, SHAPES, Camera, Room, Scene, SceneObject

SIZES_M = (0.4, 0.6, 0.8, 1.2, 1.6)
# Speeds in m/s and accelerations in m/s^2: 0.1 and 0.15 times powers of two.
RATES = tuple(round(rate * 2.0**octave, 9) for octave in range(-5, 6) for rate in (0.1, 0.15))
PATH_M = (0.6, 3.0)  # what a moving object may travel in a clip
TURNS_DEG = (90, 180, 270, 360)  # what a spinning object may turn in a clip
CAMERA_PATH_M = (0.4, 0.8, 1.2)
CAMERA_TURN_DEG = (10, 20)
# Clockwise from the camera's first heading.
DIRECTIONS_DEG = {"away from the camera": 0, "right": 90, "towards the camera": 180, "left": 270}
DIRECTION_JITTER_DEG = (-10, 0, 10)

SPLITS = ("train", "validation", "test")
GAP_M = 0.15  # between two objects, at all times
CHECK_SIZE_PX, CHECK_TIMES = 48, 5
MIN_FIRST_AREA_PX, MIN_LATER_AREA_PX = 20, 10  # of CHECK_SIZE_PX ** 2; later: in all but one of the checked frames
MAX_ATTEMPTS = 500


def combinations(split: str) -> tuple[tuple[str, str, str], ...]:
    """The (shape, colour, motion) triples that objects of `split` may have.

    One triple in five is held out for `test`, which shows no other; `train` and `validation` share the rest. A Latin
    square chooses them: each shape and colour meets exactly one held-out motion, so every shape, colour and motion
    alone, and every pair of shape and colour, is seen in training, and the test asks for what was never seen together.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}.")
    return tuple(
        (shape, color, motion)
        for i, shape in enumerate(SHAPES)
        for j, color in enumerate(COLORS)
        for k, motion in enumerate(MOTIONS)
        if ((i + j + k) % len(MOTIONS) == 0) == (split == "test")
    )


def _pick(rng: np.random.Generator, options, weights=None):
    """One of `options`, drawn through `random()` alone, whose stream numpy keeps stable."""
    if weights is None:
        return options[int(rng.random() * len(options))]
    edges = np.cumsum(weights)
    return options[int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))]


def draw_rate(rng: np.random.Generator, accelerates: bool, duration_s: float) -> tuple[float, float]:
    """Speed (m/s), or acceleration from rest (m/s^2), and the path in metres that it gives in `duration_s`."""
    # An accelerating object starts from rest and never turns back: path = a T^2 / 2.
    reach = duration_s**2 / 2 if accelerates else duration_s
    rate = _pick(rng, [rate for rate in RATES if PATH_M[0] - 1e-9 <= rate * reach <= PATH_M[1] + 1e-9])
    return rate, rate * reach


def draw_size(rng: np.random.Generator, shape: str) -> tuple[float, float, float]:
    """Width, height and length of an object in metres."""
    width = _pick(rng, SIZES_M[1:4])
    if shape == "sphere":
        return (width, width, width)
    if shape == "cylinder":
        return (width, _pick(rng, SIZES_M), width)
    return (width, _pick(rng, SIZES_M), _pick(rng, SIZES_M[1:4]))


def draw_place(rng: np.random.Generator) -> tuple[float, float]:
    """Where an object stands on the floor before the camera: how far to its right, and how far ahead, in metres."""
    depth = rng.uniform(2.8, 7.0)
    return rng.uniform(-0.42, 0.42) * depth, depth


def _sample_camera(rng: np.random.Generator, duration_s: float) -> Camera:
    motion = _pick(rng, CAMERA_MOTIONS, (4, 2, 2, 2))
    yaw = float(_pick(rng, range(-20, 25, 5)))
    velocity, yaw_rate = (0.0, 0.0, 0.0), 0.0
    if "translate" in motion:
        heading, path = math.radians(yaw + _pick(rng, (0, 90, 180, 270))), _pick(rng, CAMERA_PATH_M)
        velocity = (
            round(math.sin(heading), 9) * path / duration_s,
            0.0,
            round(math.cos(heading), 9) * path / duration_s,
        )
    if "pan" in motion:
        yaw_rate = _pick(rng, (-1, 1)) * _pick(rng, CAMERA_TURN_DEG) / duration_s
    return Camera(
        1.0, (0.0, -_pick(rng, (1.4, 1.6, 1.8)), 0.0), yaw, float(_pick(rng, (8, 10, 12))), velocity, yaw_rate
    )


def _sample_object(
    rng: np.random.Generator, combination: tuple[str, str, str], camera: Camera, duration_s: float
) -> SceneObject:
    shape, color, motion = combination
    size = draw_size(rng, shape)
    lateral, depth = draw_place(rng)
    yaw = math.radians(camera.yaw_deg)
    x, z = (lateral * math.cos(yaw) + depth * math.sin(yaw), -lateral * math.sin(yaw) + depth * math.cos(yaw))
    velocity = acceleration = (0.0, 0.0, 0.0)
    if motion in ("translate", "translate_spin", "accelerate"):
        heading = math.radians(
            camera.yaw_deg + _pick(rng, tuple(DIRECTIONS_DEG.values())) + _pick(rng, DIRECTION_JITTER_DEG)
        )
        direction = (round(math.sin(heading), 9), 0.0, round(math.cos(heading), 9))
        rate, _ = draw_rate(rng, motion == "accelerate", duration_s)
        vector = tuple(rate * component for component in direction)
        velocity, acceleration = (velocity, vector) if motion == "accelerate" else (vector, acceleration)
    turn = _pick(rng, (-1, 1)) * _pick(rng, TURNS_DEG) / duration_s if "spin" in motion else 0.0
    position = (round(x, 3), -size[1] / 2, round(z, 3))
    return SceneObject(
        shape,
        color,
        size,
        position,
        float(_pick(rng, range(0, 360, 15))),
        velocity,
        acceleration,
        turn,
        int(rng.random() * 2**31),
    )


def _fits(item: SceneObject, others: list[SceneObject], camera: Camera, room: Room, duration_s: float) -> bool:
    """In view and clear of the camera, the walls and the other objects throughout (33 times; the gap covers what
    happens between them).
    """
    times = np.linspace(0, duration_s, 33)
    centres = item.position_at(times)
    rotation, origin = camera.pose(times)
    seen = np.einsum("nji,nj->ni", rotation, centres - origin)
    radius = item.footprint_radius
    lower, upper = room.bounds
    if seen[:, 2].min() < 1.6 + radius or (np.abs(seen[:, 0]) + 0.5 * radius > 0.5 * seen[:, 2] / camera.focal).any():
        return False
    if (centres[:, [0, 2]] - radius < lower[[0, 2]]).any() or (centres[:, [0, 2]] + radius > upper[[0, 2]]).any():
        return False
    for other in others:
        apart = np.hypot(*(centres - other.position_at(times))[:, [0, 2]].T)
        if apart.min() < radius + other.footprint_radius + GAP_M:
            return False
    return True


def _is_seen(scene: Scene) -> bool:
    """Every object is well in view in the first frame and in most of the clip, and not mostly hidden behind another one
    at the start.
    """
    masks = instance_masks(scene, np.linspace(0, scene.duration_s, CHECK_TIMES), CHECK_SIZE_PX)
    for k, item in enumerate(scene.objects):
        areas = (masks == k).sum((1, 2))
        distance = np.linalg.norm(np.array(item.position) - scene.camera.position)
        silhouette = (
            item.size[1] * min(item.size[0], item.size[2]) * (CHECK_SIZE_PX * scene.camera.focal / distance) ** 2
        )
        if areas[0] < max(MIN_FIRST_AREA_PX, 0.45 * silhouette) or np.sort(areas)[1] < MIN_LATER_AREA_PX:
            return False
    return True


def sample_scene(seed: int, split: str, durations_s: tuple[float, ...], fps: tuple[int, ...]) -> Scene:
    """Draw a scene: one to six objects with different names, all in view in the first frame.

    Args:
        seed: any non-negative integer; the scene is a function of the four arguments alone.
        split: decides which `combinations` may appear.
        durations_s, fps: grids to draw from; only pairs that give a whole number of frame intervals are used.
    Raises: `ValueError` if no pair fits, or the split is unknown.
    """
    allowed = combinations(split)
    pairs = [
        (duration, rate)
        for duration in durations_s
        for rate in fps
        if abs(duration * rate - round(duration * rate)) < 1e-9
    ]
    if not pairs:
        raise ValueError(f"No duration of {durations_s} s is a whole number of frame intervals at any of {fps} fps.")
    by_motion = {motion: [triple for triple in allowed if triple[2] == motion] for motion in MOTIONS}
    for attempt in range(MAX_ATTEMPTS):
        rng = np.random.default_rng([seed, SPLITS.index(split), attempt])
        # Duration first and evenly: the number of frame rates that go with it must not favour it.
        duration = _pick(rng, sorted({pair[0] for pair in pairs}))
        rate = _pick(rng, [pair[1] for pair in pairs if pair[0] == duration])
        camera = _sample_camera(rng, duration)
        room = Room(
            float(_pick(rng, (8, 9, 10))),
            float(_pick(rng, (4, 5))),
            -4.0,
            float(_pick(rng, (12, 13, 14))),
            int(rng.random() * 2**31),
        )
        objects: list[SceneObject] = []
        wanted = _pick(rng, (1, 2, 3, 4, 5, 6), (1, 4, 5, 5, 3, 2))
        for _ in range(wanted):
            # The first object moves more often than not, since half of the questions are about movement.
            weights = (1, 2, 2, 2, 2) if not objects else (4, 2, 2, 2, 1)
            for _ in range(60):
                combination = _pick(rng, by_motion[_pick(rng, MOTIONS, weights)])
                if combination[:2] in [(item.shape, item.color) for item in objects]:
                    continue
                item = _sample_object(rng, combination, camera, duration)
                if _fits(item, objects, camera, room, duration):
                    objects.append(item)
                    break
        if len(objects) == wanted:
            scene = Scene(seed, rate, duration, camera, room, tuple(objects))
            if _is_seen(scene):
                return scene
    raise RuntimeError(f"No scene found for seed {seed} of split {split!r} in {MAX_ATTEMPTS} attempts.")
