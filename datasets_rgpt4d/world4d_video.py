"""Write rendered frames as an mp4 file with exact times."""

import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def _codec() -> tuple[str, dict[str, str]]:
    """H.264 where this build of FFmpeg has the encoder, else MPEG-4 Part 2. No B-frames: every frame is stored at its
    own time, without an edit list.
    """
    try:
        av.codec.Codec("libx264", "w")
    except ValueError:
        return "mpeg4", {"qscale": "2", "bf": "0"}
    # mbtree off: with it, one encoding in ten of the same 32 px clip differed (asm=0 also cures it).
    return "libx264", {"crf": "18", "preset": "veryfast", "bf": "0", "x264-params": "mbtree=0"}


def write_video(path: str | Path, frames: Iterable[np.ndarray], fps: int, size_px: int) -> None:
    """Encode `(size_px, size_px, 3)` uint8 RGB frames; frame k is shown at exactly k / fps seconds.

    One thread, so that the same build of FFmpeg writes the same bytes. The file is written beside its place and renamed
    when complete: a file that is there is whole, whatever interrupted an earlier run.
    Raises: `ValueError` for an odd size (yuv420p halves the colour planes) or a frame of another shape.
    """
    if size_px < 2 or size_px % 2:
        raise ValueError(f"The side of a video must be an even number of pixels, got {size_px}.")
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    name, options = _codec()
    try:
        with av.open(
            str(partial), "w", format="mp4", options={"fflags": "+bitexact", "movflags": "+faststart"}
        ) as container:
            stream = container.add_stream(name, rate=fps, options=options)
            stream.width = stream.height = size_px
            stream.pix_fmt = "yuv420p"
            stream.time_base = stream.codec_context.time_base = Fraction(1, fps)
            stream.codec_context.thread_count = 1
            for k, image in enumerate(frames):
                if image.shape != (size_px, size_px, 3):
                    raise ValueError(f"Frame {k} has shape {image.shape}, but the video's is {(size_px, size_px, 3)}.")
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                frame.pts, frame.time_base = k, Fraction(1, fps)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
