import json
import math
import re
from collections import Counter

import numpy as np
import pytest

from datasets_rgpt4d import CONFIGS, TASKS, Scene, SceneObject, combinations, sample_scene, scene_questions
from datasets_rgpt4d.world4d_questions import DURATIONS_S
from datasets_rgpt4d.world4d_render import instance_masks
from datasets_rgpt4d.world4d_scene import COLORS, MOTIONS, SHAPES

TINY, _, FULL = CONFIGS


@pytest.fixture(scope="module")
def clips():
    """160 test clips and their questions: (scene, rows)."""
    scenes = [TINY.scene("test", index) for index in range(160)]
    return [(scene, scene_questions(scene, "test", 112)) for scene in scenes]


def rows_of(clips, task):
    return [(json.loads(scene.to_json()), row) for scene, rows in clips for row in rows if row["task"] == task]


def named(scene, row, number=1):
    """The object that <obj_N> stands for: the one whose name `question_raw` has in its place."""
    pattern = re.sub(r"<obj_(\d)>", r"the (?P<obj_\1>\\w+ \\w+)", row["question"].replace("?", "[?]"), count=2)
    pattern = re.sub(r"\(\?P<obj_1>(.*?)\)(.*)\(\?P<obj_1>.*?\)", r"(?P<obj_1>\1)\2(?P=obj_1)", pattern)
    color, shape = re.fullmatch(pattern, row["question_raw"])[f"obj_{number}"].split()
    (item,) = [item for item in scene["objects"] if (item["color"], item["shape"]) == (color, shape)]
    return item


def place(item, t):
    return np.array(
        [
            p + v * t + a * t * t / 2
            for p, v, a in zip(item["position"], item["velocity"], item["acceleration"], strict=True)
        ]
    )


def heading_axes(camera, t):
    yaw = math.radians(camera["yaw_deg"] + camera["yaw_rate_deg_s"] * t)
    return np.array([math.cos(yaw), 0, -math.sin(yaw)]), np.array([math.sin(yaw), 0, math.cos(yaw)])


def test_scene_survives_json_and_is_a_function_of_its_seed(clips):
    for scene, rows in clips[:20]:
        assert Scene.from_json(scene.to_json()) == scene
        again = sample_scene(scene.seed, "test", TINY.durations_s, TINY.fps)
        assert again == scene and scene_questions(again, "test", 112) == rows
    with pytest.raises(ValueError, match="not a World4D scene"):
        Scene.from_json('{"seed": 1}')
    with pytest.raises(ValueError, match="not a World4D scene"):
        Scene.from_json(clips[0][0].to_json().replace('"shape"', '"form"'))


def test_first_scene_is_pinned():
    """Scenes must not change silently: a published model names its data by version and seed."""
    scene = TINY.scene("train", 0)
    assert (scene.seed, scene.fps, scene.duration_s) == (0, 12, 3.0)
    assert [item.combination for item in scene.objects] == [
        ("box", "red", "translate"),
        ("sphere", "green", "accelerate"),
        ("cylinder", "purple", "translate"),
    ]


def test_splits_share_no_combination_and_cover_every_value():
    train, validation, test = (set(combinations(split)) for split in ("train", "validation", "test"))
    assert train == validation and not train & test
    assert len(train | test) == len(SHAPES) * len(COLORS) * len(MOTIONS)
    for held in (train, test):
        assert all(
            {triple[axis] for triple in held} == set(values) for axis, values in enumerate((SHAPES, COLORS, MOTIONS))
        )
    with pytest.raises(ValueError, match="split must be one of"):
        combinations("dev")


def test_scenes_show_only_their_splits_combinations(clips):
    for scene, _ in clips:
        assert {item.combination for item in scene.objects} <= set(combinations("test"))
    train = [TINY.scene("train", index) for index in range(40)]
    for scene in train:
        assert {item.combination for item in scene.objects} <= set(combinations("train"))
    assert not {scene.seed for scene in train} & {scene.seed for scene, _ in clips}


