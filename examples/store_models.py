"""Put models of the study, with code and cards, where a clone finds them: a student and its teacher, or the base model.

    python examples/store_models.py --work runs/study --row p4d --seed 0 --evaluation runs/study-student-eval
    python examples/store_models.py --work runs/study --row base

They lie in `study/student` and `study/teacher`, or in `study/base`, which examples/study.py then starts its rows from. Cards are
filled from the study's records; --evaluation, a folder of examples/run_eval.py for runs/study/models/p4d-0, adds
its scores on clips in video files. The student then loads with
`AutoModelForImageTextToText.from_pretrained("study/student", trust_remote_code=True)`, and examples/perceive.py shows what it
perceives with --teacher study/teacher. Their code is linked to that of the project, so that it is there once.
"""

import argparse
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from publish import evaluation_result, overlaps_of, read_record
from study_run import start_of
from train_teacher import RECORD as TEACHER_RECORD
from transformers import AutoModelForImageTextToText, AutoProcessor

from hub_cards import model_card, teacher_card, write_card
from modeling_rgpt4d import L4PModel, PerceptionDecoder
from modeling_rgpt4d.modeling_l4p import SIGNALS
from trainer import P4DConfig
from trainer.p4d_trainer import DECODER_FOLDER
from trainer.signal_errors import MeanWithInterval

EXAMPLES = Path(__file__).resolve().parent
RECORDS = EXAMPLES.parent / "study"
CODE = EXAMPLES.parent / "modeling_rgpt4d"
MAX_BYTES = 25_000_000  # of a file of weights: it lies in the repository
LOSS_SETTINGS = ("distill_latent", "alpha", "beta", "signals", *(f"lambda_{signal}" for signal in SIGNALS))
STUDY = "python examples/study.py"


def read_study(file: Path) -> dict[str, Any]:
    return read_record(file.parent, file.name, "examples/study.py")


def runs_before(record: dict[str, Any], records: Path) -> list[dict[str, Any]]:
    """Records of the runs whose weights this one goes on from, the first of them first."""
    start = start_of(record["settings"], Path(), record["seed"]).name
    if start == "initial":
        return []
    before = read_study(records / f"{start}.json")
    return [*runs_before(before, records), before]


def scores_of_seeds(record: dict[str, Any], records: Path) -> str:
    """A sentence with the averages of every seed of the row, so that a reader sees whether the seed was a lucky one."""
    seeds = sorted((read_study(file) for file in records.glob(f"{record['row']}-[0-9]*.json")), key=lambda r: r["seed"])
    told = ", ".join(f"{one['tests']['test']['scores']['Avg']:.1f} (seed {one['seed']})" for one in seeds)
    return f"Right answers of every seed of this row in the study, in %: {told}. This is seed {record['seed']}."


def student_record(
    record: dict[str, Any],
    before: list[dict[str, Any]],
    items: dict[str, Any],
    seeds: str,
    evaluation: dict[str, Any] | None,
    repo_id: str,
) -> dict[str, Any]:
    """What [`hub_cards.model_card`] takes, from records of the study and, if there is one, a result of run_eval.py."""
    settings, world = record["settings"], items["data"]
    losses = P4DConfig("unused", bf16=False, **{name: settings[name] for name in LOSS_SETTINGS if name in settings})
    told = how_trained(record, before, items)
    study = {
        "benchmark": "World4D test, rendered frames",
        "dataset_id": "world4d",
        "split": "test",
        "revision": f"tiny, seed 0, {world['test_clips']:,} clips, questions {items['sha256'][:12]}",
        "command": told["training"]["command"],
        "scores": record["tests"]["test"]["scores"],
    }
    results = [study] if evaluation is None else [evaluation, study]
    return {
        "name": "4D-RGPT World4D",
        "summary": f"A 4D-RGPT of {record['parameters'] / 1e6:.1f} million parameters that answers questions about World4D, "
        "rendered scenes with exact 4D truth: small enough for a laptop, and trained as the study of this project tells. Its "
        f"perception decoder lies beside it in `{DECODER_FOLDER}`.",
        "repo_id": repo_id,
        "origins": [{"name": "the study's teacher", "role": "teacher", "license": "apache-2.0"}],
        **told,
        "training": {
            **told["training"],
            "teacher": "a small L4P trained on World4D's exact truth",
            "losses": {
                "sft": 1.0,
                "latent": losses.alpha if losses.distill_latent else 0.0,
                "explicit": losses.beta,
                "signals": losses.signal_weights,
            },
        },
        "results": results,
        "perception": {
            side: {name: MeanWithInterval.of(values).as_dict() for name, values in errors.items()}
            for side, errors in record["perception"].items()
        },
        "overlaps": overlaps_of(told["data"], results),
        "limits": [
            "Trained on rendered scenes alone; answers about real videos mean nothing.",
            "A reply is the text of an option, or its letter; it was not trained on free-form questions.",
            seeds,
        ],
    }


