"""Teachers: what they perceive in a video (Eq. 1, 2 of arXiv 2512.17012), and in a student's latents (Eq. 4).

A teacher declares what it gives and in which convention, so that losses never guess:

- `num_frames`, `image_size`: the window it sees, and the grid of its full-resolution signals.
- `latent_shape`: `(taps, N', h', w', c')` of one video.
- `signals`: names of the signals it gives. Shapes, units and axes are those of
  `modeling_rgpt4d.modeling_l4p.L4POutput`: flow is backward in pixels of the teacher's grid, rays are direction and
  moment in the frame of the first camera.
- `depth_scale`: "metric" (metres) or "per_window_scale" (each window has an unknown scale of its own).
- `motion_kind`: "logit" or "probability".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_rgpt4d.modeling_l4p import SIGNAL_CHANNELS, SIGNALS, L4PModel

DepthScale = Literal["metric", "per_window_scale"]


@dataclass
class PerceptionTargets:
    """What a teacher perceives in V videos.

    latents: `(V, taps, N', h', w', c')`, or `None` if the teacher has none.
    signals: signal -> `(V, channels, N, H, W)` float32.
    valid: signal -> bool mask, broadcastable to that signal; a signal left out is valid everywhere.
    """

    latents: Tensor | None
    signals: dict[str, Tensor] = field(default_factory=dict)
    valid: dict[str, Tensor] = field(default_factory=dict)


class Teacher(Protocol):
    """What [`P4DTrainer`] needs of a teacher; see the module for the attributes."""

    num_frames: int
    image_size: int
    latent_shape: tuple[int, ...]
    signals: tuple[str, ...]
    depth_scale: DepthScale
    motion_kind: Literal["logit", "probability"]

    def to(self, device: torch.device | str) -> "Teacher": ...

    def check_student(self, num_frames: int, latent_shape: Sequence[int] | None = None) -> None: ...

    def perceive(
        self,
        pixel_values_videos: Tensor,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        targets: Mapping[str, Tensor] | None = None,
        signals: Sequence[str] | None = None,
    ) -> PerceptionTargets: ...

    def decode(self, latents: Tensor, signals: Sequence[str]) -> dict[str, Tensor]: ...


class L4PTeacher:
    """The 4D perception model, frozen.

    A plain class, not a module: whatever holds a teacher neither trains, saves nor shards it. Move it with `to`.

    Args:
        model: the perception model; frozen and set to evaluation here.
        depth_scale: "per_window_scale" for the released weights; "metric" for a model trained on metres.
        signals: the signals to give, all four by default. The heads of the others never run; none at all is fine where
            only latents are distilled.
    """

    motion_kind = "logit"

    def __init__(self, model: L4PModel, depth_scale: DepthScale = "per_window_scale", signals: Sequence[str] = SIGNALS):
        unknown = [signal for signal in signals if signal not in SIGNALS]
        if unknown:
            raise ValueError(f"unknown signals {unknown}; a teacher can give {list(SIGNALS)}")
        if depth_scale not in ("metric", "per_window_scale"):
            raise ValueError(f"depth_scale must be 'metric' or 'per_window_scale'; got {depth_scale!r}")
        self.model = model.eval().requires_grad_(False)
        # Half as much time again on tensor cores: 520 to 760 TFLOP/s in bfloat16, and 420 to 600 without.
        self.model.heads.to(memory_format=torch.channels_last_3d)
        self.depth_scale = depth_scale
        self.signals = tuple(signal for signal in SIGNALS if signal in signals)  # one order everywhere
        self.num_frames: int = model.config.num_frames
        self.image_size: int = model.config.image_size
        self.latent_shape: tuple[int, ...] = model.config.latent_shape

    def to(self, device: torch.device | str) -> "L4PTeacher":
        self.model.to(device)
        return self

    def compile_layers(self) -> None:
        """`torch.compile` the layers of the encoder and the heads, each for itself, when they run for the first time."""
        encoder = self.model.encoder  # None where a CachedTeacher took it out
        for module in (*(encoder.layers if encoder is not None else ()), *self.model.heads.values()):
            module.compile()

    def check_student(self, num_frames: int, latent_shape: Sequence[int] | None = None) -> None:
        """Raise `ValueError` if a student cannot learn from this teacher.

        Args:
            num_frames: frames that the student's processor samples from a video.
            latent_shape: shape of the latents that the student's perception decoder gives, `(taps, N', h', w', c')`.
        """
        if num_frames != self.num_frames:
            raise ValueError(
                f"the student samples {num_frames} frames of a video, but the teacher sees windows of "
                f"{self.num_frames}: set num_frames of the processor to {self.num_frames}, or use a teacher of "
                f"{num_frames} frames"
            )
        if latent_shape is not None and tuple(latent_shape) != tuple(self.latent_shape):
            raise ValueError(
                f"the student's perception decoder gives latents of shape {tuple(latent_shape)}, but the teacher's are "
                f"{tuple(self.latent_shape)} (taps, frames, height, width, channels): make the decoder with the latter"
            )

    def prepare(self, pixel_values_videos: Tensor, image_mean: Sequence[float], image_std: Sequence[float]) -> Tensor:
        """The student's frames as the teacher's input: `(V, N, 3, H, W)` -> `(V, N, 3, size, size)` float32.

        The student's normalisation is undone, the frames are resized (bilinear, with antialias, without keeping the
        aspect ratio, as the authors' demo does), and normalised again with the teacher's constants.
        """
        if pixel_values_videos.ndim != 5 or pixel_values_videos.shape[2] != 3:
            raise ValueError(
                f"videos must be (videos, frames, 3, height, width); got {tuple(pixel_values_videos.shape)}"
            )
        self.check_student(pixel_values_videos.shape[1])
        config = self.model.config
        frames = pixel_values_videos.flatten(0, 1).float()
        student_mean, student_std, mean, std = (
            frames.new_tensor(values).view(1, 3, 1, 1)
            for values in (image_mean, image_std, config.image_mean, config.image_std)
        )
        # Resizing keeps constants, so the two normalisations are one scale and one shift, done on the smaller frames.
        if tuple(frames.shape[2:]) != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            frames = F.interpolate(frames, size=size, mode="bilinear", align_corners=False, antialias=True)
        frames = frames * (student_std / std) + (student_mean - mean) / std
        return frames.unflatten(0, pixel_values_videos.shape[:2])

    @torch.no_grad()
    def perceive(
        self,
        pixel_values_videos: Tensor,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        targets: Mapping[str, Tensor] | None = None,
        signals: Sequence[str] | None = None,
    ) -> PerceptionTargets:
        """Eq. 1 and 2 for a batch of videos.

        Args:
            pixel_values_videos: `(V, N, 3, H, W)`, RGB frames as the student gets them, on the teacher's device.
            image_mean, image_std: the student's normalisation.
            targets: what the batch carries; not used by this teacher.
            signals: those of its signals to give, all by default; the heads of the others do not run.
        """
        with _without_autocast(pixel_values_videos):
            latents = self.model.encode(self.prepare(pixel_values_videos, image_mean, image_std))
            wanted = self.signals if signals is None else signals
            decoded = [self.model.decode(part, wanted) for part in latents.split(windows_at_once(self))]
        return PerceptionTargets(
            latents=latents, signals={name: torch.cat([one[name] for one in decoded]) for name in wanted}
        )

    def decode(self, latents: Tensor, signals: Sequence[str]) -> dict[str, Tensor]:
        """Eq. 4: the frozen heads on a student's latents `(V, taps, N', h', w', c')`, to which gradients flow."""
        with _without_autocast(latents):
            return self.model.decode(latents, signals)


