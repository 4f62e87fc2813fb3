"""The configs of examples/configs are read by the libraries that they are for, and examples/train.py takes its options."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from PIL import Image
from safetensors import safe_open

from examples import train
from modeling_rgpt4d import RGPT4DConfig, RGPT4DForConditionalGeneration
from trainer import P4DConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = EXAMPLES / "configs"
RUNS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
LAUNCHES = sorted(path.stem for path in (CONFIGS / "accelerate").glob("*.yaml"))


def run_example(script: str, *options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, str(EXAMPLES / script), *map(str, options)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def checked(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_here(monkeypatch, options: list) -> None:
    """examples/train.py in this process, which has imported everything."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options)])
    train.main()


def parsed(config: str, *options) -> tuple[train.RunArguments, P4DConfig]:
    run = ["--model", "here"] if config == "small" else []
    return train.parse(
        ["--config", str(CONFIGS / f"{config}.yaml"), "--output_dir", "there", *run, *options, "--dry_run"]
    )


@pytest.mark.parametrize("config", RUNS)
def test_config_sets_options_that_exist(config):
    run, args = parsed(config)
    for name, value in yaml.safe_load((CONFIGS / f"{config}.yaml").read_text()).items():
        known = run if hasattr(run, name) else args
        assert getattr(known, name) == ([] if value == "none" else value), name


def test_unknown_option_of_a_config_is_refused(tmp_path):
    config = tmp_path / "wrong.yaml"
    config.write_text((CONFIGS / "small.yaml").read_text() + "learning_rat: 1.0\n")
    with pytest.raises(ValueError, match="learning_rat"):
        train.parse(["--config", str(config), "--model", "here", "--output_dir", str(tmp_path), "--dry_run"])


@pytest.mark.parametrize("config", ["paper", "one_node"])
def test_batch_and_schedule_are_the_papers(config):
    run, args = parsed(config)
    assert run.num_gpus * args.per_device_train_batch_size * args.gradient_accumulation_steps == 1024
    assert (args.num_train_epochs, args.learning_rate, args.warmup_steps) == (5, 1e-5, 0.03)
    assert args.lr_scheduler_type == "cosine" and args.trainable == ["projector", "llm"]
    assert (run.num_frames, run.time_cue) == (16, "tpe")
    paper = P4DConfig.paper("there", use_cpu=True)
    assert args.signal_weights == paper.signal_weights and (args.alpha, args.beta) == (paper.alpha, paper.beta)


@pytest.mark.parametrize("launch", LAUNCHES)
def test_accelerate_config_is_read_by_accelerate(launch, tmp_path):
    file = CONFIGS / "accelerate" / f"{launch}.yaml"
    found = load_config_from_file(str(file))
    expected = {
        "ddp": DistributedType.MULTI_GPU,
        "cpu": DistributedType.MULTI_GPU,
        "fsdp2": DistributedType.FSDP,
        "zero3": DistributedType.DEEPSPEED,
    }
    assert found.distributed_type == expected[launch] and found.num_processes > 1
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(file.read_text() + "num_process: 8\n")
    with pytest.raises(ValueError, match="num_process"):
        load_config_from_file(str(wrong))


def test_nested_keys_of_accelerate_configs_are_options_of_its_launcher():
    from accelerate.commands.launch import launch_command_parser

    known = {action.dest for action in launch_command_parser()._actions}
    fsdp = load_config_from_file(str(CONFIGS / "accelerate" / "fsdp2.yaml")).fsdp_config
    zero = load_config_from_file(str(CONFIGS / "accelerate" / "zero3.yaml")).deepspeed_config
    assert set(fsdp) | set(zero) <= known
    assert fsdp["fsdp_version"] == 2 and fsdp["fsdp_state_dict_type"] == "FULL_STATE_DICT" and zero["zero_stage"] == 3


def test_fsdp_shards_by_layers_that_the_model_has():
    fsdp = load_config_from_file(str(CONFIGS / "accelerate" / "fsdp2.yaml")).fsdp_config
    with torch.device("meta"):
        model = RGPT4DForConditionalGeneration(RGPT4DConfig())
    classes = {type(module).__name__ for module in model.modules()}
    assert set(fsdp["fsdp_transformer_layer_cls_to_wrap"].split(",")) <= classes & set(model._no_split_modules)


def test_cpu_config_starts_as_many_processes_as_it_says(tmp_path):
    script = tmp_path / "who.py"
    # Each writes a file of its own: lines that two processes print to one pipe can mix.
    script.write_text(
        "import os, pathlib; pathlib.Path(os.environ['RANK'] + '.txt').write_text(os.environ['WORLD_SIZE'])"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / "accelerate" / "cpu.yaml"]
    checked(subprocess.run([*launch, script], capture_output=True, text=True, timeout=120, cwd=tmp_path))
    assert {file.name: file.read_text() for file in tmp_path.glob("*.txt")} == {"0.txt": "2", "1.txt": "2"}


