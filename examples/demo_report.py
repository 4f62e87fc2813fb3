"""The HTML report of examples/demo.py: scores, curves, perceived maps and the question, all read from the run's records."""

import base64
import io
import json
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from metrics_rgpt4d import PairedComparison
from modeling_rgpt4d.region_marks import draw_marks
from modeling_rgpt4d.video_decoding import decode_video

TEMPLATE = Path(__file__).with_name("demo_report.html.j2")
NAMES = {"sft": "SFT alone", "p4d": "SFT + P4D"}
ERRORS = {  # name in trainer.signal_errors -> how the report calls it
    "depth_abs_rel": "depth, absolute relative error",
    "depth_delta_1.25": "depth, share of pixels within a factor of 1.25",
    "flow_epe_px": "flow, end-point error (px of the teacher's grid)",
    "motion_iou": "motion, intersection over union",
    "ray_angle_deg": "rays, mean angle (degrees)",
    "camera_centre_m": "the camera's place, mean distance (m)",
}


def inline_png(image: Image.Image | Path | Figure) -> str:
    """A picture as a data URI, so that the report is one file."""
    if isinstance(image, Path):
        data = image.read_bytes()
    else:
        buffer = io.BytesIO()
        if isinstance(image, Figure):
            image.savefig(buffer, format="png", dpi=110)
        else:
            image.save(buffer, format="PNG")
        data = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(data).decode()


def curves(runs: dict[str, dict]) -> Figure:
    """The answer loss of both runs, and the terms of distillation."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    answers, terms = figure.subplots(1, 2)
    for kind, run in runs.items():
        log = [entry for entry in run["log"] if "loss_sft" in entry]
        answers.plot([e["step"] for e in log], [e["loss_sft"] for e in log], label=NAMES[kind])
    answers.set(xlabel="step", ylabel="L_SFT, nats a token", yscale="log")
    log = [entry for entry in runs["p4d"]["log"] if "loss_ld" in entry]
    for name, label in (("loss_ld", "latent"), *((f"loss_{s}", s) for s in ("depth", "flow", "motion", "camray"))):
        terms.plot([e["step"] for e in log], [e[name] for e in log], label=label)
    terms.set(xlabel="step", ylabel="Smooth-L1, summed over frames", yscale="log")
    for axis in (answers, terms):
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    return figure


def columns_of(scores: dict) -> dict[str, dict]:
    """Each column of the metric with accuracy, interval and n; tasks outside R4D-Bench come last."""
    table = {
        column: {"accuracy": scores[column], "interval": scores["interval"][column], "n": n}
        for column, n in scores["n"].items()
        if n
    }
    return table | {
        task: {key: other[key] for key in ("accuracy", "interval", "n")} for task, other in scores["other"].items()
    }


def chance_of(answers: list[dict]) -> float:
    """Percent that a guess among each question's options gets right, on average."""
    return 100 * float(np.mean([1 / len(answer["options"]) for answer in answers]))


def paired(first: dict, second: dict) -> dict:
    """McNemar's exact test of two runs on the same questions (all of them, TimeBench too)."""
    metric = PairedComparison(keep_in_memory=True)
    return metric.compute(predictions1=first["items"], predictions2=second["items"])


def region_picture(video: Path, region: str, num_frames: int) -> tuple[Image.Image, list[Image.Image]]:
    """The first frame with its drawn region, at the source's size, and a strip of all frames."""
    frames = decode_video(video, num_frames=num_frames).frames
    name, _, numbers = region.partition(":")
    values = [float(number) for number in numbers.split(",")]
    marked = draw_marks(Image.fromarray(frames[0]), [{"name": name, "box" if len(values) == 4 else "point": values}])
    strip = [Image.fromarray(frame) for frame in frames]
    for picture in [marked, *strip]:
        picture.thumbnail((960, 720) if picture is marked else (180, 180))
    return marked, strip


def samples(answers: dict[str, list[dict]]) -> list[dict]:
    """The first question of each task, with what each model said (`replies`, in the order of `answers`)."""
    by_id = [{answer["id"]: answer["reply"] for answer in of_model} for of_model in answers.values()]
    first = {answer["category"]: answer for answer in reversed(next(iter(answers.values())))}
    return [{**answer, "replies": [replies[answer["id"]] for replies in by_id]} for answer in reversed(first.values())]


def scores_of(evaluations: dict[str, Path]) -> dict[str, Any]:
    """What the report's scores and samples take from folders of examples/run_eval.py, by the models' names."""
    scores = {name: json.loads((folder / "scores.json").read_text())["world4d"] for name, folder in evaluations.items()}
    answers = {
        name: [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
        for name, folder in evaluations.items()
    }
    first = next(iter(answers.values()))
    return {
        "scores": scores,
        "tables": {name: columns_of(score) for name, score in scores.items()},
        "chance": chance_of(first),
        "questions": len(first),
        "samples": samples(answers),
    }


@dataclass(frozen=True)
class Stored:
    """The model that comes with the project: its answers to the test questions, and what it perceives in a clip."""

    evaluation: Path
    picture: Path


@dataclass(frozen=True)
class Trained:
    """The runs of SFT and P4D, by `"sft"` and `"p4d"`: folders of the models and of their evaluations."""

    students: dict[str, Path]
    evaluations: dict[str, Path]


def write_report(
    path: Path,
    *,
    records: list[dict],
    settings: dict,
    video: Path,
    region: str,
    question: str,
    options: list[str],
    asked: dict,
    stored: Stored,
    trained: Trained | None,
) -> None:
    """Write the report to `path`, whole or not at all. Every figure in it is read from the files of the runs.

    Args:
        trained: None while the training goes on; the report then says so.
    """
    marked, strip = region_picture(video, region, len(asked["timestamps"]))
    of_stored = {**scores_of({"the stored model": stored.evaluation}), "picture": stored.picture}
    of_trained: dict[str, Any] | None = None
    if trained is not None:
        runs = {kind: json.loads((folder / "run.json").read_text()) for kind, folder in trained.students.items()}
        named = scores_of({NAMES[kind]: folder for kind, folder in trained.evaluations.items()})
        of_trained = {
            **named,
            "pair": paired(*(named["scores"][NAMES[kind]] for kind in ("sft", "p4d"))),
            "curves": curves(runs),
            "pictures": sorted((trained.students["p4d"] / "pictures").glob("*.png")),
            "perception": runs["p4d"]["perception"],
        }
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATE.parent), autoescape=True)
    environment.filters["png"] = inline_png
    html = environment.get_template(TEMPLATE.name).render(
        stored=of_stored,
        trained=of_trained,
        settings=settings,
        versions={name: version(name) for name in ("rgpt4d", "torch", "transformers", "trl", "datasets")},
        machine=f"{platform.machine()}, {os.cpu_count()} CPU cores, Python {platform.python_version()}",
        records=records,
        error_names=ERRORS,
        marked=marked,
        strip=list(zip(strip, asked["timestamps"], strict=True)),
        video=video.name,
        question=question,
        options=options,
        asked=asked,
    )
    unfinished = path.with_suffix(".part")
    unfinished.write_text(html, encoding="utf-8")
    unfinished.replace(path)
