"""A World4D scene: what stands in the room, how it moves, and how the camera moves, as closed forms of time.

World axes are those of a camera that looks straight ahead: x right, y down, z forward, metres; the floor is y = 0, so
heights are negative y. A yaw turns forward towards right, which is clockwise for somebody who looks down from above.
Nothing here is random and nothing needs torch: `world4d_sampling` draws scenes, `world4d_render` renders them.
"""

import dataclasses
import json
import math
from dataclasses import dataclass

import numpy as np

SHAPES = ("sphere", "box", "cylinder")
COLORS = ("red", "green", "blue", "yellow", "purple", "cyan")
MOTIONS = ("still", "translate", "accelerate", "spin", "translate_spin")
CAMERA_MOTIONS = ("still", "translate", "pan", "translate_pan")

Vector = tuple[float, float, float]


def _vector(value, name: str) -> Vector:
    vector = tuple(float(number) for number in value)
    if len(vector) != 3 or not all(math.isfinite(number) for number in vector):
        raise ValueError(f"{name} must be three finite numbers (x, y, z), got {value!r}.")
    return vector


def _yaw_matrix(yaw_rad: np.ndarray) -> np.ndarray:
    """Rotation about the vertical axis, `(..., 3, 3)`; a positive angle turns +z (forward) towards +x (right)."""
    c, s = np.cos(yaw_rad), np.sin(yaw_rad)
    zero, one = np.zeros_like(c), np.ones_like(c)
    return np.stack([c, zero, s, zero, one, zero, -s, zero, c], -1).reshape(*c.shape, 3, 3)


def _pitch_matrix(pitch_rad: float) -> np.ndarray:
    """Rotation about the camera's x axis, `(3, 3)`; a positive angle looks down."""
    c, s = math.cos(pitch_rad), math.sin(pitch_rad)
    return np.array([[1.0, 0.0, 0.0], [0.0, c, s], [0.0, -s, c]])


