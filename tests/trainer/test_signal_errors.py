import math

import pytest
import torch

from trainer.signal_errors import (
    MeanWithInterval,
    camera_centre_error,
    camera_centres,
    depth_abs_rel,
    depth_delta,
    flow_end_point_error,
    motion_iou,
    ray_angle,
    signal_errors,
)


def video(*frames: list[float], channels: int = 1) -> torch.Tensor:
    """One video, given as frames of pixels in one row: `(1, channels, frames, 1, pixels)`; channels in turn."""
    return torch.tensor(frames).view(1, len(frames), channels, 1, -1).movedim(2, 1)


def test_depth_errors_by_hand():
    depth, truth = video([1.0, 3.0], [2.0, 8.0]), video([1.0, 2.0], [4.0, 7.0])
    # |d - t| / t: 0, 1/2, 1/2, 1/7; ratios: 1, 1.5, 2, 8/7
    assert depth_abs_rel(depth, truth).item() == pytest.approx((0 + 1 / 2 + 1 / 2 + 1 / 7) / 4)
    assert depth_delta(depth, truth).item() == 0.5


def test_depth_errors_leave_invalid_pixels_out():
    depth, truth = video([1.0, 3.0], [2.0, 5.0]), video([1.0, 2.0], [float("nan"), 0.0])
    valid = torch.tensor([[True, True], [False, False]]).view(1, 1, 2, 1, 2)
    assert depth_abs_rel(depth, truth, valid).item() == 0.25
    assert depth_delta(depth, truth, valid).item() == 0.5
    assert depth_abs_rel(depth, truth, torch.zeros_like(valid)).isnan().all()


def test_flow_error_by_hand_without_frame_0():
    flow = video([9.0, 9.0, 9.0, 9.0], [3.0, 1.0, 4.0, 1.0], channels=2)  # frame 1: (3, 4), (1, 1)
    truth = video([0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 3.0], channels=2)  # (0, 0), (1, 3)
    assert flow_end_point_error(flow, truth).item() == 3.5  # (5 + 2) / 2
    valid = torch.tensor([[True, True], [True, False]]).view(1, 1, 2, 1, 2)
    assert flow_end_point_error(flow, truth, valid).item() == 5.0


def test_motion_iou_by_hand():
    logit, truth = video([2.0, -1.0, 0.5, -3.0]), video([1.0, 1.0, 0.0, 0.0])
    assert motion_iou(logit, truth).item() == pytest.approx(1 / 3)
    still = torch.zeros(1, 1, 1, 1, 4)
    assert motion_iou(logit, still).item() == 0
    assert motion_iou(-torch.ones(1, 1, 1, 1, 4), still).isnan().all()


def test_ray_angle_by_hand():
    along_z = torch.tensor([0.0, 0, 1, 5, 5, 5]).view(1, 6, 1, 1, 1)
    tilted = torch.tensor([1.0, 0, 1, 0, 0, 0]).view(1, 6, 1, 1, 1)  # 45 degrees; length and moment do not count
    assert ray_angle(along_z, 3 * along_z).item() == 0
    assert ray_angle(tilted, along_z).item() == pytest.approx(45)
    assert ray_angle(torch.cat([tilted, along_z], dim=4), along_z.expand(1, 6, 1, 1, 2)).item() == pytest.approx(22.5)
    small = torch.tensor([math.tan(math.radians(0.01)), 0, 1, 0, 0, 0]).view(1, 6, 1, 1, 1)
    assert ray_angle(small, along_z).item() == pytest.approx(0.01, rel=1e-3)


def test_camera_centres_are_where_the_rays_come_from():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 3, generator=generator)
    direction = torch.randn(3, 5, 4, 4, generator=generator)  # of any length
    origin = centres.T[..., None, None].expand_as(direction)
    rays = torch.cat([direction, torch.linalg.cross(origin, direction, dim=0)])
    torch.testing.assert_close(camera_centres(rays).float(), centres, atol=1e-5, rtol=0)
    torch.testing.assert_close(camera_centres(torch.stack([rays, 2 * rays])), camera_centres(rays).expand(2, 5, 3))


