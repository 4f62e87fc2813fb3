"""Regions of a picture: their names `<obj_N>`, and the Set-of-Marks that shows the model which region has which name.

4D-RGPT reads regions as marks drawn on the first frame (arXiv 2512.17012, section 3.1) and names them in the text. The
paper writes `<R1>`, R4D-Bench writes `<obj_1>`; here the latter is the name and the former is accepted.
"""

import functools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

REGION_KINDS = ("box", "mask", "point")
NAME_IN_TEXT = re.compile(r"<(?:obj_|R_?)(\d+)>")
NAME_ALONE = re.compile(r"<?(?:obj_|R_?)(\d+)>?")
# Colours of objects 1 to 10: bright and far apart. The following ones are found by `_palette`.
COLOURS = (
    (230, 25, 25),
    (30, 110, 255),
    (255, 215, 0),
    (20, 170, 60),
    (255, 0, 220),
    (0, 215, 230),
    (255, 120, 0),
    (125, 50, 220),
    (160, 240, 40),
    (255, 165, 190),
)
NUM_COLOURS = 64
FILL_OPACITY = 0.25  # of masks: the object stays visible
# The model sees pictures shrunk to a few hundred pixels on both axes: a letter as wide as 1.4 % of the longer side is
# still 6 pixels wide at 448.
FONT_PER_LONG_SIDE = 0.026
READABLE_FONT_PX = 11
SMALLEST_FONT_PX = 6
# A coordinate may pass the border by less than this, as rounding of detectors' boxes does; it is drawn on the border.
BORDER_SLACK_PX = 0.5


def region_name(name: Any) -> str:
    """`"obj_1"` for any of `"obj_1"`, `"<obj_1>"`, `"R1"`, `"<R1>"`, `"R_1"`; a `ValueError` for another name."""
    match = NAME_ALONE.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise ValueError(f'a region is called "obj_1", "obj_2", ... (or "R1" as in the paper), got {name!r}')
    return f"obj_{int(match.group(1))}"


def names_in_text(text: str) -> list[str]:
    """The region names that a text uses, `["obj_1", ...]`, each once, in order of their first use."""
    return list(dict.fromkeys(f"obj_{int(number)}" for number in NAME_IN_TEXT.findall(text)))


def rewrite_names(text: str) -> str:
    """The same text with every `<R1>` or `<R_1>` written `<obj_1>`."""
    return NAME_IN_TEXT.sub(lambda match: f"<obj_{int(match.group(1))}>", text)


@functools.cache
def _palette() -> list[tuple[int, int, int]]:
    """`COLOURS`, continued with the colour farthest from all before it (squared RGB distance, green counts double)."""
    levels = np.linspace(20, 245, 7).round()
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    weights = np.array([1.0, 2.0, 1.0])
    distance = np.full(len(candidates), np.inf)
    colours = list(COLOURS)
    for i in range(NUM_COLOURS):
        if i == len(colours):
            colours.append(tuple(int(v) for v in candidates[distance.argmax()]))
        distance = np.minimum(distance, ((candidates - colours[i]) ** 2 * weights).sum(-1))
    return colours


def colour_of(name: str) -> tuple[int, int, int]:
    """RGB colour of an object: the same in every picture, different for any two of `NUM_COLOURS` consecutive numbers."""
    return _palette()[(int(name.removeprefix("obj_")) - 1) % NUM_COLOURS]


