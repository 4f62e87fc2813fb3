"""The study from the clips to the document, with a model and a teacher that are trained for two steps."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from datasets_rgpt4d.world4d_frames import World4DFrames
from datasets_rgpt4d.world4d_questions import TASKS
from modeling_rgpt4d import L4PModel, RGPT4DForConditionalGeneration
from modeling_rgpt4d.modeling_l4p import SIGNALS
from trainer import P4DCollator
from trainer.collator import IGNORE_INDEX

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CONFIG = yaml.safe_load((EXAMPLES / "study.yaml").read_text(encoding="utf-8"))
SMALL = {
    "data": {"num_frames": 8, "train_clips": 6, "base_clips": 4, "test_clips": 2},
    "model": {"image_size": 112, "patch_size": 28, "width": 32, "layers": 1, "vocab_size": 400},
    "teacher": {
        **{
            "steps": 1,
            "batch-size": 2,
            "eval-clips": 2,
            "hidden-size": 32,
            "heads": 2,
            "feature-dim": 4,
            "last-dim": 4,
        },
        **{"image-size": 64, "patch-size": 16},
    },
    "test": {"batch_size": 32, "max_new_tokens": 2},
    "training": {
        **{"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "bf16": False, "warmup_steps": 0},
        "decoder_hidden_size": 16,
    },
    "seeds": [0],
}
ROWS = ("base", "p4d", "mark", "release_states", "one_frame", "probe_sft", "p4d_20")


def study(tmp_path, *arguments, status=0):
    command = [sys.executable, str(EXAMPLES / "study.py"), "--config", str(tmp_path / "study.yaml")]
    command += [
        "--work",
        str(tmp_path / "work"),
        "--records",
        str(tmp_path / "study"),
        "--parallel",
        "1",
        "--num-proc",
        "1",
    ]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=EXAMPLES.parent)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def write_config(tmp_path, **training):
    config = {**CONFIG, **SMALL, "training": {**CONFIG["training"], **SMALL["training"], **training}}
    few = {"max_steps": 2, "perception_clips": 2, "inference": False, "picture_steps": [0, 2]}
    changed = {
        name: {**(row or {}), **{k: v for k, v in few.items() if k in (row or {})}}
        for name, row in CONFIG["rows"].items()
    }
    changed["p4d_20"]["share"] = 0.5  # 20 % of so few clips are none
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({**config, "rows": changed}), encoding="utf-8")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("study")
    write_config(tmp_path)
    study(tmp_path, "--rows", *ROWS)
    return tmp_path


@pytest.fixture
def opened(finished, monkeypatch):
    """Settings, clips and prepared batches of a row."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from study_batches import Batches, processor_with
    from study_run import batches_name, row_settings

    def open_row(row: str):
        settings = row_settings(yaml.safe_load((finished / "study.yaml").read_text()), row)
        data = finished / "work" / "data"
        clips = World4DFrames(data / "train")
        processor = processor_with(finished / "work" / "initial", settings["time_cue"])
        return settings, clips, Batches(data / batches_name(settings, "train"), clips, processor, torch.device("cpu"))

    return open_row


def test_rows_and_all_that_they_need_leave_records_and_a_document(finished):
    records = {path.stem for path in (finished / "study" / "records").iterdir()}
    assert records == {"teacher", "pairs-0", "base-0", "sft-0", *(f"{row}-0" for row in ROWS if row != "base")}
    record = json.loads((finished / "study" / "records" / "p4d-0.json").read_text())
    items = json.loads((finished / "study" / "items.json").read_text())
    assert record["items_sha256"] == items["sha256"]
    assert {*record["tests"]} == {"test", "shuffled", "zeroed"}
    assert all(len(test["letters"]) == len(items["items"]) for test in record["tests"].values())
    assert len(record["perception"]["student"]["depth_abs_rel"]) == 2
    assert {"loss_sft", "loss_ld", "loss_ed"} <= {*record["log"][0]}
    began, ended = record["from_to"]
    assert ended - began > sum(record["seconds"].values()) and record["unit"]
    assert (finished / "study" / "pictures.npz").exists()
    # `pairs` looks at two frames, and nothing tests it.
    assert not (finished / "work" / "data" / "test-none-2").exists()
    assert "Table 4" in (finished / "STUDY.md").read_text()


