import json
import shutil
import zipfile
from io import BytesIO
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from PIL import Image

from datasets_rgpt4d import (
    MMSIBenchQuestions,
    OmniSpatialQuestions,
    R4DBenchQuestions,
    SATRealBothOrders,
    SATRealQuestions,
    STIBenchQuestions,
    TimeBenchQuestions,
    VLM4DQuestions,
    VLM4DSyntheticQuestions,
    VSTIBenchQuestions,
    evaluation_messages,
    source_files,
    timebench_rows,
    vstibench,
)
from datasets_rgpt4d.mmsi_bench import split_inline_options
from datasets_rgpt4d.published_questions import UnusableItem, option_at, options_by_letter
from datasets_rgpt4d.schema import EVALUATION_FEATURES
from datasets_rgpt4d.source_files import MissingDataError, SourceFiles
from datasets_rgpt4d.sti_bench import scene_of
from datasets_rgpt4d.world4d_video import write_video

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


def read(builder, root):
    """Rows and unusable items by id."""
    rows, unusable = {}, {}
    for row in builder.read(SourceFiles(root, builder.REMEDY)):
        if isinstance(row, dict):
            assert row["id"] not in rows and row["benchmark"] == builder.BENCHMARK
            rows[row["id"]] = {**row, "details": json.loads(row["details"])}
        else:
            unusable[row.id] = row
    return rows, unusable


def build(builder, root, **options):
    made = builder(location=str(root), cache_dir=str(root.parent / "cache"), **options)
    made.download_and_prepare()
    return made, made.as_dataset(split="test")


# ----- R4D-Bench


def r4d_item(id, **changes):
    item = {
        "id": id,
        "benchmark": "vlm4d",
        "task": "Counting",
        "video": "videos/vlm4d/baseball.mp4",
        "source": "videos/vlm4d/baseball.mp4",
        "som_image": f"images/vlm4d/{id}.png",
        "question": "How many times does the <obj_1> hit the ball to the left?",
        "question_raw": "How many times does the batter hit the ball to the left?",
        "options": [1, 2, 3, 0],
        "answer": 0,
        "time_start": None,
    }
    return {**item, **changes}


def r4d(root, *items):
    put(root, "test.json", list(items))
    put(root, "videos/vlm4d/baseball.mp4", VIDEO)
    for item in items:
        if item["som_image"]:
            put(root, item["som_image"], png("red"))
    return root


def test_r4d_bench_keeps_zero_none_and_mixed_types(root):
    items = [
        r4d_item("validation_3"),
        r4d_item(556, options=["left", 2, None, 0.5], answer=None, time_start="7.0", benchmark="stibench"),
        r4d_item("validation_9", som_image=""),
    ]
    rows, unusable = read(R4DBenchQuestions, r4d(root, *items))
    assert not unusable
    assert rows["validation_3"]["options"] == ["1", "2", "3", "0"] and rows["validation_3"]["answer"] == "0"
    assert rows["556"]["options"] == ["left", "2", "None", "0.5"] and rows["556"]["answer"] == "None"
    assert (rows["556"]["time_start"], rows["556"]["time_end"], rows["validation_3"]["time_start"]) == (7.0, None, None)
    assert rows["556"]["category"] == "Counting" and rows["556"]["details"]["benchmark"] == "stibench"
    assert rows["validation_3"]["question"] == items[0]["question"]
    assert rows["validation_3"]["details"]["question_raw"] == items[0]["question_raw"]
    pictures = {id: [one["path"] for one in row["images"]] for id, row in rows.items()}
    assert pictures["validation_3"] == [str(root / "images/vlm4d/validation_3.png")]
    assert pictures["validation_9"] == []