def test_of_parallel_rays_the_centre_is_the_nearest_to_the_origin():
    direction = torch.tensor([0.0, 0, 1]).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    origin = torch.tensor([3.0, 0, 7]).view(3, 1, 1, 1).expand_as(direction)
    rays = torch.cat([direction, torch.linalg.cross(origin, direction, dim=0)])
    assert camera_centres(rays).tolist() == [pytest.approx([3, 0, 0], abs=1e-9)]


def test_camera_centre_error_by_hand():
    of_a_frame = torch.tensor([[0.0, 0, 1], [0.6, 0, 0.8]]).T  # two rays
    direction = of_a_frame.reshape(3, 1, 1, 2).repeat(1, 2, 1, 1)

    def rays(*places):
        origin = torch.tensor(places).T[..., None, None].expand_as(direction)
        return torch.cat([direction, torch.linalg.cross(origin, direction, dim=0)])[None]

    still, travelling = rays([0.0, 0, 0], [0, 0, 0]), rays([0.0, 0, 0], [0.3, 0, 0.4])
    assert camera_centre_error(still, still).item() == 0
    assert camera_centre_error(still, travelling).item() == pytest.approx(0.25)  # 0 m and 0.5 m off
    assert camera_centre_error(travelling, 2 * travelling).item() == pytest.approx(0, abs=1e-6)  # the same lines


def test_signal_errors_are_lists_with_one_value_a_video():
    generator = torch.Generator().manual_seed(0)
    shapes = {"depth": (1, 3, 8, 8), "flow": (2, 3, 8, 8), "motion": (1, 3, 8, 8), "camray": (6, 3, 2, 2)}
    truth = {name: torch.rand(2, *shape, generator=generator) + 0.1 for name, shape in shapes.items()}
    truth["motion"] = torch.stack([torch.ones(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)])
    errors = signal_errors({**{name: truth[name] for name in shapes}, "motion": truth["motion"] - 0.5}, truth)
    assert errors == {
        "depth_abs_rel": [0.0, 0.0],
        "depth_delta_1.25": [1.0, 1.0],
        "flow_epe_px": [0.0, 0.0],
        "motion_iou": [1.0, None],  # in the second video nothing moves, and nothing is said to
        "ray_angle_deg": [pytest.approx(0, abs=1e-3)] * 2,
        "camera_centre_m": [0.0, 0.0],
    }
    assert list(signal_errors({"flow": truth["flow"]}, truth)) == ["flow_epe_px"]


def test_signal_errors_refuse_what_cannot_be_compared():
    with pytest.raises(ValueError, match=r"depth is \(1, 1, 1, 1, 2\), but its truth is \(1, 1, 1, 1, 1\)"):
        signal_errors({"depth": video([1.0, 1.0])}, {"depth": video([1.0])})
    with pytest.raises(ValueError, match=r"truth has \['flow'\], but no depth"):
        signal_errors({"depth": video([1.0])}, {"flow": video([1.0])})


def test_interval_holds_the_mean_and_shrinks_with_n():
    few = MeanWithInterval.of([0.0, 1.0, None] * 10)
    many = MeanWithInterval.of([0.0, 1.0] * 1000)
    assert few.mean == many.mean == 0.5 and (few.n, many.n) == (20, 2000)
    assert few.low < 0.5 < few.high
    # The standard error of 20 fair coins is 0.112, of 2000 coins 0.0112; 1.96 of them to each side.
    assert few.high - few.low == pytest.approx(2 * 1.96 * 0.112, rel=0.15)
    assert many.high - many.low == pytest.approx(2 * 1.96 * 0.0112, rel=0.15)
    assert MeanWithInterval.of([2.0, 2.0]).as_dict() == {"mean": 2.0, "low": 2.0, "high": 2.0, "n": 2}
    with pytest.raises(ValueError, match="no value"):
        MeanWithInterval.of([None])
