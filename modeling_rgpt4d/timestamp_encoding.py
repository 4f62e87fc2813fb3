"""Timestamp Positional Encoding: what tells 4D-RGPT when each frame was taken (Eq. 5 of arXiv 2512.17012)."""

import torch
from torch import nn

MAX_TIMESCALE = 10_000  # T of Eq. 5; "we use T=10,000" (paper, A1.1)

TPE_LAYOUTS = ("interleaved", "halves")


class TimestampEncoding(nn.Module):
    r"""Sinusoidal code of a moment in seconds, without learned parameters. With D = `dim` and T = `max_timescale`:

    $$ p[2i] = \sin(t / T^{2i/D}), \quad p[2i+1] = \cos(t / T^{2i/D}), \quad i = 0 \dots D/2 - 1 $$

    Precision: everything is float32, whatever the model's dtype is, because the angle of the fastest channel (i = 0) is
    the time in seconds itself: bfloat16 steps by 0.5 s at t = 100 s and could not tell neighbouring frames apart. The
    divisors are computed in float64 and rounded once, so an angle is off by at most 2^-23 of itself, beside the
    rounding of t, which a float32 holds to 0.12 ms at t = 1 hour.

    Args:
        dim: D, the width of the vision features that the code is added to; even.
        layout: `"interleaved"` is Eq. 5. `"halves"` has the same numbers, all sines before all cosines, as in the
            authors' release.
        max_timescale: T; the slowest channel turns once in almost 2 pi T seconds.

    Raises: `ValueError` for an odd or non-positive `dim` and for an unknown `layout`.
    """

    def __init__(self, dim: int, layout: str = "interleaved", max_timescale: float = MAX_TIMESCALE):
        super().__init__()
        if dim <= 0 or dim % 2:
            raise ValueError(f"the timestamp encoding pairs sines with cosines: dim must be even, not {dim}")
        if layout not in TPE_LAYOUTS:
            raise ValueError(f"unknown layout {layout!r} of the timestamp encoding; choose one of {TPE_LAYOUTS}")
        self.dim = dim
        self.layout = layout
        self.max_timescale = max_timescale

    def forward(self, seconds: torch.Tensor) -> torch.Tensor:
        """Encode `seconds`, float32 or float64, of any shape `(...)`, as `(..., dim)` float32 on the same device.

        Raises: `ValueError` for any other dtype: the caller must not have rounded the time before.
        """
        if seconds.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"seconds must be float32 or float64 to keep frames apart, not {seconds.dtype}")
        # Not a buffer: `from_pretrained` builds models on the meta device, where a non-persistent buffer loses its
        # values. On the CPU, so that float64 exists everywhere and all devices divide by the same numbers.
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float64, device="cpu") / self.dim
        divisors = (self.max_timescale**exponents).to(device=seconds.device, dtype=torch.float32)
        angles = seconds.to(torch.float32).unsqueeze(-1) / divisors
        if self.layout == "halves":
            return torch.cat((angles.sin(), angles.cos()), dim=-1)
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, layout={self.layout!r}, max_timescale={self.max_timescale}"


__all__ = ["TimestampEncoding"]