def test_r4d_bench_never_shows_the_untrimmed_video_for_a_missing_clip(root):
    clip, picture, neither = (
        r4d_item("a", video="clipped/vlm4d/baseball.mp4"),
        r4d_item("b"),
        r4d_item("c", answer="7"),
    )
    r4d(root, clip, picture, neither, r4d_item("d", video=None))
    (root / "images/vlm4d/b.png").unlink()
    rows, unusable = read(R4DBenchQuestions, root)
    assert rows == {}
    assert {id: one.reason for id, one in unusable.items()} == {
        "a": "the clip is missing",
        "b": "the set-of-mark picture is missing",
        "c": "the answer does not fit the question",
        "d": "no clip is named",
    }
    assert unusable["a"].detail == "clipped/vlm4d/baseball.mp4"
    with pytest.raises(DatasetGenerationError) as caught:
        build(R4DBenchQuestions, root)
    assert "4 of 4 rows are unusable" in str(caught.value.__cause__) and "helpers.py --clip" in str(
        caught.value.__cause__
    )
    put(root, "clipped/vlm4d/baseball.mp4", VIDEO)
    made, kept = build(R4DBenchQuestions, root, skip_unusable=True)
    assert kept["id"] == ["a"] and len(made.unusable) == 3
    assert kept[0]["videos"][0]["path"].endswith("clipped/vlm4d/baseball.mp4")


def test_sample_rows_of_r4d_bench_are_read(root, shared_dir):
    items = json.loads((shared_dir / "samples" / "r4d_bench.json").read_text())["rows"]
    for item in items:
        put(root, item["video"], VIDEO)
        if item["som_image"]:
            put(root, item["som_image"], png("red"))
    put(root, "test.json", items)
    rows, unusable = read(R4DBenchQuestions, root)
    assert list(rows) == ["556", "validation_3", "validation_9"]
    assert list(unusable) == ["555"]  # printed from a model's output, with a letter for its answer


# ----- STI-Bench


def sti_item(id, **changes):
    item = {
        "Video": "scene0011_00.mp4",
        "ID": id,
        "time_start": 0.0,
        "time_end": 19.6,
        "Question": "How far does the camera move?",
        "Candidates": {"A": "1.16m", "B": "0.91m", "C": "1.03m", "D": "0.75m", "E": None},
        "Answer": "B",
        "Task": "Displacement & Path Length",
        "Source": "scannet",
    }
    return {**item, **changes}


def test_sti_bench_reads_structs_json_and_both_folder_names(root):
    box = {"C_lwh": [4.95, 2.36, 1.81], "C_heading": -0.17}
    for name, items in {
        "struct": [sti_item(0), sti_item(1, time_start=None, time_end=float("nan"), Answer="d ")],
        "json": [
            sti_item(2, Candidates=json.dumps({"A": 0, "B": None})),
            sti_item(3, Candidates=json.dumps({"A": box, "B": "x"}), Answer="A", Video="000123"),
            sti_item(4, Candidates='{"A": 1, "C": 2}'),
            sti_item(5, Answer="E"),
            sti_item(6, Video="gone.mp4"),
        ],
    }.items():
        folder = root / name
        put(folder, f"{'videos' if name == 'struct' else 'video'}/scene0011_00.mp4", VIDEO)
        put(folder, "video/000123.mp4", VIDEO)
        if name == "json":
            items = [{**one, "Candidates": _as_json(one["Candidates"])} for one in items]
        pq.write_table(pa.Table.from_pylist(items), folder / "qa.parquet")
    rows, unusable = read(STIBenchQuestions, root / "struct")
    assert not unusable
    first, second = rows["scene0011_00.mp4/0"], rows["scene0011_00.mp4/1"]
    assert (first["options"], first["answer"]) == (["1.16m", "0.91m", "1.03m", "0.75m"], "0.91m")
    assert (first["time_start"], first["time_end"], first["question"]) == (0.0, 19.6, "How far does the camera move?")
    assert (second["time_start"], second["time_end"], second["answer"]) == (None, None, "0.75m")
    assert first["category"] == "Displacement & Path Length" and first["details"]["scene"] == "indoor"

    rows, unusable = read(STIBenchQuestions, root / "json")
    assert rows["scene0011_00.mp4/2"]["options"] == ["0", "None"] and rows["scene0011_00.mp4/2"]["answer"] == "None"
    assert rows["000123/3"]["answer"] == json.dumps(box) and rows["000123/3"]["details"]["scene"] == "desktop"
    assert {id: one.reason for id, one in unusable.items()} == {
        "scene0011_00.mp4/4": "the options cannot be read",
        "scene0011_00.mp4/5": "the answer names no option",
        "gone.mp4/6": "the video is missing",
    }


