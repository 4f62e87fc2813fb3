import dataclasses

import numpy as np
import pytest

from datasets_rgpt4d.world4d import CONFIGS
from datasets_rgpt4d.world4d_difficulty import clip_difficulty, occluded_shares
from datasets_rgpt4d.world4d_scene import Camera, Room, Scene, SceneObject


def scene(*boxes, **camera):
    """Cubes of 1 m at (x, z) metres, and a camera that looks straight ahead from half their height."""
    stands = {"velocity": (0, 0, 0), "acceleration": (0, 0, 0), "yaw_rate_deg_s": 0.0, "texture_seed": 0}
    objects = [SceneObject("box", "red", (1, 1, 1), (x, -0.5, z), 0.0, **stands) for x, z in boxes]
    view = {"focal": 1.0, "position": (0, -0.5, 0), "yaw_deg": 0.0, "pitch_deg": 0.0, "velocity": (0, 0, 0)}
    return Scene(0, 10, 2.0, Camera(**{**view, "yaw_rate_deg_s": 0.0, **camera}), Room(8, 4, -4, 12, 0), tuple(objects))


def test_a_cube_behind_another_is_hidden_by_their_overlap():
    # At 4 m and 8 m the near faces are 1/3.5 and 1/7.5 of the picture wide: half of the far one lies behind the near one
    # if their edges meet in its middle, 0.5 / 3.5 of the picture beside the axis.
    half = occluded_shares(scene((0, 4), (0.5 / 3.5 * 7.5, 8)), np.array([0.0]))
    assert half[0] == 0 and half[1] == pytest.approx(0.5, abs=0.1)
    assert occluded_shares(scene((0, 4), (0, 8)), np.array([0.0])).tolist() == [0, 1]
    assert occluded_shares(scene((-2, 4), (2, 4)), np.array([0.0])).tolist() == [0, 0]


def test_the_worst_time_counts():
    still = scene((0, 4), (2, 8))
    passing = dataclasses.replace(still.objects[1], velocity=(-1.0, 0, 0))
    moving = dataclasses.replace(still, objects=(still.objects[0], passing))
    assert occluded_shares(moving, np.array([0.0]))[1] < 0.1
    assert occluded_shares(moving, np.array([0.0, 2.0]))[1] == 1


def test_what_leaves_the_picture_is_not_hidden():
    assert occluded_shares(scene((0, 4), (40, 4)), np.array([0.0])).tolist() == [0, 0]


def test_a_clip_tells_its_camera_and_objects():
    told = clip_difficulty(scene((0, 4), (0, 8), velocity=(0.3, 0, 0.4), yaw_rate_deg_s=-5.0), 3)
    assert told == {
        "objects": 2,
        "occluded": pytest.approx(1, abs=0.2),
        "camera_turn_deg": 10.0,
        "camera_path_m": 1.0,
        "shapes": ["box", "box"],
        "motions": ["still", "still"],
    }


def test_the_test_split_hides_objects_and_turns_the_camera():
    clips = [clip_difficulty(CONFIGS[0].scene("test", index), 8) for index in range(40)]
    assert np.mean([clip["occluded"] >= 0.25 for clip in clips]) > 0.2
    assert np.mean([clip["camera_turn_deg"] > 0 for clip in clips]) > 0.2
    assert {shape for clip in clips for shape in clip["shapes"]} == {"sphere", "box", "cylinder"}
