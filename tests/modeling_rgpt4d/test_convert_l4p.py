"""The released L4P names to ours. The checkpoint is made here, by the tables of what the release holds."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from modeling_rgpt4d.configuration_l4p import L4PConfig
from modeling_rgpt4d.convert_l4p import convert_l4p, main
from tests.modeling_rgpt4d.test_l4p_parity import IMPLEMENTATION, load_module

DIM, INNER, FEATURES, LAST, BLOCKS, HOOKS = 32, 48, 8, 8, 6, (1, 2, 3, 4)
LAYERS = (8, 12, 16, 16)
CHANNELS = {"depth": 1, "flow_2d_backward": 2, "dyn_mask": 1, "camray": 6}
ENCODER, DPT = "l4p_model.video_encoder.", "l4p_model.task_heads.{}.task_head.dpt."


def config() -> L4PConfig:
    return L4PConfig(
        image_size=56, hidden_size=DIM, num_hidden_layers=HOOKS[-1], num_attention_heads=2, intermediate_size=INNER,
        taps=HOOKS, feature_dim=FEATURES, layer_dims=LAYERS, last_dim=LAST,
    )  # fmt: skip


def released() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}

    def add(name: str, *shape: int, bias: int | None = None):
        tensors[f"{name}.weight"] = torch.randn(shape, generator=generator) * 0.1
        if bias is not None:
            tensors[f"{name}.bias"] = torch.randn(bias, generator=generator) * 0.1

    add(f"{ENCODER}patch_embed.proj", DIM, 3, 2, 14, 14, bias=DIM)
    for i in range(BLOCKS):
        block = f"{ENCODER}blocks.{i}."
        for norm in ("norm1", "norm2"):
            add(block + norm, DIM, bias=DIM)
        add(f"{block}attn.qkv", 3 * DIM, DIM)
        for bias in ("q_bias", "v_bias"):
            tensors[f"{block}attn.{bias}"] = torch.randn(DIM, generator=generator)
        add(f"{block}attn.proj", DIM, DIM, bias=DIM)
        add(f"{block}mlp.fc1", INNER, DIM, bias=INNER)
        add(f"{block}mlp.fc2", DIM, INNER, bias=DIM)
    add(f"{ENCODER}norm", DIM, bias=DIM)
    for task, channels in CHANNELS.items():
        head = DPT.format(task)
        kernels = ((2, 1, 1), (2, 1, 1)) if task == "camray" else ((2, 4, 4), (2, 2, 2))
        for i, width in enumerate(LAYERS):
            add(f"{head}act_postprocess.{i}.0", width, DIM, 1, 1, 1, bias=width)
            add(f"{head}scratch.layer{i + 1}_rn", FEATURES, width, 3, 3, 3)
            tensors[f"{head}scratch.layer_rn.{i}.weight"] = tensors[f"{head}scratch.layer{i + 1}_rn.weight"]
            for unit in ("resConfUnit1", "resConfUnit2"):
                for conv in ("conv1", "conv2"):
                    name = f"{head}scratch.refinenet{i + 1}.{unit}.{conv}"
                    add(name, FEATURES, FEATURES, 3, 3, 3, bias=FEATURES)
            add(f"{head}scratch.refinenet{i + 1}.out_conv", FEATURES, FEATURES, 1, 1, 1, bias=FEATURES)
        for i, kernel in enumerate(kernels):
            add(f"{head}act_postprocess.{i}.1", LAYERS[i], LAYERS[i], *kernel, bias=LAYERS[i])
        add(f"{head}act_postprocess.3.1", LAYERS[3], LAYERS[3], 3, 3, 3, bias=LAYERS[3])
        add(f"{head}head1.0", LAST, FEATURES, 3, 3, 3, bias=LAST)
        add(f"{head}head2.0", LAST, LAST, 3, 3, 3, bias=LAST)
        add(f"{head}head2.2", channels, LAST, 1, 1, 1, bias=channels)
    add("l4p_model.task_heads.track_2d.processed_video_features_proj", 4, DIM, bias=4)
    return tensors


@pytest.fixture
def checkpoint(tmp_path):
    file = tmp_path / "l4p.ckpt"
    torch.save({"epoch": 3, "pytorch-lightning_version": "2.1", "state_dict": released()}, file)
    return file


def changed(tmp_path, change) -> str:
    tensors = released()
    change(tensors)
    file = tmp_path / "changed.ckpt"
    torch.save({"state_dict": tensors}, file)
    return file


def test_every_tensor_gets_its_place_or_is_named(checkpoint, tmp_path):
    report = convert_l4p(checkpoint, tmp_path / "l4p", config())
    source, ours = released(), load_file(tmp_path / "l4p" / "model.safetensors")
    qkv = source[f"{ENCODER}blocks.2.attn.qkv.weight"]
    attention = "encoder.layers.2.attention.attention"
    for i, part in enumerate(("query", "key", "value")):
        assert torch.equal(ours[f"{attention}.{part}.weight"], qkv[i * DIM : (i + 1) * DIM])
    assert torch.equal(ours[f"{attention}.value.bias"], source[f"{ENCODER}blocks.2.attn.v_bias"])
    head = DPT.format("dyn_mask")
    for theirs, mine in (
        ("scratch.refinenet2.resConfUnit1.conv2.bias", "fusion.1.lateral_unit.conv2.bias"),
        ("scratch.layer3_rn.weight", "laterals.2.weight"),
        ("act_postprocess.1.1.weight", "reassemble.1.resample.weight"),
        ("head1.0.weight", "project.weight"),
        ("head2.2.bias", "output.2.bias"),
    ):
        assert torch.equal(ours[f"heads.motion.{mine}"], source[head + theirs])
    used = len(source) - len(report["unused_tensors"])
    assert len(ours) == used + 2 * HOOKS[-1]  # queries, keys and values of each block were one
    assert sorted(report["left_out"].values()) == sorted([2, 2, 2 * 13, 16, 16])
    assert report["parameters"] == sum(tensor.numel() for tensor in ours.values())


def test_a_stranger_loads_it(checkpoint, tmp_path, run_as_stranger):
    convert_l4p(checkpoint, tmp_path / "l4p", config())
    video = torch.randn(1, 16, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = AutoModel.from_pretrained(tmp_path / "l4p")(video)
    save_file({"video": video, "depth": expected.depth, "camray": expected.camray}, tmp_path / "tensors.safetensors")
    run_as_stranger(
        "import torch; from safetensors.torch import load_file; from transformers import AutoModel\n"
        "model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "tensors = load_file(sys.argv[2])\n"
        "with torch.no_grad():\n"
        "    output = model(tensors['video'])\n"
        "for name in ('depth', 'camray'):\n"
        "    torch.testing.assert_close(output[name], tensors[name], atol=1e-5, rtol=1e-5)",
        tmp_path / "l4p",
        tmp_path / "tensors.safetensors",
    )


def test_the_reference_checkpoint_gives_the_originals_signals(shared_dir, tmp_path, monkeypatch):
    folder = shared_dir / "parity" / "l4p"
    monkeypatch.syspath_prepend(str(folder))
    check, implementation = load_module("l4p_check", folder / "check.py"), load_module("l4p_impl", IMPLEMENTATION)
    case = json.loads((folder / "small56" / "config.json").read_text())
    convert_l4p(folder / "small56" / "state_dict.safetensors", tmp_path / "l4p", implementation.config_of(case))
    reference = load_file(folder / "small56" / "reference.safetensors")
    video = check.normalise(load_file(folder / "small56" / "input.safetensors")["video_uint8"])
    with torch.no_grad():
        output = AutoModel.from_pretrained(tmp_path / "l4p")(video.transpose(1, 2))
    for task, signal in implementation.SIGNAL_OF_TASK.items():
        expected = reference[f"heads.{task}.out"]
        limit = 1e-5 + 1e-5 * expected.abs().max()
        assert (output[signal] - expected).abs().max() <= limit, signal


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(f"{ENCODER}blocks.1.mlp.fc1.bias"), r"1 missing: encoder.layers.1.intermediate.dense.bias \(48,\)"),
        (lambda t: t.update({f"{ENCODER}blocks.1.ls1.gamma": torch.ones(2)}), "1 tensors are not of L4P.*ls1.gamma"),
        (lambda t: t.update({f"{DPT.format('normals')}head1.0.bias": torch.ones(2)}), "normals"),
        (lambda t: t.update({f"{ENCODER}patch_embed.proj.bias": torch.ones(9)}), r"is \(9,\), expected \(32,\)"),
        (lambda t: t.update({f"{DPT.format('depth')}scratch.layer_rn.1.weight": torch.ones(2)}), "two names of one"),
    ],
)  # fmt: skip
def test_another_checkpoint_is_refused_by_name_and_leaves_nothing(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        convert_l4p(changed(tmp_path, change), tmp_path / "l4p", config())
    assert {path.name for path in tmp_path.iterdir()} == {"changed.ckpt"}


def test_the_released_size_is_the_default(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="expected"):
        convert_l4p(checkpoint, tmp_path / "l4p")


class Code:
    """What weights-only unpickling must not bring to life."""


def test_files_that_are_no_checkpoint_are_refused(tmp_path, checkpoint):
    torch.save({"state_dict": {"a": Code()}}, tmp_path / "code.ckpt")
    (tmp_path / "cut.ckpt").write_bytes(checkpoint.read_bytes()[:1000])
    torch.save([1, 2], tmp_path / "list.ckpt")
    for name, message in (
        ("code", "weights alone"),
        ("cut", "cut short"),
        ("list", "no state_dict"),
        ("none", "no file"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_l4p(tmp_path / f"{name}.ckpt", tmp_path / "l4p", config())
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        convert_l4p(checkpoint, tmp_path / "there", config())


def test_the_command_converts(checkpoint, tmp_path, capsys):
    config().save_pretrained(tmp_path / "size")
    main([str(checkpoint), str(tmp_path / "l4p"), "--config", str(tmp_path / "size" / "config.json")])
    assert '"tracking head": 2' in capsys.readouterr().out and (tmp_path / "l4p" / "conversion.json").is_file()
    with pytest.raises(SystemExit, match="error: .*no file"):
        main([str(tmp_path / "none.ckpt"), str(tmp_path / "other")])