def _as_json(candidates):
    if isinstance(candidates, str):
        return candidates
    return json.dumps({letter: text for letter, text in candidates.items() if text is not None})


def test_scene_of_a_video_is_told_by_its_name():
    assert scene_of("11356601648124485814_409_000_429_000_camera_1.mp4") == "outdoor"
    assert [scene_of(name) for name in ("scene0011_00.mp4", "000123.mp4", "0123.mp4")] == [
        "indoor",
        "desktop",
        "unknown",
    ]


# ----- VLM4D

VLM4D_ADDRESS = "https://huggingface.co/datasets/shijiezhou/VLM4D/resolve/main/"


def vlm4d_item(id, video, choices, answer):
    return {
        "id": id,
        "video": VLM4D_ADDRESS + video,
        "question_type": "multiple-choice",
        "question": "What direction is it moving towards?",
        "choices": dict(zip("ABCD", choices, strict=False)),
        "answer": answer,
    }


def test_vlm4d_reads_integers_spaces_and_a_text_listed_twice(root):
    davis, ego = "videos_real/davis/sea snake.mp4", "videos_real/ego4d/clip_300.mp4"
    items = [
        vlm4d_item("validation_3", davis.replace(" ", "%20"), [1, 2, 3, 0], 0),
        vlm4d_item("validation_633", davis, ["not sure", "not moving", "away", "away"], "away"),
        vlm4d_item("validation_1371", ego, ["above ", "left", "below", "right"], " above"),
    ]
    for layout in ("QA", "data", "."):
        folder = root / layout.strip(".") / "x"
        put(folder, f"{layout}/real_mc.json", items)
        put(folder, davis, VIDEO)
        put(folder, ego, VIDEO)
        rows, unusable = read(VLM4DQuestions, folder)
        assert not unusable
        assert [rows[one["id"]]["answer"] for one in items] == ["0", "away", "above"]
        assert rows["validation_633"]["options"] == ["not sure", "not moving", "away", "away"]
        assert rows["validation_1371"]["options"][0] == "above"
        assert [rows[one["id"]]["category"] for one in items] == ["exo", "exo", "ego"]
        assert rows["validation_3"]["videos"] == [{"path": str(folder / davis), "bytes": None}]
        assert rows["validation_3"]["details"]["part"] == "real"


def test_vlm4d_synthetic_ids_differ_from_the_real_ones(root):
    video = "videos_synthetic/synth_001.mp4"
    put(root, video, VIDEO)
    choices = ["left", "no robotic arm there", "not moving", "right"]
    items = [
        vlm4d_item("validation_1", video, choices, "left"),
        vlm4d_item("validation_2", video, choices, "no robotic arm there"),
        vlm4d_item("validation_3", video, choices, "not moving"),
    ]
    put(root, "QA/synthetic_mc.json", items)
    put(root, "QA/real_mc.json", items)
    synthetic, _ = read(VLM4DSyntheticQuestions, root)
    real, _ = read(VLM4DQuestions, root)
    assert not set(synthetic) & set(real)
    assert [row["category"] for row in synthetic.values()] == ["directional", "false_positive", "directional"]
    assert {row["details"]["part"] for row in synthetic.values()} == {"synthetic"}


