import json
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from datasets.exceptions import DatasetGenerationError
from PIL import Image

from datasets_rgpt4d import (
    RoboFAC,
    SATStatic,
    SATTrain,
    VSTITrain,
    WolfQA,
    published_dataset,
    training_messages,
    vsti_train,
)
from datasets_rgpt4d.published_conversations import chat_messages, question_and_answer
from datasets_rgpt4d.published_dataset import Unusable
from datasets_rgpt4d.published_questions import UnusableItem, parquet_items
from datasets_rgpt4d.robofac import question_type
from datasets_rgpt4d.schema import TRAINING_FEATURES
from datasets_rgpt4d.source_files import MissingDataError

VIDEO = b"no video at all: building must not decode"


def png(colour):
    stream = BytesIO()
    Image.new("RGB", (4, 4), colour).save(stream, "png")
    return stream.getvalue()


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    return folder


def put(root, name, content):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def read(builder, root, **options):
    """Rows by id, and what is unusable by id."""
    rows = list(builder.read(builder.source(str(root), **options)))
    usable = {row["id"]: row for row in rows if not isinstance(row, Unusable)}
    unusable = {row.id: row for row in rows if isinstance(row, Unusable)}
    assert len(usable) + len(unusable) == len(rows)
    return usable, unusable


def texts(row):
    return [
        (message["role"], block["text"])
        for message in row["messages"]
        for block in message["content"]
        if block["type"] == "text"
    ]


def kinds(row):
    return [[block["type"] for block in message["content"]] for message in row["messages"]]


# The mapping of turns


def test_media_tokens_are_put_before_the_first_turn_of_the_user():
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Compare <image> and\n<video>\nHow far is <obj_1>?"},
        {"from": "assistant", "value": 0},
        {"from": "user", "value": "And now?\n<image>"},
        {"from": "gpt", "value": " 1.6 \n"},
    ]
    messages = chat_messages(turns, num_images=2, num_videos=1)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [block["type"] for block in messages[1]["content"]] == ["image", "image", "video", "text"]
    assert [message["content"][-1]["text"] for message in messages] == [
        "Be brief.",
        "Compare and\n\nHow far is <obj_1>?",
        "0",
        "And now?",
        "1.6",
    ]
    assert all(len(messages[index]["content"]) == 1 for index in (0, 2, 3, 4))


QUESTION = {"from": "human", "value": "<video>\nWhat?"}


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([QUESTION, {"from": "robot", "value": "This."}], "unknown role"),
        ([QUESTION, {"from": "gpt", "value": " "}], "the answer is empty"),
        ([QUESTION, {"from": "gpt", "value": None}], "the answer is empty"),
        ([{"from": "human", "value": "<video>\n"}, {"from": "gpt", "value": "This."}], "a turn is empty"),
        ([{"from": "human", "value": "What?"}, {"from": "gpt", "value": "."}], "the media tokens do not fit the media"),
        ([{**QUESTION, "value": "<video><image>"}, QUESTION], "a turn is empty"),
        ([QUESTION, {"from": "gpt", "value": "<image> a"}], "the media tokens do not fit the media"),
        (None, "the conversation cannot be read"),
        ("What?", "the conversation cannot be read"),
        (["What?"], "the conversation cannot be read"),
    ],
)
def test_turns_that_cannot_be_used_say_why(turns, reason):
    with pytest.raises(UnusableItem) as error:
        chat_messages(turns, num_videos=1)
    assert error.value.args[0] == reason and error.value.args[1]


def test_an_empty_question_is_refused():
    with pytest.raises(UnusableItem, match="a turn is empty"):
        question_and_answer(None, "yes", num_images=1)


# VSTI-Bench


def vsti_row(number, answer="1.6", question_type="camera_displacement", **others):
    return {
        "id": f"00000000-0000-4000-8000-00000000000{number}",
        "data_source": "scannet",
        "scene_name": "scene0191_00",
        "question_type": question_type,
        "video": "scannet/videos/scene0191_00.mp4",
        "conversations": [
            {
                "from": "human",
                "value": "<image>\nThese are frames of a video.\nApproximately how far (in meters) did the camera move between "
                "frame 14 and frame 20 of 32?\nPlease answer the question using a single word or phrase.",
            },
            {"from": "gpt", "value": answer},
        ],
        **others,
    }


