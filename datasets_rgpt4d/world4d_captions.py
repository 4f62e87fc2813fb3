"""Captions of World4D scenes and questions about their looks: what a general video-language model learns first.

They tell what the first frame shows; in a word, whether an object moves, which way, and whether it turns, as captions of
videos do; and where in the picture it is, or moves to, as data sets of pointing and tracking do. They hold no number of metres, seconds
or degrees: a model that is trained on these alone knows the scenes and the marks, but not the 4D tasks of
`world4d_questions`.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from .world4d_questions import direction_of_travel, first_frame_boxes, scene_questions
from .world4d_sampling import SPLITS, _pick
from .world4d_scene import COLORS, SHAPES, Scene, SceneObject

APPEARANCE_TASKS = (
    "Colour",
    "Shape",
    "Which Mark",
    "Number",
    "Left or Right",
    "Higher or Lower",
    "Picture Size",
)
CAPTION_TASK, CAPTION_PROMPT = "Caption", "Describe the video."
REGION_TASK, REGION_PROMPT = "Region Captions", "Describe each marked object."
MOVEMENT_TASK, MOVEMENT_PROMPT = "Region Movements", "What does each marked object do?"
TRACK_TASK = "Region Tracks"
TRACK_PROMPT = "Where in the picture is each marked object in the first and in the last frame?"
PICTURE_MOVEMENT_TASK = "Picture Movement"
# Last numbers of random streams, next to that of world4d_questions.
APPEARANCE_STREAM, CAPTION_STREAM, REGION_STREAM, CHOICE_STREAM, PICTURE_STREAM = (
    2**20 + number for number in range(1, 6)
)

NUMBERS = ("one", "two", "three", "four", "five", "six")
# Below the first edge the first word is right, above the last edge the last one; between two words' edges none is said.
SIZE_EDGES_M, SIZE_WORDS = ((0.75, 0.95),), ("small", "large")
PLACE_EDGES, PLACE_WORDS = ((-0.19, -0.15), (0.15, 0.19)), ("on the left", "in the middle", "on the right")
DEPTH_EDGES_M, DEPTH_WORDS = ((4.4, 5.2),), ("near the camera", "far away")
MIN_ORDER_SHARE, MIN_ORDER_M = 0.04, 0.4  # between neighbours of a caption that tells their order

MIN_ASIDE_SHARE, MIN_ABOVE_SHARE = 0.1, 0.06  # of the picture's side, between the centres of two boxes
MIN_HEIGHT_RATIO = 1.25  # between the heights of two boxes
# Of the picture's side: what moves less stays, and what moves more moves, if it is mostly along one side.
STAYS_SHARE, MOVES_SHARE, MIN_STRAIGHTNESS = 0.01, 0.04, 1.5


def _word(value: float, edges: Sequence[tuple[float, float]], words: Sequence[str]) -> str:
    """The word for a value, or "" where it lies between two."""
    for (lower, upper), word in zip(edges, words, strict=False):
        if value < lower:
            return word
        if value < upper:
            return ""
    return words[-1]


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _projected(scene: Scene, time_s: float) -> tuple[np.ndarray, np.ndarray]:
    """Of the centre of every object: how far it is to the right and below the picture's middle, in shares of its side,
    `(2, K)`; and its depth `(K,)` in metres.
    """
    rotation, origin = scene.camera.pose([time_s])
    x, y, z = ((np.array([item.position_at([time_s])[0] for item in scene.objects]) - origin) @ rotation[0]).T
    return scene.camera.focal * np.stack([x, y]) / z, z


def _places(scene: Scene) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Of every object in the first frame: how far to the right, in shares of the picture's width; the depth in metres; and
    both in words.
    """
    (across, _), depth = _projected(scene, 0.0)
    words = [
        " ".join(filter(None, (_word(x, PLACE_EDGES, PLACE_WORDS), _word(z, DEPTH_EDGES_M, DEPTH_WORDS))))
        for x, z in zip(across, depth, strict=True)
    ]
    return across, depth, words


def _kind(item: SceneObject) -> str:
    """E.g. `"a small red box"`; the size is that of a cube of the same bounding volume."""
    size = _word(float(np.prod(item.size)) ** (1 / 3), SIZE_EDGES_M, SIZE_WORDS)
    return " ".join(filter(None, ("a", size, item.color, item.shape)))