def test_sample_rows_of_vlm4d_are_read(root, shared_dir):
    splits = json.loads((shared_dir / "samples" / "vlm4d.json").read_text())["splits"]
    for split, items in splits.items():
        put(root, f"data/{split}.json", items)
        for item in items:
            put(root, item["video"].removeprefix(VLM4D_ADDRESS), VIDEO)
    rows, unusable = read(VLM4DQuestions, root)
    assert not unusable
    assert {id: row["answer"] for id, row in rows.items()} == {
        "validation_1": "there are no buses in the video",
        "validation_3": "1",
        "validation_633": "away from the camera",
        "validation_1371": "right",
    }
    rows, unusable = read(VLM4DSyntheticQuestions, root)
    assert not unusable and list(rows) == ["synthetic_validation_1", "synthetic_validation_445"]


# ----- OmniSpatial


def omnispatial_items():
    common = {"question": "Where?", "sub_task_type": "Manipulation"}
    return [
        {"id": "0_0", "options": ["Left", "Right"], "answer": 0, "task_type": "Dynamic_Reasoning", **common},
        {"id": "0_0", "options": ["A", "B", "C"], "answer": "2", "task_type": "Spatial_Interaction", **common},
        {"id": "0_1", "options": ["a", "b"], "answer": 2, "task_type": "Dynamic_Reasoning", **common},
        {"id": "7_0", "options": ["a", "b"], "answer": 1, "task_type": "Dynamic_Reasoning", **common},
    ]


@pytest.mark.parametrize("top", ["OmniSpatial-test/", ""])
def test_omnispatial_answers_by_index_and_counts_pictures_within_a_task(root, top):
    put(root, f"{top}data.json", omnispatial_items())
    for task in ("Dynamic_Reasoning", "Spatial_Interaction"):
        put(root, f"{top}{task}/0.png", png("red"))
    put(root, "OmniSpatial-test.zip", b"kept beside the unpacked folder")
    rows, unusable = read(OmniSpatialQuestions, root)
    first, second = rows["Dynamic_Reasoning/0_0"], rows["Spatial_Interaction/0_0"]
    assert (first["answer"], second["answer"]) == ("Left", "C")
    assert second["category"] == "Spatial_Interaction/Manipulation"
    assert second["images"] == [{"path": str(root / f"{top}Spatial_Interaction/0.png"), "bytes": None}]
    assert {id: one.reason for id, one in unusable.items()} == {
        "Dynamic_Reasoning/0_1": "the answer names no option",
        "Dynamic_Reasoning/7_0": "the image is missing",
    }


def test_omnispatial_of_the_hub_is_read_from_its_archive(root, monkeypatch):
    with zipfile.ZipFile(root / "OmniSpatial-test.zip", "w") as archive:
        archive.writestr("OmniSpatial-test/data.json", json.dumps(omnispatial_items()[:2]))
        for task in ("Dynamic_Reasoning", "Spatial_Interaction"):
            archive.writestr(f"OmniSpatial-test/{task}/0.png", png("red"))
    info = SimpleNamespace(sha="d" * 40, siblings=[SimpleNamespace(rfilename="OmniSpatial-test.zip")])
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", str(root / "extracted"))
    monkeypatch.setattr(source_files, "HfApi", lambda: SimpleNamespace(dataset_info=lambda *a, **k: info))
    monkeypatch.setattr(source_files, "hf_hub_download", lambda location, name, **_: str(root / name))
    made = OmniSpatialQuestions(cache_dir=str(root.parent / "cache"))
    made.download_and_prepare()
    rows = made.as_dataset(split="test")
    assert rows["answer"] == ["Left", "C"] and set(rows["revision"]) == {"d" * 40}
    assert made.config.location is None and made.unusable == []


# ----- MMSI-Bench