@pytest.fixture
def vsti(root):
    put(root, "vstibench_train/qa_camera_displacement.json", [vsti_row(1), vsti_row(2, "0")])
    rows = [vsti_row(3, "B", "obj_obj_relative_pos_lr")]
    put(root, "vstibench_train/qa_obj_obj_rel_pos_lr.json", rows)
    put(root, "scannet/videos/scene0191_00.mp4", VIDEO)
    return root


def test_vsti_rows_have_their_type_as_subset_and_a_video_for_the_image_token(vsti):
    rows, unusable = read(VSTITrain, vsti)
    assert not unusable and [row["subset"] for row in rows.values()] == [
        "camera_displacement",
        "camera_displacement",
        "obj_obj_relative_pos_lr",
    ]
    row = rows[vsti_row(1)["id"]]
    assert row["source"] == "vsti" and kinds(row) == [["video", "text"], ["text"]] and not row["images"]
    assert texts(row)[0][1].startswith("These are frames of a video.\nApproximately") and texts(row)[1][1] == "1.6"
    assert Path(row["videos"][0]["path"]) == vsti / "scannet/videos/scene0191_00.mp4"
    assert texts(rows[vsti_row(2)["id"]])[1] == ("assistant", "0")


def test_vsti_without_a_type_takes_it_from_the_file(vsti):
    row = vsti_row(4)
    del row["question_type"]
    put(vsti, "vstibench_train/qa_camera_obj_abs_dist.json", [row])
    assert read(VSTITrain, vsti)[0][row["id"]]["subset"] == "camera_obj_abs_dist"


@pytest.mark.parametrize("layout", ["rows", "ids", "by id"])
@pytest.mark.parametrize("folder", ["vstibench_train/", ""])
def test_vsti_honours_the_erratum_and_tells_the_labels_apart(vsti, monkeypatch, layout, folder):
    warnings = []
    monkeypatch.setattr(vsti_train.logger, "warning", warnings.append)
    before, _ = read(VSTITrain, vsti)
    assert {row["revision"].split()[1] for row in before.values()} == {"before_erratum"}
    assert len(warnings) == 1 and "13 July 2026" in warnings[0]

    dropped, reason = vsti_row(1)["id"], "ambiguity gap"
    content = {"rows": [{"id": dropped, "reason": reason}], "ids": [dropped], "by id": {dropped: reason}}[layout]
    put(vsti, f"{folder}erratum_dropped_items.json", content)
    after, unusable = read(VSTITrain, vsti)
    assert {row["revision"].split()[1] for row in after.values()} == {"after_erratum"} and len(warnings) == 1
    assert list(unusable) == [dropped] and set(after) == set(before) - {dropped}
    assert unusable[dropped].reason == "dropped by the erratum of 2026-07-13"
    assert (reason if layout != "ids" else dropped) in unusable[dropped].detail
    assert {row["revision"].split()[0] for row in after.values()} != {
        row["revision"].split()[0] for row in before.values()
    }


@pytest.mark.parametrize("content", [{"items": [{"id": "a"}]}, [{"uid": "a"}], [1]])
def test_vsti_refuses_an_erratum_that_it_cannot_read(vsti, content):
    put(vsti, "erratum_dropped_items.json", content)
    with pytest.raises(ValueError, match="erratum_dropped_items.json must hold"):
        read(VSTITrain, vsti)


def test_vsti_without_videos_says_what_to_get_and_where_to_put_it(vsti, tmp_path):
    (vsti / "scannet/videos/scene0191_00.mp4").unlink()
    with pytest.raises(DatasetGenerationError) as error:
        VSTITrain(location=str(vsti), cache_dir=str(tmp_path / "cache")).download_and_prepare()
    message = str(error.value.__cause__)
    assert "3 of 3 rows are unusable" in message and "the video is missing (scannet/videos/scene0191_00.mp4)" in message
    assert "www.scan-net.org" in message and "media=" in message and "skip_unusable=True" in message


@pytest.mark.parametrize("name", ["scannet/videos/scene0191_00.mp4", "videos/scene0191_00.mp4", "scene0191_00.mp4"])
def test_vsti_finds_videos_in_a_folder_of_their_own(vsti, tmp_path, name):
    (vsti / "scannet/videos/scene0191_00.mp4").unlink()
    video = put(tmp_path / "elsewhere", name, VIDEO)
    rows, unusable = read(VSTITrain, vsti, media=str(video.parents[name.count("/")]))
    assert not unusable and {row["videos"][0]["path"] for row in rows.values()} == {str(video)}


