"""Export a trained model with its card, ready for the Hub, and upload it if a repository is named.

    python examples/publish.py --run runs/p4d --evaluation runs/p4d-eval --from-scratch --name small-4d-rgpt \
        --output runs/small-4d-rgpt

The folder then loads with `AutoModelForImageTextToText.from_pretrained(..., trust_remote_code=True)`. What the card says
is read from the records of the run and of the evaluation.

A metric becomes a Space, which `evaluate.load("user/name")` takes, with a card filled from its own documentation:

    python examples/publish.py --metric metrics_rgpt4d/depth_flow --output runs/depth_flow --repo-id user/depth_flow

With --metric alone, the card in the metric's folder is brought up to date.
"""

import argparse
import json
import shutil
from pathlib import Path

import evaluate
from transformers import AutoModelForImageTextToText, AutoProcessor

from hub_cards import metric_card, metric_record, model_card, publish, write_card


def parse_origin(text: str) -> dict:
    """`NAME,LICENSE` of the weights that a run started from."""
    name, _, license = text.rpartition(",")
    if not name or not license:
        raise argparse.ArgumentTypeError(f"{text!r} should be NAME,LICENSE, for example nvidia/4D-RGPT-8B,cc-by-nc-4.0")
    return {"name": name, "role": "initial weights", "license": license}


def read_record(folder: Path, name: str, made_by: str) -> dict:
    file = folder / name
    if not file.exists():
        raise SystemExit(f"There is no {file}; make it with {made_by}.")
    return json.loads(file.read_text())


def evaluation_result(folder: Path, model: Path, revision: str | None = None) -> dict:
    """The World4D scores that examples/run_eval.py wrote to `folder`, as a result of a card.

    `revision` says which World4D; by default it is the hash that the evaluation recorded.
    """
    scores = read_record(folder, "scores.json", "examples/run_eval.py")
    settings = read_record(folder, "settings.json", "examples/run_eval.py")
    if Path(settings["model"]).resolve() != model.resolve():
        raise SystemExit(f"{folder} evaluated {settings['model']}, not {model}.")
    if "world4d" not in scores:
        raise SystemExit(f"{folder} has no scores of World4D, only of {', '.join(scores)}.")
    return {
        "benchmark": "World4D test",
        "dataset_id": "world4d",
        "split": "test",
        "revision": revision or ", ".join(settings["benchmarks"]["world4d"]["revisions"]),
        "command": f"python examples/run_eval.py --model {settings['model']} --benchmarks world4d --world4d "
        f"{settings['benchmarks']['world4d']['location']} --num-frames {settings['num_frames']} "
        f"--max-new-tokens {settings['generation']['max_new_tokens']}",
        "scores": scores["world4d"],
    }


def overlaps_of(data: list[dict], results: list[dict]) -> list[dict]:
    """What training sets of World4D and its test split have in common."""
    note = "no common scene, and no common combination of shape, colour and motion."
    tests = dict.fromkeys(result["benchmark"] for result in results)
    return [{"train": one["name"], "test": test, "note": note} for one in data for test in tests]


def card_record(args: argparse.Namespace) -> dict:
    run = read_record(args.run, "run.json", "examples/train.py")
    world4d = read_record(Path(run["settings"]["data"]), "world4d.json", "examples/render_world4d.py")
    revision = f"{world4d['name']}, version {world4d['version']}, seed {world4d['seed']}"
    weights = run["distillation"] or {}
    origins = [] if args.from_scratch else list(args.origin)
    if run["settings"]["teacher"] is not None:
        origins.append({"name": "the teacher", "role": "teacher", "license": args.teacher_license})
    data = [{"name": "World4D train", "id": None, "revision": revision, "license": "apache-2.0"}]
    results = [evaluation_result(args.evaluation, args.run, revision)]
    return {
        "name": args.name,
        "summary": "A 4D-RGPT trained on World4D, rendered scenes with exact 4D truth.",
        "repo_id": args.repo_id or args.name,
        "num_frames": run["settings"]["num_frames"],
        "origins": origins,
        "data": data,
        "training": {
            "command": run["command"],
            "steps": run["steps"],
            "seed": run["settings"]["seed"],
            "device": run["device"],
            "versions": run["versions"],
            "teacher": run["settings"]["teacher"] and "a small L4P trained on World4D's exact truth",
            "losses": {
                "sft": 1.0,
                "latent": weights.get("alpha", 0.0),
                "explicit": weights.get("beta", 0.0),
                "signals": {name: value for name, value in weights.items() if name not in ("alpha", "beta")},
            },
        },
        "results": results,
        "perception": run["perception"],
        "overlaps": overlaps_of(data, results),
        "limits": [
            "Trained on rendered scenes alone; answers about real videos mean nothing yet.",
            "A reply is the text of an option; it was not trained on free-form questions.",
        ],
    }


