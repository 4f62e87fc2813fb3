import dataclasses

import numpy as np
import pytest
import torch

from datasets_rgpt4d import Camera, Room, Scene, SceneObject, render_frames, render_signals, sample_scene
from datasets_rgpt4d.world4d_render import instance_masks

STILL_CAMERA = Camera(1.0, (0.0, -1.6, 0.0), 0.0, 0.0, (0.0, 0.0, 0.0), 0.0)
ROOM = Room(8.0, 4.0, -4.0, 12.0, 3)
SPHERE = SceneObject("sphere", "red", (0.8, 0.8, 0.8), (0.0, -1.6, 5.0), 0.0, (0.0,) * 3, (0.0,) * 3, 0.0, 1)
DURATIONS, FPS = (1.0, 2.0, 4.0), (10, 12)


def scene_of(*objects, camera=STILL_CAMERA, duration_s=2.0):
    return Scene(0, 10, duration_s, camera, ROOM, objects)


def bilinear(image, x, y):
    """Sample `(H, W, C)` at pixel coordinates; the first pixel's centre is 0."""
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    fx, fy = (x - x0)[..., None], (y - y0)[..., None]
    x1, y1 = np.minimum(x0 + 1, image.shape[1] - 1), np.minimum(y0 + 1, image.shape[0] - 1)
    upper = image[y0, x0] * (1 - fx) + image[y0, x1] * fx
    return upper * (1 - fy) + (image[y1, x0] * (1 - fx) + image[y1, x1] * fx) * fy


def interior(instance):
    """Pixels whose 3 x 3 neighbours show the same thing, so that bilinear sampling does not mix two surfaces."""
    same = np.ones_like(instance, bool)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            same &= np.roll(instance, (dy, dx), (-2, -1)) == instance
    same[..., [0, -1], :] = same[..., :, [0, -1]] = False
    return same


@pytest.mark.parametrize("seed", range(6))
def test_warping_the_previous_frame_reproduces_the_frame(seed):
    scene = sample_scene(seed, "train", DURATIONS, FPS)
    times, size = np.linspace(0, scene.duration_s, 8), 160
    frames = render_frames(scene, times, size, as_numpy=True).astype(float)
    truth = render_signals(scene, times, size, 4, as_numpy=True)
    inside = interior(truth["instance"])
    y, x = np.mgrid[:size, :size]
    checked = 0
    for t in range(1, len(times)):
        u, v = truth["flow"][:, t]
        place_x, place_y = x + u, y + v
        use = truth["visible_in_previous"][t] & inside[t] & (place_x >= 0) & (place_x <= size - 1)
        use &= (place_y >= 0) & (place_y <= size - 1)
        place_x, place_y = place_x[use], place_y[use]
        use_before = inside[t - 1][np.round(place_y).astype(int), np.round(place_x).astype(int)]
        error = np.abs(bilinear(frames[t - 1], place_x, place_y) - frames[t][use]).max(-1)[use_before]
        # Grey levels of 255. Exact flow leaves what bilinear sampling loses; without flow the error on objects is 20 to
        # 35, and test_a_wrong_flow_is_noticed shifts it by a pixel.
        assert np.median(error) <= 1.5 and error.mean() < 2.5, (t, np.median(error), error.mean())
        on_object = (truth["instance"][t][use] >= 0)[use_before]
        if on_object.sum() > 50:
            assert error[on_object].mean() < 6
        checked += use_before.sum()
    assert checked > 0.4 * size * size * 7


def test_a_wrong_flow_is_noticed():
    scene = scene_of(SPHERE, camera=dataclasses.replace(STILL_CAMERA, velocity=(0.5, 0.0, 0.0)))
    frames = render_frames(scene, [0.0, 1.0], 160, as_numpy=True).astype(float)
    truth = render_signals(scene, [0.0, 1.0], 160, 4, as_numpy=True)
    y, x = np.mgrid[:160, :160]
    u, v = truth["flow"][:, 1]
    use = truth["visible_in_previous"][1] & interior(truth["instance"])[1] & (x + u < 156)
    error = [
        np.abs(bilinear(frames[0], (x + u + shift)[use], (y + v)[use]) - frames[1][use]).max(-1).mean()
        for shift in (0, 1, 3)
    ]
    assert 2 * error[0] < error[1] < error[2]


