import pytest
import torch
import torch.nn.functional as F

from modeling_rgpt4d.configuration_l4p import L4PConfig
from modeling_rgpt4d.modeling_l4p import SIGNALS, L4PModel
from trainer.losses import explicit_distillation_loss, latent_distillation_loss
from trainer.teachers import GroundTruthTeacher, L4PTeacher

HALF = (0.5, 0.5, 0.5)


def make_model() -> L4PModel:
    torch.manual_seed(0)
    return L4PModel(
        L4PConfig(
            image_size=16,
            patch_size=8,
            num_frames=4,
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=16,
            taps=(1, 2, 3, 4),
            feature_dim=4,
            layer_dims=(4, 4, 4, 4),
            last_dim=4,
        )
    )


@pytest.fixture
def teacher() -> L4PTeacher:
    return L4PTeacher(make_model(), depth_scale="metric")


def rgb_video(size: int, videos: int = 2) -> torch.Tensor:
    return torch.rand(videos, 4, 3, size, size, generator=torch.Generator().manual_seed(3))


def truth_for(teacher, videos: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"depth": (1, 4, 16, 16), "flow": (2, 4, 16, 16), "motion": (1, 4, 16, 16), "camray": (6, 4, 2, 2)}
    return {name: torch.rand(videos, *shape, generator=generator) for name, shape in shapes.items()}


def test_teacher_declares_its_conventions(teacher):
    assert (teacher.num_frames, teacher.image_size, teacher.latent_shape) == (4, 16, (4, 2, 2, 2, 16))
    assert (teacher.signals, teacher.depth_scale, teacher.motion_kind) == (SIGNALS, "metric", "logit")
    assert L4PTeacher(make_model()).depth_scale == "per_window_scale"  # what the released weights give


def test_perceived_targets_are_the_models_own_output(teacher):
    rgb = rgb_video(16)
    targets = teacher.perceive((rgb - 0.5) / 0.5, HALF, HALF)
    config = teacher.model.config
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.image_mean, config.image_std))
    with torch.no_grad():
        expected = teacher.model((rgb - mean) / std)
    torch.testing.assert_close(targets.latents, expected.latents, rtol=1e-4, atol=1e-5)
    assert list(targets.signals) == list(SIGNALS)
    for name in SIGNALS:
        torch.testing.assert_close(targets.signals[name], expected[name], rtol=1e-4, atol=1e-5)
    assert targets.valid == {} and not targets.latents.requires_grad


@pytest.mark.parametrize("size", [40, 10])
def test_student_frames_are_resized_and_normalised_again(teacher, size):
    rgb = rgb_video(size)
    student_mean, student_std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    normalised = (rgb - torch.tensor(student_mean).view(3, 1, 1)) / torch.tensor(student_std).view(3, 1, 1)
    prepared = teacher.prepare(normalised, student_mean, student_std)
    resized = F.interpolate(rgb.flatten(0, 1), size=(16, 16), mode="bilinear", antialias=True).unflatten(0, (2, 4))
    config = teacher.model.config
    expected = (resized - torch.tensor(config.image_mean).view(3, 1, 1)) / torch.tensor(config.image_std).view(3, 1, 1)
    torch.testing.assert_close(prepared, expected, rtol=1e-4, atol=1e-5)


def test_only_the_declared_signals_are_decoded():
    teacher = L4PTeacher(make_model(), signals=["camray", "depth"])
    assert teacher.signals == ("depth", "camray")
    calls = []
    for name, head in teacher.model.heads.items():
        head.register_forward_hook(lambda _m, _i, _o, name=name: calls.append(name))
    assert list(teacher.perceive(rgb_video(16, videos=1), HALF, HALF).signals) == ["depth", "camray"] == calls
    calls.clear()
    assert (
        list(teacher.perceive(rgb_video(16, videos=1), HALF, HALF, signals=["camray"]).signals) == ["camray"] == calls
    )
    latents_only = L4PTeacher(make_model(), signals=[]).perceive(rgb_video(16), HALF, HALF)
    assert latents_only.signals == {} and latents_only.latents is not None


def test_teacher_is_frozen_and_in_evaluation():
    model = make_model().train()
    teacher = L4PTeacher(model)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not isinstance(teacher, torch.nn.Module)  # so that no student can take it for a part of itself


