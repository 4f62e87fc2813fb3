import json
import math
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from scipy.stats import bootstrap

from metrics_rgpt4d import DepthFlow
from metrics_rgpt4d.depth_flow.depth_flow import ERROR_NAMES, clip_errors, score
from trainer import signal_errors as errors_while_training

METRIC_FOLDER = Path(__file__).parents[2] / "metrics_rgpt4d" / "depth_flow"


def frames(*rows, channels=1):
    """A signal given as frames of pixels in one row, `(channels, frames, 1, pixels)`; of each frame, channels in turn."""
    return np.moveaxis(np.array(rows, dtype=np.float64).reshape(len(rows), channels, 1, -1), 0, 1)


def random_clip(seed, num_frames=3, size=8):
    """A prediction and its truth with all four signals and both masks."""
    rng = np.random.default_rng(seed)
    shape = (num_frames, size, size)
    truth = {
        "id": seed,
        "depth": rng.uniform(1, 5, (1, *shape)),
        "flow": rng.normal(size=(2, *shape)),
        "motion": (rng.random((1, *shape)) < 0.3).astype(float),
        "camray": rng.normal(size=(6, num_frames, 2, 2)),
        "depth_valid": rng.random((1, *shape)) < 0.8,
        "flow_valid": rng.random((1, *shape)) < 0.8,
    }
    prediction = {
        "depth": truth["depth"] * rng.uniform(0.5, 2, (1, *shape)),
        "flow": truth["flow"] + rng.normal(size=(2, *shape)),
        "motion": rng.random((1, *shape)),
        "camray": truth["camray"] + 0.3 * rng.normal(size=(6, num_frames, 2, 2)),
    }
    return prediction, truth


def clips(number):
    predictions, references = zip(*map(random_clip, range(number)), strict=True)
    return list(predictions), list(references)


@pytest.mark.parametrize("factor", [0.25, 0.9, 1.0, 1.2, 3.0])
def test_depth_off_by_a_factor_has_closed_errors_and_none_after_alignment(factor):
    prediction, truth = random_clip(0)
    errors = clip_errors({"depth": factor * truth["depth"]}, truth)
    assert errors["depth_abs_rel"] == pytest.approx(abs(factor - 1), abs=1e-6)
    assert errors["depth_delta_1.25"] == (1.0 if 0.8 < factor < 1.25 else 0.0)
    assert errors["depth_abs_rel_aligned"] == pytest.approx(0, abs=1e-6) and errors["depth_delta_1.25_aligned"] == 1.0
    assert errors["depth_scale"] == pytest.approx(1 / factor)


def test_alignment_is_one_ratio_of_medians_a_clip_by_hand():
    depth, truth = frames([2.0, 2.0], [4.0, 8.0]), frames([1.0, 2.0], [3.0, 10.0])
    errors = clip_errors({"depth": depth}, {"id": 0, "depth": truth})
    assert errors["depth_scale"] == pytest.approx(2.5 / 3)  # medians of four values: (2 + 3) / 2 and (2 + 4) / 2
    aligned = [5 / 3, 5 / 3, 10 / 3, 20 / 3]
    expected = np.mean([abs(d - t) / t for d, t in zip(aligned, [1, 2, 3, 10], strict=True)])
    assert errors["depth_abs_rel_aligned"] == pytest.approx(expected)
    assert errors["depth_delta_1.25_aligned"] == 0.5  # ratios 5/3, 6/5, 10/9, 3/2
    valid = np.array([True, True, True, False]).reshape(1, 2, 1, 2)
    masked = clip_errors({"depth": depth}, {"id": 0, "depth": truth, "depth_valid": valid})
    assert masked["depth_scale"] == 1.0  # medians 2 and 2