def test_vsti_without_annotations_says_where_they_are(root):
    with pytest.raises(MissingDataError, match=r"no vstibench_train/qa_\*.json. .*VLM-3R-DATA"):
        read(VSTITrain, root)


def test_a_build_sees_videos_that_came_later(vsti, tmp_path, monkeypatch):
    media = tmp_path / "elsewhere"
    media.mkdir()
    (vsti / "scannet/videos/scene0191_00.mp4").unlink()
    put(vsti, "vstibench_train/qa_more.json", [vsti_row(4, video="scannet/videos/scene0000_00.mp4")])
    put(media, "scene0000_00.mp4", VIDEO)
    warnings = []
    monkeypatch.setattr(published_dataset.logger, "warning", warnings.append)
    where = dict(location=str(vsti), media=str(media), skip_unusable=True, cache_dir=str(tmp_path / "cache"))
    builder = VSTITrain(**where)
    builder.download_and_prepare()
    assert len(builder.as_dataset(split="train")) == 1 and len(builder.unusable) == 3
    assert warnings == ["VSTITrain: left out 3 of 4 rows: the video is missing (3)"]
    put(media, "scene0191_00.mp4", VIDEO)
    builder = VSTITrain(**where)
    builder.download_and_prepare()
    assert len(builder.as_dataset(split="train")) == 4 and not builder.unusable and len(warnings) == 1


def test_a_build_without_any_usable_row_fails(vsti, tmp_path):
    (vsti / "scannet/videos/scene0191_00.mp4").unlink()
    builder = VSTITrain(location=str(vsti), skip_unusable=True, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DatasetGenerationError) as error:
        builder.download_and_prepare()
    assert "3 of 3 rows are unusable" in str(error.value.__cause__)


# RoboFAC

FORK = "09936392-adb5-4f34-9410-7c7305d9c76b"


def robofac_row(id, video, question, answer):
    turns = [{"from": "human", "value": f"<video>\n{question}"}, {"from": "assistant", "value": answer}]
    return {"id": id, "video": video, "conversations": turns}


@pytest.fixture
def robofac(root):
    video = f"dataset_success_cleaned/MicrowaveTask-fork/stack_error/{FORK}.mp4"
    rows = [
        robofac_row(
            FORK,
            video,
            "Can you identify what task the robot is doing in the provided video?",
            "Put the fork in the cup and put them in the microwave",
        ),
        robofac_row(FORK, video, "Tell me more.", "It puts the fork."),
    ]
    put(root, "training_qa.json", rows)
    put(root, video, VIDEO)
    return root


def test_robofac_rows_of_one_video_have_ids_of_their_own(robofac):
    rows, unusable = read(RoboFAC, robofac)
    assert not unusable and list(rows) == [f"{FORK}-0", f"{FORK}-1"]
    assert [row["subset"] for row in rows.values()] == ["Task identification", "stack_error"]
    assert kinds(rows[f"{FORK}-0"]) == [["video", "text"], ["text"]]
    assert texts(rows[f"{FORK}-0"])[1] == ("assistant", "Put the fork in the cup and put them in the microwave")


@pytest.mark.parametrize(
    ("named", "lies"),
    [
        ("dataset_success_cleaned/PickCube/a/1.mp4", "success_data/PickCube/a/1.mp4"),
        ("dataset_failure_cleaned/PickCube/a b/1.mp4", "failure_data/PickCube/a b/1.mp4"),
        ("dataset_failure_cleaned/PickCube/a/1.mp4", "simulation_data/PickCube/a/1.mp4"),
        ("dataset_failure_cleaned/PickCube/a/1.mp4", "PickCube/a/1.mp4"),
        ("dataset_failure_cleaned/PickCube/a/1.mp4", "simulation_data/failure_data/PickCube/a/1.mp4"),
        ("simulation_data/Rotation-cube/a/1.mp4", "simulation_data/SpinStack-cube/a/1.mp4"),
        ("dataset_success_cleaned/Rotation2-x/a/1.mp4", "success_data/SpinPullStack-x/a/1.mp4"),
        ("dataset_success_cleaned/Rotation-x/a/1.mp4", "dataset_success_cleaned/SpinStack-x/a/1.mp4"),
    ],
)
def test_robofac_finds_videos_under_their_new_names(root, named, lies):
    put(root, "training_qa.json", [robofac_row("1", named, "What?", "This.")])
    video = put(root, lies, VIDEO)
    rows, unusable = read(RoboFAC, root)
    assert not unusable and rows["1-0"]["videos"][0]["path"] == str(video)