def test_mmsi_bench_takes_the_options_out_of_the_question_and_keeps_all_pictures(root):
    question = (
        "In which direction are you moving?\nOptions: A: Left, while moving, B: Forward: left, C: Right, D: Image 2, B"
    )
    pictures = [png("red"), png("blue"), png("green")]
    items = [
        {
            "id": 0,
            "images": pictures,
            "question_type": "Motion (Cam.)",
            "question": question,
            "answer": "B",
            "thought": "",
        },
        {"id": 1, "images": [], "question_type": "MSR", "question": question, "answer": "B", "thought": "t"},
        {"id": 2, "images": pictures, "question_type": "MSR", "question": "No options?", "answer": "B", "thought": "t"},
    ]
    pq.write_table(pa.Table.from_pylist(items), root / "MMSI_Bench.parquet")
    rows, unusable = read(MMSIBenchQuestions, root)
    row = rows["0"]
    assert row["question"] == "In which direction are you moving?"
    assert row["options"] == ["Left, while moving", "Forward: left", "Right", "Image 2, B"]
    assert row["answer"] == "Forward: left" and row["details"]["published_question"] == question
    assert row["images"] == [{"path": None, "bytes": one} for one in pictures]
    assert {id: one.reason for id, one in unusable.items()} == {
        "1": "an image is missing",
        "2": "the options cannot be read",
    }
    structs = [{**items[0], "images": [{"bytes": one, "path": "x.png"} for one in pictures]}]
    pq.write_table(pa.Table.from_pylist(structs), root / "MMSI_Bench.parquet")
    assert read(MMSIBenchQuestions, root)[0]["0"]["images"] == row["images"]


def test_sample_questions_of_mmsi_bench_have_four_options(shared_dir):
    for item in json.loads((shared_dir / "samples" / "mmsi_bench.json").read_text())["rows"]:
        stem, options = split_inline_options(item["question"])
        assert len(options) == 4 and "Options" not in stem
        listed = ", ".join(f"{letter}: {text}" for letter, text in zip("ABCD", options, strict=True))
        assert f"{stem}\nOptions: {listed}" == item["question"]


# ----- SAT-real


def sat(root, num=40):
    items = [
        {
            "image_bytes": [{"bytes": png("red"), "path": None}] * (1 + k % 2),
            "question": "Were any of the objects moved?",
            "answers": [f"chair {k} was moved left", f"chair {k} was moved right"],
            "question_type": "obj_movement",
            "correct_answer": f"chair {k} was moved left",  # first in the source, as it mostly is
        }
        for k in range(num)
    ]
    pq.write_table(pa.Table.from_pylist(items), root / "SAT_test.parquet", row_group_size=num)
    return items


def test_sat_real_shuffles_options_by_id_alone(root):
    items = sat(root)
    rows, unusable = read(SATRealQuestions, root)
    assert not unusable and list(rows) == [str(k) for k in range(len(items))]
    first = sum(row["options"][0] == row["answer"] for row in rows.values())
    assert 8 < first < 32  # 20 expected, deviation 3.2
    assert rows == read(SATRealQuestions, root)[0]
    for row, item in zip(rows.values(), items, strict=True):
        assert sorted(row["options"]) == sorted(item["answers"]) and row["details"]["answers"] == item["answers"]
        assert [one["bytes"] for one in row["images"]] == [one["bytes"] for one in item["image_bytes"]]


def test_sat_real_in_both_orders_has_pairs(root):
    sat(root, 5)
    single, _ = read(SATRealQuestions, root)
    both, _ = read(SATRealBothOrders, root)
    assert len(both) == 10
    for id, row in single.items():
        assert both[id] == row and both[f"{id}-reversed"] == {
            **row,
            "id": f"{id}-reversed",
            "options": row["options"][::-1],
        }
        assert both[f"{id}-reversed"]["details"]["pair"] == both[id]["details"]["pair"] == id


def test_sat_real_names_items_whose_answer_is_no_option(root):
    items = sat(root, 3)
    items[0]["correct_answer"] = "chair"
    items[1]["answers"] = ["one"]
    pq.write_table(pa.Table.from_pylist(items), root / "SAT_test.parquet")
    rows, unusable = read(SATRealBothOrders, root)
    assert len(rows) == 2 and list(unusable) == ["0", "1"]