def camera_places(clip: dict) -> np.ndarray:
    """(N, 3): o of each frame by least squares over its rays' m = o x d."""
    places = []
    for frame in np.moveaxis(clip["camray"], 1, 0).astype(np.float64):
        direction, moment = (part.reshape(3, -1).T for part in np.split(frame / np.linalg.norm(frame[:3], axis=0), 2))
        across = [np.eye(3) - np.outer(d, d) for d in direction]
        nearest = np.cross(direction, moment)
        places.append(
            np.linalg.lstsq(
                np.concatenate(across), np.concatenate([a @ p for a, p in zip(across, nearest, strict=True)])
            )[0]
        )
    return np.stack(places)


def test_all_errors_equal_plain_numpy_in_float64():
    prediction, truth = random_clip(7)
    valid = truth["depth_valid"]
    d, t = prediction["depth"][valid], truth["depth"][valid]
    distance = np.sqrt(((prediction["flow"] - truth["flow"]) ** 2).sum(axis=0))[1:][truth["flow_valid"][0, 1:]]
    said, moves = prediction["motion"] > 0.5, truth["motion"] == 1
    one, other = (rays[:3] / np.linalg.norm(rays[:3], axis=0) for rays in (prediction["camray"], truth["camray"]))
    scale = np.median(t) / np.median(d)
    assert clip_errors(prediction, truth) == pytest.approx(
        {
            "depth_abs_rel": np.mean(np.abs(d - t) / t),
            "depth_delta_1.25": np.mean(np.maximum(d / t, t / d) < 1.25),
            "depth_abs_rel_aligned": np.mean(np.abs(scale * d - t) / t),
            "depth_delta_1.25_aligned": np.mean(np.maximum(scale * d / t, t / (scale * d)) < 1.25),
            "flow_epe_px": distance.mean(),
            "motion_iou": (said & moves).sum() / (said | moves).sum(),
            "ray_angle_deg": np.degrees(np.arccos((one * other).sum(axis=0))).mean(),
            "camera_centre_m": np.linalg.norm(camera_places(prediction) - camera_places(truth), axis=1).mean(),
            "depth_scale": scale,
        },
        rel=1e-5,
    )


def test_errors_are_those_of_training():
    prediction, truth = random_clip(3)
    logits = prediction | {"motion": np.log(prediction["motion"] / (1 - prediction["motion"]))}
    batch = [{k: torch.as_tensor(v)[None] for k, v in side.items() if k != "id"} for side in (logits, truth)]
    batch = [{k: v if v.dtype == torch.bool else v.float() for k, v in side.items()} for side in batch]
    expected = {name: value for name, (value,) in errors_while_training(*batch).items()}
    errors = clip_errors(prediction, truth)
    assert len(expected) == 6 and {name: errors[name] for name in expected} == expected


def test_invalid_pixels_and_frame_0_of_flow_may_hold_anything():
    prediction, truth = random_clip(1)
    expected = clip_errors(prediction, truth)
    for side in (prediction, truth):
        side["depth"][~truth["depth_valid"]] = np.nan
        side["flow"][:, ~truth["flow_valid"][0]] = np.inf
        side["flow"][:, 0] = np.nan
    truth["depth"][~truth["depth_valid"]] = -1.0
    assert clip_errors(prediction, truth) == expected


def test_motion_threshold_is_half_and_a_still_clip_is_undefined():
    said, moves = frames([0.9, 0.500001, 0.5, 0.2]), frames([1.0, 0.0, 1.0, 0.0])
    assert clip_errors({"motion": said}, {"id": 0, "motion": moves})["motion_iou"] == pytest.approx(1 / 3)
    still = np.zeros_like(moves)
    assert clip_errors({"motion": said}, {"id": 0, "motion": still})["motion_iou"] == 0.0
    assert clip_errors({"motion": still}, {"id": 0, "motion": still.astype(bool)})["motion_iou"] is None
    results = score([{"motion": said}, {"motion": still}], [{"id": 0, "motion": moves}, {"id": 1, "motion": still}])
    assert results["motion_iou"] == pytest.approx(1 / 3)
    assert results["n"]["motion_iou"] == 1 and results["undefined"]["motion_iou"] == 1 and results["num_clips"] == 2