def test_depth_and_rays_project_to_the_same_world_point():
    """Two frames, two routes: unproject with depth and camray, or follow the flow; the room's points must agree."""
    camera = dataclasses.replace(
        STILL_CAMERA, pitch_deg=10.0, yaw_deg=15.0, velocity=(0.3, 0.0, 0.4), yaw_rate_deg_s=8.0
    )
    scene, size = scene_of(SPHERE, camera=camera), 48
    truth = render_signals(scene, [0.0, 0.7, 1.9], size, size, as_numpy=True)
    direction, moment = truth["camray"][:3], truth["camray"][3:]
    np.testing.assert_allclose(np.linalg.norm(direction, axis=0), 1, atol=1e-6)
    np.testing.assert_allclose((direction * moment).sum(0), 0, atol=1e-6)
    assert np.abs(moment[:, 0]).max() == 0  # the first camera is the origin
    forward = np.cos(np.arctan(np.hypot(*np.meshgrid(*[(np.arange(size) - (size - 1) / 2) / size] * 2))))
    rotation, centre = camera.pose([0.0, 0.7, 1.9])
    origin = np.cross(direction, moment, axis=0)  # foot of the ray; o = foot + s d
    for t in range(3):
        o = rotation[0].T @ (centre[t] - centre[0])
        point = o[:, None, None] + direction[:, t] * truth["depth"][0, t] / forward
        foot = o[:, None, None] - (o @ direction[:, t].reshape(3, -1)).reshape(1, size, size) * direction[:, t]
        np.testing.assert_allclose(origin[:, t], foot, atol=1e-5)
        # the point, seen by the camera of frame t, lies on its own pixel at its own depth
        seen = np.einsum(
            "ji,jhw->ihw",
            rotation[t],
            np.einsum("ij,jhw->ihw", rotation[0], point) + (centre[0] - centre[t])[:, None, None],
        )
        y, x = np.mgrid[:size, :size]
        np.testing.assert_allclose(seen[0] / seen[2] * size + (size - 1) / 2, x, atol=1e-3)
        np.testing.assert_allclose(seen[1] / seen[2] * size + (size - 1) / 2, y, atol=1e-3)
        np.testing.assert_allclose(seen[2], truth["depth"][0, t], rtol=1e-5)
        if t:  # and, if it stands still, seen by the camera before it lies where the flow says
            world = np.einsum("ij,jhw->ihw", rotation[0], point) + centre[0][:, None, None]
            seen = np.einsum("ji,jhw->ihw", rotation[t - 1], world - centre[t - 1][:, None, None])
            valid = truth["flow_valid"][0, t]
            np.testing.assert_allclose(
                (seen[0] / seen[2] * size + (size - 1) / 2 - x)[valid], truth["flow"][0, t][valid], atol=2e-3
            )
            np.testing.assert_allclose(
                (seen[1] / seen[2] * size + (size - 1) / 2 - y)[valid], truth["flow"][1, t][valid], atol=2e-3
            )


def test_depth_of_a_wall_ahead_is_its_distance():
    truth = render_signals(scene_of(), [0.0], 33, 3)
    ahead = truth["depth"][0, 0, 10, :]  # a row above the horizon that ends on the wall z = 12
    assert ahead.shape == (33,) and torch.allclose(ahead[8:25], torch.tensor(12.0))
    floor = truth["depth"][0, 0, 32, 16].item()  # the bottom row looks down by 16 pixels of 33: 1.6 m below the camera
    assert floor == pytest.approx(1.6 * 33 / 16, rel=1e-5)


def test_flow_of_a_sphere_that_moves_right_is_its_speed_over_depth():
    sphere = dataclasses.replace(SPHERE, velocity=(0.4, 0.0, 0.0))
    truth = render_signals(scene_of(sphere), [0.0, 0.5], 65, 5, as_numpy=True)
    on = truth["instance"][1] == 0
    assert on.sum() > 30
    # 0.2 m to the right between the frames; backward flow points left: u = -f * 0.2 / z, and no vertical flow
    np.testing.assert_allclose(truth["flow"][0, 1][on], -65 * 0.2 / truth["depth"][0, 1][on], rtol=1e-4)
    np.testing.assert_allclose(truth["flow"][1, 1], 0, atol=1e-4)
    np.testing.assert_allclose(truth["flow"][0, 1][~on], 0, atol=1e-4)
    assert (truth["motion"][0] == (truth["instance"] == 0)).all()
    # nearest point of the sphere, at its centre: 5 - 0.4 m
    assert truth["depth"][0, 0, 32, 32] == pytest.approx(4.6, rel=1e-5)


def test_frame_zero_has_no_flow_and_frames_may_be_irregular():
    truth = render_signals(sample_scene(1, "train", DURATIONS, FPS), [0.0, 0.03, 0.9, 0.9], 32, 4)
    assert not truth["flow_valid"][0, 0].any() and truth["flow_valid"][0, 1:].all()
    assert truth["flow"][:, 0].abs().max() == 0 and not truth["visible_in_previous"][0].any()
    assert truth["flow"][:, 3].abs().max() < 1e-3 and truth["motion"][0, 3].max() == 0  # the same instant twice


def test_a_still_object_under_a_moving_camera_has_flow_but_no_motion():
    camera = dataclasses.replace(STILL_CAMERA, velocity=(0.4, 0.0, 0.0), yaw_rate_deg_s=5.0)
    truth = render_signals(scene_of(SPHERE, camera=camera), np.linspace(0, 2, 4), 64, 4)
    on = truth["instance"][1:] == 0
    assert on.any() and (truth["flow"][:, 1:].norm(dim=0)[on] > 0.5).all()
    assert truth["motion"].max() == 0