# ----- VSTI-Bench


def vsti_item(id, **changes):
    item = {
        "id": id,
        "dataset": "scannet",
        "scene_name": "scene0011_00",
        "video_path": "scannet/videos/scene0011_00.mp4",
        "question_type": "obj_obj_relative_pos_nf",
        "question": "In frame 13 of 32, relative to the camera, is table [Near/Far] compared to printer?",
        "options": ["A. Far", "B. Near"],
        "ground_truth": "Near",
        "mc_answer": "B",
    }
    return {**item, **changes}


def vsti_number(id, ground_truth):
    return vsti_item(id, question_type="camera_displacement", options=None, ground_truth=ground_truth, mc_answer=None)


def test_vstibench_has_numbers_and_choices(root):
    items = [
        vsti_item(1),
        vsti_item(2, options=["A. backward", "B. left", "C. right"], ground_truth="Right", mc_answer="C"),
        vsti_number(3, "1.1"),
        vsti_number(4, "0"),
        vsti_number(5, 0.0),
        vsti_number(6, "nan"),
        vsti_number(7, None),
        vsti_item(8, mc_answer=None),
        vsti_item(9, mc_answer="A"),
        vsti_item(0),
        vsti_item(10, video_path="scannet/videos/gone.mp4"),
        {"id": 11, "video_path": "scannet/videos/scene0011_00.mp4"},
    ]
    put(root, "test.json", items)
    put(root, "scannet/videos/scene0011_00.mp4", VIDEO)
    rows, unusable = read(VSTIBenchQuestions, root)
    assert (rows["1"]["options"], rows["1"]["answer"], rows["1"]["answer_kind"]) == (["Far", "Near"], "Near", "choice")
    assert rows["2"]["answer"] == "right" and rows["0"]["answer"] == "Near"
    assert [(rows[id]["answer"], rows[id]["answer_kind"]) for id in "345"] == [
        ("1.1", "number"),
        ("0", "number"),
        ("0.0", "number"),
    ]
    assert rows["3"]["options"] == [] and rows["3"]["category"] == "camera_displacement"
    assert {id: one.reason for id, one in unusable.items()} == {
        "6": "the answer is no number",
        "7": "the answer is no number",
        "8": "the answer names no option",
        "9": "two fields name different options",
        "10": "the video is missing",
        "11": "a field is missing",
    }


def test_vstibench_tells_labels_before_and_after_the_erratum(root, monkeypatch):
    monkeypatch.setattr(vstibench, "NUM_BEFORE", 4)
    monkeypatch.setattr(vstibench, "NUM_AFTER", 3)
    messages = []
    monkeypatch.setattr(vstibench.logger, "warning", messages.append)
    put(root, "scannet/videos/scene0011_00.mp4", VIDEO)

    def labels(num, dropped=None):
        put(root, "test.json", [vsti_item(k) for k in range(num)])
        (root / "erratum_dropped_items.json").unlink(missing_ok=True)
        if dropped is not None:
            put(root, "erratum_dropped_items.json", dropped)
        rows, _ = read(VSTIBenchQuestions, root)
        (word,) = {row["details"]["revision_of_labels"] for row in rows.values()}
        return word

    assert [labels(4), labels(3), labels(2)] == ["before_erratum", "after_erratum", "unknown"]
    assert labels(2, [{"id": 1, "reason": "gap"}]) == labels(2, {"1": "gap"}) == "before_erratum"
    assert labels(4, [{"id": 99, "reason": "gap"}]) == "after_erratum"
    assert len(messages) == 4 and "'before_erratum' (4 rows)" in messages[0]


def test_numbers_of_rows_before_and_after_the_erratum_are_those_published():
    assert vstibench.NUM_BEFORE - vstibench.NUM_AFTER == 306


# ----- TimeBench