def test_ray_angle_ignores_length_and_moment():
    along_z, tilted = np.array([0.0, 0, 1, 5, 5, 5]), np.array([2.0, 0, 2, 0, 0, 0])
    rays = np.stack([along_z, tilted], axis=1).reshape(6, 1, 1, 2)
    straight = np.stack([3 * along_z, along_z], axis=1).reshape(6, 1, 1, 2)
    assert clip_errors({"camray": rays}, {"id": 0, "camray": straight})["ray_angle_deg"] == pytest.approx(22.5)


def test_clip_without_a_valid_pixel_is_counted_as_undefined():
    prediction, truth = random_clip(0)
    nothing = truth | {"id": "none", "depth_valid": np.zeros_like(truth["depth_valid"])}
    single = {"flow": np.ones((2, 1, 4, 4))}  # one frame has no predecessor
    results = score([prediction, prediction], [truth, nothing], return_items=True)
    for name in ("depth_abs_rel", "depth_abs_rel_aligned"):
        assert results["n"][name] == 1 and results["undefined"][name] == 1
        assert results["items"][1][name] is None and results[name] == results["items"][0][name]
    assert results["items"][1]["depth_scale"] is None and results["n"]["flow_epe_px"] == 2
    assert clip_errors(single, {"id": 0, **single}) == {"flow_epe_px": None}


def test_mean_is_over_clips_and_each_signal_has_its_own_n():
    predictions, references = clips(3)
    del predictions[1]["flow"], references[1]["flow"]  # a data set without flow
    results = score(predictions, references, return_items=True)
    assert results["n"]["flow_epe_px"] == 2 and results["n"]["depth_abs_rel"] == 3
    assert results["undefined"] == dict.fromkeys(ERROR_NAMES, 0) and "flow_epe_px" not in results["items"][1]
    for name in ERROR_NAMES:
        assert results[name] == pytest.approx(np.mean([item[name] for item in results["items"] if name in item]))


def test_signal_that_only_some_predictions_have_is_an_error():
    predictions, references = clips(3)
    del predictions[2]["depth"]
    with pytest.raises(ValueError, match="clip 2: depth is not predicted, although its truth is there"):
        score(predictions, references)
    assert score([{"flow": p["flow"]} for p in predictions], references)["n"]["depth_abs_rel"] == 0


def test_interval_is_the_percentile_bootstrap_over_clips():
    results = score(*clips(40), return_items=True)
    for name in ("depth_abs_rel", "flow_epe_px"):
        values = [item[name] for item in results["items"]]
        options = {"n_resamples": 20_000, "method": "percentile", "rng": np.random.default_rng(1)}
        expected = bootstrap((values,), np.mean, **options).confidence_interval
        width = expected.high - expected.low
        assert results["interval"][name] == pytest.approx([expected.low, expected.high], abs=0.06 * width)
    assert score(*clips(40))["interval"] == results["interval"] != score(*clips(40), seed=1)["interval"]
    assert set(score(*clips(1))["interval"].values()) == {None}  # one clip shows no variation


def change(**fields):
    prediction, truth = random_clip(7)
    prediction |= {name: value for name, value in fields.items() if not name.startswith("truth_")}
    truth |= {name.removeprefix("truth_"): value for name, value in fields.items() if name.startswith("truth_")}
    return prediction, truth


def nan_at(shape, value=np.nan):
    array = np.ones(shape)
    array[..., -1, -1] = value
    return array