@dataclass(frozen=True)
class Camera:
    """A pinhole camera with square field of view.

    `focal` is in units of the picture's side: fx = focal * W, fy = focal * H, and the principal point is the picture's
    centre, so a picture of another size is a resized picture of the same view. `velocity` (m/s, world axes) and
    `yaw_rate_deg_s` are constant.
    """

    focal: float
    position: Vector
    yaw_deg: float
    pitch_deg: float
    velocity: Vector
    yaw_rate_deg_s: float

    def __post_init__(self):
        object.__setattr__(self, "position", _vector(self.position, "Camera.position"))
        object.__setattr__(self, "velocity", _vector(self.velocity, "Camera.velocity"))
        if not self.focal > 0:
            raise ValueError(f"Camera.focal must be positive (in units of the picture's side), got {self.focal}.")

    @property
    def motion(self) -> str:
        """One of `CAMERA_MOTIONS`."""
        moves, pans = any(self.velocity), bool(self.yaw_rate_deg_s)
        return ("translate_pan" if pans else "translate") if moves else ("pan" if pans else "still")

    def pose(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """World-from-camera rotation `(N, 3, 3)` and camera centre `(N, 3)` in metres, float64, at `times` (N,) in
        seconds.
        """
        times = np.asarray(times, np.float64)
        yaw = np.radians(self.yaw_deg + self.yaw_rate_deg_s * times)
        rotation = _yaw_matrix(yaw) @ _pitch_matrix(math.radians(self.pitch_deg))
        return rotation, np.array(self.position) + times[:, None] * np.array(self.velocity)


@dataclass(frozen=True)
class SceneObject:
    """A sphere, box or upright cylinder: centre p(t) = position + velocity t + acceleration t^2 / 2, yaw(t) = yaw_deg +
    yaw_rate_deg_s t.

    `size` is the full extent in metres along the object's own x, y (height) and z; a sphere has three equal extents and
    a cylinder x = z.
    `texture_seed` draws the pattern that is painted on the surface and moves with it.
    """

    shape: str
    color: str
    size: Vector
    position: Vector
    yaw_deg: float
    velocity: Vector
    acceleration: Vector
    yaw_rate_deg_s: float
    texture_seed: int

    def __post_init__(self):
        for name in ("size", "position", "velocity", "acceleration"):
            object.__setattr__(self, name, _vector(getattr(self, name), f"SceneObject.{name}"))
        if self.shape not in SHAPES:
            raise ValueError(f"SceneObject.shape must be one of {SHAPES}, got {self.shape!r}.")
        if self.color not in COLORS:
            raise ValueError(f"SceneObject.color must be one of {COLORS}, got {self.color!r}.")
        if min(self.size) <= 0:
            raise ValueError(f"SceneObject.size must be positive, got {self.size}.")
        x, y, z = self.size
        if (self.shape == "sphere" and not x == y == z) or (self.shape == "cylinder" and x != z):
            raise ValueError(
                f"SceneObject.size {self.size} does not fit a {self.shape}: a sphere needs x = y = z, a cylinder x = z."
            )

    @property
    def name(self) -> str:
        """What a question calls the object, e.g. `"red sphere"`."""
        return f"{self.color} {self.shape}"

    @property
    def motion(self) -> str:
        """One of `MOTIONS`."""
        if any(self.acceleration):
            return "accelerate"
        if any(self.velocity):
            return "translate_spin" if self.yaw_rate_deg_s else "translate"
        return "spin" if self.yaw_rate_deg_s else "still"

    @property
    def combination(self) -> tuple[str, str, str]:
        """(shape, colour, motion): what the splits hold out."""
        return self.shape, self.color, self.motion

    @property
    def translates(self) -> bool:
        return any(self.velocity) or any(self.acceleration)

    @property
    def footprint_radius(self) -> float:
        """Radius in metres of the vertical cylinder that holds the object whatever its yaw."""
        return math.hypot(self.size[0], self.size[2]) / 2 if self.shape == "box" else self.size[0] / 2

    def position_at(self, times: np.ndarray) -> np.ndarray:
        """Centre `(N, 3)` in metres at `times` (N,) in seconds, float64."""
        times = np.asarray(times, np.float64)[:, None]
        return np.array(self.position) + times * np.array(self.velocity) + 0.5 * times**2 * np.array(self.acceleration)

    def yaw_at(self, times: np.ndarray) -> np.ndarray:
        """Yaw `(N,)` in degrees, not wrapped, at `times` (N,) in seconds, float64."""
        return self.yaw_deg + self.yaw_rate_deg_s * np.asarray(times, np.float64)

    def pose(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """World-from-object rotation `(N, 3, 3)` and centre `(N, 3)`, float64, at `times` (N,) in seconds."""
        return _yaw_matrix(np.radians(self.yaw_at(times))), self.position_at(times)


@dataclass(frozen=True)
class Room:
    """The walls: x in [-half_width, half_width], y in [-height, 0], z in [back, front], metres. Every ray from inside
    ends on one of its faces.
    """

    half_width: float
    height: float
    back: float
    front: float
    texture_seed: int

    def __post_init__(self):
        if not (self.half_width > 0 and self.height > 0 and self.front > self.back):
            raise ValueError(f"Room needs positive half_width and height and back < front, got {self}.")

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper corner, `(3,)` each."""
        return np.array([-self.half_width, -self.height, self.back]), np.array([self.half_width, 0.0, self.front])


@dataclass(frozen=True)
class Scene:
    """A clip: `duration_s` seconds from the first frame to the last, so `duration_s * fps + 1` frames, frame k at k /
    fps seconds.
    """

    seed: int
    fps: int
    duration_s: float
    camera: Camera
    room: Room
    objects: tuple[SceneObject, ...]

    def __post_init__(self):
        object.__setattr__(self, "objects", tuple(self.objects))
        intervals = self.duration_s * self.fps
        if self.fps <= 0 or self.duration_s <= 0 or abs(intervals - round(intervals)) > 1e-9:
            raise ValueError(
                "Scene needs fps > 0 and a duration that is a whole number of frame intervals, "
                f"got {self.duration_s} s at {self.fps} fps."
            )

    @property
    def num_frames(self) -> int:
        return round(self.duration_s * self.fps) + 1

    @property
    def frame_times(self) -> np.ndarray:
        """Presentation time of every frame in seconds, `(num_frames,)` float64: exactly k / fps."""
        return np.arange(self.num_frames) / self.fps

    def to_json(self) -> str:
        """The scene as one line of JSON; `Scene.from_json` gives an equal scene."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Scene":
        """Read what `to_json` wrote. Raises `ValueError` if a field is missing, unknown or out of range."""
        try:
            fields = json.loads(text)
            return cls(
                **{
                    **fields,
                    "camera": Camera(**fields["camera"]),
                    "room": Room(**fields["room"]),
                    "objects": tuple(SceneObject(**item) for item in fields["objects"]),
                }
            )
        except (TypeError, KeyError) as error:
            raise ValueError(f"This text is not a World4D scene written by Scene.to_json: {error}.") from error