def export_metric(folder: Path, output: Path | None, repo_id: str | None) -> None:
    """Write the metric with its card into `output`, whole or not at all; without it, the card into `folder`."""
    folder = folder.resolve()
    if not (folder / f"{folder.name}.py").is_file():
        raise SystemExit(f"{folder} is no metric: it holds no {folder.name}.py.")
    load = repo_id or "/".join(folder.parts[-2:])
    card = metric_card(metric_record(evaluate.load(str(folder)), folder, load))
    if output is None:
        print(f"{write_card(card, folder)} is up to date.")
        return
    unfinished = output.with_name(f".{output.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    # Files that are shared with other metrics are links in the folder; a Space gets their content.
    shutil.copytree(folder, unfinished, ignore=shutil.ignore_patterns("__pycache__"))
    write_card(card, unfinished)
    unfinished.replace(output)
    print(f"{output} holds the metric and its card.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of examples/train.py")
    parser.add_argument("--evaluation", type=Path, help="folder of examples/run_eval.py for that run")
    parser.add_argument("--output", type=Path, help="folder to write; must not exist")
    parser.add_argument("--name", help="what the model is called")
    parser.add_argument("--metric", type=Path, help="folder of a metric, to publish it instead of a model")
    initial = parser.add_mutually_exclusive_group()
    initial.add_argument("--from-scratch", action="store_true", help="the run started from random weights")
    initial.add_argument(
        "--origin", type=parse_origin, action="append", help="NAME,LICENSE of the weights that the run started from"
    )
    parser.add_argument(
        "--teacher-license", default="apache-2.0", help="license of the teacher's weights (default: %(default)s)"
    )
    parser.add_argument("--repo-id", help="upload to this Hub repository, user/name")
    parser.add_argument("--public", action="store_true", help="make the repository public (default: private)")
    args = parser.parse_args()
    of_model = {"--run": args.run, "--evaluation": args.evaluation, "--name": args.name}
    of_model["--from-scratch or --origin"] = args.from_scratch or args.origin
    if args.metric is not None:
        if any(of_model.values()):
            parser.error(f"--metric goes without {', '.join(of_model)}")
        if args.repo_id and args.output is None:
            parser.error("--repo-id needs --output, the folder that is uploaded")
    else:
        missing = [name for name, value in {**of_model, "--output": args.output}.items() if not value]
        if missing:
            parser.error(f"a model needs {', '.join(missing)}")
    if args.output is not None and args.output.exists():
        raise SystemExit(f"{args.output} exists; remove it or choose another --output.")
    if args.metric is not None:
        export_metric(args.metric, args.output, args.repo_id)
        if args.repo_id:
            print(publish(args.output, args.repo_id, private=not args.public, repo_type="space"))
        return

    card = model_card(card_record(args))
    unfinished = args.output.with_name(f".{args.output.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    AutoModelForImageTextToText.from_pretrained(args.run, trust_remote_code=True).save_pretrained(unfinished)
    AutoProcessor.from_pretrained(args.run, trust_remote_code=True).save_pretrained(unfinished)
    write_card(card, unfinished)
    unfinished.replace(args.output)
    print(f"{args.output} holds the model, its processor, their code and the card.")
    if args.repo_id:
        print(publish(args.output, args.repo_id, private=not args.public))


if __name__ == "__main__":
    main()