def test_objects_have_different_names_and_never_touch(clips):
    for scene, _ in clips[:60]:
        assert len({item.name for item in scene.objects}) == len(scene.objects)
        times = np.linspace(0, scene.duration_s, 101)
        camera = scene.camera.pose(times)[1]
        for k, item in enumerate(scene.objects):
            centre = item.position_at(times)
            assert np.hypot(*(centre - camera)[:, [0, 2]].T).min() > item.footprint_radius + 1
            for other in scene.objects[:k]:
                apart = np.hypot(*(centre - other.position_at(times))[:, [0, 2]].T)
                assert apart.min() > item.footprint_radius + other.footprint_radius


def test_scenes_vary_as_the_design_says():
    scenes = [FULL.scene("train", index) for index in range(60)]
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3, 4, 5, 6}
    assert {scene.camera.motion for scene in scenes} == {"still", "translate", "pan", "translate_pan"}
    assert {item.motion for scene in scenes for item in scene.objects} == set(MOTIONS)
    assert min(scene.duration_s for scene in scenes) == 1 and max(scene.duration_s for scene in scenes) == 20
    assert {scene.fps for scene in scenes} == {10, 12, 15, 20, 24, 30}


def test_every_task_is_asked_in_r4d_bench_names(clips):
    counts = Counter(row["task"] for _, rows in clips for row in rows)
    assert set(counts) == set(TASKS) and len(TASKS) == 10
    assert min(counts.values()) > 0.5 * len(clips)
    assert all(len(rows) == len({row["task"] for row in rows}) for _, rows in clips)


def test_options_are_distinct_and_hold_the_answer_once(clips):
    four = {"Rotational", "Counting", "Translational", "False Positives"}
    for _, rows in clips:
        for row in rows:
            assert len(row["options"]) == (4 if row["task"] in four else 5), row
            assert len(set(row["options"])) == len(row["options"]) and row["options"].count(row["answer"]) == 1, row


def test_right_answers_stand_at_every_position_and_rung(clips):
    for count in (4, 5):
        position = Counter(
            row["options"].index(row["answer"]) for _, rows in clips for row in rows if len(row["options"]) == count
        )
        total = sum(position.values())
        assert set(position) == set(range(count))
        # Five standard deviations of a fair die: never by chance, always if options are not shuffled.
        spread = 5 * math.sqrt(total * (1 / count) * (1 - 1 / count))
        assert all(abs(value - total / count) < spread for value in position.values())
    for task in ("Speed & Acceleration", "Displacement & Path Length"):
        rungs = Counter()
        for _, row in rows_of(clips, task):
            values = sorted(float(option.split()[0]) for option in row["options"])
            rungs[values.index(float(row["answer"].split()[0]))] += 1
        assert set(rungs) == set(range(5)) and max(rungs.values()) < 0.35 * sum(rungs.values())


def test_regions_are_boxes_of_the_first_frame(clips):
    for scene, rows in clips[:30]:
        mask = instance_masks(scene, [0.0], 112)[0]
        for row in rows:
            assert [region["name"] for region in row["regions"]] == sorted(
                {part.split(">")[0] for part in row["question"].split("<")[1:]}
            )
            for number, region in enumerate(row["regions"], 1):
                item = named(json.loads(scene.to_json()), row, number)
                k = next(
                    k
                    for k, other in enumerate(scene.objects)
                    if (other.color, other.shape) == (item["color"], item["shape"])
                )
                x1, y1, x2, y2 = (int(value) for value in region["box"])
                assert 0 <= x1 < x2 <= 112 and 0 <= y1 < y2 <= 112
                inside = np.zeros_like(mask, bool)
                inside[y1:y2, x1:x2] = True
                assert not (mask == k)[~inside].any()
                edges = (mask == k)[y1:y2, x1:x2]
                assert edges[0].any() and edges[-1].any() and edges[:, 0].any() and edges[:, -1].any()
                assert edges.sum() > 60


def test_translational_answers_follow_from_the_scene(clips):
    asked = rows_of(clips, "Translational")
    assert {row["answer"] for _, row in asked} == {"left", "right", "towards the camera", "away from the camera"}
    for scene, row in asked:
        item = named(scene, row)
        moved = place(item, scene["duration_s"]) - place(item, 0)
        right, forward = heading_axes(scene["camera"], 0)
        axis = {"left": -right, "right": right, "towards the camera": -forward, "away from the camera": forward}[
            row["answer"]
        ]
        assert moved @ axis > math.cos(math.radians(11)) * np.linalg.norm(moved) > 0.55
        assert "it does not move" in row["options"]


