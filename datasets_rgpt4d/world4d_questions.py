"""Multiple-choice questions about a World4D scene: R4D-Bench's nine categories (paper, A2.2) and TimeBench (paper, A3).

Every answer is computed from the scene and is exactly true as written; a question whose answer would be a matter of
taste (a diagonal direction, say) is not asked. What a reader of the text alone could use is removed where possible:
wrong numbers are drawn as the right ones are, so that each might be true of another clip, things that do not happen are
asked about in the same words as things that do (category "False Positives"), and options are shuffled.
"""

import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .world4d_render import instance_masks
from .world4d_sampling import (
    CHECK_SIZE_PX,
    DIRECTIONS_DEG,
    SIZES_M,
    SPLITS,
    TURNS_DEG,
    _pick,
    draw_place,
    draw_rate,
    draw_size,
)
from .world4d_scene import Scene, SceneObject

R4D_TASKS = (
    "3D Video Grounding",
    "Dimensional Measurement",
    "Spatial Relation",
    "Rotational",
    "Counting",
    "Translational",
    "False Positives",
    "Speed & Acceleration",
    "Displacement & Path Length",
)
TASKS = (*R4D_TASKS, "TimeBench")

NOT_MOVING, NOT_TURNING = "it does not move", "it does not turn"
DIRECTION_MARGIN = 1.5  # the stronger component of a direction must exceed the weaker one this many times
MIN_RATIO = 1.19  # between speeds, accelerations and paths that are options of one question
MIN_DISTANCE_RATIO = 1.1  # between distances; with greater gaps the middle option is right more often than others
MIN_BOX_RATIO = 1.2  # between distances of the boxes that are options of one question
MIN_PAIR_M = 1.0  # nearer centres are rare: objects keep a gap between them
DURATIONS_S = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # of the clips of World4D's default
MIN_OFFSET_M = 0.4  # nearer things are neither left nor right of each other


def level_coordinates(scene: Scene, points: np.ndarray, time_s: float) -> np.ndarray:
    """World points `(..., 3)` in the levelled frame of the camera at `time_s`: origin in its centre, x right, y down, z
    along its heading, metres.

    The camera's pitch is left out, so that y is vertical and an upright object has pitch and roll 0.
    """
    _, origin = scene.camera.pose([time_s])
    yaw = math.radians(scene.camera.yaw_deg + scene.camera.yaw_rate_deg_s * time_s)
    x, y, z = np.moveaxis(np.asarray(points) - origin[0], -1, 0)
    return np.stack([x * math.cos(yaw) - z * math.sin(yaw), y, x * math.sin(yaw) + z * math.cos(yaw)], -1)


def travelled_m(item: SceneObject, duration_s: float) -> float:
    """Path length of an object in a clip, metres; objects move on straight lines and never turn back, so it is also the
    displacement.
    """
    start, end = item.position_at([0.0, duration_s])
    return float(np.linalg.norm(end - start))


def _number(value: float) -> str:
    return f"{round(value, 6):g}"


def _dominant(right: float, forward: float) -> str | None:
    """Which of the four directions a horizontal vector points to, or None if it is near a diagonal."""
    strong, weak = max(abs(right), abs(forward)), min(abs(right), abs(forward))
    if strong < DIRECTION_MARGIN * weak:
        return None
    if abs(right) > abs(forward):
        return "right" if right > 0 else "left"
    return "away from the camera" if forward > 0 else "towards the camera"


def direction_of_travel(scene: Scene, item: SceneObject) -> str | None:
    """One of `DIRECTIONS_DEG`, in the levelled frame of the first camera; None for an object that stands or moves near
    a diagonal.
    """
    if not item.translates:
        return None
    start, end = level_coordinates(scene, item.position_at([0.0, scene.duration_s]), 0.0)
    return _dominant(end[0] - start[0], end[2] - start[2])


