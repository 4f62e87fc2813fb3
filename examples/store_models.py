"""Put a student of the study and its teacher, with code and cards, where a clone finds them: `study/student`, `study/teacher`.

    python examples/store_models.py --work runs/study --row p4d --seed 0

Cards are filled from the study's records. A student then loads with
`AutoModelForImageTextToText.from_pretrained("study/student", trust_remote_code=True)`, and examples/perceive.py shows what it
perceives with --teacher study/teacher.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText, AutoProcessor

from hub_cards import model_card, teacher_card, write_card
from modeling_rgpt4d import L4PModel, PerceptionDecoder
from modeling_rgpt4d.modeling_l4p import SIGNALS
from trainer import P4DConfig
from trainer.p4d_trainer import DECODER_FOLDER
from trainer.signal_errors import MeanWithInterval

EXAMPLES = Path(__file__).resolve().parent
RECORDS = EXAMPLES.parent / "study"
MAX_BYTES = 25_000_000  # of a file of weights: it lies in the repository
LOSS_SETTINGS = ("distill_latent", "alpha", "beta", "signals", *(f"lambda_{signal}" for signal in SIGNALS))
STUDY = "python examples/study.py"


def read_record(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise SystemExit(f"There is no {file}: run examples/study.py first.")
    return json.loads(file.read_text(encoding="utf-8"))


def student_record(record: dict[str, Any], items: dict[str, Any], repo_id: str) -> dict[str, Any]:
    """What [`hub_cards.model_card`] takes, from a record of the study."""
    settings, perception = record["settings"], record["perception"]["student"]
    losses = P4DConfig("unused", bf16=False, **{name: settings[name] for name in LOSS_SETTINGS if name in settings})
    depth = MeanWithInterval.of(perception["depth_abs_rel"])
    revision = f"tiny, {items['data']['train_clips']:,} training clips, questions {items['sha256'][:12]}"
    return {
        "name": "4D-RGPT World4D",
        "summary": f"A 4D-RGPT of {record['parameters'] / 1e6:.1f} million parameters that answers questions about World4D, "
        "rendered scenes with exact 4D truth: small enough for a laptop, and trained as the study of this project tells. Its "
        f"perception decoder lies beside it in `{DECODER_FOLDER}`: the depth that it perceives has an absolute relative error "
        f"of {depth.mean:.3f} [{depth.low:.3f}, {depth.high:.3f}] (n = {depth.n} test clips).",
        "repo_id": repo_id,
        "num_frames": settings["num_frames"],
        "origins": [{"name": "the teacher", "role": "teacher", "license": "apache-2.0"}],
        "data": [{"name": "World4D train", "id": None, "revision": revision, "license": "apache-2.0"}],
        "training": {
            "command": f"{STUDY} --rows {record['row']} --seeds {record['seed']}",
            "steps": settings["max_steps"],
            "seed": record["seed"],
            "device": record["device"],
            "versions": record["versions"],
            "teacher": "a small L4P trained on World4D's exact truth",
            "losses": {
                "sft": 1.0,
                "latent": losses.alpha if losses.distill_latent else 0.0,
                "explicit": losses.beta,
                "signals": losses.signal_weights,
            },
        },
        "results": [
            {
                "benchmark": "World4D test",
                "dataset_id": "world4d",
                "split": "test",
                "revision": revision,
                "command": f"{STUDY} --rows {record['row']} --seeds {record['seed']}",
                "scores": record["tests"]["test"]["scores"],
            }
        ],
        "overlaps": [
            {
                "train": "World4D train",
                "test": "World4D test",
                "note": "no common scene, and no common combination of shape, colour and motion.",
            }
        ],
        "limits": [
            "Trained on rendered scenes alone; answers about real videos mean nothing.",
            "A reply is the text of an option, or its letter; it was not trained on free-form questions.",
            "The seed was not chosen by its scores.",
        ],
    }


def write_whole_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder and put it in the place of the one that may be there."""
    unfinished, old = (folder.with_name(f".{folder.name}.{what}") for what in ("part", "old"))
    for leftover in (unfinished, old):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir(parents=True)
    fill(unfinished)
    for file in unfinished.rglob("*.safetensors"):
        if file.stat().st_size > MAX_BYTES:
            raise SystemExit(
                f"{file.name} has {file.stat().st_size / 1e6:.1f} MB; in the repository at most {MAX_BYTES / 1e6:.0f} MB "
                "may lie: train a smaller model."
            )
        file.chmod(0o644)
    if folder.exists():
        folder.replace(old)
    unfinished.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="--work of examples/study.py")
    parser.add_argument("--row", default="p4d", help="row of the student (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="its seed (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RECORDS, help="the study's records (default: %(default)s)")
    args = parser.parse_args()
    output, trained = args.output, args.work / "models" / f"{args.row}-{args.seed}"
    items, of_teacher = read_record(output / "items.json"), read_record(args.work / "teacher" / "teacher_errors.json")
    record = read_record(output / "records" / f"{args.row}-{args.seed}.json")
    if not trained.exists() or "perception" not in record:
        raise SystemExit(f"{trained} is not there or was not tested for what it perceives: choose a row that is.")

    def fill_student(folder: Path) -> None:
        for part in (AutoModelForImageTextToText, AutoProcessor):
            part.from_pretrained(trained, trust_remote_code=True).save_pretrained(folder)
        PerceptionDecoder.from_pretrained(trained, subfolder=DECODER_FOLDER).save_pretrained(folder / DECODER_FOLDER)
        write_card(model_card(student_record(record, items, "study/student")), folder)

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