def draw_marks(image: Image.Image, regions: Iterable[dict], source: str = "the picture") -> Image.Image:
    """Draw Set-of-Marks: the outline of every region and its name `<obj_N>`, each region in its own colour.

    Labels stay inside the picture and never cover each other; where there is room, they cover no region either. Lines and
    letters grow with the picture. The same input gives the same pixels.

    Args:
        image (`PIL.Image.Image`): the picture, any mode; it is not changed.
        regions (`Iterable[dict]`): `{"name": "obj_1"}` and exactly one of
            - `"box"`: `[x1, y1, x2, y2]`, pixels of `image`, `0 <= x1 < x2 <= width` and `0 <= y1 < y2 <= height`;
            - `"mask"`: `(height, width)` bool array, tensor or nested list, with at least one true pixel;
            - `"point"`: `[x, y]`, pixels of `image`.
            A key whose value is None counts as absent.
        source (`str`): what to call the picture in errors.

    Returns: a new RGB `PIL.Image.Image` of the same size.
    Raises: `ValueError` if a region is not as above, two have one name, or the picture is too small for all labels.
    """
    picture = image.convert("RGB")
    regions = check_regions(regions, picture.size, source)
    if not regions:
        return picture.copy() if picture is image else picture
    width, height = picture.size
    line = max(1, round(min(width, height) / 220))

    pixels = None
    for region in regions:  # fills first, so that no fill covers an outline
        if "mask" in region:
            pixels = np.array(picture) if pixels is None else pixels
            colour = np.array(colour_of(region["name"]), dtype=np.float32)
            inside = region["mask"]
            blended = pixels[inside] * (1 - FILL_OPACITY) + colour * FILL_OPACITY
            pixels[inside] = blended.round().astype(np.uint8)
            pixels[inside & ~_eroded(inside, line)] = colour.astype(np.uint8)
    picture = picture if pixels is None else Image.fromarray(pixels)
    picture = picture.copy() if picture is image else picture
    draw = ImageDraw.Draw(picture)
    for region in regions:
        colour = colour_of(region["name"])
        if "box" in region:
            left, top, right, bottom = _pixel_bounds(region, width, height)
            draw.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=line)
        elif "point" in region:
            x, y = region["point"]
            radius = 2 * line
            outer = radius + max(1, line // 2)
            ring = _text_colour(colour)  # the dot stands out on any ground, its own colour included
            draw.ellipse((x - outer, y - outer, x + outer, y + outer), fill=ring)
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    for region, (left, top, right, bottom), font in _place_labels(regions, width, height, line, source):
        colour = colour_of(region["name"])
        draw.rectangle((left, top, right - 1, bottom - 1), fill=colour)
        draw.text(
            ((left + right) / 2, (top + bottom) / 2), _label(region), fill=_text_colour(colour), font=font, anchor="mm"
        )
    return picture


def check_regions(regions: Iterable[dict], size: tuple[int, int], source: str = "the picture") -> list[dict]:
    """The regions with names normalised, None values dropped, coordinates as floats and masks as bool arrays.

    Args:
        regions (`Iterable[dict]`): as `draw_marks` takes them; they are not changed.
        size (`tuple[int, int]`): width and height of the picture, pixels.
        source (`str`): what to call the picture in errors.
    Raises: `ValueError` that names the picture, the region and what was expected.
    """
    if isinstance(regions, dict) or not isinstance(regions, Iterable):
        raise ValueError(f"{source}: regions must be a list of dicts, got {type(regions).__name__}")
    checked, seen = [], set()
    for i, region in enumerate(regions):
        if not isinstance(region, dict):
            raise ValueError(
                f"{source}: region {i} must be a dict with 'name' and one of {REGION_KINDS}, got {region!r}"
            )
        region = {key: value for key, value in region.items() if value is not None}
        try:
            name = region_name(region.get("name"))
        except ValueError as error:
            raise ValueError(f"{source}: region {i}: {error}") from None
        unknown = sorted(set(region) - {"name", *REGION_KINDS})
        if unknown:
            raise ValueError(
                f"{source}: region {name} has unknown keys {unknown}; expected 'name' and one of {REGION_KINDS}"
            )
        kinds = [kind for kind in REGION_KINDS if kind in region]
        if len(kinds) != 1:
            raise ValueError(f"{source}: region {name} must have exactly one of {REGION_KINDS}, got {kinds or 'none'}")
        if name in seen:
            raise ValueError(f"{source}: two regions are called {name}; every region of a picture needs its own name")
        seen.add(name)
        check = {"box": _check_box, "mask": _check_mask, "point": _check_point}[kinds[0]]
        checked.append({"name": name, kinds[0]: check(region[kinds[0]], size, f"{source}: region {name}")})
    return checked


def _check_numbers(values: Any, count: int, where: str, expected: str) -> list[float]:
    values = values.tolist() if isinstance(values, np.ndarray | torch.Tensor) else values
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
        raise ValueError(f"{where}: expected {expected}, got {values!r}")
    if not all(isinstance(v, int | float | np.number) and not isinstance(v, bool) and math.isfinite(v) for v in values):
        raise ValueError(f"{where}: expected {expected} with finite numbers, got {values!r}")
    return [float(v) for v in values]


def _check_box(box: Any, size: tuple[int, int], where: str) -> list[float]:
    width, height = size
    x1, y1, x2, y2 = _check_numbers(box, 4, where, "a box [x1, y1, x2, y2] in pixels")
    inside = min(x1, y1) > -BORDER_SLACK_PX and x2 < width + BORDER_SLACK_PX and y2 < height + BORDER_SLACK_PX
    if not inside or x1 >= x2 or y1 >= y2:
        raise ValueError(
            f"{where}: box {[x1, y1, x2, y2]} does not lie in the frame of {width} x {height} pixels; expected "
            f"0 <= x1 < x2 <= {width} and 0 <= y1 < y2 <= {height}"
        )
    return [max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))]