# ------------------------------------------------------------------------------------------------------------- dry run


def test_dry_run_tells_what_the_papers_run_costs_and_that_it_fits():
    config = CONFIGS / "paper.yaml"
    printed = checked(run_example("train.py", "--config", config, "--output_dir", "nowhere", "--dry_run"))
    assert "NVILA-Lite-8B" in printed and "It fits 80.0 GiB" in printed
    for line in (
        "perception decoder",
        "optimizer states",
        "teacher",
        "2,080 tokens",
        "s a step at 0.50",
        "1,024 samples",
    ):
        assert line in printed
    assert not Path("nowhere").exists()


@pytest.mark.parametrize("config", ["one_node", "one_gpu_lora"])
def test_dry_runs_of_smaller_configs_fit(config, monkeypatch, capsys):
    run_here(monkeypatch, ["--config", CONFIGS / f"{config}.yaml", "--output_dir", "nowhere", "--dry_run"])
    printed = capsys.readouterr().out
    assert "It fits 80.0 GiB" in printed and ("LoRA" in printed) == (config == "one_gpu_lora")


def test_dry_run_of_what_cannot_fit_stops_with_remedies():
    options = ["--config", CONFIGS / "one_node.yaml", "--output_dir", "nowhere", "--dry_run", "--sharding", "none"]
    stopped = run_example("train.py", *options, "--max_steps", 3)
    assert stopped.returncode == 1 and "steps       3" in stopped.stdout
    assert "80.0 GiB" in stopped.stderr and "fsdp2.yaml" in stopped.stderr and "--llm_lora" in stopped.stderr


def test_teacher_is_loaded_whole_under_zero3():
    from transformers.integrations import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config
    from transformers.integrations.deepspeed import set_hf_deepspeed_config

    class Zero3:  # DeepSpeed itself is not needed to see what `from_pretrained` would do
        def is_zero3(self):
            return True

    class Plugin:
        dschf = Zero3()

    _, args = parsed("small")
    args.deepspeed_plugin = Plugin
    set_hf_deepspeed_config(Plugin.dschf)
    try:
        assert is_deepspeed_zero3_enabled()
        with train.whole_weights(args):
            assert not is_deepspeed_zero3_enabled()
        assert is_deepspeed_zero3_enabled()
    finally:
        unset_hf_deepspeed_config()


# --------------------------------------------------------------------------------------------------- small real runs


@pytest.fixture(scope="module")
def path(tmp_path_factory, request):
    """A folder with a small model, a teacher, and three conversations about a folder of frames."""
    folder = tmp_path_factory.mktemp("train")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("HF_HOME", str(folder / "home"))
    request.addfinalizer(monkeypatch.undo)
    clips = ["--train-clips", 1, "--validation-clips", 1, "--test-clips", 1, "--size-px", 32, "--num-proc", 1]
    checked(run_example("render_world4d.py", "--output", folder / "world4d", *clips))
    size = ["--num-frames", 4, "--image-size", 16, "--hidden-size", 16, "--layers", 4, "--heads", 2, "--feature-dim", 8]
    teacher = ["--output-dir", folder / "teacher", "--steps", 1, "--batch-size", 1, "--eval-clips", 1]
    checked(run_example("train_teacher.py", *teacher, *size))
    small = ["--data", folder / "world4d", "--output", folder / "small", "--image-size", 56, "--patch-size", 14]
    checked(run_example("make_small_model.py", *small, "--width", 32, "--layers", 1, "--vocab-size", 512))

    (folder / "frames").mkdir()
    for index, frame in enumerate(np.random.default_rng(0).integers(0, 256, (6, 24, 24, 3), dtype=np.uint8)):
        Image.fromarray(frame).save(folder / "frames" / f"{index}.png")
    video = {"type": "video", "video": str(folder / "frames"), "fps": 2.0}
    with open(folder / "talk.jsonl", "w") as file:
        for word in ("left", "right", "up"):
            question = {"role": "user", "content": [video, {"type": "text", "text": f"Is it {word}?"}]}
            answer = {"role": "assistant", "content": [{"type": "text", "text": word}]}
            file.write(json.dumps({"messages": [question, answer]}) + "\n")
    return folder


def small_run(path: Path, output: str, *more) -> list:
    options = ["--config", CONFIGS / "small.yaml", "--model", path / "small", "--data", path / "talk.jsonl"]
    options += ["--output_dir", path / output, "--num_frames", 4, "--per_device_train_batch_size", 2]
    options += ["--use_cpu", "true", "--decoder_hidden_size", 16, "--logging_steps", 1, "--disable_tqdm", "true"]
    return [*options, *more]


