"""The times of a video, burned into its frames or told in words: "marks" and "prompts" of Table 6, arXiv 2512.17012."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT_PER_SIDE = 1 / 16  # of the shorter side: at 448 px a digit is as wide as a patch of 14 px
READABLE_FONT_PX = 11
SMALLEST_FONT_PX = 6


def draw_time(image: Image.Image, seconds: float, source: str = "the picture") -> Image.Image:
    """Write `"12.34 s"` in white letters on a black box into the lower left corner.

    The letters grow with the picture, and shrink, down to 6 pixels, where the text would be wider than it. The same
    input gives the same pixels.

    Args:
        image (`PIL.Image.Image`): the picture as the model will see it, that is, resized; any mode; it is not changed.
        seconds (`float`): time of the frame, seconds after the first one of its video; two decimals are written.
        source (`str`): what to call the picture in errors.

    Returns: a new RGB `PIL.Image.Image` of the same size.
    Raises: `ValueError` if the picture is too small for the text.
    """
    picture = image.convert("RGB")  # a copy, always
    width, height = picture.size
    text = f"{seconds:.2f} s"
    for size in range(max(round(FONT_PER_SIDE * min(width, height)), READABLE_FONT_PX), SMALLEST_FONT_PX - 1, -1):
        font = ImageFont.load_default(size=size)  # ships inside Pillow, so every machine draws the same letters
        left, top, right, bottom = font.getbbox(text, anchor="ls")
        margin = max(1, round((bottom - top) / 4))
        box_width, box_height = right - left + 2 * margin, bottom - top + 2 * margin
        if box_width <= width and box_height <= height:
            draw = ImageDraw.Draw(picture)
            draw.rectangle((0, height - box_height, box_width - 1, height - 1), fill=(0, 0, 0))
            draw.text((margin - left, height - margin - bottom), text, fill=(255, 255, 255), font=font, anchor="ls")
            return picture
    raise ValueError(
        f"{source}: frames of {width} x {height} pixels are too small for the time mark {text!r} in letters of at "
        f"least {SMALLEST_FONT_PX} pixels height; resize to larger frames or choose another time cue"
    )


def time_prompt(duration: float, fps: float | None) -> str:
    """The paper's sentence (section 6.3) about a video.

    Numbers are rounded to two decimals, below 1 to two significant digits, and zeros at the end are left out: 19,
    19.03, 29.97, 0.033.

    Args:
        duration (`float`): seconds.
        fps (`float`, *optional*): frames per second, the mean if it varies. None for a video that has no rate, because it
            is a single frame without duration; the sentence then says that it is a single frame.

    Example:

    ```python
    >>> time_prompt(19.0, 30000 / 1001)
    'The following video frames are sampled from a video 19 seconds long and recorded at 29.97 frames per second.'
    ```"""
    what = "of a single frame"
    if fps is not None:
        what = f"{_short(duration)} seconds long and recorded at {_short(fps)} frames per second"
    return f"The following video frames are sampled from a video {what}."


def _short(number: float) -> str:
    return np.format_float_positional(number, precision=2, unique=False, fractional=number >= 1, trim="-")


__all__ = ["draw_time", "time_prompt"]