def test_false_positives_ask_about_what_does_not_happen(clips):
    asked = rows_of(clips, "False Positives")
    assert {row["answer"] for _, row in asked} == {"it does not move", "it does not turn"}
    happens = {row["question"] for task in ("Translational", "Rotational") for _, row in rows_of(clips, task)}
    for scene, row in asked:
        item = named(scene, row)
        if row["answer"] == "it does not move":
            assert not any(item["velocity"]) and not any(item["acceleration"])
        else:
            assert item["yaw_rate_deg_s"] == 0
        assert row["question"] in happens  # the words alone do not give it away


def test_rotational_answers_follow_from_the_scene(clips):
    answers = set()
    for scene, row in rows_of(clips, "Rotational"):
        rate = named(scene, row)["yaw_rate_deg_s"]
        answers.add(row["answer"])
        if row["answer"].endswith("°"):
            assert float(row["answer"][:-1]) == pytest.approx(abs(rate) * scene["duration_s"])
        else:
            assert row["answer"] == ("clockwise" if rate > 0 else "counter-clockwise")
    assert {"clockwise", "counter-clockwise", "90°", "360°"} <= answers


def test_positive_yaw_is_clockwise_seen_from_above():
    """A point in front (+z) goes to the right (+x), as clock hands do for one who looks down with +z up."""
    item = SceneObject("box", "red", (1, 1, 1), (0, -0.5, 5), 0.0, (0, 0, 0), (0, 0, 0), 90.0, 0)
    rotation, _ = item.pose([1.0])
    np.testing.assert_allclose(rotation[0] @ [0, 0, 1], [1, 0, 0], atol=1e-12)


def test_counts_follow_from_the_scene(clips):
    seen = set()
    for scene, row in rows_of(clips, "Counting"):
        item = named(scene, row)
        others = [other for other in scene["objects"] if other is not item]
        if "shape" in row["question"]:
            truth = sum(other["shape"] == item["shape"] for other in others)
        elif "colour" in row["question"]:
            truth = sum(other["color"] == item["color"] for other in others)
        elif "turn" in row["question"]:
            truth = sum(other["yaw_rate_deg_s"] != 0 for other in others)
        else:
            truth = sum(any(other["velocity"]) or any(other["acceleration"]) for other in others)
        assert row["answer"] == str(truth)
        assert all(0 <= int(option) for option in row["options"])
        seen.add((row["question"].split(">")[1], truth))
    assert len(seen) >= 12


def test_relations_follow_from_the_scene(clips):
    answers = Counter()
    for scene, row in rows_of(clips, "Spatial Relation"):
        t = scene["duration_s"] if "last frame" in row["question"] else 0.0
        right, forward = heading_axes(scene["camera"], t)
        offset = place(named(scene, row, 1), t) - place(named(scene, row, 2), t)
        axis = {"left of it": -right, "right of it": right, "in front of it": -forward, "behind it": forward}[
            row["answer"]
        ]
        side = abs(offset @ (right if "front" in row["answer"] or "behind" in row["answer"] else forward))
        assert offset @ axis >= 1.5 * side and offset @ axis >= 0.4
        answers[row["answer"]] += 1
    assert len(answers) == 4