def test_what_is_recorded_is_not_made_again_and_a_removed_record_is(finished):
    records = finished / "study" / "records"
    untouched = {path: path.stat().st_mtime_ns for path in records.iterdir() if path.stem != "one_frame-0"}
    (records / "one_frame-0.json").unlink()
    base_clips = finished / "work" / "data" / "base"
    shutil.rmtree(base_clips)
    assert "one_frame-0 done" in study(finished, "--rows", *ROWS)
    assert not base_clips.exists()  # the base model is made: rendering its clips takes longest
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched


def test_a_record_of_other_settings_is_refused(finished):
    write_config(finished, learning_rate=0.5)
    said = study(finished, "--rows", "p4d", status=1)
    write_config(finished)
    assert "p4d-0.json was made with other settings of ['learning_rate']" in said


def test_a_record_older_than_an_option_had_its_default(finished):
    file = finished / "study" / "records" / "mark-0.json"
    kept = file.read_text()
    older = json.loads(kept)
    del older["settings"]["unlabelled"]
    file.write_text(json.dumps(older))
    study(finished, "--rows", "mark")
    assert json.loads(file.read_text()) == older  # neither refused nor made again
    file.write_text(kept)


def test_a_share_of_no_clips_is_refused(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from study_run import has_labels

    assert has_labels(10, 0.2).sum() == 2
    with pytest.raises(SystemExit, match="A share of 0.05 of 6 clips is none"):
        has_labels(6, 0.05)


def test_a_failed_run_is_named(finished):
    config = yaml.safe_load((finished / "study.yaml").read_text())
    config["rows"]["wrong"] = {"signals": ["smell"]}
    (finished / "study.yaml").write_text(yaml.safe_dump(config))
    said = study(finished, "--rows", "wrong", status=1)
    write_config(finished)
    assert "wrong-0 failed, see" in said and "smell" in said


@pytest.mark.parametrize("row", list(CONFIG["rows"]))
def test_rows_set_options_that_exist(monkeypatch, tmp_path, row):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from study_run import STUDY_OPTIONS, RunArguments, row_settings
    from transformers import HfArgumentParser

    from trainer import P4DConfig

    options = {name: value for name, value in row_settings(CONFIG, row).items() if name not in STUDY_OPTIONS}
    options |= {"model": "here", "output_dir": str(tmp_path), "bf16": False, "teacher": None}
    _, args = HfArgumentParser((RunArguments, P4DConfig)).parse_dict(options)  # refuses what is unknown
    assert args.max_steps == CONFIG["rows"][row].get("max_steps", CONFIG["training"]["max_steps"])


def test_what_the_document_says_of_rows_is_what_the_configuration_does():
    training, rows = CONFIG["training"], CONFIG["rows"]
    assert {rows[row]["max_steps"] for row in ("sft_long", "p4d_long")} == {2 * training["max_steps"]}
    assert rows["sft_half_rate"]["learning_rate"] == training["learning_rate"] / 2
    assert rows["p4d"]["picture_steps"][-1] == training["max_steps"]  # the last picture is of the finished model


def test_rows_name_tasks_that_exist():
    assert CONFIG["training"]["tasks"] == [*TASKS]
    for row, settings in CONFIG["rows"].items():
        assert {*(settings.get("tasks") or ())} <= {*TASKS}, row


@pytest.mark.parametrize("row", ["p4d", "mark", "one_frame"])
def test_prepared_batches_equal_the_collators(opened, row):
    from study_run import conversations

    settings, clips, batches = opened(row)
    rows = conversations(clips.rows, settings, "train")
    indices = [4, 0, 3]
    messages = [clips.conversation(clips.rows.select(rows[index]).to_list()) for index in indices]
    expected = P4DCollator(batches.processor, settings["num_frames"])([{"messages": one} for one in messages])
    found = batches.batch(indices, unmarked=True)
    assert {*found} == {*expected}
    for name, values in expected.items():
        assert torch.equal(found[name], values), name


def test_prepared_targets_are_what_the_teacher_perceives_without_marks(opened, finished):
    from study_batches import PreparedTeacher, Targets, prepare_targets

    _, _, batches = opened("mark")
    weights = finished / "work" / "teacher" / "model.safetensors"
    teacher = PreparedTeacher(L4PModel.from_pretrained(weights.parent), "metric")
    frames = batches.batch([4, 0, 3], unmarked=True)["unmarked_pixel_values_videos"]
    of_videos = batches.processor.video_processor
    folder = finished / "work" / "data" / "train-targets"  # that the runs have made
    carried = Targets(folder, frames.device)(batches.clip[[4, 0, 3]])
    live = teacher.perceive(frames, of_videos.image_mean, of_videos.image_std)
    found = teacher.perceive(frames, of_videos.image_mean, of_videos.image_std, targets=carried, signals=["flow"])
    assert {*live.signals} == {*SIGNALS} and {*found.signals} == {"flow"}
    for one, other in ((found.latents, live.latents), (found.signals["flow"], live.signals["flow"])):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert (live.latents[0] - live.latents[1]).abs().max() > 0.1  # another clip's would not pass
    with pytest.raises(SystemExit, match="targets of another teacher"):
        prepare_targets(folder, batches, teacher, finished / "work" / "models" / "base-0" / "model.safetensors")


@pytest.mark.parametrize("row", ["p4d", "mark"])
def test_questions_apart_are_answered_as_if_each_were_asked_alone(opened, finished, row):
    from study_batches import SHARED
    from study_run import conversations

    settings, clips, batches = opened(row)
    model = RGPT4DForConditionalGeneration.from_pretrained(finished / "work" / "models" / "base-0").eval()
    collate = P4DCollator(batches.processor, settings["num_frames"])
    all_rows = conversations(clips.rows, settings, "train")
    indices = [4, 0]
    batch = batches.batch(indices, apart=True)
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits
    for place, index in enumerate(indices):
        messages = clips.conversation(clips.rows.select(all_rows[index]).to_list())
        video, first = messages[0]["content"]
        questions = [first, *(message["content"][0] for message in messages[2::2])]
        assert len(questions) > 4
        turns = batches.turns[batches.starts[index] : batches.ends[index]]
        turns = turns[turns >= SHARED]
        for number, (question, answer) in enumerate(zip(questions, messages[1::2], strict=True), 1):
            alone = collate([{"messages": [{"role": "user", "content": [video, question]}, answer]}])
            of_turn = np.flatnonzero((turns == SHARED) | (turns == number))
            assert torch.equal(batch["input_ids"][place, of_turn], alone["input_ids"][0])
            assert torch.equal(labels[place, of_turn], alone.pop("labels")[0])
            assert torch.equal(batch["pixel_values_videos"][place], alone["pixel_values_videos"][0])
            with torch.no_grad():
                expected = model(**alone).logits[0]
            torch.testing.assert_close(logits[place, of_turn], expected, atol=1e-5, rtol=1e-4)


def test_an_unknown_optimizer_is_refused(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from study_run import Run

    run = Run.__new__(Run)
    run.settings = {"optimizer": "moun"}
    with pytest.raises(SystemExit, match="'moun'; it must be adamw or muon"):
        run.optimizer()


def test_unlabelled_clips_fill_half_of_a_batch_without_answers(opened):
    from study_batches import BatchCollator
    from study_run import Run, has_labels

    settings, clips, batches = opened("p4d_20")
    count = len(batches.clip)
    labelled = has_labels(count, settings["share"])
    assert count == SMALL["data"]["train_clips"] and labelled.sum() == count / 2
    run = Run.__new__(Run)
    run.settings = settings
    rows = run.examples(count).to_list()
    assert {row["unlabelled"] for row in rows} == {*(~labelled).nonzero()[0]}
    assert {row["index"] for row in rows} == {*labelled.nonzero()[0]}
    batch = BatchCollator(batches, settings["num_frames"])(rows)
    for number, row in enumerate(rows):
        shown = row["unlabelled" if number % 2 else "index"]
        expected = batches.batch([shown])
        length = expected["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][number, :length], expected["input_ids"][0])
        assert torch.equal(batch["pixel_values_videos"][number], expected["pixel_values_videos"][0])
        answers = batch["labels"][number, :length]
        assert (answers == IGNORE_INDEX).all() if number % 2 else torch.equal(answers, expected["labels"][0])


@pytest.mark.parametrize(("named", "gpus"), [("", ["0", "1"]), ("3,1,0", ["3", "1"]), ("GPU-9fa0", ["GPU-9fa0"])])
def test_runs_stay_on_the_gpus_that_the_study_was_given(monkeypatch, named, gpus):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import study as command

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    assert command.visible_gpus() == gpus
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert command.visible_gpus() == [None]


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A folder `study` of a repository, with a base model and a teacher, and examples/study.py that takes it for its own."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import study as command

    for name in ("base", "teacher", "records"):
        (tmp_path / "study" / name).mkdir(parents=True)
    for name in ("base", "teacher"):
        (tmp_path / "study" / name / "model.safetensors").write_text(f"weights of {name}")
    for name in ("pairs-0", "base-0", "teacher"):
        (tmp_path / "study" / "records" / f"{name}.json").write_text(f"record of {name}")
    monkeypatch.setattr(command, "RECORDS", tmp_path / "study")
    return command


def test_stored_teacher_and_base_model_are_taken_with_their_records(stored, tmp_path):
    work, records = tmp_path / "work", tmp_path / "mine" / "records"
    stored.take_stored(work, records)
    assert (work / "models" / "base-0" / "model.safetensors").read_text() == "weights of base"
    assert (work / "teacher" / "model.safetensors").read_text() == "weights of teacher"
    assert {file.stem for file in records.iterdir()} == {"pairs-0", "base-0", "teacher"}
    jobs = stored.jobs_to_do(CONFIG, work, records, ["p4d"], [1])
    assert [job.name for job in jobs] == ["p4d-1"]  # what it needs is there


def test_a_study_with_a_base_model_of_its_own_keeps_it(stored, tmp_path):
    work, records = tmp_path / "work", tmp_path / "mine" / "records"
    (work / "teacher").mkdir(parents=True)  # in training
    records.mkdir(parents=True)
    (records / "base-0.json").write_text("another record")
    stored.take_stored(work, records)
    assert (records / "base-0.json").read_text() == "another record"
    assert not (work / "models" / "base-0").exists() and not [*(work / "teacher").iterdir()]


def test_runs_are_not_mixed_with_those_of_another_base_model(stored, tmp_path):
    work, records = tmp_path / "work", tmp_path / "mine" / "records"
    stored.take_stored(work, records)
    jobs = [stored.Job("p4d", 0), stored.Job("teacher", 0)]
    for name in ("pairs-0", "base-0", "teacher"):
        (records / f"{name}.json").write_text(json.dumps({"settings": {"start": "initial"}}))
    stored.check_starts(CONFIG, work, records, jobs)
    digest = hashlib.sha256(b"weights of base").hexdigest()
    for seed, known in ((0, digest), (1, "of another")):
        record = {"seed": seed, "settings": {"start": "base"}, "start_sha256": known}
        (records / f"sft-{seed}.json").write_text(json.dumps(record))
    stored.check_starts(CONFIG, work, records, jobs)
    with pytest.raises(SystemExit, match=r"sft-1\.json went on from another base model"):
        stored.check_starts(CONFIG, work, records, [stored.Job("p4d", 1)])
    shutil.rmtree(work / "models" / "base-0")  # so it would be trained anew
    with pytest.raises(SystemExit, match=r"sft-0\.json went on from another base model"):
        stored.check_starts(CONFIG, work, records, jobs)


def test_runs_are_not_mixed_with_those_of_another_teacher(stored, tmp_path):
    work, records = tmp_path / "work", tmp_path / "mine" / "records"
    stored.take_stored(work, records)
    for name in ("pairs-0", "base-0", "teacher"):
        (records / f"{name}.json").write_text(json.dumps({"settings": {"start": "initial"}}))
    digest = hashlib.sha256(b"weights of teacher").hexdigest()
    for row, known in (("sft", {}), ("ld", {}), ("ed", {"teacher_sha256": digest})):
        record = {"seed": 1, "settings": {"start": "base", "teacher": row != "sft"}, **known}
        (records / f"{row}-1.json").write_text(json.dumps(record))
    stored.check_starts(CONFIG, work, records, [stored.Job("p4d", 0)])
    (work / "teacher" / "model.safetensors").write_bytes(b"of another")
    stored.check_starts(CONFIG, work, records, [stored.Job("sft", 0)])  # has none
    with pytest.raises(SystemExit, match=r"ed-1\.json learnt from another teacher"):
        stored.check_starts(CONFIG, work, records, [stored.Job("sft", 0), stored.Job("p4d", 0)])


def test_stored_models_serve_the_configuration_that_made_them(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import study as command

    assert command.is_stored(CONFIG)
    assert not command.is_stored({**CONFIG, "training": {**CONFIG["training"], "decoder_kind": "linear"}})
    other_rows = {**CONFIG["rows"], "p4d": {"max_steps": 1}, "another": {}}
    assert command.is_stored({**CONFIG, "rows": other_rows})
    assert not command.is_stored({**CONFIG, "teacher": {**CONFIG["teacher"], "steps": 1}})


def test_student_and_teacher_are_stored_with_code_and_cards(finished, run_as_stranger):
    command = [sys.executable, str(EXAMPLES / "store_models.py"), "--work", str(finished / "work")]
    subprocess.run([*command, "--output", str(finished / "study")], check=True, capture_output=True)
    subprocess.run([*command, "--output", str(finished / "study")], check=True, capture_output=True)  # in their place
    student, teacher = finished / "study" / "student", finished / "study" / "teacher"
    card = (student / "README.md").read_text()
    record = json.loads((finished / "study" / "records" / "p4d-0.json").read_text())
    assert "license: apache-2.0" in card and "0.5 L_LD + 0.1 L_ED" in card
    assert f"{record['tests']['test']['scores']['Avg']:.1f}" in card
    assert "license: apache-2.0" in (teacher / "README.md").read_text()
    said = run_as_stranger(
        "from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor\n"
        f"AutoProcessor.from_pretrained({str(student)!r}, trust_remote_code=True)\n"
        f"AutoModelForImageTextToText.from_pretrained({str(student)!r}, trust_remote_code=True)\n"
        f"print(type(AutoModel.from_pretrained({str(teacher)!r}, trust_remote_code=True)).__name__)"
    )
    assert "L4PModel" in str(said)
    assert (student / "perception_decoder" / "model.safetensors").exists()


def test_the_base_model_is_stored_byte_by_byte(finished):
    output = finished / "study"
    command = [sys.executable, str(EXAMPLES / "store_models.py"), "--work", str(finished / "work"), "--row", "base"]
    subprocess.run([*command, "--output", str(output)], check=True, capture_output=True)
    weights = (output / "base" / "model.safetensors").read_bytes()
    assert weights == (finished / "work" / "models" / "base-0" / "model.safetensors").read_bytes()
    record = json.loads((output / "records" / "p4d-0.json").read_text())
    assert record["start_sha256"] == hashlib.sha256(weights).hexdigest()  # tells which model the run went on from
    taught_by = (finished / "work" / "teacher" / "model.safetensors").read_bytes()
    assert record["teacher_sha256"] == hashlib.sha256(taught_by).hexdigest()
    card = (output / "base" / "README.md").read_text()
    assert "none: supervised fine-tuning alone" in card and "None were measured." in card
