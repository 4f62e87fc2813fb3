import pytest
import torch

from trainer import teachers
from trainer.decoded_distillation import decoded_distillation, usable_windows, without
from trainer.losses import explicit_distillation_loss
from trainer.teachers import PerceptionTargets, windows_at_once

WEIGHTS = {"depth": 1.0, "flow": 0.1, "motion": 0.05, "camray": 0.05}


@pytest.fixture(autouse=True)
def two_at_once(teacher, monkeypatch):
    monkeypatch.setattr(
        teachers, "RELEASED_WINDOW", teacher.num_frames * teacher.image_size**2 * teacher.latent_shape[-1]
    )


def test_a_small_teacher_decodes_more_windows_at_once(teacher, monkeypatch):
    assert windows_at_once(teacher) == 2
    monkeypatch.setattr(teachers, "RELEASED_WINDOW", 50 * teachers.RELEASED_WINDOW)
    assert windows_at_once(teacher) == 100


@pytest.fixture
def targets(teacher):
    frames = torch.rand(3, 4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    found = teacher.perceive(frames, [0.5] * 3, [0.5] * 3)
    found.valid["depth"] = torch.rand(3, 1, 4, 16, 16, generator=torch.Generator().manual_seed(4)) > 0.3
    return found


@pytest.fixture
def latents(teacher):
    return torch.randn(3, *teacher.latent_shape, generator=torch.Generator().manual_seed(3), requires_grad=True)


def test_values_and_gradients_equal_those_of_one_pass_over_the_batch(teacher, targets, latents):
    decoded = teacher.decode(latents, tuple(WEIGHTS))
    whole, values = explicit_distillation_loss(
        decoded, targets.signals, WEIGHTS, targets.valid, teacher.motion_kind, reduction="none"
    )
    of_windows = torch.tensor([0.2, 1.0, 3.0])
    (expected,) = torch.autograd.grad((of_windows * whole).sum(), latents)
    terms = decoded_distillation(teacher, latents, targets, list(WEIGHTS), list(WEIGHTS))
    for name, value in values.items():
        torch.testing.assert_close(terms[name].detach(), value)
    (found,) = torch.autograd.grad((of_windows * sum(WEIGHTS[n] * terms[n] for n in terms)).sum(), latents)
    torch.testing.assert_close(found, expected)


def test_watched_signals_have_no_gradient_and_no_graph_without_autograd(teacher, targets, latents):
    terms = decoded_distillation(teacher, latents, targets, ["depth", "flow"], ["flow"])
    assert not terms["depth"].requires_grad and terms["flow"].requires_grad
    with torch.no_grad():
        terms = decoded_distillation(teacher, latents, targets, ["depth", "flow"], ["flow"])
    assert not terms["flow"].requires_grad and (terms["flow"] > 0).all()


def test_one_head_on_few_windows_is_alive_at_a_time(teacher, targets, latents):
    """The memory that the design promises: what a head saved for its backward pass is gone before the next head runs."""
    alive, most = set(), 0

    class Saved:
        pass

    def pack(tensor):
        nonlocal most
        handle = Saved()
        alive.add(id(handle))
        handle.tensor, handle.release = tensor, Released(alive, id(handle))
        most = max(most, len(alive))
        return handle

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda handle: handle.tensor):
        decoded_distillation(teacher, latents[: windows_at_once(teacher)], targets, ["depth"], ["depth"])
        of_one, most = most, 0
        decoded_distillation(teacher, latents, targets, list(WEIGHTS), list(WEIGHTS))
    assert of_one <= most <= of_one + 8  # heads differ by some tensors; four at once would be four times as many


class Released:
    def __init__(self, alive, key):
        self.alive, self.key = alive, key

    def __del__(self):
        self.alive.discard(self.key)


def test_windows_with_targets_that_are_not_finite_are_found(targets):
    signals = list(WEIGHTS)
    assert usable_windows(targets, signals, True).tolist() == [True] * 3
    targets.signals["flow"][0, :, 0] = torch.nan  # frame 0 has no flow, whatever stands there
    targets.signals["depth"][~targets.valid["depth"]] = torch.inf
    assert usable_windows(targets, signals, True).tolist() == [True] * 3
    targets.signals["flow"][1, 0, 2, 3, 3] = torch.nan
    targets.latents[2, 0, 0, 0, 0, 0] = -torch.inf
    assert usable_windows(targets, signals, True).tolist() == [True, False, False]
    assert usable_windows(targets, ["depth"], False).tolist() == [True] * 3


def test_replaced_windows_are_finite_and_others_untouched(targets):
    kept = targets.latents[0].clone()
    targets.latents[1] = torch.nan
    filled = without(targets, torch.tensor([True, False, True]))
    assert torch.equal(filled.latents[0], kept) and filled.latents.isfinite().all()
    assert without(PerceptionTargets(latents=None), torch.tensor([True])).latents is None
