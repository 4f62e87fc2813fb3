"""Errors of perceived depth, flow, motion and camera rays as an `evaluate` metric; a clip is a dict of arrays."""

from collections.abc import Mapping

import datasets
import evaluate
import numpy as np
import torch

# One file with the trainer: what is printed while a model trains and what is reported of it are the same formulas.
from .signal_errors import MeanWithInterval, signal_errors

CHANNELS = {"depth": 1, "flow": 2, "motion": 1, "camray": 6}
MASKS = {"depth": "depth_valid", "flow": "flow_valid"}
ALIGNED = "_aligned"
DEPTH_ERRORS = ("depth_abs_rel", "depth_delta_1.25")
ERRORS = {
    "depth": (*DEPTH_ERRORS, *(name + ALIGNED for name in DEPTH_ERRORS)),
    "flow": ("flow_epe_px",),
    "motion": ("motion_iou",),
    "camray": ("ray_angle_deg", "camera_centre_m"),
}
ERROR_NAMES = tuple(name for names in ERRORS.values() for name in names)
INTERVAL_METHOD = "percentile bootstrap over clips, 2,000 resamples, 95 %; none for a single clip"

_DESCRIPTION = (
    "Errors of depth, optical flow, motion and camera rays that a model perceives in videos, against exact ones."
)
_CITATION = """\
AbsRel and delta < 1.25: D. Eigen, C. Puhrsch, R. Fergus, Depth map prediction from a single image, NeurIPS 2014.
Scaling by the ratio of medians: T. Zhou et al., Unsupervised learning of depth and ego-motion, CVPR 2017.
End-point error: S. Baker et al., A database and evaluation methodology for optical flow, IJCV 2011."""
_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[dict]`): one clip each: any of these arrays (NumPy, or what `numpy.asarray` reads), N frames:
        `depth` (1, N, H, W): along the optical axis, positive.
        `flow` (2, N, H, W): in pixels of H x W, (right, down). Frame 0 has no predecessor and is never compared.
        `motion` (1, N, H, W): probability that the point moves, in [0, 1]; a pixel moves above 0.5.
        `camray` (6, N, h, w): direction (any length but zero) and moment of each ray, in metres.
    references (`list[dict]`): the clips' truth in the same order: `id` (str or int, unique), the same arrays, and
        optionally the bool masks `depth_valid` and `flow_valid` (1, N, H, W). Other fields are ignored.
        A clip may lack a signal; then it must be missing in the prediction, too.
    seed (`int`, defaults to 0): of the bootstrap.
    return_items (`bool`, defaults to `False`): adds `items`, one record a clip.
Returns: a dict with the mean over clips of each error, every clip counting the same; `None` where no clip has it:
    `depth_abs_rel`: mean of |depth - truth| / truth over valid pixels. `depth_delta_1.25`: share of them with
        max(depth / truth, truth / depth) < 1.25. Nothing is aligned: both sides have one unit.
    `depth_abs_rel_aligned`, `depth_delta_1.25_aligned`: the same after each clip's depth was multiplied by
        median(truth) / median(depth) over its valid pixels, one factor a clip.
    `flow_epe_px`: mean length of flow - truth over valid pixels of frames 1 to N - 1.
    `motion_iou`: intersection over union of the moving pixels of a clip.
    `ray_angle_deg`: mean angle between the directions. `camera_centre_m`: mean distance between the camera's places, each the
        point nearest to all rays of a frame.
    `interval`: error -> `[low, high]` or `None`; `interval_method` names the method.
    `num_clips`; `n`: error -> clips in its mean; `undefined`: error -> clips that have the signal but nothing to
        compare: no valid pixel, a single frame of flow, or nothing that moves and nothing said to move.
    `items`, on request: `{"id", "depth_scale"}` and the errors; `None` where undefined, no key where not compared.
Raises: `ValueError` that names the clip, for NaN, infinity or depth <= 0 at a valid pixel (mask it, or mend the model),
    shapes that differ, an id that comes twice, a signal without its truth, or one that only some predictions have.
Examples:
    >>> import numpy as np
    >>> truth = {"id": "a", "depth": np.full((1, 2, 4, 4), 2.0)}
    >>> DepthFlow(keep_in_memory=True).compute(predictions=[{"depth": 3 * truth["depth"]}], references=[truth])
    {'depth_abs_rel': 2.0, 'depth_delta_1.25': 0.0, 'depth_abs_rel_aligned': 0.0, 'depth_delta_1.25_aligned': 1.0, ...}
"""


def _array(values, name: str, where: str) -> np.ndarray:
    """A signal as float32 `(channels, N, height, width)`."""
    array = np.asarray(values)
    if array.dtype.kind not in "bfiu":
        raise ValueError(f"{where}: {name} has dtype {array.dtype}; give numbers")
    if array.ndim != 4 or array.shape[0] != CHANNELS[name] or not array.size:
        raise ValueError(
            f"{where}: {name} is {array.shape}; give ({CHANNELS[name]}, frames, height, width), none of them empty"
        )
    return array.astype(np.float32)


def _mask(reference: Mapping, name: str, shape: tuple[int, ...], where: str) -> np.ndarray:
    """Pixels that are compared, bool `(1, N, height, width)`; all of them if the truth names none."""
    key, shape = MASKS.get(name), (1, *shape[1:])
    valid = np.asarray(reference[key]) if key in reference else np.ones(shape, dtype=bool)
    if valid.shape != shape or valid.dtype != bool:
        raise ValueError(f"{where}: {key} must be bool {shape}, not {valid.dtype} {valid.shape}")
    if name == "flow":
        valid = valid.copy()
        valid[:, 0] = False
    return valid


def _check_values(array: np.ndarray, valid: np.ndarray, name: str, where: str) -> None:
    compared = array[np.broadcast_to(valid, array.shape)]
    bad = np.count_nonzero(~np.isfinite(compared))
    if bad:
        remedy = f"; mask what has no truth by {MASKS[name]} in the reference" if name in MASKS else ""
        raise ValueError(f"{where}: {name} has {bad} values that are NaN or infinite{remedy}")
    if name == "depth" and (compared <= 0).any():
        raise ValueError(f"{where}: depth has values <= 0 at valid pixels; a depth is positive (is it a disparity?)")
    if name == "motion" and ((compared < 0) | (compared > 1)).any():
        raise ValueError(f"{where}: motion leaves [0, 1]; give probabilities, the sigmoid of logits")
    if name == "camray" and not (array[:3] != 0).any(axis=0).all():
        raise ValueError(f"{where}: camray has directions of length zero, which have no angle")


def clip_errors(prediction: Mapping, reference: Mapping) -> dict[str, float | None]:
    """Errors of one clip; arguments, keys and errors are those of [`DepthFlow`], with `depth_scale` beside depth's.

    Returns: error -> value, `None` where there is nothing to compare; no key for a signal that was not predicted.
    """
    if not isinstance(reference, Mapping) or not isinstance(prediction, Mapping):
        raise ValueError("a prediction and a reference must be a dict of arrays each")
    if "id" not in reference:
        raise ValueError(f"a reference has {', '.join(reference) or 'nothing'}, but no id; give each clip its own")
    clip = f"clip {reference['id']}"
    unknown = sorted(set(prediction) - set(CHANNELS))
    if unknown:
        raise ValueError(
            f"{clip}: the prediction has {', '.join(unknown)}; give depth, flow, motion and camray alone (masks belong "
            "to the reference)"
        )
    perceived, truth = {}, {}
    for name in prediction:
        if name not in reference:
            raise ValueError(f"{clip}: {name} is predicted, but the reference has none to compare with")
        said, exact = _array(prediction[name], name, f"{clip}, prediction"), _array(reference[name], name, clip)
        if said.shape != exact.shape:
            raise ValueError(f"{clip}: the predicted {name} is {said.shape}, but its truth is {exact.shape}")
        valid = _mask(reference, name, exact.shape, clip)
        _check_values(said, valid, name, f"{clip}, prediction")
        _check_values(exact, valid, name, f"{clip}, reference")
        # The formulas take logits of motion: probability > 0.5 where logit > 0.
        perceived[name] = torch.from_numpy(said - 0.5 if name == "motion" else said)[None]
        truth[name] = torch.from_numpy(exact)[None]
        if name in MASKS:
            truth[MASKS[name]] = torch.from_numpy(valid)[None]
    errors = {name: value for name, (value,) in signal_errors(perceived, truth).items()}
    if "depth" in perceived:
        valid = truth["depth_valid"].numpy()
        scale = float("nan")
        if valid.any():
            # The medians' ratio and not the ratios' median, as is usual; NumPy's is the mean of the two middle values.
            scale = float(np.median(truth["depth"].numpy()[valid]) / np.median(perceived["depth"].numpy()[valid]))
        aligned = signal_errors({"depth": perceived["depth"] * scale}, truth)
        errors |= {name + ALIGNED: value for name, (value,) in aligned.items()}
        errors["depth_scale"] = scale if valid.any() else None
    return errors


def _record(prediction: Mapping, reference: Mapping) -> dict:
    """What is kept of a clip: its id, the signals of its truth, and its errors."""
    errors = clip_errors(prediction, reference)
    return {"id": str(reference["id"]), "signals": [name for name in CHANNELS if name in reference], "errors": errors}


def _summary(records: list[dict], seed: int, return_items: bool) -> dict:
    seen: set[str] = set()
    for record in records:
        if record["id"] in seen:
            raise ValueError(f"clip {record['id']} comes twice; drop what a sampler padded, or make the ids unique")
        seen.add(record["id"])
    for signal, names in ERRORS.items():
        predicted = [names[0] in record["errors"] for record in records]
        for record, has_it in zip(records, predicted, strict=True):
            if any(predicted) and signal in record["signals"] and not has_it:
                raise ValueError(
                    f"clip {record['id']}: {signal} is not predicted, although its truth is there and other clips have "
                    "it; a mean over some clips would not compare"
                )
    means, undefined = {}, {}
    for name in ERROR_NAMES:
        values = [record["errors"][name] for record in records if name in record["errors"]]
        undefined[name] = sum(value is None for value in values)
        means[name] = MeanWithInterval.of(values, seed) if len(values) > undefined[name] else None
    result = {
        **{name: mean and mean.mean for name, mean in means.items()},
        "num_clips": len(records),
        "n": {name: mean.n if mean else 0 for name, mean in means.items()},
        "undefined": undefined,
        "interval": {name: [mean.low, mean.high] if mean and mean.n > 1 else None for name, mean in means.items()},
        "interval_method": INTERVAL_METHOD,
    }
    items = [{"id": record["id"], **record["errors"]} for record in records]
    return result | {"items": items} if return_items else result


def score(predictions: list[Mapping], references: list[Mapping], seed: int = 0, return_items: bool = False) -> dict:
    """Scores clips; arguments, returned keys and errors are those of [`DepthFlow`]'s `compute`."""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references; give one dict a clip")
    records = [_record(clip, truth) for clip, truth in zip(predictions, references, strict=True)]
    return _summary(records, seed, return_items)


# Arrow tells a missing value from NaN, but has no missing key.
def _to_row(errors: dict[str, float | None]) -> dict[str, float | None]:
    """Errors with every key: NaN where undefined, `None` where not compared."""
    names = (*ERROR_NAMES, "depth_scale")
    return {
        name: (float("nan") if errors[name] is None else errors[name]) if name in errors else None for name in names
    }


def _from_row(row: dict[str, float | None]) -> dict[str, float | None]:
    return {name: None if np.isnan(value) else value for name, value in row.items() if value is not None}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class DepthFlow(evaluate.Metric):
    """`evaluate.load("metrics_rgpt4d/depth_flow")`, or this class without dynamic loading.

    Clips are compared as they are added and only their errors are kept, so that any number of them fits in memory.
    """

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            # What is kept of the arrays, not the arrays.
            features=datasets.Features(
                {
                    "predictions": dict.fromkeys((*ERROR_NAMES, "depth_scale"), number),
                    "references": {
                        "id": datasets.Value("string"),
                        "signals": datasets.List(datasets.Value("string")),
                    },
                }
            ),
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Adds clips: a list of dicts of arrays each."""
        if predictions is None or references is None:
            raise ValueError("give both predictions and references")
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions for {len(references)} references; give one dict a clip")
        records = [_record(clip, truth) for clip, truth in zip(predictions, references, strict=True)]
        super().add_batch(
            predictions=[_to_row(record["errors"]) for record in records],
            references=[{"id": record["id"], "signals": record["signals"]} for record in records],
            **kwargs,
        )

    def add(self, *, prediction=None, reference=None, **kwargs):
        """Adds one clip: a dict of arrays each."""
        if prediction is None or reference is None:
            raise ValueError("give both a prediction and a reference")
        record = _record(prediction, reference)
        kept = {"id": record["id"], "signals": record["signals"]}
        super().add(prediction=_to_row(record["errors"]), reference=kept, **kwargs)

    def _compute(self, predictions, references, seed=0, return_items=False):
        records = [dict(kept, errors=_from_row(row)) for row, kept in zip(predictions, references, strict=True)]
        return _summary(records, seed, return_items)