@pytest.mark.parametrize(
    "lies", ["failure_data/PickCube/a/1.mp4", "success_data/PushCube/a/1.mp4", "success_data/SpinStack-x/a/1.mp4"]
)
def test_robofac_takes_no_other_video_for_a_missing_one(root, lies):
    put(root, "training_qa.json", [robofac_row("1", "dataset_success_cleaned/PickCube/a/1.mp4", "What?", "This.")])
    put(root, lies, VIDEO)
    assert read(RoboFAC, root)[1]["1-0"].reason == "the video is missing"


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Can you identify what task the robot is doing in the provided video?", "Task identification"),
        ("From the video, what task is the robot engaged in?", "Task identification"),
        ("What is the robot doing in the video? Please describe its task.", "Task identification"),
        (
            "In the video, the robotic arm executes a task. Please break down its execution into a sequence of subtasks.",
            "Task planning",
        ),
        (
            "Based on the video of the robotic arm executing a task, did it finish the task successfully?",
            "Failure detection",
        ),
        (
            "This is a video of a robotic arm performing a task, please explain in detail the reason for the task failure.",
            "Failure explanation",
        ),
        (
            "Which failure happened? (Your answer should choose one of the following options: ['Orientation deviation.', "
            "'Grasping error.', 'Position deviation.'])",
            "Failure identification",
        ),
        ("In which subtask did the error occur?", "Failure locating"),
        ("Please give high-level suggestions for correction.", "High-level correction"),
        ("Please give low-level suggestions for correction.", "Low-level correction"),
        ("What happened?", None),
        ("Give high-level and low-level corrections.", None),
    ],
)
def test_robofac_types_are_told_by_the_question_where_they_are_sure(question, expected):
    assert question_type(question) == expected


def test_robofac_unknown_roles_and_empty_answers_are_reported(robofac):
    video = "PickCube/a/1.mp4"
    bad = [robofac_row("a", video, "What?", ""), robofac_row("b", video, "What?", "This."), {"id": "c", "video": video}]
    bad[1]["conversations"][1]["from"] = "narrator"
    put(robofac, "training_qa.json", bad + [robofac_row("d", video, "What?", "This.")])
    bad[1]["conversations"].append({"from": "human", "value": "And?"})
    put(robofac, video, VIDEO)
    rows, unusable = read(RoboFAC, robofac)
    assert list(rows) == ["d-0"]
    assert {id: one.reason for id, one in unusable.items()} == {
        "a-0": "the answer is empty",
        "b-0": "unknown role",
        "c-0": "a field is missing",
    }


def test_a_conversation_that_ends_with_a_question_is_reported(robofac):
    row = robofac_row("a", f"success_data/MicrowaveTask-fork/stack_error/{FORK}.mp4", "What?", "This.")
    row["video"] = f"dataset_success_cleaned/MicrowaveTask-fork/stack_error/{FORK}.mp4"
    row["conversations"].append({"from": "human", "value": "And?"})
    put(robofac, "training_qa.json", [row])
    assert read(RoboFAC, robofac)[1]["a-0"].reason == "the turns do not fit together"


def test_robofac_packed_videos_are_to_be_unpacked_first(robofac):
    for video in robofac.glob("**/*.mp4"):
        video.unlink()
    put(robofac, "simulation_data.zip", b"")
    with pytest.raises(MissingDataError, match="unzip .*simulation_data.zip"):
        read(RoboFAC, robofac)


# SAT

IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
FIGURE_A4 = (
    "Were any of the objects in the initial frame that you can still see in the second frame moved from their original "
    "positions?"
)
PLANT = "green tapered square potted houseplant was moved {} in the first frame"
A4_OPTIONS = [PLANT.format("right and towards the camera"), PLANT.format("left and away from the camera")]


def sat_row(question=FIGURE_A4, answers=A4_OPTIONS, answer=A4_OPTIONS[0], kind="obj_movement", images=("red", "blue")):
    return {
        "image_bytes": [{"bytes": png(colour) if colour else b"", "path": None} for colour in images],
        "question": question,
        "answers": answers,
        "question_type": kind,
        "correct_answer": answer,
    }