@pytest.mark.parametrize("shape", ["sphere", "box", "cylinder"])
def test_a_spinning_object_moves_though_its_outline_may_not(shape):
    item = dataclasses.replace(SPHERE, shape=shape, yaw_rate_deg_s=90.0)
    truth = render_signals(scene_of(item), [0.0, 0.25], 64, 4)
    on = truth["instance"] == 0
    assert on[0].any() and (truth["motion"][0] == on).all()
    if shape != "box":
        assert (on[0] == on[1]).all()
    # Clockwise seen from above: the side that faces the camera goes left, so backward flow points right.
    centre = truth["flow"][0, 1, 28:36, 28:36]
    assert (centre > 0).all()


def test_a_hidden_point_is_not_visible_in_the_previous_frame():
    """A sphere slides right; the wall it uncovers was hidden before, the wall far from it was not."""
    sphere = dataclasses.replace(SPHERE, velocity=(0.8, 0.0, 0.0))
    truth = render_signals(scene_of(sphere), [0.0, 1.0], 64, 4)
    before, after = truth["instance"]
    uncovered = (before == 0) & (after == -1)
    assert uncovered.any() and not truth["visible_in_previous"][1][uncovered].any()
    assert truth["visible_in_previous"][1][(before == -1) & (after == -1)].all()


def test_camera_rays_sit_at_patch_centres():
    truth = render_signals(scene_of(), [0.0, 1.0], 224, 16)
    assert truth["camray"].shape == (6, 2, 16, 16)
    x, y = 14 * 3 + 6.5, 14 * 5 + 6.5  # centre of cell (i, j) = (5, 3) in pixels of the 224 grid
    expected = torch.nn.functional.normalize(torch.tensor([(x - 111.5) / 224, (y - 111.5) / 224, 1.0]), dim=0)
    torch.testing.assert_close(truth["camray"][:3, 1, 5, 3], expected)


def test_shapes_dtypes_and_numpy_follow_the_contract():
    scene = sample_scene(2, "train", DURATIONS, FPS)
    truth = render_signals(scene, torch.tensor([0.0, 0.1, 0.3], dtype=torch.float64), (24, 40), (3, 5))
    assert {name: (tuple(value.shape), value.dtype) for name, value in truth.items()} == {
        "depth": ((1, 3, 24, 40), torch.float32),
        "flow": ((2, 3, 24, 40), torch.float32),
        "flow_valid": ((1, 3, 24, 40), torch.bool),
        "motion": ((1, 3, 24, 40), torch.float32),
        "camray": ((6, 3, 3, 5), torch.float32),
        "instance": ((3, 24, 40), torch.int64),
        "visible_in_previous": ((3, 24, 40), torch.bool),
    }
    assert all(torch.isfinite(value).all() for value in truth.values()) and truth["depth"].min() > 0
    arrays = render_signals(scene, [0.0, 0.1, 0.3], (24, 40), (3, 5), as_numpy=True)
    assert all(np.allclose(arrays[name], truth[name].numpy(), atol=1e-4) for name in truth)
    frames = render_frames(scene, [0.0, 0.1], (24, 40))
    assert frames.shape == (2, 24, 40, 3) and frames.dtype == torch.uint8


def test_rendering_in_pieces_changes_nothing(monkeypatch):
    scene, times = sample_scene(3, "train", DURATIONS, FPS), np.linspace(0, 1, 5)
    whole = render_signals(scene, times, 32, 4), render_frames(scene, times, 32, supersample=2)
    monkeypatch.setattr("datasets_rgpt4d.world4d_render.MAX_RAYS_CPU", 2 * 32 * 32)
    pieces = render_signals(scene, times, 32, 4), render_frames(scene, times, 32, supersample=2)
    for name, value in whole[0].items():
        torch.testing.assert_close(pieces[0][name], value, msg=name)
    assert torch.equal(pieces[1], whole[1])


def test_smooth_edges_are_near_the_mean_of_many_rays():
    scene = sample_scene(4, "train", DURATIONS, FPS)
    fine = render_frames(scene, [0.0], 256).float().reshape(64, 4, 64, 4, 3).mean((1, 3))
    error = [(render_frames(scene, [0.0], 64, supersample=s)[0].float() - fine).abs().mean() for s in (1, 4)]
    assert error[1] < 0.5 * error[0]


def test_float64_masks_agree_with_float32_signals():
    scene = sample_scene(5, "train", DURATIONS, FPS)
    masks, instance = (
        instance_masks(scene, [0.0, 1.0], 64),
        render_signals(scene, [0.0, 1.0], 64, 4)["instance"].numpy(),
    )
    assert (masks != instance).mean() < 1e-3


def test_bad_requests_name_their_remedy():
    scene = scene_of(SPHERE)
    for times in ([], [[0.0]], [float("nan")]):
        with pytest.raises(ValueError, match="non-empty list of finite seconds"):
            render_frames(scene, times, 32)
    with pytest.raises(ValueError, match="must lie in the clip"):
        render_signals(scene, [0.0, 2.5], 32, 4)
    with pytest.raises(ValueError, match="size must be positive"):
        render_frames(scene, [0.0], 0)
