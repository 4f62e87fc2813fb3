"""examples/prepare_data.py, from folders laid out as the authors publish them to a training step and to the Hub and back."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset
from huggingface_hub import DatasetCard
from PIL import Image
from transformers import Qwen2Config, SiglipVisionConfig

from datasets_rgpt4d import training_shards
from datasets_rgpt4d.schema import TRAINING_FEATURES
from datasets_rgpt4d.world4d_video import write_video
from examples import prepare_data, train
from modeling_rgpt4d import (
    L4PConfig,
    L4PModel,
    RGPT4DConfig,
    RGPT4DForConditionalGeneration,
    RGPT4DImageProcessor,
    RGPT4DProcessor,
    RGPT4DVideoProcessor,
)
from trainer import P4DCollator

ROOT = Path(__file__).parents[2]
TOKENS = {"image_token_id": "<image>", "video_token_id": "<video>", "frame_end_token_id": "\u010a"}


def load_fake_hub():
    spec = importlib.util.spec_from_file_location("fake_hub", ROOT / "tests" / "fake_hub.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def conversation(question, answer, token="<video>", speaker="gpt"):
    return [{"from": "human", "value": f"{token}\n{question}"}, {"from": speaker, "value": answer}]


def write_json(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Four training sets of a few rows; two videos of robofac are damaged and missing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    noise = np.random.default_rng(0)

    def video(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, iter(noise.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)), 10, 32)
        return path

    vsti = []
    for scene in ("scene0000_00", "scene0001_00"):
        video(tmp_path / "vsti" / "scannet" / "videos" / f"{scene}.mp4")
        vsti += [
            {
                "id": f"{scene}-{i}",
                "data_source": "scannet",
                "scene_name": scene,
                "question_type": "camera_displacement",
                "video": f"scannet/videos/{scene}.mp4",
                "conversations": conversation(f"How far in {i} s?", f"{i}.5", "<image>"),
            }
            for i in range(4)
        ]
    write_json(tmp_path / "vsti" / "vstibench_train" / "qa_camera_displacement.json", vsti)

    video(tmp_path / "wolf" / "clips" / "a.mp4")
    wolf = [{"id": f"w{i}", "video": "clips/a.mp4", "question": "What?", "answer": f"A car {i}."} for i in range(3)]
    (tmp_path / "wolf" / "wolf_qa.jsonl").write_text("".join(json.dumps(one) + "\n" for one in wolf))

    robofac = []
    for name in ("whole", "cut", "absent"):
        path = f"simulation_data/StackCube/stack_error/{name}.mp4"
        robofac.append(
            {"id": name, "video": path, "conversations": conversation("What task?", "Stack.", speaker="assistant")}
        )
    whole = video(tmp_path / "robofac" / robofac[0]["video"]).read_bytes()
    (tmp_path / "robofac" / robofac[1]["video"]).write_bytes(whole[: len(whole) // 2])
    write_json(tmp_path / "robofac" / "training_qa.json", robofac)

    sat = []
    for i in range(3):
        (tmp_path / "sat").mkdir(exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(tmp_path / "sat" / f"{i}.png")
        answers = conversation("Left or right? Options: ['left', 'right']", "left.", "<image>")
        sat.append({"id": f"sat_{i}", "image": [f"SAT/{i}.png"], "conversations": answers})
    write_json(tmp_path / "sat" / "sft.json", sat)
    return tmp_path


def run(*options, names=("vsti", "wolf", "robofac", "sat")):
    places = [word for name in names for word in (f"--{name}", name)]
    prepare_data.main([*places, "--num-proc", "1", *map(str, options)])


def rows_of(folder, *config):
    return load_dataset(str(folder), *config, split="train", cache_dir=str(Path("cache").absolute()))


def test_mixture_becomes_a_folder_that_load_dataset_reads(sources):
    run("--mixture", "V+W+R+S", "--skip-unusable", "--output", "out")
    rows = rows_of("out")
    assert rows.features == TRAINING_FEATURES
    assert Counter(rows["source"]) == {"vsti": 8, "wolf": 3, "robofac": 1, "sat": 3}
    assert [*rows_of("out", "wolf")["source"]] == ["wolf"] * 3
    assert all(
        Path(one["path"]).is_file() and one["bytes"] is None for row in rows for one in row["videos"] + row["images"]
    )
    assert not Path("out.unfinished").exists()
    vsti = rows_of("out", "vsti")["id"][:]
    assert sorted(vsti) == sorted(f"scene000{s}_00-{i}" for s in (0, 1) for i in range(4)) and vsti != sorted(vsti)


def test_report_counts_what_is_unusable_and_names_every_id(sources):
    with pytest.raises(SystemExit, match=r"2 rows cannot be used; .*report.md says why. Mend them, or leave them out"):
        run("--mixture", "V+W+R+S", "--output", "out")
    assert not Path("out").exists()
    before = (Path("out.unfinished") / "report.md").read_text()
    run("--mixture", "V+W+R+S", "--output", "out", "--skip-unusable")
    report = json.loads(Path("out/report.json").read_text())
    (robofac,) = [one for one in report["sources"] if one["name"] == "robofac"]
    assert (robofac["read"], robofac["rows"], robofac["not_chosen"]) == (3, 1, 0)
    assert robofac["unusable"] == {"the video is missing": 1, "the video cannot be read": 1}
    assert robofac["revision"].startswith("sha256:") and "MIT" in robofac["license"]
    lines = [json.loads(line) for line in Path("out/unusable.jsonl").read_text().splitlines()]
    assert {(one["source"], one["id"], one["reason"]) for one in lines} == {
        ("robofac", "absent-0", "the video is missing"),
        ("robofac", "cut-0", "the video cannot be read"),
    }
    text = Path("out/report.md").read_text()
    for place in (before, text):
        assert "| robofac | the video is missing | 1 |" in place and "- robofac absent-0: the video is missing" in place
    assert report["counts"]["all"]["all"]["videos"] == 4 and "| all | all | 15 | 15 | 4 | 3 |" in text
    for file in ("report.json", "report.md", "unusable.jsonl", "README.md"):
        assert str(sources) not in Path("out", file).read_text(), f"{file} names a folder of this machine"


def test_card_says_licenses_revisions_and_overlaps(sources):
    run("--sources", "vsti", "sat", "--output", "out")
    card = DatasetCard.load("out/README.md")
    assert card.data.license == "other"  # of VSTI's annotations none is established
    assert [config["config_name"] for config in card.data.configs] == ["default", "sat", "vsti"]
    revisions = {one["name"]: one["revision"] for one in json.loads(Path("out/report.json").read_text())["sources"]}
    for name, revision in revisions.items():
        assert f"| {name} | local folder {name} | {revision} |" in card.text
    assert "| vsti | vstibench | No common video: " in card.text and "its validation scenes" in card.text
    assert "| sat | sat_real | No common image" in card.text and "before_erratum" in card.text
    run("--sources", "sat", "--output", "sat-alone")
    assert DatasetCard.load("sat-alone/README.md").data.license == "mit"


def test_yaml_mixture_chooses_and_repeats(sources):
    Path("mix.yaml").write_text("{seed: 1, sources: {vsti: {cap: 3}, wolf: {weight: 2}}}")
    run("--mixture", "mix.yaml", "--output", "out")
    assert Counter(rows_of("out")["source"]) == {"vsti": 3, "wolf": 6}
    assert "not_chosen" in Path("out/report.json").read_text()
    assert "5 left out by the mixture" in Path("out/report.md").read_text()
    run("--mixture", "mix.yaml", "--output", "other-seed", "--seed", 2)
    assert rows_of("out", "vsti")["id"][:] != rows_of("other-seed", "vsti")["id"][:]


def test_finished_folder_is_left_alone_and_other_data_are_refused(sources, capsys):
    options = ["--sources", "wolf", "--output", "out"]
    run(*options)
    stamps = {file: file.stat().st_mtime_ns for file in Path("out").rglob("*")}
    run(*options)
    assert "holds these data already" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in Path("out").rglob("*")} == stamps
    for more in (["--check-media", "exists"], ["--seed", "3"], ["--embed-media"]):
        with pytest.raises(SystemExit, match="out holds something else, or data put together in another way"):
            run(*options, *more)
    with open("wolf/wolf_qa.jsonl", "a") as file:
        file.write(json.dumps({"id": "new", "video": "clips/a.mp4", "question": "?", "answer": "!"}) + "\n")
    with pytest.raises(SystemExit, match="out holds something else"):
        run(*options)


def test_interrupted_run_goes_on_to_the_same_files(sources, monkeypatch):
    options = ["--mixture", "V+W+R+S", "--skip-unusable"]
    run(*options, "--output", "whole")
    check, seen = prepare_data.unusable_media, []
    write = training_shards._write_shard

    def interrupted_check(rows, *more, **options):
        found = check(rows, *more, **options)
        seen.append("checked")
        if len(seen) == 2:
            raise KeyboardInterrupt
        return found

    def interrupted_write(*arguments):
        if seen and seen[-1] == "written":
            raise KeyboardInterrupt
        seen.append("written")
        return write(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_data, "unusable_media", interrupted_check)
        run(*options, "--output", "out")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training_shards, "_write_shard", interrupted_write)
        run(*options, "--output", "out")
    assert not Path("out").exists() and seen == ["checked", "checked", "written"]
    with pytest.raises(SystemExit, match="an interrupted run left that had other settings"):
        run(*options, "--output", "out", "--check-media", "exists")

    def checked_again(*_):
        raise AssertionError("a file was checked again")

    with monkeypatch.context() as patch:
        patch.setattr("datasets_rgpt4d.media_check.medium_problem", checked_again)
        run(*options, "--output", "out")
    files = sorted(file.relative_to("out") for file in Path("out").rglob("*") if file.is_file())
    assert files == sorted(file.relative_to("whole") for file in Path("whole").rglob("*") if file.is_file())
    assert [file for file in files if file.suffix == ".parquet"]  # equal names: equal content
    assert Path("out/unusable.jsonl").read_text() == Path("whole/unusable.jsonl").read_text()


def test_source_without_a_usable_row_fails_even_if_the_unusable_are_skipped(sources):
    (sources / "wolf" / "clips" / "a.mp4").unlink()
    with pytest.raises(SystemExit, match="wolf has no usable row; .*report.md says why"):
        run("--mixture", "V+W", "--skip-unusable", "--output", "out")
    assert "| wolf | the video is missing | 3 |" in Path("out.unfinished/report.md").read_text()
    assert len(Path("out.unfinished/unusable.jsonl").read_text().splitlines()) == 3
    (sources / "robofac" / "training_qa.json").write_text("[]")
    with pytest.raises(SystemExit, match="robofac has no usable row"):
        run("--sources", "robofac", "--skip-unusable", "--output", "empty")
    (sources / "robofac" / "training_qa.json").write_text("no JSON")
    with pytest.raises(SystemExit, match="robofac: .*training_qa.json"):
        run("--sources", "robofac", "--skip-unusable", "--output", "damaged")


def test_everything_that_is_missing_is_named_before_anything_is_read(sources):
    with pytest.raises(SystemExit) as stopped:
        run("--mixture", "V+W+R", "--vsti", "absent/vsti", "--output", "out", names=("robofac",))
    message = str(stopped.value)
    assert "vsti (--vsti): absent/vsti is neither a folder here nor" in message and "www.scan-net.org" in message
    assert "wolf (--wolf): WolfQA is on no Hub" in message and "robofac" not in message
    assert not Path("out.unfinished").exists()


def test_media_elsewhere_are_found(sources):
    (sources / "vsti" / "scannet").rename(sources / "elsewhere")
    run("--sources", "vsti", "--vsti-media", "elsewhere", "--output", "out")
    assert {Path(row["videos"][0]["path"]).parent for row in rows_of("out")} == {sources / "elsewhere" / "videos"}


def test_tokens_are_counted_where_a_tokenizer_is_named(sources, tiny_tokenizer):
    tiny_tokenizer.save_pretrained("tokenizer")
    run("--sources", "wolf", "--tokenizer", "tokenizer", "--output", "out")
    counts = json.loads(Path("out/report.json").read_text())["counts"]["wolf"]["all"]
    texts = [f"A car {i}." for i in range(3)]
    assert counts["answer_tokens"] == sum(
        len(ids) for ids in tiny_tokenizer(texts, add_special_tokens=False)["input_ids"]
    )
    assert "| question tokens | answer tokens |" in Path("out/report.md").read_text()


@pytest.fixture
def student_and_teacher(sources, tiny_tokenizer):
    torch.manual_seed(0)
    ids = {name: tiny_tokenizer.convert_tokens_to_ids(token) for name, token in TOKENS.items()}
    vision = dict(image_size=28, patch_size=7, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    text = dict(vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    heads = dict(num_attention_heads=2)
    config = RGPT4DConfig(
        vision_config=SiglipVisionConfig(**vision, **heads, vision_use_head=False),
        text_config=Qwen2Config(
            **text,
            **heads,
            num_key_value_heads=1,
            bos_token_id=None,
            eos_token_id=tiny_tokenizer.eos_token_id,
            pad_token_id=tiny_tokenizer.pad_token_id,
        ),
        projector_type="mlp_downsample",
        vision_feature_layer=-1,
        **ids,
    )
    RGPT4DForConditionalGeneration(config).save_pretrained("student")
    size = {"height": 28, "width": 28}
    images, videos = RGPT4DImageProcessor(size=size), RGPT4DVideoProcessor(size=size)
    RGPT4DProcessor(images, videos, tiny_tokenizer, frame_grid=2).save_pretrained("student")
    l4p = dict(image_size=16, patch_size=8, num_frames=4, hidden_size=24, num_hidden_layers=4, intermediate_size=48)
    layers = dict(taps=(1, 2, 3, 4), feature_dim=8, layer_dims=(8, 8, 8, 8), last_dim=8)
    L4PModel(L4PConfig(**l4p, **heads, **layers)).save_pretrained("teacher")


@pytest.mark.parametrize("embedded", [False, True])
def test_training_takes_the_folder_with_videos_and_images(sources, student_and_teacher, embedded, monkeypatch):
    run("--sources", "vsti", "sat", *(["--embed-media"] if embedded else []), "--output", "out")
    if embedded:  # then the sources are not needed any more
        for name in ("vsti", "sat"):
            (sources / name).rename(sources / f"gone-{name}")
    options = ["--config", str(ROOT / "examples" / "configs" / "small.yaml"), "--model", "student", "--data", "out"]
    options += ["--teacher", "teacher", "--output_dir", "run", "--num_frames", "4", "--decoder_hidden_size", "16"]
    options += [
        "--per_device_train_batch_size",
        "11",
        "--max_steps",
        "1",
        "--use_cpu",
        "true",
        "--disable_tqdm",
        "true",
    ]
    options += ["--logging_steps", "1"]
    collate, batches = P4DCollator.__call__, []
    monkeypatch.setattr(
        P4DCollator, "__call__", lambda self, rows: batches.append((rows, collate(self, rows))) or batches[-1][1]
    )
    monkeypatch.setattr(sys, "argv", ["train.py", *options])
    train.main()
    ((rows, batch),) = batches  # all rows at once: eight with a video, three with an image
    assert batch["pixel_values_videos"].shape[:2] == (8, 4) and batch["pixel_values"].shape[0] == 3
    assert {len(row["messages"]) for row in rows} == {2}
    record = json.loads(Path("run/run.json").read_text())
    (step,) = [entry for entry in record["log"] if "loss_ld" in entry]
    assert step["loss_ld"] > 0 and step["loss_ed"] > 0 and step["loss"] > 0


def test_training_opens_no_media_when_it_loads_the_rows(sources):
    run("--sources", "vsti", "sat", "--output", "out")
    for name in ("vsti", "sat"):
        (sources / name).rename(sources / f"gone-{name}")
    rows = train.split_of(train.load_rows("out"), "train")
    assert len(rows) == 11 and {*rows.features} == {*TRAINING_FEATURES}
    with pytest.raises(FileNotFoundError, match="sat"):
        rows[[*rows.with_format(None)["source"]].index("sat")]


READ_BACK = """
import json, sys
from datasets import load_dataset
repo_id, file = sys.argv[1:]
def plain(rows):
    return [json.loads(json.dumps(row, default=lambda content: content.hex())) for row in rows]