def scene_caption(scene: Scene, seed_words: Sequence[int] = ()) -> str:
    """What a general caption tells of a scene: number, sizes, colours and shapes of the objects, and where they are in
    the first frame. It says nothing of an attribute that lies between two words.

    Args:
        scene: of one to six objects, all ahead of the camera in the first frame.
        seed_words: non-negative integers that choose the sentences, together with the scene's seed.
    Returns: one to seven sentences.
    Raises: `ValueError` for a scene with none or more than six objects.
    """
    if not 1 <= len(scene.objects) <= len(NUMBERS):
        raise ValueError(f"A caption tells of 1 to {len(NUMBERS)} objects, the scene has {len(scene.objects)}.")
    rng = np.random.default_rng([scene.seed, *seed_words])
    across, depth, where = _places(scene)
    number = f"{NUMBERS[len(scene.objects) - 1]} object{'s' if len(scene.objects) > 1 else ''}"
    kinds = [_kind(item) for item in scene.objects]
    placed = [" ".join(filter(None, parts)) for parts in zip(kinds, where, strict=True)]
    from_left, from_near = np.argsort(across), np.argsort(depth)

    patterns = ["sentences", "list"]
    if len(scene.objects) > 1 and np.diff(across[from_left]).min() >= MIN_ORDER_SHARE:
        patterns.append("from left to right")
    if len(scene.objects) > 1 and np.diff(depth[from_near]).min() >= MIN_ORDER_M:
        patterns.append("from near to far")
    pattern = _pick(rng, patterns)
    if pattern == "sentences":
        verb = "is" if len(scene.objects) == 1 else "are"
        told = [f"{kinds[k][0].upper()}{kinds[k][1:]} stands {where[k] or 'in the room'}." for k in from_left]
        return " ".join([f"There {verb} {number} in a room.", *told])
    if pattern == "list":
        return f"A room with {number}: {_listed([placed[k] for k in from_left])}."
    order = from_left if pattern == "from left to right" else from_near
    return f"The video shows a room with {number}. Listed {pattern}: {_listed([kinds[k] for k in order])}."


def _doing(scene: Scene, item: SceneObject) -> str:
    """E.g. `"moves left and turns"`; the direction only where it is not near a diagonal."""
    words = []
    if item.translates:
        words.append(" ".join(filter(None, ("moves", direction_of_travel(scene, item)))))
    if item.yaw_rate_deg_s:
        words.append("turns")
    return " and ".join(words) or "stands still"


def _points(scene: Scene, time_s: float) -> list[str]:
    """Where the centre of every object is in the picture, e.g. `"34 52 %"`, from the left and from the top, rounded down;
    or `"outside"`.
    """
    shares, depth = _projected(scene, time_s)
    percent = np.floor(100 * (shares + 0.5)).astype(int)
    inside = (depth > 0) & (percent >= 0).all(0) & (percent < 100).all(0)
    return [f"{x} {y} %" if seen else "outside" for x, y, seen in zip(*percent, inside, strict=True)]


def region_captions(scene: Scene, split: str, size_px: int) -> list[dict[str, Any]]:
    """Three open questions, whose answers tell of every object of the first frame, by its mark, how it looks, what it does,
    and where in the picture it starts and ends.

    No other text ties so many words to a mark in so few tokens: a small model learns from it what marks are, and to follow
    what is marked.

    Args: as `scene_questions`.
    Returns: rows as of `scene_questions`, with an empty list of options.
    Raises: `ValueError` if the first frame shows no object.
    """
    boxes = first_frame_boxes(scene, size_px)
    if not boxes:
        raise ValueError(f"The first frame of scene {scene.seed} shows no object to describe.")
    rng = np.random.default_rng([scene.seed, SPLITS.index(split), REGION_STREAM])
    chosen, (_, _, where) = _sample(rng, boxes, len(boxes)), _places(scene)
    looks = [" ".join(filter(None, ("is", _kind(scene.objects[k]), where[k]))) for k in chosen]
    movements = [_doing(scene, scene.objects[k]) for k in chosen]
    starts, ends = _points(scene, 0.0), _points(scene, float(scene.frame_times[-1]))
    tracks = [f"from {starts[k]} to {ends[k]}" for k in chosen]
    return [
        {
            "task": task,
            "question": prompt,
            "question_raw": prompt,
            "options": [],
            "answer": " ".join(f"{_mark(number)} {words}." for number, words in enumerate(told)),
            "regions": [{"name": f"obj_{number + 1}", "box": boxes[k]} for number, k in enumerate(chosen)],
        }
        for task, prompt, told in (
            (REGION_TASK, REGION_PROMPT, looks),
            (MOVEMENT_TASK, MOVEMENT_PROMPT, movements),
            (TRACK_TASK, TRACK_PROMPT, tracks),
        )
    ]