def _check_point(point: Any, size: tuple[int, int], where: str) -> list[float]:
    width, height = size
    x, y = _check_numbers(point, 2, where, "a point [x, y] in pixels")
    if not (-BORDER_SLACK_PX < x < width + BORDER_SLACK_PX and -BORDER_SLACK_PX < y < height + BORDER_SLACK_PX):
        raise ValueError(
            f"{where}: point {[x, y]} does not lie in the frame of {width} x {height} pixels; expected "
            f"0 <= x <= {width} and 0 <= y <= {height}"
        )
    return [min(max(x, 0.0), width - 1.0), min(max(y, 0.0), height - 1.0)]


def _check_mask(mask: Any, size: tuple[int, int], where: str) -> np.ndarray:
    width, height = size
    mask = mask.detach().cpu().numpy() if isinstance(mask, torch.Tensor) else np.asarray(mask)
    if mask.dtype != np.bool_:
        raise ValueError(f"{where}: a mask must hold booleans, got {mask.dtype}; give mask > 0")
    if mask.shape != (height, width):
        raise ValueError(
            f"{where}: mask of shape {mask.shape} does not fit the frame; expected (height, width) = {(height, width)}"
        )
    if not mask.any():
        raise ValueError(f"{where}: the mask has no true pixel; expected at least one")
    return mask


def _eroded(mask: np.ndarray, radius: int) -> np.ndarray:
    """True where the whole (2 radius + 1) square lies in the mask; outside the picture counts as outside the mask."""
    for axis in (0, 1):
        sums = np.cumsum(np.pad(mask, [(radius + 1, radius) if a == axis else (0, 0) for a in (0, 1)]), axis=axis)
        window = 2 * radius + 1
        mask = (
            np.take(sums, range(window, sums.shape[axis]), axis) - np.take(sums, range(mask.shape[axis]), axis)
        ) == window
    return mask