class _Asker:
    """Collects the questions about one scene. Methods named after a task give (text with {0}, {1} for objects, objects,
    options, answer) or None.
    """

    def __init__(self, scene: Scene, split: str, durations_s: Sequence[float]):
        self.scene, self.durations_s = scene, durations_s
        # The last number keeps this stream apart from those of sample_scene, which counts attempts there.
        self.rng = np.random.default_rng([scene.seed, SPLITS.index(split), 2**20])

    def pick(self, options):
        return _pick(self.rng, list(options))

    def sample(self, options, count: int) -> list:
        options = list(options)
        return [options[i] for i in np.argsort(self.rng.random(len(options)))[:count]]

    def grounding(self):
        item = self.pick(self.scene.objects)
        centre = level_coordinates(self.scene, np.array(item.position), 0.0)
        floor = centre[1] + item.size[1] / 2
        yaw = round((item.yaw_deg - self.scene.camera.yaw_deg + 180) % 360 - 180, 1)
        while (other := draw_size(self.rng, item.shape)) == item.size:
            pass
        distance = math.hypot(centre[0], centre[2])
        # Three distances times two sizes, less one: each candidate shares its distance and its size with others, so
        # none stands out.
        boxes = []
        for away in self._seen_elsewhere(distance, lambda: math.hypot(*draw_place(self.rng)), 3, MIN_BOX_RATIO):
            for size in (item.size, other):
                place = centre * (away / distance)
                point = [round(float(place[0]), 2), round(float(floor - size[1] / 2), 2), round(float(place[2]), 2)]
                boxes.append(
                    {
                        "dimensions": list(size),
                        "central_point": point,
                        "orientation": {"yaw": yaw, "pitch": 0, "roll": 0},
                    }
                )
        answer = boxes.pop(0)
        options = [json.dumps(box) for box in [answer, *self.sample(boxes, 4)]]
        text = (
            "Which 3D bounding box is that of {0} in the first frame? Metres and degrees; the origin is the camera, "
            "x points right, y down and z forward, with x and z level."
        )
        return text, [item], options, options[0]

    def measurement(self):
        first, *rest = self.sample(self.scene.objects, 2)
        form = self.pick(range(3 if rest else 2))
        if form == 0:
            return (
                "What is the height of {0}?",
                [first],
                [f"{_number(size)} m" for size in SIZES_M],
                f"{_number(first.size[1])} m",
            )
        start = np.array(first.position)
        if form == 1:
            distance = float(np.linalg.norm(start - self.scene.camera.position))
            text, items = "What is the distance between the camera and the centre of {0} in the first frame?", [first]
        else:
            distance = float(np.linalg.norm(start - rest[0].position))
            text, items = "What is the distance between the centres of {0} and {1} in the first frame?", [first, *rest]
        truth = round(distance, 1)
        draw = functools.partial(self._other_distance, between_objects=form == 2)
        values = self._seen_elsewhere(truth, draw, ratio=MIN_DISTANCE_RATIO)
        return text, items, [f"{value:.1f} m" for value in values], f"{truth:.1f} m"

    def relation(self):
        if len(self.scene.objects) < 2:
            return None
        time_s, moment = self.pick([(0.0, "first"), (self.scene.duration_s, "last")])
        shown = set(np.unique(instance_masks(self.scene, [time_s], CHECK_SIZE_PX)).tolist())
        items = self.sample([item for k, item in enumerate(self.scene.objects) if k in shown], 2)
        if len(items) < 2:
            return None
        one, two = (level_coordinates(self.scene, item.position_at([time_s])[0], time_s) for item in items)
        offset = one - two
        if max(abs(offset[0]), abs(offset[2])) < MIN_OFFSET_M:
            return None
        names = {
            "left": "left of it",
            "right": "right of it",
            "towards the camera": "in front of it",
            "away from the camera": "behind it",
        }
        direction = _dominant(offset[0], offset[2])
        if direction is None:
            return None
        text = (
            f"As seen by the camera, where is {{0}} relative to {{1}} in the {moment} frame? "
            "In front means nearer to the camera."
        )
        return text, items, [*names.values(), "above it"], names[direction]

    def _turn(self, item: SceneObject):
        options = ["clockwise", "counter-clockwise", NOT_TURNING, "first one way, then the other"]
        # Positive yaw is clockwise seen from above (world4d_scene).
        answer = NOT_TURNING if not item.yaw_rate_deg_s else options[0] if item.yaw_rate_deg_s > 0 else options[1]
        return "Which way does {0} turn about its vertical axis, seen from above?", [item], options, answer

    def _travel(self, item: SceneObject):
        answer = direction_of_travel(self.scene, item) if item.translates else NOT_MOVING
        if answer is None:
            return None
        others = self.sample(
            [direction for direction in DIRECTIONS_DEG if direction != answer], 2 if item.translates else 3
        )
        text = "Which way does {0} move over the floor, seen from where the camera is in the first frame?"
        return text, [item], list(dict.fromkeys([answer, *others, NOT_MOVING])), answer

    def rotational(self):
        turning = [item for item in self.scene.objects if item.yaw_rate_deg_s]
        if not turning:
            return None
        item = self.pick(turning)
        if self.rng.random() < 0.7:
            return self._turn(item)
        turn = abs(item.yaw_rate_deg_s) * self.scene.duration_s
        return (
            "By how many degrees does {0} turn during the video?",
            [item],
            [f"{_number(turn)}°" for turn in TURNS_DEG],
            f"{_number(turn)}°",
        )

    def translational(self):
        moving = [item for item in self.scene.objects if item.translates]
        return self._travel(self.pick(moving)) if moving else None

    def false_positives(self):
        nothing = [(self._travel, item) for item in self.scene.objects if not item.translates]
        nothing += [(self._turn, item) for item in self.scene.objects if not item.yaw_rate_deg_s]
        if not nothing:
            return None
        ask, item = self.pick(nothing)
        return ask(item)

    def counting(self):
        kinds = {
            "have the shape of {0}": lambda other, item: other.shape == item.shape,
            "have the colour of {0}": lambda other, item: other.color == item.color,
            "move to another place": lambda other, item: other.translates,
            "turn about their vertical axis": lambda other, item: bool(other.yaw_rate_deg_s),
        }
        asked: dict[int, list[tuple[str, SceneObject]]] = {}
        for item in self.scene.objects:
            others = [other for other in self.scene.objects if other is not item]
            for kind, counts in kinds.items():
                asked.setdefault(sum(counts(other, item) for other in others), []).append((kind, item))
        # The number first, then a question that has it as answer: most questions about a scene have the answers 0 or 1.
        truth = self.pick(sorted(asked))
        kind, item = self.pick(asked[truth])
        # One set of options for nearly all: a window laid round the truth would have 0 as its lowest whenever 0 is right.
        lowest = max(0, truth - 3)
        return f"Apart from {{0}}, how many objects {kind}?", [item], [str(lowest + i) for i in range(4)], str(truth)

    def _other_rate(self, accelerates: bool) -> tuple[float, float]:
        """As `draw_rate` gives it, in another clip."""
        return draw_rate(self.rng, accelerates, self.pick(self.durations_s))

    def _other_distance(self, between_objects: bool) -> float:
        """From the camera to an object's centre, or between the centres of two, as in other clips; metres."""
        while True:
            lateral, depth = draw_place(self.rng)
            if not between_objects:
                drop = self.scene.camera.position[1] + draw_size(self.rng, "box")[1] / 2  # y points down
                return round(math.hypot(lateral, depth, drop), 1)
            aside, ahead = draw_place(self.rng)
            if (distance := math.hypot(lateral - aside, depth - ahead)) >= MIN_PAIR_M:
                return round(distance, 1)

    def _seen_elsewhere(
        self, truth: float, draw: Callable[[], float], count: int = 5, ratio: float = MIN_RATIO
    ) -> list[float]:
        """`truth`, and values of other clips up to `count`, each `ratio` apart.

        `draw` draws as the truth was drawn, so none is more likely than another before one has seen the video.
        """
        values = [truth]
        for attempt in itertools.count(1):
            candidate = draw()
            if all(max(candidate, other) >= ratio * min(candidate, other) for other in values):
                values.append(candidate)
            if len(values) == count:
                return values
            if attempt % 50 == 0:  # values in between left no room for the last ones
                values = [truth]

    def speed(self):
        moving = [item for item in self.scene.objects if item.translates]
        if not moving:
            return None
        item = self.pick(moving)
        accelerates = item.motion == "accelerate"
        truth = float(np.linalg.norm(item.acceleration if accelerates else item.velocity))
        unit = "m/s²" if accelerates else "m/s"
        text = (
            "What is the acceleration of {0}, which starts from rest?" if accelerates else "What is the speed of {0}?"
        )
        values = [_number(value) for value in self._seen_elsewhere(truth, lambda: self._other_rate(accelerates)[0])]
        return text, [item], [f"{value} {unit}" for value in values], f"{values[0]} {unit}"

    def path_length(self):
        moving = [item for item in self.scene.objects if item.translates]
        if not moving:
            return None
        item = self.pick(moving)
        truth = travelled_m(item, self.scene.duration_s)
        accelerates = item.motion == "accelerate"
        paths = self._seen_elsewhere(truth, lambda: self._other_rate(accelerates)[1])
        values = [f"{_number(value)} m" for value in paths]
        return "How far does {0} travel from the first frame to the last?", [item], values, values[0]

    def timebench(self):
        duration = self.scene.duration_s
        others = [other for other in self.durations_s if other != duration]
        if len(others) < 4:
            return None
        # Departs from the paper (A3), whose options are 1/4 to 4 times the truth: there the middle one is always right, and
        # on any rung of such a ladder the text alone tells 39 % of the answers, because no clip is that short or long.
        values = [_number(value) for value in (duration, *self.sample(others, 4))]
        return "How many seconds have passed in the input video?", [], values, values[0]


