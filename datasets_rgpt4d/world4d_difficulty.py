"""What makes a World4D clip hard to read, measured on its scene: objects that hide each other, a moving camera."""

import dataclasses
from typing import Any

import numpy as np

from modeling_rgpt4d.video_decoding import uniform_indices

from .world4d_render import instance_masks
from .world4d_sampling import CHECK_SIZE_PX
from .world4d_scene import Scene

MIN_SILHOUETTE_PX = 10  # of CHECK_SIZE_PX ** 2: a share of fewer pixels says nothing


def occluded_shares(scene: Scene, times: np.ndarray) -> np.ndarray:
    """How much of each object the others hide at worst.

    Args:
        times: `(N,)` seconds at which to look.
    Returns: `(objects,)` float64 in [0, 1]: the greatest share, over the times, of the pixels which the object alone would
        show in the picture and in which another object stands before it. What is outside the picture does not count, nor
        does a time at which the object alone would show fewer than `MIN_SILHOUETTE_PX` pixels.
    """
    masks = instance_masks(scene, times, CHECK_SIZE_PX)
    shares = np.zeros(len(scene.objects))
    for k, item in enumerate(scene.objects):
        alone = instance_masks(dataclasses.replace(scene, objects=(item,)), times, CHECK_SIZE_PX) == 0
        silhouette, seen = alone.sum((1, 2)), (masks == k).sum((1, 2))
        counts = silhouette >= MIN_SILHOUETTE_PX
        if counts.any():
            shares[k] = 1 - (seen[counts] / silhouette[counts]).min()
    return shares


def clip_difficulty(scene: Scene, num_frames: int) -> dict[str, Any]:
    """`objects`, how many; `occluded`, the worst of `occluded_shares` over the `num_frames` frames that a processor samples;
    `camera_turn_deg` and `camera_path_m`, in the whole clip; `shapes` and `motions` of the objects.
    """
    times = scene.frame_times[uniform_indices(scene.num_frames, num_frames)]
    return {
        "objects": len(scene.objects),
        "occluded": round(float(occluded_shares(scene, times).max()), 3),
        "camera_turn_deg": round(abs(scene.camera.yaw_rate_deg_s) * scene.duration_s, 3),
        "camera_path_m": round(float(np.linalg.norm(scene.camera.velocity)) * scene.duration_s, 3),
        "shapes": [item.shape for item in scene.objects],
        "motions": [item.motion for item in scene.objects],
    }
