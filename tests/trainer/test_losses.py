import math

import pytest
import torch

from trainer.losses import explicit_distillation_loss, latent_distillation_loss

# Smooth-L1 with beta 1: 0.5 d^2 for |d| < 1, |d| - 0.5 beyond. So 0.5 -> 0.125, 1 -> 0.5, 2 -> 1.5, 3 -> 2.5.


def signal(*values: list[list[float]], channels: int = 1) -> torch.Tensor:
    """Videos given as frames of pixels in one row: `(batch, channels, frames, 1, pixels / channels)`."""
    video = torch.tensor(values)
    return video.unflatten(2, (channels, -1)).movedim(2, 1).unsqueeze(3).requires_grad_()


def test_latent_loss_by_hand():
    student = torch.zeros(2, 2, 2, 1, 1, 2)  # 2 videos, 2 taps, 2 latent frames, 1 x 1, 2 channels
    teacher = torch.zeros(2, 2, 2, 1, 1, 2)
    teacher[0, 0, 0] = torch.tensor([1.0, 2.0])  # frame mean (0.5 + 1.5) / 2 = 1
    teacher[0, 0, 1] = torch.tensor([3.0, 0.0])  # frame mean 2.5 / 2 = 1.25; tap 0: 1 + 1.25 = 2.25
    teacher[0, 1, 0] = torch.tensor([0.5, 0.5])  # frame mean 0.125;          tap 1: 0.125
    # Video 0: mean over taps (2.25 + 0.125) / 2 = 1.1875. Video 1: 0.
    per_video = latent_distillation_loss(student, teacher, reduction="none")
    assert per_video.tolist() == [1.1875, 0.0]
    assert latent_distillation_loss(student, teacher).item() == 1.1875 / 2


def test_latent_loss_is_a_sum_over_frames_and_a_mean_inside():
    student, teacher = torch.zeros(1, 4, 2, 3, 3, 5), torch.ones(1, 4, 2, 3, 3, 5)
    assert latent_distillation_loss(student, teacher).item() == 2 * 0.5
    three_times = (1, 1, 3, 1, 1, 1)
    assert latent_distillation_loss(student.repeat(three_times), teacher.repeat(three_times)).item() == 6 * 0.5


def test_latent_loss_trains_the_student_only():
    student = torch.zeros(1, 1, 1, 1, 1, 2, requires_grad=True)
    teacher = torch.tensor([0.5, 3.0]).view(1, 1, 1, 1, 1, 2).requires_grad_()
    latent_distillation_loss(student, teacher).backward()
    assert student.grad.flatten().tolist() == [-0.25, -0.5]  # (-0.5, -1) over two channels
    assert teacher.grad is None


def test_latent_loss_is_computed_in_float32():
    student = torch.full((1, 1, 1, 8, 8, 64), 1.0, dtype=torch.bfloat16)
    loss = latent_distillation_loss(student, torch.full((1, 1, 1, 8, 8, 64), 3.0))
    assert loss.dtype == torch.float32 and loss.item() == 1.5


def test_latent_loss_names_both_shapes():
    with pytest.raises(ValueError, match=r"student's are \(1, 4, 8, 4, 4, 5\), the teacher's \(1, 4, 8, 4, 4, 6\)"):
        latent_distillation_loss(torch.zeros(1, 4, 8, 4, 4, 5), torch.zeros(1, 4, 8, 4, 4, 6))


def test_explicit_loss_by_hand():
    student = {
        "depth": signal([[1.0, math.e], [1.0, 1.0]]),
        "camray": signal([[0.0, 0.0], [0.0, 4.0]]),
    }
    teacher = {
        # log distances: frame 0: 0.5 and 0 -> mean 0.125 / 2 = 0.0625; frame 1: 3 and 1 -> mean (2.5 + 0.5) / 2 = 1.5
        "depth": signal([[math.exp(0.5), math.e], [math.exp(3.0), math.exp(-1.0)]]),
        # frame 0: (0.5 + 0) / 2 = 0.25; frame 1: (0 + 1.5) / 2 = 0.75
        "camray": signal([[1.0, 0.0], [0.0, 2.0]]),
    }
    loss, terms = explicit_distillation_loss(student, teacher, {"depth": 1.0, "camray": 0.05})
    assert terms["depth"].item() == pytest.approx(1.5625, abs=1e-5)
    assert terms["camray"].item() == pytest.approx(1.0)
    assert loss.item() == pytest.approx(1.5625 + 0.05 * 1.0, abs=1e-5)
    assert not any(term.requires_grad for term in terms.values())


def test_explicit_loss_of_each_video_and_their_mean():
    student = {"camray": signal([[0.0, 0.0]], [[0.0, 0.0]])}
    teacher = {"camray": signal([[1.0, 1.0]], [[3.0, 3.0]])}
    loss, terms = explicit_distillation_loss(student, teacher, {"camray": 2.0}, reduction="none")
    assert loss.tolist() == [1.0, 5.0] and terms["camray"].tolist() == [0.5, 2.5]
    loss, terms = explicit_distillation_loss(student, teacher, {"camray": 2.0})
    assert loss.item() == 3.0 and terms["camray"].item() == 1.5


def test_flow_of_frame_0_is_masked():
    student = {"flow": signal([[0.0, 0.0], [0.0, 0.0]], channels=2)}
    teacher = {"flow": signal([[9.0, float("nan")], [1.0, 3.0]], channels=2)}
    loss, _ = explicit_distillation_loss(student, teacher, {"flow": 1.0})
    loss.backward()
    assert loss.item() == 1.5  # frame 1: (0.5 + 2.5) / 2
    gradient = student["flow"].grad
    assert gradient[0, :, 0].flatten().tolist() == [0.0, 0.0]
    assert gradient[0, :, 1].flatten().tolist() == [-0.5, -0.5]