whole = load_dataset(repo_id, split="train")
streamed = load_dataset(repo_id, "vsti", split="train", streaming=True)
json.dump({"rows": plain(whole), "streamed": plain(streamed)}, open(file, "w"))
"""


def test_pushed_rows_come_back_equal_with_their_media(sources):
    """Another process reads the Hub, because the libraries read HF_ENDPOINT when they are imported."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    with load_fake_hub().serve() as hub:
        environment |= {
            "HF_ENDPOINT": hub.address,
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "x",
            "HF_HOME": str(sources / "home"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, str(ROOT / "examples" / "prepare_data.py"), "--sources", "vsti", "sat"]
        command += ["--vsti", "vsti", "--sat", "sat", "--output", "out", "--num-proc", "1", "--push-to-hub", "user/mix"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        assert hub.private["user/mix"] and "/datasets/user/mix/commit/" in done.stdout
        read = [sys.executable, "-c", READ_BACK, "user/mix", "back.json"]
        done = subprocess.run(read, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        _, files = hub.files("user/mix")
    assert {"README.md", "report.md", "report.json", "unusable.jsonl"} < {*files}
    assert 'load_dataset("user/mix"' in files["README.md"].decode()

    # The same rows, prepared here with paths
    run("--sources", "vsti", "sat", "--output", "paths", names=("vsti", "sat"))
    expected = {(row["source"], row["id"]): row for row in rows_of("paths")}
    back = json.loads(Path("back.json").read_text())
    assert len(back["rows"]) == len(expected) == 11
    for row in back["rows"]:
        before = expected[row["source"], row["id"]]
        for column in ("images", "videos"):
            media = [
                {"path": Path(one["path"]).name, "bytes": Path(one["path"]).read_bytes().hex()}
                for one in before[column]
            ]
            assert row[column] == media
        assert {**row, "images": [], "videos": []} == {**before, "images": [], "videos": []}
    key = lambda row: row["id"]  # noqa: E731
    streamed = sorted((row for row in back["rows"] if row["source"] == "vsti"), key=key)
    assert sorted(back["streamed"], key=key) == streamed