_ASK = (
    _Asker.grounding,
    _Asker.measurement,
    _Asker.relation,
    _Asker.rotational,
    _Asker.counting,
    _Asker.translational,
    _Asker.false_positives,
    _Asker.speed,
    _Asker.path_length,
    _Asker.timebench,
)


@functools.lru_cache(maxsize=1)  # several kinds of questions are asked about a scene, one after the other
def first_frame_boxes(scene: Scene, size_px: int) -> dict[int, list[float]]:
    """Object index -> [x1, y1, x2, y2] round its visible pixels in the first frame, in pixels of a `size_px` video; x2
    and y2 are exclusive edges.
    """
    mask = instance_masks(scene, [0.0], size_px)[0]
    boxes = {}
    for k in range(len(scene.objects)):
        rows, columns = np.nonzero(mask == k)
        if len(rows):
            boxes[k] = [float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)]
    return boxes


def scene_questions(
    scene: Scene, split: str, size_px: int, durations_s: Sequence[float] = DURATIONS_S
) -> list[dict[str, Any]]:
    """At most one question of each task about a scene, in the order of `TASKS`.

    Args:
        split: `"train"`, `"validation"` or `"test"`; enters the random stream.
        size_px: side of the video in pixels, for the boxes of the regions.
        durations_s: how long the clips of the data set last; wrong answers come from them. TimeBench needs five.
    Returns: dicts with `task`, `question` (objects as <obj_N>), `question_raw` (objects by name), `options` (shuffled),
        `answer` (the text of one option) and `regions` ({"name", "box"} of every <obj_N>, first frame).
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}.")
    asker, boxes, rows = _Asker(scene, split, durations_s), first_frame_boxes(scene, size_px), []
    for task, ask in zip(TASKS, _ASK, strict=True):
        asked = ask(asker)
        if asked is None:
            continue
        text, items, options, answer = asked
        rows.append(
            {
                "task": task,
                "question": text.format(*(f"<obj_{n + 1}>" for n in range(len(items)))),
                "question_raw": text.format(*(f"the {item.name}" for item in items)),
                "options": asker.sample(options, len(options)),
                "answer": answer,
                "regions": [
                    {"name": f"obj_{n + 1}", "box": boxes[scene.objects.index(item)]} for n, item in enumerate(items)
                ],
            }
        )
    return rows