def write_sat(root, rows, name="SAT_train.parquet", **options):
    schema = pa.schema(
        [
            ("image_bytes", IMAGES),
            ("question", pa.string()),
            ("answers", pa.list_(pa.string())),
            ("question_type", pa.string()),
            ("correct_answer", pa.string()),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), root / name, row_group_size=10**9, **options)


def test_sat_rows_read_as_figure_a4(root):
    write_sat(
        root, [sat_row(), sat_row("How many Chairs are visible in the scene?", ["3", "0"], "0", "other", ["red"])]
    )
    rows, unusable = read(SATTrain, root)
    assert not unusable and list(rows) == ["train-0", "train-1"]
    row = rows["train-0"]
    (_, question), (_, answer) = texts(row)
    orders = [A4_OPTIONS, A4_OPTIONS[::-1]]
    assert question in [f"{FIGURE_A4} Options: ['{first}', '{second}']" for first, second in orders]
    assert answer == f"{A4_OPTIONS[0]}."
    assert kinds(row) == [["image", "image", "text"], ["text"]] and row["subset"] == "obj_movement"
    assert [image["bytes"] for image in row["images"]] == [png("red"), png("blue")] and not row["videos"]
    assert texts(rows["train-1"])[1] == ("assistant", "0.") and kinds(rows["train-1"])[0] == ["image", "text"]


def test_sat_options_are_shuffled_the_same_way_each_time(root):
    write_sat(root, [sat_row("What?", ["yes", "no"], "yes", "other", ["red"])] * 200)
    first, again = read(SATTrain, root)[0], read(SATTrain, root)[0]
    assert first == again
    leading = sum("Options: ['yes', 'no']" in texts(row)[0][1] for row in first.values())
    assert 70 < leading < 130


def test_sat_rows_that_cannot_be_used_say_why(root):
    bad = [
        sat_row(answer="up"),
        sat_row(answers=None),
        sat_row(answers=["yes"], answer="yes"),
        sat_row(answers=["yes", "yes "], answer="yes"),
        sat_row(answer=None),
        sat_row(answers=["", "no"], answer=""),
        sat_row(images=["red", None]),
        sat_row(images=[]),
    ]
    write_sat(root, [*bad, sat_row(answers=[" yes ", "no."], answer="no.")])
    rows, unusable = read(SATTrain, root)
    assert texts(rows["train-8"])[1] == ("assistant", "no.") and len(rows) == 1
    assert [one.reason for one in unusable.values()] == [
        "the answer is not one of the options",
        "there are fewer than two options",
        "there are fewer than two options",
        "the answer is not one of the options",
        "the answer is empty",
        "the answer is empty",
        "an image is missing",
        "an image is missing",
    ]


def test_sat_static_reads_its_own_file(root):
    write_sat(root, [sat_row(kind="other")], "SAT_static.parquet")
    assert list(read(SATStatic, root)[0]) == ["static-0"]
    with pytest.raises(MissingDataError, match="no SAT_train.parquet or sft.json. Download SAT_train.parquet"):
        read(SATTrain, root)
    (root / "SAT_static.parquet").unlink()
    put(root, "sft.json", [])
    with pytest.raises(MissingDataError, match="SAT_static.parquet .*2.63 GB"):
        read(SATStatic, root)


def test_sat_is_read_in_pieces(root):
    """A row group of 80 MB passes through a small part of it."""
    picture = bytes(range(256)) * 40
    rows = [{**sat_row(images=()), "image_bytes": [{"bytes": picture + str(i).encode()}]} for i in range(8_000)]
    write_sat(root, rows, compression="none", use_dictionary=False)
    del rows
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    allocated = [pool.bytes_allocated() - before for _ in parquet_items(root / "SAT_train.parquet")]
    assert len(allocated) == 8_000
    assert (root / "SAT_train.parquet").stat().st_size > 80e6 and 0 < max(allocated) < 30e6