def test_lengths_speeds_and_times_follow_from_the_scene(clips):
    for scene, row in rows_of(clips, "Displacement & Path Length"):
        item, end = named(scene, row), scene["duration_s"]
        steps = np.stack([place(item, t) for t in np.linspace(0, end, 200)])
        path = np.linalg.norm(np.diff(steps, axis=0), axis=1).sum()
        assert float(row["answer"].removesuffix(" m")) == pytest.approx(path, abs=1e-5)
        assert path == pytest.approx(np.linalg.norm(steps[-1] - steps[0]))  # no turning back
    units = set()
    for scene, row in rows_of(clips, "Speed & Acceleration"):
        item, end = named(scene, row), scene["duration_s"]
        value, unit = row["answer"].split(" ")
        units.add(unit)
        speed = [np.linalg.norm(place(item, t + 1e-4) - place(item, t)) / 1e-4 for t in (0.0, end / 2, end - 1e-4)]
        if unit == "m/s":
            np.testing.assert_allclose(speed, float(value), rtol=1e-3)
        else:
            assert (speed[2] - speed[0]) / end == pytest.approx(float(value), rel=1e-2)
    assert units == {"m/s", "m/s²"}
    for scene, row in rows_of(clips, "Dimensional Measurement"):
        value, item = float(row["answer"].removesuffix(" m")), named(scene, row)
        if "height" in row["question"]:
            assert value == item["size"][1]
        else:
            other = scene["camera"]["position"] if "camera" in row["question"] else place(named(scene, row, 2), 0)
            assert abs(np.linalg.norm(place(item, 0) - other) - value) <= 0.05 + 1e-9
    for scene, row in rows_of(clips, "TimeBench"):
        assert float(row["answer"]) == scene["duration_s"]
        assert {float(option) for option in row["options"]} <= set(DURATIONS_S)
        assert row["question"] == row["question_raw"] == "How many seconds have passed in the input video?"


def test_grounding_boxes_follow_from_the_scene(clips):
    for scene, row in rows_of(clips, "3D Video Grounding"):
        box, item = json.loads(row["answer"]), named(scene, row)
        assert box["dimensions"] == item["size"]
        right, forward = heading_axes(scene["camera"], 0)
        offset = place(item, 0) - scene["camera"]["position"]
        np.testing.assert_allclose(box["central_point"], [offset @ right, offset[1], offset @ forward], atol=0.0051)
        # every option stands on the floor, so that height above it does not give the answer away
        for option in map(json.loads, row["options"]):
            floor = option["central_point"][1] + option["dimensions"][1] / 2
            assert floor == pytest.approx(-scene["camera"]["position"][1], abs=0.011)
            assert option["orientation"] == box["orientation"]


def test_wrong_numbers_are_not_computed_from_the_right_one(clips):
    """A ladder of rounded multiples of the truth tells a reader of the text alone which of its rungs the truth is."""
    for _, row in rows_of(clips, "Dimensional Measurement"):
        if "height" not in row["question"]:
            values = np.sort([float(option.split()[0]) for option in row["options"]])
            ratios = values[1:] / values[:-1]
            assert ratios.min() > 1.09 and ratios.max() - ratios.min() > 0.02


def test_wrong_boxes_have_sizes_that_objects_may_have(clips):
    shown = set()
    for _, row in rows_of(clips, "3D Video Grounding"):
        boxes = [json.loads(option) for option in row["options"]]
        shown |= {tuple(box["dimensions"]) for box in boxes}
        away = {round(math.hypot(box["central_point"][0], box["central_point"][2]), 1) for box in boxes}
        assert len({tuple(box["dimensions"]) for box in boxes}) == 2 and len(away) == 3
    assert {size[0] for size in shown} | {size[2] for size in shown} == {0.6, 0.8, 1.2}


def test_times_of_the_data_set_are_the_options():
    rows = scene_questions(FULL.scene("test", 0), "test", 112, FULL.durations_s)
    (asked,) = [row for row in rows if row["task"] == "TimeBench"]
    assert {float(option) for option in asked["options"]} <= set(FULL.durations_s)
    few = scene_questions(FULL.scene("test", 0), "test", 112, FULL.durations_s[:3])
    assert [row["task"] for row in few if row["task"] == "TimeBench"] == []


def test_bad_scenes_are_refused():
    with pytest.raises(ValueError, match="a sphere needs x = y = z"):
        SceneObject("sphere", "red", (1, 2, 1), (0, 0, 5), 0.0, (0, 0, 0), (0, 0, 0), 0.0, 0)
    with pytest.raises(ValueError, match="color must be one of"):
        SceneObject("box", "mauve", (1, 2, 1), (0, 0, 5), 0.0, (0, 0, 0), (0, 0, 0), 0.0, 0)
    with pytest.raises(ValueError, match="whole number of frame intervals"):
        sample_scene(0, "train", (1.5,), (15,))
