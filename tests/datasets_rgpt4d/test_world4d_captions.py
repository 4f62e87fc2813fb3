import dataclasses

import numpy as np
import pytest

from datasets_rgpt4d.world4d import CONFIGS
from datasets_rgpt4d.world4d_captions import (
    APPEARANCE_TASKS,
    CAPTION_TASK,
    MOVEMENT_TASK,
    REGION_TASK,
    TRACK_TASK,
    appearance_questions,
    base_questions,
    mixed_questions,
    picture_movement,
    region_captions,
)
from datasets_rgpt4d.world4d_questions import direction_of_travel, first_frame_boxes, scene_questions
from datasets_rgpt4d.world4d_render import instance_masks

SIZE_PX = 64
SCENES = [CONFIGS[0].scene("train", index) for index in range(60)]


@pytest.fixture(scope="module")
def questions():
    return [(scene, row) for scene in SCENES for row in appearance_questions(scene, "train", SIZE_PX)]


def asked_objects(scene, row):
    boxes = {tuple(box): scene.objects[k] for k, box in first_frame_boxes(scene, SIZE_PX).items()}
    return {f"<{region['name']}>": boxes[tuple(region["box"])] for region in row["regions"]}


def test_every_kind_is_asked_and_the_answer_is_one_of_the_options(questions):
    assert {row["task"] for _, row in questions} == {*APPEARANCE_TASKS}
    assert all(row["options"].count(row["answer"]) == 1 for _, row in questions)


def test_colours_and_shapes_are_those_of_the_marked_object(questions):
    for scene, row in questions:
        objects = asked_objects(scene, row)
        if row["task"] == "Colour":
            assert row["answer"] == objects["<obj_1>"].color
        elif row["task"] == "Shape":
            assert row["answer"] == objects["<obj_1>"].shape
        elif row["task"] == "Which Mark":
            assert row["answer"] in objects


def test_numbers_and_sides_are_those_of_the_picture(questions):
    for scene, row in questions:
        if row["task"] == "Number":
            visible = len(first_frame_boxes(scene, SIZE_PX))
            assert row["answer"] in (str(visible), ("one", "two", "three", "four", "five", "six")[visible - 1])
        if row["task"] == "Left or Right":
            one, other = ((region["box"][0] + region["box"][2]) / 2 for region in row["regions"])
            assert ("left" in row["answer"]) == (one < other)


def test_a_caption_names_what_is_seen_and_no_movement():
    for scene in SCENES:
        caption = base_questions(scene, "train", SIZE_PX)[0]
        assert caption["task"] == CAPTION_TASK and caption["options"] == []
        assert sum(caption["answer"].count(item.color) for item in scene.objects) >= len(
            {i.color for i in scene.objects}
        )
        for word in ("move", "turn", "second", "metre", "fast", "slow", "spin"):
            assert word not in caption["answer"]


def test_region_captions_describe_each_object_by_its_mark():
    orders = []
    for scene in SCENES:
        looks, movements, _ = region_captions(scene, "train", SIZE_PX)
        objects = asked_objects(scene, looks)
        orders.append([*objects.values()] == [*scene.objects])
        assert (looks["task"], movements["task"]) == (REGION_TASK, MOVEMENT_TASK)
        assert looks["options"] == movements["options"] == [] and looks["regions"] == movements["regions"]
        assert len(objects) == len(first_frame_boxes(scene, SIZE_PX))
        told = (row["answer"].removesuffix(".").split(". ") for row in (looks, movements))
        for look, movement, (mark, item) in zip(*told, objects.items(), strict=True):
            assert look.startswith(f"{mark} is a ") and f"{item.color} {item.shape}" in look
            assert (movement == f"{mark} stands still") == (item.motion == "still")
            assert ("moves" in movement) == item.translates and ("turns" in movement) == bool(item.yaw_rate_deg_s)
            direction = direction_of_travel(scene, item)
            assert direction is None or movement.startswith(f"{mark} moves {direction}")
    assert not all(orders)  # marks are numbered at random


def test_tracks_are_where_the_renderer_draws_the_objects():
    found = 0
    for scene in SCENES:
        tracks = region_captions(scene, "train", SIZE_PX)[-1]
        assert tracks["task"] == TRACK_TASK
        told = tracks["answer"].removesuffix(".").split(". ")
        for track, (mark, item) in zip(told, asked_objects(scene, tracks).items(), strict=True):
            alone = dataclasses.replace(scene, objects=(item,))  # nothing hides it
            masks = instance_masks(alone, [0.0, scene.frame_times[-1]], SIZE_PX) == 0
            points = track.removeprefix(f"{mark} from ").split(" to ")
            for mask, point in zip(masks, points, strict=True):
                if point == "outside":
                    assert mask.sum() == mask[1:-1, 1:-1].sum() == 0 or mask.sum() > mask[1:-1, 1:-1].sum()
                    continue
                rows, columns = np.nonzero(mask)
                x, y = ((int(value) + 0.5) / 100 * SIZE_PX for value in point.removesuffix(" %").split())
                assert columns.min() - 0.5 <= x <= columns.max() + 1.5 and rows.min() - 0.5 <= y <= rows.max() + 1.5
                found += 1
    assert found > 200


def test_a_base_model_is_asked_two_questions_about_looks_of_every_kind():
    kinds = []
    for scene in SCENES:
        caption, looks, movements, tracks, *asked = base_questions(scene, "train", SIZE_PX)
        assert [row["task"] for row in (looks, movements, tracks)] == [REGION_TASK, MOVEMENT_TASK, TRACK_TASK]
        asked, moved = asked[:2], asked[2:]
        assert all(row in appearance_questions(scene, "train", SIZE_PX) for row in asked)
        assert moved == picture_movement(scene, "train", SIZE_PX)
        kinds += [row["task"] for row in asked]
    assert {*kinds} == {*APPEARANCE_TASKS}


def test_movements_in_the_picture_are_those_of_the_rendered_object():
    answers = []
    for scene in SCENES:
        for row in picture_movement(scene, "train", SIZE_PX):
            ((_, item),) = asked_objects(scene, row).items()
            alone = dataclasses.replace(scene, objects=(item,))
            masks = instance_masks(alone, [0.0, scene.frame_times[-1]], SIZE_PX) == 0
            (_, rows_0, columns_0), (_, rows_1, columns_1) = (np.nonzero(mask[None]) for mask in masks)
            right, down = columns_1.mean() - columns_0.mean(), rows_1.mean() - rows_0.mean()
            ways = {"right": right, "left": -right, "down": down, "up": -down}
            if row["answer"] in ways:
                assert ways[row["answer"]] > 0.02 * SIZE_PX
            else:
                assert max(map(abs, ways.values())) < 0.04 * SIZE_PX
            answers.append(row["answer"])
    assert len(answers) > 40 and {*answers} >= {"left", "right", "down", "it stays where it is"}


def test_mixed_questions_are_the_4d_ones_and_captions_of_regions():
    tasks = [row["task"] for row in mixed_questions(SCENES[0], "train", SIZE_PX)]
    assert tasks == [
        *(row["task"] for row in scene_questions(SCENES[0], "train", SIZE_PX)),
        *(row["task"] for row in region_captions(SCENES[0], "train", SIZE_PX)),
    ]


def test_the_same_scene_gives_the_same_questions():
    assert base_questions(SCENES[0], "train", SIZE_PX) == base_questions(SCENES[0], "train", SIZE_PX)
    assert base_questions(SCENES[0], "train", SIZE_PX) != base_questions(SCENES[0], "validation", SIZE_PX)