def test_invalid_pixels_have_no_weight_and_no_gradient():
    student = {"depth": signal([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])}
    teacher = {"depth": signal([[math.e**2, 0.0, float("nan")], [0.0, float("inf"), -1.0]])}
    valid = {"depth": torch.tensor([[True, False, False], [False, False, False]]).view(1, 1, 2, 1, 3)}
    loss, _ = explicit_distillation_loss(student, teacher, {"depth": 1.0}, valid=valid)
    loss.backward()
    # frame 0 has one valid pixel: |0 - 2| - 0.5; frame 1 has none and adds nothing
    assert loss.item() == pytest.approx(1.5)
    torch.testing.assert_close(student["depth"].grad.flatten(), torch.tensor([-1.0, 0, 0, 0, 0, 0]))


def test_valid_mask_of_one_channel_covers_both_of_flow():
    student = {"flow": signal([[0.0] * 4, [0.0] * 4], channels=2)}
    teacher = {"flow": signal([[0.0] * 4, [1.0, 8.0, 3.0, 8.0]], channels=2)}  # u = 1, 8; v = 3, 8
    valid = {"flow": torch.tensor([[True, True], [True, False]]).view(1, 1, 2, 1, 2)}
    loss, _ = explicit_distillation_loss(student, teacher, {"flow": 1.0}, valid=valid)
    assert loss.item() == 1.5  # the valid pixel's (0.5 + 2.5) / 2 channels


def test_motion_is_compared_in_the_teachers_kind():
    student = {"motion": signal([[0.0, 2.0]])}
    logits = {"motion": signal([[1.0, 0.0]])}
    loss, _ = explicit_distillation_loss(student, logits, {"motion": 1.0}, motion_kind="logit")
    assert loss.item() == 1.0  # (0.5 + 1.5) / 2
    loss, _ = explicit_distillation_loss(
        student, {"motion": signal([[1.0, 1.0]])}, {"motion": 1.0}, motion_kind="probability"
    )
    sigmoid_2 = 1 / (1 + math.exp(-2))
    assert loss.item() == pytest.approx((0.5 * 0.5**2 + 0.5 * (1 - sigmoid_2) ** 2) / 2)


def test_masked_motion_probability_adds_nothing():
    student = {"motion": signal([[5.0, 0.0]])}
    valid = {"motion": torch.tensor([False, True]).view(1, 1, 1, 1, 2)}
    teacher = {"motion": signal([[0.0, 1.0]])}
    loss, _ = explicit_distillation_loss(student, teacher, {"motion": 1.0}, valid, motion_kind="probability")
    loss.backward()
    assert loss.item() == pytest.approx(0.125)
    assert student["motion"].grad.flatten()[0] == 0


def test_zero_or_missing_weight_reports_without_gradient():
    student = {"depth": signal([[1.0]]), "camray": signal([[0.0]]), "motion": signal([[0.0]])}
    teacher = {"depth": signal([[math.e]]), "camray": signal([[3.0]]), "motion": signal([[1.0]])}
    loss, terms = explicit_distillation_loss(student, teacher, {"depth": 1.0, "camray": 0.0})
    assert loss.item() == pytest.approx(0.5)
    assert terms["camray"].item() == 2.5 and terms["motion"].item() == 0.5
    loss.backward()
    assert student["depth"].grad.abs().sum() > 0
    assert student["camray"].grad is None and student["motion"].grad is None


def test_nothing_weighted_is_a_zero_loss_with_reports():
    loss, terms = explicit_distillation_loss({"camray": signal([[0.0]])}, {"camray": signal([[3.0]])}, {})
    assert loss.item() == 0 and not loss.requires_grad and terms["camray"].item() == 2.5


def test_student_and_teacher_must_agree():
    depth = {"depth": signal([[1.0]])}
    with pytest.raises(ValueError, match=r"depth .* student's is \(1, 1, 1, 1, 1\), the teacher's \(1, 1, 1, 1, 2\)"):
        explicit_distillation_loss(depth, {"depth": signal([[1.0, 1.0]])}, {"depth": 1.0})
    with pytest.raises(ValueError, match=r"gives \['flow'\], so the student's \['depth'\]"):
        explicit_distillation_loss(depth, {"flow": signal([[1.0]])}, {"depth": 1.0})
    with pytest.raises(ValueError, match=r"\['flow'\] have a weight, but the student gives \['depth'\]"):
        explicit_distillation_loss(depth, depth, {"depth": 1.0, "flow": 0.1})
    with pytest.raises(ValueError, match="mask of depth must be bool"):
        explicit_distillation_loss(depth, depth, {"depth": 1.0}, valid={"depth": torch.ones(1, 1, 1, 1, 1)})
    with pytest.raises(ValueError, match=r"mask of depth, \(1, 1, 1, 1, 3\), does not broadcast to \(1, 1, 1, 1, 1\)"):
        valid = {"depth": torch.ones(1, 1, 1, 1, 3, dtype=torch.bool)}
        explicit_distillation_loss(depth, depth, {"depth": 1.0}, valid=valid)
    with pytest.raises(ValueError, match="reduction must be"):
        explicit_distillation_loss(depth, depth, {"depth": 1.0}, reduction="sum")
    with pytest.raises(ValueError, match="motion_kind must be"):
        explicit_distillation_loss(depth, depth, {"depth": 1.0}, motion_kind="mask")
    with pytest.raises(ValueError, match="at least one signal"):
        explicit_distillation_loss({}, depth, {})