def clips(root):
    for name, num_frames, fps in (("stibench/a.mp4", 197, 10), ("vlm4d/b.mp4", 48, 24)):
        (root / name).parent.mkdir(exist_ok=True)
        frames = (np.full((16, 16, 3), k % 255, np.uint8) for k in range(num_frames))
        write_video(root / name, frames, fps, 16)


def test_timebench_offers_multiples_of_the_true_length(root):
    clips(root)
    put(root, "broken.mp4", VIDEO)
    rows, unusable = read(TimeBenchQuestions, root)
    assert list(unusable) == ["broken.mp4"] and unusable["broken.mp4"].reason == "the video cannot be read"
    assert sorted(rows) == [
        "stibench/a.mp4#seconds",
        "stibench/a.mp4#time",
        "vlm4d/b.mp4#seconds",
        "vlm4d/b.mp4#time",
    ]
    first = rows["stibench/a.mp4#seconds"]
    assert first["question"] == "How many seconds have passed in the input video?"
    assert rows["stibench/a.mp4#time"]["question"] == "How much time has passed in the video?"
    # 19.70 s is the length of the paper's figure A15, which prints 4.92; four times are 78.80 and not its 59.10.
    assert sorted(first["options"], key=float) == ["4.92", "9.85", "19.70", "39.40", "78.80"]
    assert first["answer"] == "19.70" and first["category"] == "10 fps"
    assert rows["vlm4d/b.mp4#time"]["answer"] == "2.00" and rows["vlm4d/b.mp4#time"]["category"] == "24 fps"
    for row in rows.values():
        true = float(row["answer"])
        ratios = [float(option) / true for option in row["options"]]
        assert ratios == pytest.approx(row["details"]["multiples"], abs=0.01)
    assert len({tuple(row["details"]["multiples"]) for row in rows.values()}) > 1


def test_timebench_shuffles_by_id(root):
    clips(root)
    for k in range(5):
        shutil.copy(root / "vlm4d/b.mp4", root / f"copy{k}.mp4")
    rows, _ = read(TimeBenchQuestions, root)
    orders = {tuple(row["options"]) for row in rows.values() if row["answer"] == "2.00"}
    assert len(orders) > 4


def test_timebench_is_the_same_wherever_the_videos_lie(root, tmp_path):
    clips(root)
    shutil.copytree(root, tmp_path / "moved")
    here, there = read(TimeBenchQuestions, root)[0], read(TimeBenchQuestions, tmp_path / "moved")[0]
    without_media = [{**row, "videos": None} for row in here.values()]
    assert without_media == [{**row, "videos": None} for row in there.values()]
    (tmp_path / "moved/vlm4d/b.mp4").unlink()
    fewer = read(TimeBenchQuestions, tmp_path / "moved")[0]
    assert {row["revision"] for row in fewer.values()} != {row["revision"] for row in here.values()}
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(MissingDataError, match="has no videos"):
        read(TimeBenchQuestions, empty)


def test_timebench_of_other_benchmarks_takes_each_video_once(root):
    clips(root)
    a, b = ({"path": str(root / name), "bytes": None} for name in ("stibench/a.mp4", "vlm4d/b.mp4"))
    embedded = {"path": "a.mp4", "bytes": (root / "stibench/a.mp4").read_bytes()}
    other = {"path": "a.mp4", "bytes": (root / "vlm4d/b.mp4").read_bytes()}

    def rows(*media):
        return timebench_rows({"benchmark": "vlm4d", "id": str(k), "videos": list(v)} for k, v in enumerate(media))

    made = rows([a], [a], [b], [a, b], [])
    assert [row["id"] for row in made] == ["vlm4d/0#seconds", "vlm4d/0#time", "vlm4d/2#seconds", "vlm4d/2#time"]
    assert [row["answer"] for row in made] == ["19.70", "19.70", "2.00", "2.00"]
    from_bytes = rows([embedded], [embedded], [other])
    assert [row["answer"] for row in from_bytes] == ["19.70", "19.70", "2.00", "2.00"]
    Dataset.from_list(made + [{**row, "id": row["id"] + "b"} for row in from_bytes], features=EVALUATION_FEATURES)