def test_targets_do_not_depend_on_autocast(teacher):
    expected = teacher.perceive(rgb_video(16), HALF, HALF)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        targets = teacher.perceive(rgb_video(16), HALF, HALF)
        decoded = teacher.decode(expected.latents.bfloat16(), ["depth"])
    assert torch.equal(targets.latents, expected.latents)
    assert decoded["depth"].dtype == torch.float32


def test_distilled_latents_reach_the_teacher(teacher):
    targets = teacher.perceive(rgb_video(16), HALF, HALF)
    latents = torch.zeros_like(targets.latents, requires_grad=True)
    optimizer = torch.optim.Adam([latents], lr=0.1)
    weights = dict.fromkeys(SIGNALS, 1.0)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        explicit, _ = explicit_distillation_loss(
            teacher.decode(latents, SIGNALS), targets.signals, weights, targets.valid, teacher.motion_kind
        )
        loss = latent_distillation_loss(latents, targets.latents) + explicit
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_student_that_does_not_fit_is_refused_with_both_sides_named(teacher):
    teacher.check_student(4)
    teacher.check_student(4, [4, 2, 2, 2, 16])
    with pytest.raises(ValueError, match="samples 8 frames .* windows of 4: set num_frames"):
        teacher.check_student(8)
    with pytest.raises(ValueError, match=r"\(4, 2, 2, 2, 32\), but the teacher's are \(4, 2, 2, 2, 16\)"):
        teacher.check_student(4, (4, 2, 2, 2, 32))
    with pytest.raises(ValueError, match="samples 6 frames"):
        teacher.perceive(torch.zeros(1, 6, 3, 16, 16), HALF, HALF)
    with pytest.raises(ValueError, match=r"got \(4, 3, 16, 16\)"):
        teacher.perceive(torch.zeros(4, 3, 16, 16), HALF, HALF)
    with pytest.raises(ValueError, match=r"unknown signals \['dyn_mask'\]"):
        L4PTeacher(make_model(), signals=["dyn_mask"])
    with pytest.raises(ValueError, match="depth_scale must be"):
        L4PTeacher(make_model(), depth_scale="inverse")


def test_ground_truth_is_handed_on_with_its_masks(teacher):
    truth = truth_for(teacher) | {"flow_valid": torch.rand(2, 1, 4, 16, 16) > 0.5}
    ground_truth = GroundTruthTeacher(teacher)
    calls = []
    teacher.model.encoder.register_forward_hook(lambda *_: calls.append(1))
    targets = ground_truth.perceive(rgb_video(40), HALF, HALF, truth)
    assert targets.latents is None and calls == []
    for name in SIGNALS:
        assert torch.equal(targets.signals[name], truth[name])
    assert list(targets.valid) == ["flow"] and torch.equal(targets.valid["flow"], truth["flow_valid"])
    assert (ground_truth.depth_scale, ground_truth.motion_kind) == ("metric", "probability")
    assert ground_truth.latent_shape == teacher.latent_shape and ground_truth.num_frames == 4


def test_ground_truth_latents_are_the_frozen_encoders(teacher):
    targets = GroundTruthTeacher(teacher, latents=True).perceive(rgb_video(40), HALF, HALF, truth_for(teacher))
    assert torch.equal(targets.latents, teacher.perceive(rgb_video(40), HALF, HALF).latents)


def test_ground_truth_decodes_with_the_heads(teacher):
    latents = torch.randn(1, *teacher.latent_shape)
    decoded = GroundTruthTeacher(teacher).decode(latents, ["flow"])
    assert torch.equal(decoded["flow"], teacher.decode(latents, ["flow"])["flow"])


def test_ground_truth_that_does_not_fit_is_refused(teacher):
    ground_truth = GroundTruthTeacher(teacher)
    with pytest.raises(ValueError, match=r"\['motion'\] missing"):
        truth = truth_for(teacher)
        del truth["motion"]
        ground_truth.perceive(rgb_video(16), HALF, HALF, truth)
    with pytest.raises(ValueError, match="missing"):
        ground_truth.perceive(rgb_video(16), HALF, HALF)
    with pytest.raises(ValueError, match=r"depth is \(2, 1, 4, 8, 8\), but the heads give \(2, 1, 4, 16, 16\)"):
        ground_truth.perceive(rgb_video(16), HALF, HALF, truth_for(teacher) | {"depth": torch.ones(2, 1, 4, 8, 8)})
    with pytest.raises(ValueError, match="depth_scale 'per_window_scale'"):
        GroundTruthTeacher(L4PTeacher(make_model()), latents=True)