@pytest.mark.parametrize("place", ["SAT/0.png", "0.png"])
@pytest.mark.parametrize("apart", [False, True])
def test_sat_reads_the_layout_of_the_papers_authors(root, tmp_path, place, apart):
    question = f"{FIGURE_A4} Options: {A4_OPTIONS[::-1]}"
    two = {
        "id": "sat_0",
        "image": ["SAT/0.png", "SAT/0.png"],
        "conversations": [
            {"from": "human", "value": f"<image>\n<image>\n{question}"},
            {"from": "gpt", "value": f"{A4_OPTIONS[0]}."},
        ],
    }
    one = {
        "image": "SAT/0.png",
        "conversations": [{"from": "human", "value": "<image>\nMany?"}, {"from": "gpt", "value": "3."}],
    }
    missing = {**one, "id": "sat_2", "image": "SAT/1.png"}
    put(root, "sft.json", [two, one, missing])
    media = tmp_path / "pictures" if apart else root
    picture = put(media, place, png("red"))
    rows, unusable = read(SATTrain, root, **({"media": str(media)} if apart else {}))
    assert list(rows) == ["sat_0", "sft-1"] and unusable["sat_2"].reason == "the image is missing"
    assert texts(rows["sat_0"])[0] == ("user", question)  # as published: nothing is shuffled
    assert [image["path"] for image in rows["sat_0"]["images"]] == [str(picture)] * 2
    assert kinds(rows["sft-1"]) == [["image", "text"], ["text"]]


# Wolf

FIGURE_A2 = (
    "What traffic participants are around the ego-centric vehicle in the video? Please count and list all of them."
)
A2_ANSWER = "1 car is near the ego vehicle's expected path. 1 traffic cone is in the ego vehicle's lane."


def wolf_rows():
    turns = [{"from": "human", "value": f"<video>\n{FIGURE_A2}"}, {"from": "gpt", "value": A2_ANSWER}]
    return [
        {"id": "wolf_0", "video": "final_version/a.mp4", "conversations": turns},
        {
            "id": "wolf_1",
            "video": "final_version/a.mp4",
            "question": "How many?",
            "answer": 0,
            "question_type": "count",
        },
    ]


@pytest.fixture
def wolf(root):
    put(root, "wolf_qa.jsonl", "\n".join(map(json.dumps, wolf_rows())).encode() + b"\n")
    put(root, "final_version/a.mp4", VIDEO)
    return root


def test_wolf_reads_conversations_and_pairs(wolf):
    rows, unusable = read(WolfQA, wolf)
    assert not unusable and [row["subset"] for row in rows.values()] == ["", "count"]
    assert texts(rows["wolf_0"]) == [("user", FIGURE_A2), ("assistant", A2_ANSWER)]
    assert texts(rows["wolf_1"]) == [("user", "How many?"), ("assistant", "0")]
    assert all(kinds(row) == [["video", "text"], ["text"]] for row in rows.values())


def test_wolf_reads_a_list_and_videos_that_lie_apart(root, tmp_path):
    put(root, "wolf_qa.json", wolf_rows())
    video = put(tmp_path / "nuscenes", "final_version/a.mp4", VIDEO)
    rows, unusable = read(WolfQA, root, media=str(tmp_path / "nuscenes"))
    assert not unusable and {row["videos"][0]["path"] for row in rows.values()} == {str(video)}


def test_wolf_lines_that_cannot_be_used_say_why(wolf):
    row = wolf_rows()[1]
    outside = put(wolf.parent, "outside.mp4", VIDEO)
    lines = [
        json.dumps({**row, "id": "gone", "video": "b.mp4"}),
        json.dumps({**row, "id": "above", "video": "../outside.mp4"}),
        json.dumps({**row, "id": "absolute", "video": str(outside)}),
        json.dumps({**row, "id": "silent", "answer": ""}),
        json.dumps({**row, "id": "mute", "question": " "}),
        json.dumps({**row, "id": "nameless", "video": None}),
        json.dumps({"id": "half", "video": row["video"], "question": "What?"}),
        json.dumps(row)[:-20],
    ]
    put(wolf, "wolf_qa.jsonl", "\n".join(lines).encode())
    rows, unusable = read(WolfQA, wolf)
    assert not rows and {id: one.reason for id, one in unusable.items()} == {
        "gone": "the video is missing",
        "above": "the video is missing",
        "absolute": "the video is missing",
        "silent": "the answer is empty",
        "mute": "a turn is empty",
        "nameless": "no video is named",
        "half": "a field is missing",
        "line 8": "the line is no JSON object",
    }