# ----- all


def test_options_and_answers_are_read_in_every_form():
    assert options_by_letter({"B": 2, "A": 1, "C": None, "D": None}) == ["1", "2"]
    assert options_by_letter({"A": None, "B": 0}) == ["None", "0"]
    assert options_by_letter('{"A": "x", "B": null}') == ["x", "None"]
    for wrong in ("no JSON", "[1, 2]", None, {"A": 1, "C": 2}, {1: "a", 2: "b"}):
        with pytest.raises(UnusableItem, match="cannot be read"):
            options_by_letter(wrong)
    options = ["a", "b", "c"]
    assert [option_at(options, one) for one in ("C", " c ", "(C)", "C.", 2, "2", 0)] == [*"cccccca"]
    for wrong in ("D", 3, -1, "", None, True, "AB", 1.5):
        with pytest.raises(UnusableItem, match="names no option"):
            option_at(options, wrong)


def test_annotations_of_another_form_are_refused(root):
    put(root, "test.json", {"rows": []})
    with pytest.raises(ValueError, match="test.json must hold a list of objects"):
        read(R4DBenchQuestions, root)
    put(root, "test.json", b"[{")
    with pytest.raises(ValueError, match="test.json is no JSON"):
        read(R4DBenchQuestions, root)


@pytest.mark.parametrize(
    ("builder", "name"),
    [
        (R4DBenchQuestions, "test.json"),
        (STIBenchQuestions, "qa.parquet"),
        (VLM4DQuestions, "real_mc.json"),
        (VLM4DSyntheticQuestions, "synthetic_mc.json"),
        (OmniSpatialQuestions, "data.json"),
        (MMSIBenchQuestions, "MMSI_Bench.parquet"),
        (SATRealQuestions, "SAT_test.parquet"),
        (VSTIBenchQuestions, "test.json"),
    ],
)
def test_missing_annotations_say_what_to_get_and_where_to_put_it(root, builder, name):
    with pytest.raises(MissingDataError, match=name) as caught:
        read(builder, root)
    assert builder.REMEDY in str(caught.value) and builder.HUB_ID in builder.REMEDY and "location=" in builder.REMEDY


def test_rows_of_all_kinds_make_one_table_and_survive_parquet(root, tmp_path):
    r4d(root / "r4d", r4d_item("validation_3"))
    (root / "sat").mkdir()
    sat(root / "sat", 2)
    put(root, "vsti/test.json", [vsti_item(1), vsti_number(2, "0")])
    put(root, "vsti/scannet/videos/scene0011_00.mp4", VIDEO)
    for builder, folder in ((R4DBenchQuestions, "r4d"), (SATRealBothOrders, "sat"), (VSTIBenchQuestions, "vsti")):
        made = builder(location=str(root / folder), cache_dir=str(tmp_path / "cache"))
        out = tmp_path / f"{folder}-parquet"
        made.download_and_prepare(str(out), file_format="parquet")
        made.download_and_prepare()
        built, embedded = (
            made.as_dataset(split="test"),
            load_dataset(str(out), split="test", cache_dir=str(tmp_path / "c")),
        )
        assert built.features == embedded.features == EVALUATION_FEATURES
        for before, after in zip(built, embedded, strict=True):
            for one, other in zip(before["images"] + before["videos"], after["images"] + after["videos"], strict=True):
                content = open(one["path"], "rb").read() if one["bytes"] is None else one["bytes"]
                assert content == other["bytes"]
            plain = {name: value for name, value in before.items() if name not in ("images", "videos")}
            assert plain == {name: value for name, value in after.items() if name not in ("images", "videos")}
            (message,) = evaluation_messages(after)
            assert message["role"] == "user"