# ----------------------------------------------------------------------------------------------------------- questions

# Text with {0}, {1}, ... for objects, indices of these objects, options, answer.
Asked = tuple[str, Sequence[int], Sequence[str], str]


def _sample(rng: np.random.Generator, options: Iterable, count: int) -> list:
    options = list(options)
    return [options[i] for i in np.argsort(rng.random(len(options)))[:count]]


def _mark(number: int) -> str:
    return f"<obj_{number + 1}>"


def _clear_pair(
    rng: np.random.Generator, boxes: dict[int, list[float]], is_clear: Callable[[list[float], list[float]], bool]
) -> tuple[int, int] | None:
    pairs = [pair for pair in itertools.permutations(boxes, 2) if is_clear(boxes[pair[0]], boxes[pair[1]])]
    return _pick(rng, pairs) if pairs else None


def _colour(scene: Scene, boxes: dict[int, list[float]], size_px: int, rng: np.random.Generator) -> Asked | None:
    if not boxes:
        return None
    k = _pick(rng, list(boxes))
    answer = scene.objects[k].color
    options = [answer, *_sample(rng, [color for color in COLORS if color != answer], 4)]
    return "What is the colour of {0}?", [k], options, answer


def _shape(scene: Scene, boxes: dict[int, list[float]], size_px: int, rng: np.random.Generator) -> Asked | None:
    if not boxes:
        return None
    k = _pick(rng, list(boxes))
    return "What is the shape of {0}?", [k], SHAPES, scene.objects[k].shape


def _which_mark(scene: Scene, boxes: dict[int, list[float]], size_px: int, rng: np.random.Generator) -> Asked | None:
    if len(boxes) < 3:
        return None
    chosen = _sample(rng, boxes, 3)
    items = [scene.objects[k] for k in chosen]
    asked = []
    for number, item in enumerate(items):
        others = [other for other in items if other is not item]
        if item.color not in [other.color for other in others]:
            asked.append((number, f"is {item.color}"))
        if item.shape not in [other.shape for other in others]:
            asked.append((number, f"is a {item.shape}"))
    if not asked:
        return None
    number, looks = _pick(rng, asked)
    return f"Which of {{0}}, {{1}} and {{2}} {looks}?", chosen, [_mark(n) for n in range(3)], _mark(number)


def _number(scene: Scene, boxes: dict[int, list[float]], size_px: int, rng: np.random.Generator) -> Asked | None:
    if not 1 <= len(boxes) <= len(NUMBERS):
        return None
    options = [str(number + 1) for number in range(len(NUMBERS))]
    return "How many objects are visible in the first frame?", [], options, str(len(boxes))


def _left_or_right(scene: Scene, boxes: dict[int, list[float]], size_px: int, rng: np.random.Generator) -> Asked | None:
    def to_the_right(one, two):
        return (one[0] + one[2] - two[0] - two[2]) / 2 / size_px

    pair = _clear_pair(rng, boxes, lambda one, two: abs(to_the_right(one, two)) >= MIN_ASIDE_SHARE)
    if pair is None:
        return None
    answer = "right" if to_the_right(*(boxes[k] for k in pair)) > 0 else "left"
    return "Is {0} left or right of {1} in the first frame?", pair, ("left", "right"), answer


def _higher_or_lower(
    scene: Scene, boxes: dict[int, list[float]], size_px: int, rng: np.random.Generator
) -> Asked | None:
    def above(one, two):  # y points down
        return (two[1] + two[3] - one[1] - one[3]) / 2 / size_px

    pair = _clear_pair(rng, boxes, lambda one, two: abs(above(one, two)) >= MIN_ABOVE_SHARE)
    if pair is None:
        return None
    answer = _mark(0 if above(*(boxes[k] for k in pair)) > 0 else 1)
    return "Which is higher up in the first frame, {0} or {1}?", pair, (_mark(0), _mark(1)), answer


def _picture_size(scene: Scene, boxes: dict[int, list[float]], size_px: int, rng: np.random.Generator) -> Asked | None:
    def height(box):
        return box[3] - box[1]

    def is_clear(one, two):
        return max(height(one), height(two)) >= MIN_HEIGHT_RATIO * min(height(one), height(two))

    pair = _clear_pair(rng, boxes, is_clear)
    if pair is None:
        return None
    answer = _mark(0 if height(boxes[pair[0]]) > height(boxes[pair[1]]) else 1)
    return "Which looks taller in the first frame, {0} or {1}?", pair, (_mark(0), _mark(1)), answer