def base_record(
    record: dict[str, Any], before: list[dict[str, Any]], items: dict[str, Any], repo_id: str
) -> dict[str, Any]:
    """What [`hub_cards.model_card`] takes of the model that the study's rows start from."""
    told = how_trained(record, before, items)
    no_distillation = {"sft": 1.0, "latent": 0.0, "explicit": 0.0, "signals": {}}
    return {
        "name": "4D-RGPT World4D base",
        "summary": f"A 4D-RGPT of {record['parameters'] / 1e6:.1f} million parameters that describes marked objects of World4D, "
        "rendered scenes. `examples/study.py` starts every row of the study of this project from it.",
        "repo_id": repo_id,
        "origins": [],
        **told,
        "training": {
            **told["training"],
            "command": f"{STUDY} --from-scratch --records runs/study-again --rows base",
            "teacher": None,
            "losses": no_distillation,
        },
        "results": [],
        "overlaps": [],
        "limits": [
            "Trained on captions and on questions about appearance alone: it answers no question of R4D-Bench's kind.",
            "It is no model for real videos.",
        ],
    }


def how_trained(record: dict[str, Any], before: list[dict[str, Any]], items: dict[str, Any]) -> dict[str, Any]:
    """The parts of a card that tell how a run of the study, and those before it, were trained."""
    world = items["data"]
    revisions = {
        "train": f"tiny, seed 0, {world['train_clips']:,} clips",
        "base": f"tiny, seed 1, {world['base_clips']:,} clips with captions",
    }
    return {
        "num_frames": record["settings"]["num_frames"],
        "data": [
            {"name": f"World4D {name}", "id": None, "revision": revisions[name], "license": "apache-2.0"}
            for name in dict.fromkeys(one["settings"]["data"] for one in (*before, record))
        ],
        "training": {
            "command": f"{STUDY} --rows {record['row']} --seeds {record['seed']}",
            "steps": ", then ".join(f"{one['settings']['max_steps']:,} ({one['row']})" for one in (*before, record)),
            "seed": record["seed"],
            "device": record["device"],
            "versions": record["versions"],
        },
    }


def write_whole_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder and put it in the place of the one that may be there."""
    unfinished, old = (folder.with_name(f".{folder.name}.{what}") for what in ("part", "old"))
    for leftover in (unfinished, old):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        fill(unfinished)
        for file in unfinished.rglob("*.safetensors"):
            if file.stat().st_size > MAX_BYTES:
                raise SystemExit(
                    f"{folder.name}/{file.relative_to(unfinished)} has {file.stat().st_size / 1e6:.1f} MB; in the "
                    f"repository at most {MAX_BYTES / 1e6:.0f} MB may lie: train a smaller model."
                )
            file.chmod(0o644)
        for file in unfinished.glob("*.py"):
            file.unlink()
            file.symlink_to(os.path.relpath(CODE / file.name, folder))
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    if folder.exists():
        folder.replace(old)
    unfinished.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="--work of examples/study.py")
    parser.add_argument("--row", default="p4d", help="row of the student (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="its seed (default: %(default)s)")
    parser.add_argument("--evaluation", type=Path, help="folder of examples/run_eval.py for that student, for its card")
    parser.add_argument("--output", type=Path, default=RECORDS, help="the study's records (default: %(default)s)")
    args = parser.parse_args()
    output, trained = args.output, args.work / "models" / f"{args.row}-{args.seed}"
    items = read_study(output / "items.json")
    record = read_study(output / "records" / f"{args.row}-{args.seed}.json")
    before = runs_before(record, output / "records")

    def fill_model(folder: Path, told: dict[str, Any]) -> None:
        for part in (AutoModelForImageTextToText, AutoProcessor):
            part.from_pretrained(trained, trust_remote_code=True).save_pretrained(folder)
        write_card(model_card(told), folder)

    if args.row == "base":
        if not trained.exists():
            raise SystemExit(f"{trained} is not there: make it with {STUDY} --rows base --work {args.work}.")
        told = base_record(record, before, items, "study/base")
        write_whole_folder(output / "base", lambda folder: fill_model(folder, told))
        print(f"{output / 'base'} holds the model, its code and card.")
        return
    if not trained.exists() or "perception" not in record:
        raise SystemExit(f"{trained} is not there or was not tested for what it perceives: choose a row that is.")
    of_teacher = read_study(args.work / "teacher" / TEACHER_RECORD)
    seeds = scores_of_seeds(record, output / "records")
    evaluation = None if args.evaluation is None else evaluation_result(args.evaluation, trained)

    def fill_student(folder: Path) -> None:
        fill_model(folder, student_record(record, before, items, seeds, evaluation, "study/student"))
        PerceptionDecoder.from_pretrained(trained, subfolder=DECODER_FOLDER).save_pretrained(folder / DECODER_FOLDER)

    def fill_teacher(folder: Path) -> None:
        L4PModel.from_pretrained(args.work / "teacher").save_pretrained(folder)
        options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in of_teacher["settings"].items())
        command = f"python {of_teacher['command']} --output-dir runs/study/teacher {options}"
        write_card(teacher_card(of_teacher, "L4P World4D", "study/teacher", command), folder)

    write_whole_folder(output / "student", fill_student)
    write_whole_folder(output / "teacher", fill_teacher)
    print(f"{output / 'student'} and {output / 'teacher'} hold the models, their code and cards.")


if __name__ == "__main__":
    main()