def _text_colour(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever stands out more on `colour` (luma of ITU-R BT.601)."""
    return (0, 0, 0) if 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 128 else (255, 255, 255)


def _label(region: dict) -> str:
    return f"<{region['name']}>"


@functools.lru_cache(maxsize=64)
def _font(size: int):
    return ImageFont.load_default(size=size)  # ships inside Pillow, so every machine draws the same letters


def _pixel_bounds(region: dict, width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a region in whole pixels, right and bottom exclusive, never empty."""
    if "mask" in region:
        rows, columns = np.flatnonzero(region["mask"].any(1)), np.flatnonzero(region["mask"].any(0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    if "point" in region:
        x, y = (round(v) for v in region["point"])
        return x, y, x + 1, y + 1
    left, top, right, bottom = (math.floor(v + 0.5) for v in region["box"])  # round() would go to even: 1-pixel jumps
    left, top = min(left, width - 1), min(top, height - 1)
    return left, top, max(right, left + 1), max(bottom, top + 1)


def _place_labels(regions: list[dict], width: int, height: int, line: int, source: str):
    """`(region, (left, top, right, bottom), font)` for every region: with the largest letters for which all labels fit."""
    shorter, longer = sorted((width, height))
    wanted = max(round(FONT_PER_LONG_SIDE * longer), min(READABLE_FONT_PX, round(0.09 * shorter)), SMALLEST_FONT_PX)
    bounds = [_pixel_bounds(region, width, height) for region in regions]
    marks = [_grown(b, 3 * line) if "point" in r else b for r, b in zip(regions, bounds, strict=True)]
    size = wanted
    while size >= SMALLEST_FONT_PX:
        font = _font(size)
        placed: list[tuple[int, int, int, int]] = []
        for i, region in enumerate(regions):
            box = _best_place(_label_size(_label(region), font), i, marks, placed, width, height)
            if box is None:
                break
            placed.append(box)
        else:
            return [(region, box, font) for region, box in zip(regions, placed, strict=True)]
        size = min(size - 1, round(size * 0.9))
    raise ValueError(
        f"{source}: {width} x {height} pixels are too few for {len(regions)} labels of at least {SMALLEST_FONT_PX} pixels "
        "height; mark fewer regions or give a larger picture"
    )


def _label_size(text: str, font) -> tuple[int, int]:
    left, top, right, bottom = font.getbbox(text, anchor="mm")
    # symmetric about the anchor, where the text is drawn, plus a margin of one eighth of the letters
    margin = max(1, round((bottom - top) / 8))
    return 2 * (math.ceil(max(-left, right)) + margin), 2 * (math.ceil(max(-top, bottom)) + margin)


def _best_place(size: tuple[int, int], own: int, marks: list, placed: list, width: int, height: int):
    """The free place that covers least of the regions, and of those the nearest to the label's own; None if all is taken."""
    label_width, label_height = size
    if label_width > width or label_height > height:
        return None
    left, top, right, bottom = marks[own]
    beside = [
        (left, top - label_height),  # above the left corner, as readers expect it; then around the region
        (right - label_width, top - label_height),
        (left, bottom),
        (right - label_width, bottom),
        (left - label_width, top),
        (right, top),
        (left - label_width, bottom - label_height),
        (right, bottom - label_height),
        (left, top),  # inside, in its corners
        (right - label_width, top),
        (left, bottom - label_height),
        (right - label_width, bottom - label_height),
    ]
    beside = [(min(max(x, 0), width - label_width), min(max(y, 0), height - label_height)) for x, y in beside]
    best = _least_covering(beside, size, own, marks, placed)
    if best is None:  # crowded: anywhere, the nearest first
        steps_x = [*range(0, width - label_width, max(1, label_width // 4)), width - label_width]
        steps_y = [*range(0, height - label_height, max(1, label_height // 2)), height - label_height]
        centre = ((left + right - label_width) / 2, (top + bottom - label_height) / 2)
        anywhere = sorted(
            ((x, y) for y in steps_y for x in steps_x), key=lambda p: (p[0] - centre[0]) ** 2 + (p[1] - centre[1]) ** 2
        )
        best = next((p for p in anywhere if _is_free(p, size, placed)), None)
    return None if best is None else (best[0], best[1], best[0] + label_width, best[1] + label_height)


def _is_free(place: tuple[int, int], size: tuple[int, int], placed: list) -> bool:
    box = (place[0], place[1], place[0] + size[0], place[1] + size[1])
    return not any(_overlap(_grown(box, 1), other) for other in placed)


def _least_covering(places: list, size: tuple[int, int], own: int, marks: list, placed: list):
    """Of the free places the one that hides the smallest share of any region; the earlier one of equals."""
    best, best_cost = None, None
    for place in places:
        if not _is_free(place, size, placed):
            continue
        box = (place[0], place[1], place[0] + size[0], place[1] + size[1])
        hidden = [_overlap(box, mark) / ((mark[2] - mark[0]) * (mark[3] - mark[1])) for mark in marks]
        cost = round(max(hidden) + sum(hidden) / 4, 3)
        if best_cost is None or cost < best_cost:
            best, best_cost = place, cost
    return best


def _grown(box: tuple[int, int, int, int], by: int) -> tuple[int, int, int, int]:
    return box[0] - by, box[1] - by, box[2] + by, box[3] + by


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> int:
    """Area that two boxes share, pixels."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