_ASK = (_colour, _shape, _which_mark, _number, _left_or_right, _higher_or_lower, _picture_size)


def appearance_questions(scene: Scene, split: str, size_px: int) -> list[dict[str, Any]]:
    """At most one question of each of `APPEARANCE_TASKS` about the first frame of a scene; one that is hard to tell, as
    which of two equally tall objects is taller, is not asked.

    Args, returns and raises: as `scene_questions`. Of <obj_N> in options, `regions` tell the object, too.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}.")
    boxes = first_frame_boxes(scene, size_px)
    rng = np.random.default_rng([scene.seed, SPLITS.index(split), APPEARANCE_STREAM])
    rows = []
    for task, ask in zip(APPEARANCE_TASKS, _ASK, strict=True):
        asked = ask(scene, boxes, size_px, rng)
        if asked is None:
            continue
        text, chosen, options, answer = asked
        rows.append(
            {
                "task": task,
                "question": text.format(*(_mark(number) for number in range(len(chosen)))),
                "question_raw": text.format(*(f"the {scene.objects[k].name}" for k in chosen)),
                "options": _sample(rng, options, len(options)),
                "answer": answer,
                "regions": [{"name": f"obj_{number + 1}", "box": boxes[k]} for number, k in enumerate(chosen)],
            }
        )
    return rows


def picture_movement(scene: Scene, split: str, size_px: int) -> list[dict[str, Any]]:
    """Which way a marked object moves in the picture, where that is clear of one: no rows or one.

    It is about the picture alone: where the camera moves or turns, what stands in the room moves in the picture.

    Args, returns and raises: as `scene_questions`.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}.")
    boxes, rng = first_frame_boxes(scene, size_px), np.random.default_rng([scene.seed, PICTURE_STREAM])
    moved = _projected(scene, float(scene.frame_times[-1]))[0] - _projected(scene, 0.0)[0]
    options = ("left", "right", "up", "down", "it stays where it is")
    clear: dict[str, list[int]] = {}
    for k in boxes:
        across, down = moved[:, k]
        strong, weak = max(abs(across), abs(down)), min(abs(across), abs(down))
        if strong < STAYS_SHARE:
            clear.setdefault(options[4], []).append(k)
        elif strong > max(MOVES_SHARE, MIN_STRAIGHTNESS * weak):
            way = (across > 0) if abs(across) > abs(down) else 2 + (down > 0)
            clear.setdefault(options[int(way)], []).append(k)
    if not clear:
        return []
    # The way first, or most questions would be about what stays.
    answer = _pick(rng, [option for option in options if option in clear])
    k = _pick(rng, clear[answer])
    text = "Which way does {0} move in the picture from the first frame to the last?"
    return [
        {
            "task": PICTURE_MOVEMENT_TASK,
            "question": text.format(_mark(0)),
            "question_raw": text.format(f"the {scene.objects[k].name}"),
            "options": _sample(rng, options, len(options)),
            "answer": answer,
            "regions": [{"name": "obj_1", "box": boxes[k]}],
        }
    ]


def base_questions(scene: Scene, split: str, size_px: int) -> list[dict[str, Any]]:
    """A scene's caption and its `region_captions`, as questions without options; two of its `appearance_questions`, which take
    more words to ask than to answer; and its `picture_movement`: what a base model learns from.

    Args, returns and raises: as `scene_questions` and `scene_caption`.
    """
    rng = np.random.default_rng([scene.seed, SPLITS.index(split), CHOICE_STREAM])
    questions = _sample(rng, appearance_questions(scene, split, size_px), 2)
    caption = {
        "task": CAPTION_TASK,
        "question": CAPTION_PROMPT,
        "question_raw": CAPTION_PROMPT,
        "options": [],
        "answer": scene_caption(scene, (SPLITS.index(split), CAPTION_STREAM)),
        "regions": [],
    }
    return [
        caption,
        *region_captions(scene, split, size_px),
        *questions,
        *picture_movement(scene, split, size_px),
    ]


def mixed_questions(scene: Scene, split: str, size_px: int) -> list[dict[str, Any]]:
    """The 4D questions about a scene and its `region_captions`: whoever trains on the former alone forgets the latter.

    Args, returns and raises: as `scene_questions` and `region_captions`.
    """
    return [*scene_questions(scene, split, size_px), *region_captions(scene, split, size_px)]