class GroundTruthTeacher:
    """Signals that the data set knows exactly, as of rendered scenes. Depth is in metres, motion a probability.

    Args:
        heads: whose heads read the student's latents, and whose shapes the signals have.
        latents: also give the frozen encoder's latents as a target; `False` leaves `PerceptionTargets.latents` empty
            and never runs it. The heads must then speak of metres too: else latents and depth would pull the student to
            different scales.
    """

    depth_scale = "metric"
    motion_kind = "probability"

    def __init__(self, heads: L4PTeacher, latents: bool = False):
        if latents and "depth" in heads.signals and heads.depth_scale != self.depth_scale:
            raise ValueError(
                "the data set's depth is metric, but the heads read the encoder's latents as depth_scale "
                f"{heads.depth_scale!r}: leave out the latents, or the depth, or use heads trained on metric depth"
            )
        self.heads = heads
        self.gives_latents = latents
        self.signals = heads.signals
        self.num_frames = heads.num_frames
        self.image_size = heads.image_size
        self.latent_shape = heads.latent_shape

    def to(self, device: torch.device | str) -> "GroundTruthTeacher":
        self.heads.to(device)
        return self

    def compile_layers(self) -> None:
        """As [`L4PTeacher.compile_layers`]."""
        self.heads.compile_layers()

    def check_student(self, num_frames: int, latent_shape: Sequence[int] | None = None) -> None:
        """As [`L4PTeacher.check_student`]."""
        self.heads.check_student(num_frames, latent_shape)

    def signal_shape(self, signal: str) -> tuple[int, int, int, int]:
        """`(channels, N, H, W)` of one video's signal."""
        side = self.latent_shape[2] if signal == "camray" else self.image_size
        return (SIGNAL_CHANNELS[signal], self.num_frames, side, side)

    @torch.no_grad()
    def perceive(
        self,
        pixel_values_videos: Tensor,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        targets: Mapping[str, Tensor] | None = None,
        signals: Sequence[str] | None = None,
    ) -> PerceptionTargets:
        """The truth of a batch of videos, checked and on their device.

        Args:
            pixel_values_videos, image_mean, image_std: as in [`L4PTeacher.perceive`]; read for the latents only.
            targets: signal -> `(V, channels, N, H, W)`, for every one of `signals`, on the teacher's grids. Masks are
                optional: `depth_valid`, `flow_valid`, `motion_valid`, `camray_valid`, bool, broadcast to their signal.
            signals: those of its signals to give, all by default.
        """
        num_videos, device = len(pixel_values_videos), pixel_values_videos.device
        truth = targets or {}
        wanted = self.signals if signals is None else signals
        missing = [signal for signal in wanted if signal not in truth]
        if missing:
            raise ValueError(
                f"the batch carries the truth of {sorted(truth)}, but the teacher is to give {list(wanted)}: "
                f"{missing} missing"
            )
        targets = PerceptionTargets(latents=None)
        for signal in wanted:
            expected = (num_videos, *self.signal_shape(signal))
            if tuple(truth[signal].shape) != expected:
                raise ValueError(
                    f"the batch's {signal} is {tuple(truth[signal].shape)}, but the heads give {expected} (videos, "
                    "channels, frames, height, width): render the truth on the teacher's grids"
                )
            targets.signals[signal] = truth[signal].to(device=device, dtype=torch.float32)
            if f"{signal}_valid" in truth:
                targets.valid[signal] = truth[f"{signal}_valid"].to(device)
        if self.gives_latents:
            with _without_autocast(pixel_values_videos):
                frames = self.heads.prepare(pixel_values_videos, image_mean, image_std)
                targets.latents = self.heads.model.encode(frames)
        return targets

    def decode(self, latents: Tensor, signals: Sequence[str]) -> dict[str, Tensor]:
        """As [`L4PTeacher.decode`]."""
        return self.heads.decode(latents, signals)


# A head's activations are a hundred times larger than what it gives: at the released size it keeps 1.5 GiB a window for its
# backward pass, in bfloat16. Measured there on one H100, four windows, all heads forward and backward: 210 ms one by one,
# where launching the kernels takes longer than running them, 146 ms by two, 139 ms all at once.
WINDOWS_AT_ONCE = 2
RELEASED_WINDOW = 16 * 224**2 * 1408  # pixels of a window times the width of its latents


def windows_at_once(teacher: Teacher) -> int:
    """Windows that its heads decode together: two of the released teacher, as many more as another one is smaller."""
    window = teacher.num_frames * teacher.image_size**2 * teacher.latent_shape[-1]
    return max(1, WINDOWS_AT_ONCE * RELEASED_WINDOW // window)


def _without_autocast(tensor: Tensor) -> torch.autocast:
    """A teacher computes in its own dtype, so that its targets do not depend on the student's mixed precision."""
    return torch.autocast(device_type=tensor.device.type, enabled=False)
