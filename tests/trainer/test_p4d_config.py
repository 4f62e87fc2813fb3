import pytest
from trl import TrlParser

from trainer import P4DConfig


def test_paper_settings_are_those_of_the_appendix(tmp_path):
    config = P4DConfig.paper(str(tmp_path), bf16=False, use_cpu=True)
    assert (config.alpha, config.beta) == (0.5, 0.1)
    assert config.signal_weights == {"depth": 1.0, "flow": 0.1, "motion": 0.05, "camray": 0.05}
    assert (config.decoder_kind, config.decoder_hidden_size) == ("mlp", 2560)
    assert (config.num_train_epochs, config.learning_rate, config.warmup_steps) == (5, 1e-5, 0.03)
    assert config.lr_scheduler_type == "cosine"
    assert config.trainable == ["projector", "llm"]


def test_release_settings_depart_where_the_release_does(tmp_path):
    config = P4DConfig.release(str(tmp_path), bf16=False, use_cpu=True)
    assert config.decoder_kind == "linear"
    assert config.trainable == ["llm"]
    assert config.alpha * 8 == pytest.approx(0.01)  # a mean over 8 latent frames there, a sum here
    assert config.beta * 16 * config.lambda_depth == pytest.approx(0.1)


def test_signal_weights_keep_to_the_chosen_signals(tmp_path):
    config = P4DConfig(str(tmp_path), signals=["flow", "depth"], bf16=False, use_cpu=True)
    assert list(config.signal_weights) == ["depth", "flow"]


def test_none_on_a_command_line_is_an_empty_list(tmp_path):
    given = ["--output_dir", str(tmp_path), "--bf16", "false", "--use_cpu", "true"]
    for options, expected in (
        ([], (["projector", "llm"], ["depth", "flow", "motion", "camray"])),
        (["--signals", "none"], (["projector", "llm"], [])),
        (["--trainable", "none", "--signals", "flow"], ([], ["flow"])),
    ):
        (config,) = TrlParser(P4DConfig).parse_args_and_config([*given, *options])
        assert (config.trainable, config.signals) == expected


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"signals": ["normals"]}, "normals"),
        ({"signals": ["none", "depth"]}, "none"),
        ({"trainable": ["head"]}, "head"),
        ({"max_length": 512}, "lose frames"),
        ({"alpha": -1.0}, "alpha"),
    ],
)
def test_wrong_settings_are_named(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        P4DConfig(str(tmp_path), bf16=False, use_cpu=True, **wrong)
