"""Render World4D scenes and their exact depth, flow, motion and camera rays by ray casting in torch.

Axes of tensors in this file: N frames, P rays (pixels of a frame, row by row), K objects, R = K + 6 painted surfaces
(objects, then the room's faces -x, +x, -y, +y, -z, +z). All cast rays have z = 1 in the camera's frame, so the ray
parameter of a hit *is* its z-depth.

Light falls straight down and casts no shadow. Shading then depends on a normal's height alone, which neither sliding
nor turning about the vertical axis changes: a surface point keeps its colour for the whole clip, and warping by the
true flow reproduces the picture.
"""

import math

import numpy as np
import torch

from .world4d_scene import COLORS, Scene

COLOR_RGB = {
    "red": (0.86, 0.13, 0.12),
    "green": (0.13, 0.65, 0.17),
    "blue": (0.14, 0.27, 0.90),
    "yellow": (0.93, 0.83, 0.12),
    "purple": (0.58, 0.15, 0.72),
    "cyan": (0.10, 0.78, 0.82),
}
assert set(COLOR_RGB) == set(COLORS)

MIN_DEPTH_M = 1e-2  # nearer hits, and points nearer to the previous camera's plane, count as behind the camera
# A point is visible in the previous frame if the ray to it stops within this share of its depth: wide enough for
# float32, far below object sizes.
VISIBILITY_TOLERANCE = 2e-3
# Of the range of a colour channel: pixels that differ more from a neighbour are smoothed if asked for.
EDGE_CONTRAST = 0.08
# Rays in flight: about 250 bytes each, so 32 MB on a CPU (larger chunks fall out of its caches) and 500 MB on a GPU.
MAX_RAYS_CPU, MAX_RAYS_GPU = 2**17, 2**21


def _times(scene: Scene, timestamps) -> np.ndarray:
    times = np.asarray(timestamps.tolist() if isinstance(timestamps, torch.Tensor) else timestamps, np.float64)
    if times.ndim != 1 or len(times) == 0 or not np.isfinite(times).all():
        raise ValueError(f"timestamps must be a non-empty list of finite seconds, got an array of shape {times.shape}.")
    # The tolerance lets float32 timestamps through.
    if times.min() < -1e-4 or times.max() > scene.duration_s + 1e-4:
        raise ValueError(
            f"timestamps must lie in the clip, [0, {scene.duration_s}] s; got [{times.min()}, {times.max()}] s."
        )
    return times


def _size(size: int | tuple[int, int], name: str) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"{name} must be positive (pixels, or (height, width)), got {size!r}.")
    return int(height), int(width)


def _pixel_rays(focal: float, height: int, width: int) -> np.ndarray:
    """Directions K^-1 [x, y, 1] of the pixel centres, `(3, height * width)` float64; the first pixel's centre has
    coordinate 0.
    """
    x = (np.arange(width) - (width - 1) / 2) / (focal * width)
    y = (np.arange(height) - (height - 1) / 2) / (focal * height)
    x, y = np.meshgrid(x, y)
    return np.stack([x.ravel(), y.ravel(), np.ones(height * width)])