DEPTH, EVERYWHERE = (1, 3, 8, 8), np.ones((1, 3, 8, 8), dtype=bool)


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (
            change(depth=nan_at(DEPTH), truth_depth_valid=EVERYWHERE),
            "clip 7, prediction: depth has 3 values that are NaN",
        ),
        (
            change(truth_depth=nan_at(DEPTH, np.inf), truth_depth_valid=EVERYWHERE),
            "clip 7, reference: .* by depth_valid",
        ),
        (change(depth=nan_at(DEPTH, 0.0), truth_depth_valid=EVERYWHERE), "depth has values <= 0 at valid pixels"),
        (change(motion=np.full(DEPTH, 3.0)), r"motion leaves \[0, 1\]; give probabilities"),
        (change(motion=nan_at(DEPTH)), "motion has 3 values that are NaN or infinite$"),
        (change(camray=np.zeros((6, 3, 2, 2))), "prediction: camray has directions of length zero"),
        (change(depth=np.ones((3, 8, 8))), r"depth is \(3, 8, 8\); give \(1, frames, height, width\)"),
        (change(depth=np.ones((1, 3, 4, 4))), r"predicted depth is \(1, 3, 4, 4\), but its truth is \(1, 3, 8, 8\)"),
        (change(depth=np.full(DEPTH, "far")), "depth has dtype <U3"),
        (change(flow_valid=EVERYWHERE), "the prediction has flow_valid; give depth, flow, motion and camray alone"),
        (change(truth_depth_valid=np.ones(DEPTH)), "depth_valid must be bool .*, not float64"),
        (change(truth_flow_valid=np.ones((1, 3), dtype=bool)), r"flow_valid must be bool \(1, 3, 8, 8\)"),
        (({"depth": np.ones(DEPTH)}, {"id": "q7"}), "clip q7: depth is predicted, but the reference has none"),
        (({"depth": np.ones(DEPTH)}, {"depth": np.ones(DEPTH)}), "but no id"),
        ((np.ones(DEPTH), {"id": 1}), "must be a dict of arrays each"),
    ],
)
def test_bad_clip_is_an_error_that_names_it(clip, message, cache):
    with pytest.raises(ValueError, match=message):
        score([clip[0]], [clip[1]])
    with pytest.raises(ValueError, match=message):
        DepthFlow(keep_in_memory=True).compute(predictions=[clip[0]], references=[clip[1]])


def test_wrong_numbers_of_clips_and_repeated_ids_are_errors(cache):
    prediction, truth = random_clip(0)
    for compute in (score, lambda p, r: DepthFlow(keep_in_memory=True).compute(predictions=p, references=r)):
        with pytest.raises(ValueError, match="clip 0 comes twice"):
            compute([prediction] * 2, [truth] * 2)
        with pytest.raises(ValueError, match="1 predictions for 2 references"):
            compute([prediction], [truth] * 2)


def test_folder_loads_offline_and_equals_the_class(cache):
    predictions, references = clips(3)
    references[0]["depth_valid"][:] = False  # undefined, which is not the same as not compared
    del predictions[1]["flow"], references[1]["flow"]
    options = {"seed": 3, "return_items": True}
    results = evaluate.load(str(METRIC_FOLDER)).compute(predictions=predictions, references=references, **options)
    assert results == DepthFlow(keep_in_memory=True).compute(predictions=predictions, references=references, **options)
    assert results == score(predictions, references, **options)
    assert results["items"][0]["depth_abs_rel"] is None and "flow_epe_px" not in results["items"][1]
    assert json.loads(json.dumps(results)) == results


def test_clips_one_by_one_equal_one_call_and_keep_no_array(cache):
    predictions, references = clips(4)
    metric = DepthFlow(keep_in_memory=True)
    metric.add_batch(predictions=predictions[:2], references=references[:2])
    for prediction, reference in zip(predictions[2:], references[2:], strict=True):
        metric.add(prediction=prediction, reference=reference)
    assert metric.compute() == score(predictions, references)
    assert sum(math.prod(v.shape) for v in predictions[0].values()) > 20 * len(metric.features["predictions"])


def test_torch_tensors_and_float16_are_taken():
    prediction, truth = random_clip(0)
    tensors = {name: torch.from_numpy(value).float() for name, value in prediction.items()}
    assert clip_errors(tensors, truth) == clip_errors(prediction, truth)
    half = {name: value.astype(np.float16) for name, value in prediction.items()}
    assert clip_errors(half, truth)["depth_abs_rel"] == pytest.approx(
        clip_errors(prediction, truth)["depth_abs_rel"], rel=1e-3
    )
