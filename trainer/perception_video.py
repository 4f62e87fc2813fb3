"""A video of what is perceived: frames and maps side by side, each at its own time."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from huggingface_hub.utils import tqdm
from PIL import Image, ImageDraw, ImageFont

from .perception_pictures import NO_EARLIER_FRAME, PerceivedVideo

PANEL_HEIGHT, LABEL_HEIGHT = 224, 20  # pixels, even: yuv420p halves the colour planes
TICKS = 60_000  # a second: exact for the usual frame rates, and MPEG-4 takes no more than 65,535


def write_perception_video(path: str | os.PathLike, video: PerceivedVideo, show_progress: bool = False) -> None:
    """Write an mp4 with the frames and the signals of each side beside them; the ranges of colours are those of the whole
    video, so that nothing flickers.

    H.264 where this build of FFmpeg has the encoder, else MPEG-4 Part 2.

    Args:
        path: written whole or not at all.
        show_progress: show a bar over the frames.

    Raises: `ValueError` if the times of the frames do not rise.
    """
    ticks = np.rint((video.seconds - video.seconds[0]).astype(np.float64) * TICKS).astype(int)
    if (np.diff(ticks) <= 0).any():
        raise ValueError(f"each frame must be later than the one before; the frames are at {video.seconds.tolist()} s")
    # by which the last frame stays as long as the others do on average
    rate = Fraction(TICKS * (len(ticks) - 1), int(ticks[-1])) if len(ticks) > 1 else Fraction(1)
    pages = _Pages(video)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    try:
        with av.open(str(unfinished), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            name, options = _encoder()
            stream = container.add_stream(name, rate=rate.limit_denominator(1000), options=options)
            stream.width, stream.height, stream.pix_fmt = pages.width, pages.height, "yuv420p"
            stream.time_base = stream.codec_context.time_base = Fraction(1, TICKS)
            for index, tick in enumerate(tqdm(ticks, desc=path.name, unit="frame", disable=not show_progress)):
                frame = av.VideoFrame.from_ndarray(pages.draw(index), format="rgb24")
                frame.pts, frame.time_base = int(tick), Fraction(1, TICKS)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _encoder() -> tuple[str, dict[str, str]]:
    # No B-frames: each picture is stored at its own time.
    try:
        av.codec.Codec("libx264", "w")
    except ValueError:
        return "mpeg4", {"qscale": "2", "bf": "0"}
    return "libx264", {"crf": "18", "preset": "veryfast", "bf": "0"}


class _Pages:
    """The pictures of the video: a row for each side, in it a panel with a label for the frame and for each signal."""

    def __init__(self, video: PerceivedVideo):
        self.video = video
        self.panel = (2 * max(round(PANEL_HEIGHT * video.aspect_ratio / 2), 1), PANEL_HEIGHT)
        self.painted = {side: {s: video.pictures(side, s) for s in video.signals} for side in video.sides}
        self.width = self.panel[0] * (1 + len(video.signals))
        self.height = (PANEL_HEIGHT + LABEL_HEIGHT) * len(video.sides)
        self.font = ImageFont.load_default(size=14)  # ships inside Pillow, so every machine draws the same letters

    def draw(self, index: int) -> np.ndarray:
        """`(height, width, 3)` uint8."""
        page = Image.new("RGB", (self.width, self.height), "black")
        pen = ImageDraw.Draw(page)
        width, height = self.panel
        for row, (side, painted) in enumerate(self.painted.items()):
            top = row * (height + LABEL_HEIGHT)
            shown = Image.fromarray(self.video.frames[index]).resize(self.panel, Image.Resampling.BICUBIC)
            page.paste(shown, (0, top + LABEL_HEIGHT))
            self._label(pen, (0, top), [f"{self.video.seconds[index]:.2f} s"])
            for column, (signal, pictures) in enumerate(painted.items(), start=1):
                # cells of a coarse map stay cells
                shown = Image.fromarray(pictures[index]).resize(self.panel, Image.Resampling.NEAREST)
                page.paste(shown, (column * width, top + LABEL_HEIGHT))
                self._label(pen, (column * width, top), [f"{signal}, {side}", signal])
                if signal == "flow" and not self.video.flow_valid[index]:
                    middle = ((column + 0.5) * width, top + LABEL_HEIGHT + height / 2)
                    pen.multiline_text(middle, NO_EARLIER_FRAME, "black", self.font, anchor="mm", align="center")
        return np.asarray(page)

    def _label(self, pen: ImageDraw.ImageDraw, corner: tuple[int, int], texts: list[str]) -> None:
        """The first of `texts` that a panel is wide enough for, or the last."""
        fitting = [text for text in texts if pen.textlength(text, self.font) < self.panel[0] - 4]
        pen.text((corner[0] + 3, corner[1] + 2), (fitting or texts[-1:])[0], "white", self.font)