def _rigid(rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
    """`(..., 3, 3)` and `(..., 3)` -> `(..., 4, 4)`."""
    matrix = np.zeros((*rotation.shape[:-2], 4, 4))
    matrix[..., :3, :3], matrix[..., :3, 3], matrix[..., 3, 3] = rotation, translation, 1.0
    return matrix


def _rigid_inverse(matrix: np.ndarray) -> np.ndarray:
    rotation = np.swapaxes(matrix[..., :3, :3], -1, -2)
    return _rigid(rotation, -(rotation @ matrix[..., :3, 3:])[..., 0])


class _Poses:
    """Float64 poses at some times: `camera` world-from-camera `(N, 4, 4)`, `objects` world-from-object `(N, K + 1, 4,
    4)`; the last is the room.
    """

    def __init__(self, scene: Scene, times: np.ndarray):
        self.camera = _rigid(*scene.camera.pose(times))
        room = np.broadcast_to(np.eye(4), (len(times), 4, 4))
        self.objects = np.stack([*(_rigid(*item.pose(times)) for item in scene.objects), room], 1)

    def __getitem__(self, index) -> "_Poses":
        part = object.__new__(_Poses)
        part.camera, part.objects = self.camera[index], self.objects[index]
        return part


def _cast(scene: Scene, poses: _Poses, rays: torch.Tensor, shade: bool = False):
    """First hit of every ray.

    Args:
        rays: `(N or 1, 3, P)` directions in the camera's frame with z = 1; their dtype and device are those of the
            result.
        shade: also give the light that the surface returns.
    Returns: z-depth `(N, P)`; surface `(N, P)` int64 in [0, R); light `(N, P)` or None.
    """
    like = dict(dtype=rays.dtype, device=rays.device)
    tensor = lambda array: torch.as_tensor(array, **like)  # noqa: E731
    x, y, z = rays.expand(len(poses.camera), -1, -1).unbind(1)
    num_objects = len(scene.objects)

    rotation, centre = tensor(poses.camera[:, :3, :3]), poses.camera[:, :3, 3]
    lower, upper = scene.room.bounds
    depth = surface = None
    for axis in range(3):
        slope = rotation[:, axis, 0, None] * x + rotation[:, axis, 1, None] * y + rotation[:, axis, 2, None] * z
        ahead = slope > 0
        to_upper, to_lower = tensor(upper[axis] - centre[:, axis, None]), tensor(centre[:, axis, None] - lower[axis])
        t = torch.where(ahead, to_upper, to_lower) / slope.abs()  # inf, never -inf, along a wall
        face = ahead.long() + (num_objects + 2 * axis)
        if depth is None:
            depth, surface = t, face
        else:
            nearer = t < depth
            depth, surface = torch.minimum(t, depth), torch.where(nearer, face, surface)
    light = tensor(FACE_LIGHT).index_select(0, (surface - num_objects).reshape(-1)).view_as(surface) if shade else None

    object_from_camera = _rigid_inverse(poses.objects[:, :-1]) @ poses.camera[:, None]
    for k, item in enumerate(scene.objects):
        m = object_from_camera[:, k]
        o = m[:, :3, 3]
        half = np.array(item.size) / 2
        m = tensor(m)
        dx = m[:, 0, 0, None] * x + m[:, 0, 1, None] * y + m[:, 0, 2, None] * z
        dy = m[:, 1, 0, None] * x + m[:, 1, 1, None] * y + m[:, 1, 2, None] * z
        dz = m[:, 2, 0, None] * x + m[:, 2, 1, None] * y + m[:, 2, 2, None] * z
        ox, oy, oz = (tensor(o[:, i, None]) for i in range(3))
        returned = None
        if item.shape == "box":
            t_in = torch.full_like(dx, -math.inf)
            t_out = torch.full_like(dx, math.inf)
            # Top and bottom return 1.0, the faces along x 0.86 and along z 0.70, so that neighbouring faces can be told
            # apart.
            for direction, origin, extent, returns in (
                (dx, o[:, 0], half[0], 0.86),
                (dz, o[:, 2], half[2], 0.70),
                (dy, o[:, 1], half[1], 1.0),
            ):
                inverse = 1 / direction
                t1, t2 = tensor(-extent - origin[:, None]) * inverse, tensor(extent - origin[:, None]) * inverse
                entry = torch.minimum(t1, t2)
                if shade:
                    returned = (
                        torch.full_like(dx, returns)
                        if returned is None
                        else torch.where(entry > t_in, returns, returned)
                    )
                t_in, t_out = torch.maximum(t_in, entry), torch.minimum(t_out, torch.maximum(t1, t2))
            hit = t_in < t_out
        else:
            sphere = item.shape == "sphere"
            a = dx * dx + dz * dz
            b = -(dx * ox + dz * oz)
            c = o[:, 0] ** 2 + o[:, 2] ** 2 - half[0] ** 2
            if sphere:
                a, b, c = a + dy * dy, b - dy * oy, c + o[:, 1] ** 2
            discriminant = b * b - a * tensor(c[:, None])
            hit = discriminant > 0
            root = discriminant.clamp_min(0).sqrt()
            t_in = (b - root) / a
            if sphere:
                if shade:
                    # Lambert under light from above: the normal's upward part is -(y of the hit) / radius.
                    returned = 0.72 - 0.28 / half[0] * (oy + t_in * dy)
            else:
                inverse = 1 / dy
                t1, t2 = tensor(-half[1] - o[:, 1, None]) * inverse, tensor(half[1] - o[:, 1, None]) * inverse
                cap = torch.minimum(t1, t2)
                hit &= torch.maximum(t_in, cap) < torch.minimum((b + root) / a, torch.maximum(t1, t2))
                if shade:
                    returned = torch.where(cap > t_in, 1.0, torch.full_like(cap, 0.78))
                t_in = torch.maximum(t_in, cap)
        hit &= (t_in > MIN_DEPTH_M) & (t_in < depth)
        depth = torch.where(hit, t_in, depth)
        surface = torch.where(hit, k, surface)
        if shade:
            light = torch.where(hit, returned, light)
    return depth, surface, light


FACE_LIGHT = (0.86, 0.92, 0.98, 1.0, 0.9, 0.96)  # -x, +x, ceiling, floor, -z, +z


def _unit_vectors(rng: np.random.Generator, count: int) -> np.ndarray:
    vectors = rng.normal(size=(count, 3))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _object_waves(size, seed: int) -> np.ndarray:
    """Four rows (wave vector in rad/m, phase) in the object's frame: three waves of the pattern, and the side of the
    object that is lighter.

    A single wave gives stripes, two crossed ones checks, three of any direction blotches. No wave is shorter than a
    third of the object's largest extent. The lighter side is what makes a turn visible whatever the pattern.
    """
    rng = np.random.default_rng([seed, 1])
    extent = max(size)
    pattern, number = int(rng.integers(3)), 2 * math.pi / extent * rng.uniform(1.6, 3.0, 3)
    angle = rng.uniform(0, 2 * math.pi)
    level = np.array([math.cos(angle), 0.0, math.sin(angle)])
    if pattern == 0:
        waves = np.stack([level * number[0], np.zeros(3), np.zeros(3)])
    elif pattern == 1:
        waves = np.stack([level * number[0] + [0, number[1], 0], level * number[0] - [0, number[1], 0], np.zeros(3)])
    else:
        waves = _unit_vectors(rng, 3) * number[:, None]
    side = rng.uniform(0, 2 * math.pi)
    rows = np.concatenate([waves, [[4 / extent * math.cos(side), 0.0, 4 / extent * math.sin(side)]]])
    phases = np.append(np.where(np.abs(waves).sum(1) > 0, rng.uniform(0, 2 * math.pi, 3), 0.0), 0.0)
    return np.concatenate([rows, phases[:, None]], 1)


def _room_texture(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Waves `(6, 4, 4)` in world axes and colours `(6, 3, 3)` (mean, contrast, lighter side) of the room's faces: tiles
    below, panels around.
    """
    rng = np.random.default_rng([seed, 2])
    waves, colors = np.zeros((6, 4, 4)), np.zeros((6, 3, 3))
    tones = np.array([[0.60, 0.56, 0.50], [0.52, 0.56, 0.58], [0.58, 0.53, 0.54], [0.50, 0.55, 0.50]])
    for face in range(6):
        in_plane = [axis for axis in range(3) if axis != face // 2]
        first, second = np.zeros(3), np.zeros(3)
        # Tiles of the floor are 1 m for everybody: a wave of 2 m in each direction. Walls and ceiling carry longer
        # waves.
        lengths = (2.0, 2.0) if face == 3 else rng.choice([2.0, 2.5, 3.0, 4.0], 2)
        first[in_plane[0]], second[in_plane[1]] = 2 * math.pi / lengths[0], 2 * math.pi / lengths[1]
        slow = np.zeros(3)
        slow[in_plane] = 2 * math.pi / rng.uniform(5.0, 9.0, 2)
        # The product of two sines is a sum of two waves: a checkerboard with soft edges.
        waves[face, :3, :3] = first + second, first - second, slow
        waves[face, :3, 3] = rng.uniform(0, 2 * math.pi, 3) if face != 3 else (0.0, 0.0, rng.uniform(0, 2 * math.pi))
        mean = tones[int(rng.integers(len(tones)))] + rng.uniform(-0.025, 0.025, 3)
        colors[face, 0], colors[face, 1] = mean, mean * (0.22 if face == 3 else 0.14)
    return waves, colors


def _paint(scene: Scene, dtype: torch.dtype, device) -> tuple[np.ndarray, torch.Tensor]:
    """Waves `(R, 4, 4)` in each surface's own frame, and colours `(9, R)`: RGB of the mean, of what the pattern adds,
    of what the lighter side adds.
    """
    room_waves, room_colors = _room_texture(scene.room.texture_seed)
    waves = [_object_waves(item.size, item.texture_seed) for item in scene.objects]
    colors = []
    for item in scene.objects:
        color = np.array(COLOR_RGB[item.color])
        colors.append(np.stack([color * 0.92 + 0.05, color * 0.24, 0.13 * (1.15 - color)]))
    colors = np.concatenate([np.array(colors).reshape(-1, 9), room_colors.reshape(-1, 9)])
    waves = np.concatenate([np.array(waves).reshape(-1, 4, 4), room_waves])
    return waves, torch.as_tensor(colors.T.copy(), dtype=dtype, device=device)


def _apply_per_surface(table: np.ndarray, surface: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Multiply each point by its surface's matrix: table `(N, R, m, 4)`, surface `(N, P)`, points `(N, 3, P)` -> `(m,
    N, P)`.
    """
    num_frames, num_surfaces, rows, _ = table.shape
    flat = torch.as_tensor(
        table.reshape(num_frames * num_surfaces, rows * 4).T.copy(), dtype=points.dtype, device=points.device
    )
    index = (surface + num_surfaces * torch.arange(num_frames, device=surface.device)[:, None]).reshape(-1)
    x, y, z = points.unbind(1)
    # index_select is several times faster than indexing here, and this is the hottest line of the renderer.
    a, b, c, d = flat.index_select(1, index).view(rows, 4, *surface.shape).unbind(1)
    return torch.addcmul(torch.addcmul(torch.addcmul(d, c, z), b, y), a, x)


def _frames_per_chunk(num_rays: int, device) -> int:
    return max(1, (MAX_RAYS_CPU if torch.device(device).type == "cpu" else MAX_RAYS_GPU) // num_rays)


class _Painter:
    """Colours of what rays hit, `(N, 3, P)` in [0, 1]."""

    def __init__(self, scene: Scene, device: str | torch.device):
        self.scene = scene
        self.waves, self.colors = _paint(scene, torch.float32, device)
        self.owner = [*range(len(scene.objects)), *[len(scene.objects)] * 6]  # pose of each surface

    def __call__(self, poses: _Poses, rays: torch.Tensor) -> torch.Tensor:
        depth, surface, light = _cast(self.scene, poses, rays, shade=True)
        # Phases of the waves are linear in the surface's coordinates, hence in the camera's: no per-pixel change of
        # frame is needed.
        surface_from_camera = _rigid_inverse(poses.objects[:, self.owner]) @ poses.camera[:, None]
        wave1, wave2, wave3, side = _apply_per_surface(self.waves @ surface_from_camera, surface, rays * depth[:, None])
        total = 1.6 * (wave1.sin_() + wave2.sin_() + 0.6 * wave3.sin_())
        pattern = total / (1 + total * total).sqrt()
        side = side / (1 + side * side).sqrt()
        mean, contrast, lighter = self.colors.index_select(1, surface.reshape(-1)).view(3, 3, *surface.shape)
        return (
            torch.addcmul(torch.addcmul(mean, contrast, pattern), lighter, side)
            .mul_(light)
            .clamp_(0, 1)
            .transpose(0, 1)
        )


def _refine(
    painter: _Painter, poses: _Poses, image: torch.Tensor, rays: torch.Tensor, supersample: int
) -> torch.Tensor:
    """Replace pixels of `image` `(N, 3, H, W)` that differ from a neighbour by the mean of `supersample ** 2` rays."""
    num_frames, _, height, width = image.shape
    uneven = torch.zeros(num_frames, height, width, dtype=torch.bool, device=image.device)
    across = (image[..., 1:] - image[..., :-1]).abs().amax(1) > EDGE_CONTRAST
    down = (image[..., 1:, :] - image[..., :-1, :]).abs().amax(1) > EDGE_CONTRAST
    uneven[..., 1:] |= across
    uneven[..., :-1] |= across
    uneven[:, 1:] |= down
    uneven[:, :-1] |= down
    uneven = uneven.flatten(1)
    image = image.flatten(2)
    most = int(uneven.sum(1).max())
    if most:
        # Frames of a clip have about as many such pixels each; shorter lists are filled up with pixel 0, which is then
        # refined again and again.
        chosen = torch.zeros(num_frames, most, dtype=torch.int64, device=image.device)
        frame, pixel = uneven.nonzero().unbind(1)
        chosen[frame, (uneven.cumsum(1) - 1)[frame, pixel]] = pixel
        step = (torch.arange(supersample, device=image.device) + 0.5) / supersample - 0.5
        dy, dx = torch.meshgrid(
            step / (painter.scene.camera.focal * height), step / (painter.scene.camera.focal * width), indexing="ij"
        )
        offsets = torch.stack([dx.flatten(), dy.flatten(), torch.zeros_like(dx).flatten()]).to(rays.dtype)
        fine = rays[0].index_select(1, chosen.flatten()).view(3, num_frames, most, 1) + offsets[:, None, None]
        colors = painter(poses, fine.transpose(0, 1).flatten(2)).unflatten(2, (most, supersample**2)).mean(3)
        image = image.scatter(2, chosen[:, None].expand(-1, 3, -1), colors)
    return image.unflatten(2, (height, width))


@torch.no_grad()
def render_frames(
    scene: Scene,
    timestamps,
    size: int | tuple[int, int],
    device: str | torch.device = "cpu",
    supersample: int = 1,
    as_numpy: bool = False,
) -> torch.Tensor | np.ndarray:
    """Render the scene at `timestamps`.

    Args:
        timestamps: `(N,)` seconds, any values in [0, `scene.duration_s`].
        size: side in pixels, or (height, width); the camera's square view is stretched to it.
        supersample: 1 samples pixel centres, as the signals do. s > 1 smooths edges: pixels that differ from a
            neighbour are averaged over s * s rays.
        as_numpy: give a numpy array instead of a tensor.
    Returns: `(N, H, W, 3)` uint8 RGB.
    Raises: `ValueError` for times outside the clip or an empty picture.
    """
    times, (height, width) = _times(scene, timestamps), _size(size, "size")
    if supersample < 1:
        raise ValueError(f"supersample must be at least 1, got {supersample}.")
    rays = torch.as_tensor(_pixel_rays(scene.camera.focal, height, width), dtype=torch.float32, device=device)[None]
    poses, painter = _Poses(scene, times), _Painter(scene, device)
    frames = torch.empty(len(times), height, width, 3, dtype=torch.uint8, device=device)
    step = _frames_per_chunk(height * width, device)
    for start in range(0, len(times), step):
        part = poses[start : start + step]
        image = painter(part, rays).reshape(-1, 3, height, width)
        if supersample > 1:
            image = _refine(painter, part, image, rays, supersample)
        frames[start : start + step] = (image * 255).add_(0.5).permute(0, 2, 3, 1).to(torch.uint8)
    return frames.cpu().numpy() if as_numpy else frames


def _camera_rays(scene: Scene, times: np.ndarray, height: int, width: int) -> np.ndarray:
    """Plücker rays `(6, N, height, width)`: unit direction d, moment m = o x d, in the frame of the camera at
    `times[0]`.
    """
    rays = _pixel_rays(scene.camera.focal, height, width)
    rays /= np.linalg.norm(rays, axis=0)
    camera = _rigid(*scene.camera.pose(times))
    first_from_camera = _rigid_inverse(camera[:1]) @ camera
    direction = first_from_camera[:, :3, :3] @ rays
    moment = np.cross(np.broadcast_to(first_from_camera[:, :3, 3:], direction.shape), direction, axis=1)
    return np.concatenate([direction, moment], 1).transpose(1, 0, 2).reshape(6, len(times), height, width)


def _moves(scene: Scene, times: np.ndarray) -> np.ndarray:
    """Whether each object's pose differs between a frame and the one before (frame 0: the one after), `(N, K)` bool.

    A single frame has no neighbour; there an object moves if its velocity or yaw rate at that instant is not zero. A
    yaw counts unwrapped, so an object that made a full turn between two frames has moved.
    """
    if len(times) == 1:
        moving = [
            [
                bool(np.any(np.array(item.velocity) + times[0] * np.array(item.acceleration)))
                or bool(item.yaw_rate_deg_s)
                for item in scene.objects
            ]
        ]
        return np.array(moving, bool).reshape(1, len(scene.objects))
    changes = np.zeros((len(times), len(scene.objects)), bool)
    for k, item in enumerate(scene.objects):
        step = (np.diff(item.position_at(times), axis=0) != 0).any(1) | (np.diff(item.yaw_at(times)) != 0)
        changes[:, k] = [step[0], *step]
    return changes


@torch.no_grad()
def render_signals(
    scene: Scene,
    timestamps,
    size: int | tuple[int, int],
    ray_size: int | tuple[int, int],
    device: str | torch.device = "cpu",
    as_numpy: bool = False,
) -> dict[str, torch.Tensor] | dict[str, np.ndarray]:
    """Exact truth of the scene at `timestamps` (the *sampled* frames: flow and motion are between neighbours in this
    list).

    Args:
        timestamps: `(N,)` seconds, any values in [0, `scene.duration_s`].
        size: H x W of the dense signals (side, or (height, width)).
        ray_size: h' x w' of `camray`; cell (i, j) is the centre of its patch of the picture.
    Returns: float32 unless said
        `depth` `(1, N, H, W)` z-depth, metres;
        `flow` `(2, N, H, W)` backward flow (u right, v down) in pixels of H x W: the surface point at pixel (x, y) of
            frame t was at (x + u, y + v) in frame t - 1, whether or not that place is hidden or outside the picture. 0
            where not valid;
        `flow_valid` `(1, N, H, W)` bool, False in frame 0 and where the point was behind the previous camera;
        `motion` `(1, N, H, W)` 1 on objects whose pose changed since frame t - 1 (frame 0: until frame 1), whatever the
            camera did;
        `camray` `(6, N, h', w')` unit direction d and moment o x d in the frame of the camera at `timestamps[0]`;
        `instance` `(N, H, W)` int64, index into `scene.objects`, -1 for the room;
        `visible_in_previous` `(N, H, W)` bool: the point lies inside frame t - 1 and nothing hid it there (False in
            frame 0).
    Raises: `ValueError` for times outside the clip or an empty picture.
    """
    times, (height, width) = _times(scene, timestamps), _size(size, "size")
    ray_height, ray_width = _size(ray_size, "ray_size")
    num_frames, num_objects = len(times), len(scene.objects)
    rays = torch.as_tensor(_pixel_rays(scene.camera.focal, height, width), dtype=torch.float32, device=device)[None]
    poses = _Poses(scene, times)

    def plane(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(*shape, height * width, dtype=dtype, device=device)

    signals = {
        "depth": plane(1, num_frames),
        "flow": plane(2, num_frames),
        "flow_valid": plane(1, num_frames, dtype=torch.bool),
        "motion": plane(1, num_frames),
        "instance": plane(num_frames, dtype=torch.int64),
        "visible_in_previous": plane(num_frames, dtype=torch.bool),
    }
    moves = np.concatenate([_moves(scene, times), np.zeros((num_frames, 1), bool)], 1)  # the room never moves
    scale_x, scale_y = scene.camera.focal * width, scene.camera.focal * height
    step = _frames_per_chunk(height * width, device)
    for start in range(0, num_frames, step):
        window = slice(start, min(start + step, num_frames))
        part = poses[window]
        depth, surface, _ = _cast(scene, part, rays)
        owner = surface.clamp_max(num_objects)
        signals["depth"][0, window] = depth
        signals["instance"][window] = torch.where(owner < num_objects, owner, -1)
        moving = torch.as_tensor(moves[window], dtype=torch.float32, device=device)
        signals["motion"][0, window] = moving.gather(1, owner)

        first = 1 if start == 0 else 0  # frame 0 has no predecessor
        if window.stop - window.start == first:
            continue
        now, before = part[first:], poses[window.start + first - 1 : window.stop - 1]
        # current camera -> world -> surface, then the surface is put back to where it was -> world -> previous camera
        chain = (
            _rigid_inverse(before.camera)[:, None] @ before.objects @ _rigid_inverse(now.objects) @ now.camera[:, None]
        )
        x, y, z = _apply_per_surface(chain[:, :, :3], owner[first:], rays * depth[first:, None])
        ahead = z > MIN_DEPTH_M
        z = torch.where(ahead, z, 1.0)
        x, y = x / z, y / z
        window = slice(window.start + first, window.stop)
        signals["flow"][0, window] = torch.where(ahead, (x - rays[:, 0]) * scale_x, 0.0)
        signals["flow"][1, window] = torch.where(ahead, (y - rays[:, 1]) * scale_y, 0.0)
        signals["flow_valid"][0, window] = ahead
        # The same caster looks from the previous camera at each point: exact, where a look-up in the previous depth map
        # would blur edges.
        depth_before, surface_before, _ = _cast(scene, before, torch.stack([x, y, torch.ones_like(x)], 1))
        inside = (x.abs() <= 0.5 / scene.camera.focal) & (y.abs() <= 0.5 / scene.camera.focal)
        reached = (depth_before - z).abs() <= VISIBILITY_TOLERANCE * z
        signals["visible_in_previous"][window] = ahead & inside & reached & (surface_before == surface[first:])
    signals = {name: signal.view(*signal.shape[:-1], height, width) for name, signal in signals.items()}
    signals["camray"] = torch.as_tensor(
        _camera_rays(scene, times, ray_height, ray_width), dtype=torch.float32, device=device
    )
    return {name: signal.cpu().numpy() for name, signal in signals.items()} if as_numpy else signals


@torch.no_grad()
def instance_masks(scene: Scene, timestamps, size: int | tuple[int, int]) -> np.ndarray:
    """Which object each pixel shows, `(N, H, W)` int64, -1 for the room.

    Cast in float64 on the CPU: boxes of regions and the choice of scenes hang on it, and a scene must be the same on
    every machine.
    """
    times, (height, width) = _times(scene, timestamps), _size(size, "size")
    rays = torch.as_tensor(_pixel_rays(scene.camera.focal, height, width))[None]
    _, surface, _ = _cast(scene, _Poses(scene, times), rays)
    return np.where(surface < len(scene.objects), surface, -1).reshape(len(times), height, width)