def test_wolf_is_on_no_hub(tmp_path):
    with pytest.raises(ValueError, match="on no Hub: give location=.*nuScenes"):
        WolfQA(cache_dir=str(tmp_path))


def test_a_media_folder_that_is_not_there_is_refused(wolf):
    with pytest.raises(MissingDataError, match="media='nowhere' is no folder"):
        read(WolfQA, wolf, media="nowhere")


# All of them


@pytest.fixture
def published(request, root):
    if request.param is SATTrain:
        write_sat(root, [sat_row(), sat_row("Many?", ["3", "0"], "0", "other", ["red"])])
    else:
        request.getfixturevalue({VSTITrain: "vsti", RoboFAC: "robofac", WolfQA: "wolf"}[request.param])
    return request.param, root


def content(media):
    return [one["bytes"] if one["bytes"] is not None else Path(one["path"]).read_bytes() for one in media]


def comparable(rows):
    return [{**row, "images": content(row["images"]), "videos": content(row["videos"])} for row in rows]


@pytest.mark.parametrize("published", [VSTITrain, RoboFAC, SATTrain, WolfQA], indirect=True)
def test_built_streamed_and_parquet_rows_are_equal(published, tmp_path):
    dataset, root = published
    where = dict(location=str(root), cache_dir=str(tmp_path / "cache"))
    builder = dataset(**where)
    builder.download_and_prepare()
    rows = builder.as_dataset(split="train")
    expected = comparable(row for row in dataset.read(dataset.source(str(root))))
    assert rows.features == TRAINING_FEATURES and len(rows) == len(expected) > 1
    assert comparable(rows) == expected and comparable(builder.as_streaming_dataset(split="train")) == expected
    assert {row["revision"].split()[0][:7] for row in rows} == {"sha256:"}

    dataset(**where).download_and_prepare(str(tmp_path / "parquet"), file_format="parquet")
    for path in sorted(root.glob("**/*"), reverse=True):  # embedded: the source is needed no more
        path.rmdir() if path.is_dir() else path.unlink()
    loaded = load_dataset(str(tmp_path / "parquet"), split="train", cache_dir=str(tmp_path / "loaded"))
    assert loaded.features == TRAINING_FEATURES and comparable(loaded) == expected
    assert all(one["bytes"] is not None for row in loaded for one in row["images"] + row["videos"])


@pytest.mark.parametrize("published", [VSTITrain, RoboFAC, SATTrain, WolfQA], indirect=True)
def test_rows_give_messages_with_their_media(published):
    dataset, root = published
    for row in dataset.read(dataset.source(str(root))):
        messages = training_messages(row)
        blocks = [block for message in messages for block in message["content"]]
        videos = [block["video"] for block in blocks if block["type"] == "video"]
        images = [block["image"] for block in blocks if block["type"] == "image"]
        assert videos == row["videos"] and len(images) == len(row["images"]) and len(videos) + len(images) > 0
        assert [block["type"] for block in messages[0]["content"]][-1] == "text"


def test_the_sample_rows_are_read(shared_dir, root):
    samples = {
        name: json.loads((shared_dir / f"samples/{name}.json").read_text(encoding="utf-8"))
        for name in ("vstibench_train", "robofac", "sat", "wolf")
    }
    put(root, "vstibench_train/qa_all.json", samples["vstibench_train"]["rows"])
    put(root, "training_qa.json", samples["robofac"]["train_rows"])
    put(root, "sft.json", [samples["sat"]["sft_row_4d_rgpt"]])
    put(root, "wolf_qa.json", samples["wolf"]["rows"])
    for row in (
        *samples["vstibench_train"]["rows"],
        *samples["robofac"]["train_rows"],
        samples["sat"]["sft_row_4d_rgpt"],
        *samples["wolf"]["rows"],
    ):
        for name in row.get("image", []) + ([row["video"]] if "video" in row else []):
            put(root, name, png("red"))
    subsets = {}
    for dataset in (VSTITrain, RoboFAC, SATTrain, WolfQA):
        rows, unusable = read(dataset, root)
        assert not unusable
        subsets[dataset.SOURCE] = [row["subset"] for row in rows.values()]
    assert subsets == {
        "vsti": ["camera_displacement", "camera_obj_rel_dist_v2", "obj_obj_relative_pos_lr"],
        "robofac": ["Task identification", "Failure detection", "Failure explanation"],
        "sat": [""],
        "wolf": [""] * 3,
    }
