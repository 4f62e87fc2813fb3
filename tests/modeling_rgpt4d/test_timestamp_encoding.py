import math

import pytest
import torch

from modeling_rgpt4d.timestamp_encoding import MAX_TIMESCALE, TimestampEncoding


def equation_5(t: float, dim: int) -> list[float]:
    """p[0], p[1], ... written as in the paper, in Python's double precision."""
    values = []
    for i in range(dim // 2):
        angle = t / MAX_TIMESCALE ** (2 * i / dim)
        values += [math.sin(angle), math.cos(angle)]
    return values


def test_interleaved_values_by_hand():
    # D = 4: the divisors are 10000^0 = 1 and 10000^(2/4) = 100
    encoding = TimestampEncoding(4)(torch.tensor([0.0, 2.0]))
    expected = [[0.0, 1.0, 0.0, 1.0], [math.sin(2), math.cos(2), math.sin(0.02), math.cos(0.02)]]
    torch.testing.assert_close(encoding, torch.tensor(expected), atol=1e-7, rtol=0)


def test_halves_values_by_hand():
    encoding = TimestampEncoding(4, layout="halves")(torch.tensor([0.0, 2.0]))
    expected = [[0.0, 0.0, 1.0, 1.0], [math.sin(2), math.sin(0.02), math.cos(2), math.cos(0.02)]]
    torch.testing.assert_close(encoding, torch.tensor(expected), atol=1e-7, rtol=0)


def test_layouts_are_a_permutation_of_each_other():
    seconds = torch.rand(5) * 60
    interleaved = TimestampEncoding(32)(seconds)
    halves = TimestampEncoding(32, layout="halves")(seconds)
    assert torch.equal(interleaved[:, 0::2], halves[:, :16])
    assert torch.equal(interleaved[:, 1::2], halves[:, 16:])
    assert not torch.equal(interleaved, halves)


def test_shape_dtype_and_contents():
    module = TimestampEncoding(1152)
    encoding = module(torch.arange(16, dtype=torch.float64))
    assert encoding.shape == (16, 1152) and encoding.dtype == torch.float32
    assert not list(module.parameters()) and not list(module.buffers())


@pytest.mark.parametrize("t", [0.1, 33.366667, 3600.04, 86_400.04])
def test_large_times_are_exact_to_float32(t):
    # t itself is rounded to float32 by the caller; what is tested is what the encoding adds to that
    seconds = torch.tensor([t], dtype=torch.float32)
    encoding = TimestampEncoding(64)(seconds)[0].double()
    expected = torch.tensor(equation_5(seconds.item(), 64), dtype=torch.float64)
    # documented: the angle, at most t, is off by at most 2^-23 of itself; sine and cosine round once more
    assert (encoding - expected).abs().max() <= t * 2**-23 + 2**-23
    # the fastest channel divides by exactly one and has the full precision at any time
    assert (encoding[:2] - expected[:2]).abs().max() <= 2**-23


def test_neighbouring_frames_stay_apart_after_an_hour():
    seconds = 3600 + torch.arange(4, dtype=torch.float64) / 30
    encoding = TimestampEncoding(64)(seconds.float())
    difference = (encoding[1:] - encoding[:-1]).abs().amax(-1)
    assert (difference > 0.01).all()
    # ... which bfloat16 could not represent: this is why the seconds are refused below
    assert len(seconds.bfloat16().unique()) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_rounded_seconds_are_refused(dtype):
    with pytest.raises(ValueError, match="float32"):
        TimestampEncoding(8)(torch.ones(2, dtype=dtype))


@pytest.mark.parametrize("dim", [7, 0])
def test_odd_dim_is_refused(dim):
    with pytest.raises(ValueError, match="even"):
        TimestampEncoding(dim)


def test_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="interleaved"):
        TimestampEncoding(8, layout="half")


def test_dtype_and_meta_device_of_the_model_do_not_matter():
    with torch.device("meta"):
        module = TimestampEncoding(16)
    seconds = torch.tensor([1.5, 2.5])
    assert torch.equal(module.bfloat16()(seconds), TimestampEncoding(16)(seconds))