def test_small_config_is_estimated_with_its_own_model(path):
    dry = ["--teacher", path / "teacher", "--dry_run", "--matrix_tflops", 0.1, "--gpu_memory_gb", 4]
    printed = checked(run_example("train.py", *small_run(path, "dry", *dry)))
    assert "3 samples" not in printed and "2 samples" in printed and "whole run" in printed and "It fits 4.0" in printed
    assert "not here" not in printed and not (path / "dry").exists()


def test_lora_on_messages_with_time_marks_trains_and_goes_on(path):
    options = ["--teacher", path / "teacher", "--time_cue", "mark", "--llm_lora", "true", "--lora_r", 2]
    options += ["--trainable", "projector", "llm", "--save_steps", 1, "--perception_clips", 1]
    checked(run_example("train.py", *small_run(path, "lora", *options, "--max_steps", 2)))
    record = json.loads((path / "lora" / "run.json").read_text())
    steps = [entry for entry in record["log"] if "loss_ld" in entry]
    assert len(steps) == 2 and all(entry["loss_ld"] > 0 for entry in steps) and record["perception"] is None
    assert record["settings"]["llm_lora"] and record["settings"]["time_cue"] == "mark"
    names = set(safe_open(path / "lora" / "adapter_model.safetensors", "pt").keys())
    assert any("language_model" in name and "lora_A" in name for name in names)
    assert any("multi_modal_projector" in name for name in names) and not any("vision_tower" in name for name in names)
    assert json.loads((path / "lora" / "processor_config.json").read_text())["time_cue"] == "mark"

    # The first checkpoint, and one that a kill left half-written
    again = path / "lora-again"
    again.mkdir()
    os.rename(path / "lora" / "checkpoint-2", again / "checkpoint-2")
    (again / "checkpoint-3").mkdir()
    checked(run_example("train.py", *small_run(path, "lora-again", *options, "--max_steps", 3)))
    resumed = json.loads((again / "run.json").read_text())
    assert [entry["step"] for entry in resumed["log"] if "loss_ld" in entry] == [1, 2, 3]


def test_latents_alone_are_distilled_from_a_cache_and_nothing_else_is_read(path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", path / "home" / "datasets")
    source = ["--teacher", path / "teacher", "--model", path / "small", "--data", path / "talk.jsonl"]
    source += ["--depth-scale", "metric"]
    checked(run_example("cache_teacher.py", *source, "--output", path / "cache", "--num-workers", 0))
    (shard,) = (path / "cache").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8:start]).items():
        if name.endswith((".depth", ".flow", ".motion", ".camray")):
            content[start + entry["data_offsets"][0]] ^= 1  # whoever reads this stops
    shard.write_bytes(content)
    options = ["--teacher", path / "teacher", "--teacher_cache", path / "cache", "--max_steps", 1]
    run_here(monkeypatch, small_run(path, "latents", *options, "--signals", "none"))
    (step,) = (e for e in json.loads((path / "latents" / "run.json").read_text())["log"] if "loss_ld" in e)
    assert step["loss_ld"] > 0 and "loss_ed" not in step and "loss_depth" not in step
    with pytest.raises(ValueError, match="depth of entry"):
        run_here(monkeypatch, small_run(path, "depth", *options, "--signals", "depth"))

    # World4D's test clips are perceived at the end: that the cache lacks them is told before the first step
    with pytest.raises(SystemExit, match="leave out the comparison with --perception_clips 0"):
        run_here(monkeypatch, small_run(path, "clips", *options, "--data", path / "world4d"))
    assert not list((path / "clips").glob("checkpoint-*"))


def test_tpe_and_whole_packed_rows_train_with_an_evaluation(path):
    options = ["--time_cue", "tpe", "--packed", "true", "--max_steps", 2, "--eval_split", "train"]
    options += ["--eval_strategy", "steps", "--eval_steps", 2, "--attn_implementation", "eager"]
    checked(run_example("train.py", *small_run(path, "packed", *options)))
    record = json.loads((path / "packed" / "run.json").read_text())
    assert [entry["eval_loss"] > 0 for entry in record["log"] if "eval_loss" in entry] == [True]
    assert json.loads((path / "packed" / "config.json").read_text())["time_cue"] == "tpe"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--truth", "true"], "--truth needs --teacher"),
        (["--teacher", "x", "--truth", "true"], "--distill_latent false"),
        (["--load_in_4bit", "true"], "needs --llm_lora"),
        (["--eval_strategy", "steps", "--eval_steps", "1"], "--eval_split"),
        (["--num_gpus", "64"], "for 64 GPUs, but 1 processes"),
        (["--train_split", "training"], "no split 'training'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_options_are_refused_before_anything_is_loaded(path, options, message, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", path / "home" / "datasets")
    with pytest.raises(SystemExit) as stopped:
        run_here(monkeypatch, small_run(path, "wrong", *options))
    assert message in str(stopped.value.code)
