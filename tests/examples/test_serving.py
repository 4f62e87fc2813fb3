"""examples/serving.md and the scripts that it names, each on a small random model."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from examples.make_small_model import build_model

EXAMPLES = Path(__file__).parents[2] / "examples"
PAGE = (EXAMPLES / "serving.md").read_text(encoding="utf-8")
REGIONS = [{"name": "obj_1", "box": [10, 20, 60, 60]}]
QUESTION = "Which way does <obj_1> move?"
ASK = ["--region", "obj_1:10,20,60,60", "--num-frames", "4", "--max-new-tokens", "8", "--question", QUESTION]


@pytest.fixture
def run_example(run_script):
    return lambda script, *options: run_script(EXAMPLES / script, *options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    """`model/`, saved with its code, and `clip.mp4`."""
    folder = tmp_path_factory.mktemp("serving")
    torch.manual_seed(0)
    model, processor = build_model(tiny_tokenizer, image_size=32, patch_size=8, width=64, layers=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)  # wide, so that what is seen decides what is said
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i in range(20):
            picture = np.full((64, 96, 3), 10 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder / "model").eval()


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder / "model")


def read(processor, folder, regions=REGIONS, num_frames: int = 4):
    content = [
        {"type": "video", "video": str(folder / "clip.mp4"), "regions": regions},
        {"type": "text", "text": QUESTION},
    ]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_frames": num_frames},
    )


def answer(model, processor, inputs, max_new_tokens: int = 8) -> str:
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def logits_of(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def python_of(section: str) -> str:
    return re.search(r"```python\n(.*?)```", PAGE.split(f"\n## {section}\n")[1], re.DOTALL)[1]


# --- pipeline ------------------------------------------------------------------------------------------------------


def test_the_pipeline_of_the_page_answers_as_generate_does(folder, model, processor, run_as_stranger):
    code = (
        python_of("Pipeline").replace("runs/p4d", str(folder / "model")).replace("clip.mp4", str(folder / "clip.mp4"))
    )
    printed = run_as_stranger(
        code.replace('print(reply[0]["generated_text"])', 'print(repr(reply[0]["generated_text"]))')
    )
    assert printed.strip() == repr(answer(model, processor, read(processor, folder, num_frames=8), 32))


# --- transformers serve --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(folder):
    """The address of a server that has loaded the model."""
    pytest.importorskip("openai", reason='the extra "serve" is not installed')
    pytest.importorskip("fastapi", reason='the extra "serve" is not installed')
    pytest.importorskip("uvicorn", reason='the extra "serve" is not installed')
    command = [sys.executable, str(EXAMPLES / "serve.py"), str(folder / "model")]
    log = folder / "server.log"
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", "0"], stdout=file, stderr=file, env=environment
        )
    try:
        for _ in range(1200):
            running = re.search(r"running on (http://127\.0\.0\.1:\d+)", log.read_text())
            if running or process.poll() is not None:
                break
            time.sleep(0.1)
        assert running, log.read_text()
        yield running[1] + "/v1"
    finally:
        process.terminate()
        process.wait(30)


def test_a_client_that_sends_a_video_and_regions_gets_the_answer_of_generate(
    folder, server, model, processor, run_example
):
    options = ["--server", server, "--model", folder / "model", "--video", folder / "clip.mp4", *ASK]
    marked = answer(model, processor, read(processor, folder))
    assert run_example("ask_server.py", *options) == marked.strip() + "\n"
    # the marks reach the pixels: in another place they get another answer
    elsewhere = [{"name": "obj_1", "box": [0, 0, 95, 63]}]
    expected = answer(model, processor, read(processor, folder, elsewhere))
    assert expected != marked
    options[options.index("obj_1:10,20,60,60")] = "obj_1:0,0,95,63"
    assert run_example("ask_server.py", *options) == expected.strip() + "\n"


def test_a_client_reads_what_is_wrong_with_its_request(folder, server, run_example):
    from openai import BadRequestError

    options = ["--server", server, "--model", folder / "model", "--video", folder / "clip.mp4", *ASK]
    options[options.index("obj_1:10,20,60,60")] = "obj_1:10,20,600,60"
    with pytest.raises(BadRequestError, match="does not lie in the frame of 96 x 64"):
        run_example("ask_server.py", *options)


def test_a_client_can_stream_and_name_a_file_of_the_server(folder, server, model, processor):
    from openai import OpenAI

    content = [
        {"type": "video_url", "video_url": {"url": str(folder / "clip.mp4")}, "regions": REGIONS},
        {"type": "text", "text": QUESTION},
    ]
    chunks = OpenAI(base_url=server, api_key="none").chat.completions.create(
        model=str(folder / "model"),
        messages=[{"role": "user", "content": content}],
        max_completion_tokens=8,
        temperature=0,
        stream=True,
        extra_body={"chat_template_kwargs": {"num_frames": 4}},
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer(model, processor, read(processor, folder))


# --- memory --------------------------------------------------------------------------------------------------------


def test_weights_spread_by_device_map_give_equal_logits(folder, model, processor, tmp_path):
    # half of the weights fit into memory, the others are read from the disk when they are needed
    room = {"cpu": model.get_memory_footprint() // 2}
    spread = AutoModelForImageTextToText.from_pretrained(
        folder / "model", device_map="auto", max_memory=room, offload_folder=tmp_path
    )
    assert set(spread.hf_device_map.values()) == {"cpu", "disk"}
    inputs = read(processor, folder)
    assert torch.equal(logits_of(spread, inputs), logits_of(model, inputs))
    assert answer(spread, processor, inputs) == answer(model, processor, inputs)


def test_generate_takes_a_device_map(folder, model, processor, run_example):
    options = ["--model", folder / "model", "--video", folder / "clip.mp4", *ASK]
    printed = run_example("generate.py", *options, "--device-map", "auto")
    assert printed == answer(model, processor, read(processor, folder)).strip() + "\n"


@pytest.mark.parametrize("bits, divergence", [(8, 0.02), (4, 1.0)])  # the wide random weights make 4 bits look bad
def test_quantize_compares_logits_and_saves_what_it_compared(
    folder, processor, tmp_path, run_example, bits, divergence
):
    pytest.importorskip("bitsandbytes", reason='the extra "quantize" is not installed')
    options = ["--model", folder / "model", "--video", folder / "clip.mp4", *ASK, "--bits", bits]
    record = json.loads(run_example("quantize.py", *options, "--output", tmp_path / "saved").splitlines()[-1])
    assert record["positions"] == 8 and 0 < record["mean_difference"] < record["max_difference"]
    assert 0 < record["kl_divergence"] < divergence and 0 <= record["argmax_agreement"] <= 1
    assert record["mib"] < 0.6 * record["mib_unquantized"]

    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        dtypes = {name: file.get_tensor(name).dtype for name in file.keys() if name.endswith("proj.weight")}
    assert {dtype for name, dtype in dtypes.items() if "vision_tower" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "language_model" in name} <= {torch.int8, torch.uint8}
    from examples.quantize import quantization_config

    fresh = AutoModelForImageTextToText.from_pretrained(
        folder / "model", quantization_config=quantization_config(bits, torch.float32)
    )
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    inputs = read(processor, folder)
    assert torch.equal(logits_of(saved, inputs), logits_of(fresh, inputs))


def test_comparison_of_logits_is_that_of_the_closed_form(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from examples.quantize import compare

    reference = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    record = compare(torch.tensor([[np.log(3.0), 0.0], [2.0, 0.0]]), reference)
    # halves against three quarters and one: (log(1/2 / 3/4) + log(1/2 / 1/4)) / 2 = log(4/3) / 2, at one of two places
    assert record["kl_divergence"] == pytest.approx(np.log(4 / 3) / 4)
    assert record["max_difference"] == pytest.approx(np.log(3.0))
    assert record["mean_difference"] == pytest.approx(np.log(3.0) / 4)
    assert (record["positions"], record["argmax_agreement"]) == (2, 1.0)


# --- adapters and export -------------------------------------------------------------------------------------------


def test_adapter_loads_in_three_ways_and_merged_gives_the_same_logits(
    folder, model, processor, tmp_path, run_as_stranger, run_example
):
    from peft import LoraConfig, PeftModel, get_peft_model

    def load(path):
        return AutoModelForImageTextToText.from_pretrained(path).eval()

    inputs = read(processor, folder)
    torch.manual_seed(0)
    layers = r".*language_model.*\.(q_proj|v_proj|down_proj)"
    adapted = get_peft_model(
        load(folder / "model"),
        LoraConfig(r=4, target_modules=layers, modules_to_save=["multi_modal_projector"], init_lora_weights=False),
    ).eval()
    adapted.save_pretrained(tmp_path / "lora")
    expected = logits_of(adapted, inputs)
    assert (expected - logits_of(model, inputs)).abs().max() > 0.1

    added = load(folder / "model")
    added.load_adapter(str(tmp_path / "lora"))
    wrapped = PeftModel.from_pretrained(load(folder / "model"), tmp_path / "lora").eval()
    for loaded in (added, wrapped, load(tmp_path / "lora")):
        assert torch.equal(logits_of(loaded, inputs), expected)

    run_example("merge_adapter.py", "--adapter", tmp_path / "lora", "--output", tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    torch.testing.assert_close(logits_of(merged, inputs), expected, atol=1e-4, rtol=0)
    assert (
        run_as_stranger(
            "import sys; from transformers import AutoModelForImageTextToText, AutoProcessor\n"
            "for kind in (AutoModelForImageTextToText, AutoProcessor):\n"
            "    print(type(kind.from_pretrained(sys.argv[1], trust_remote_code=True)).__module__.split('.')[0])",
            tmp_path / "merged",
        ).split()
        == ["transformers_modules"] * 2
    )
    with pytest.raises(SystemExit, match="exists"):
        run_example("merge_adapter.py", "--adapter", tmp_path / "lora", "--output", tmp_path / "merged")


def test_exported_vision_equals_the_model_for_any_number_of_frames(folder, model, tmp_path, run_example):
    run_example("export_vision.py", "--model", folder / "model", "--output", tmp_path / "vision.pt2")
    program = torch.export.load(tmp_path / "vision.pt2")
    assert not [name for name in program.state_dict if "language_model" in name]
    for num_frames in (1, 3, 8):
        generator = torch.Generator().manual_seed(num_frames)
        frames = torch.randn(num_frames, 3, 32, 32, generator=generator)
        seconds = torch.rand(num_frames, generator=generator) * 100
        with torch.no_grad():
            (expected,) = model.get_video_features(frames[None], seconds[None]).pooler_output
            tokens = program.module()(frames, seconds)
        torch.testing.assert_close(tokens.flatten(0, 1), expected, atol=1e-5, rtol=0)


def test_export_of_a_model_that_needs_a_teachers_latents_is_refused(folder, tmp_path, run_example):
    options = {"geometry_fusion": "concat", "geometry_hidden_size": 6}
    fused = AutoModelForImageTextToText.from_pretrained(folder / "model", **options)
    fused.save_pretrained(tmp_path / "fused")
    with pytest.raises(ValueError, match="geometry_fusion is 'concat'.*no such input.*geometry_fusion='none'"):
        run_example("export_vision.py", "--model", tmp_path / "fused", "--output", tmp_path / "vision.pt2")
    assert not (tmp_path / "vision.pt2").exists()


# --- the page ------------------------------------------------------------------------------------------------------


def test_commands_and_links_of_the_page_exist(help_of):
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (EXAMPLES / target).exists(), target
    commands = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    commands += re.findall(r"`(python examples/[^`]+)`", PAGE)
    commands = [command for command in commands if command.startswith("python examples/")]
    assert len(commands) >= 6
    for command in commands:
        script = command.split()[1].removeprefix("examples/")
        help_text = help_of(EXAMPLES / script)
        for option in re.findall(r" (--[\w-]+)", command):
            assert re.search(rf"{option}\b", help_text), f"{script} {option}"
