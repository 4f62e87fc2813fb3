"""Score a model on World4D's multiple-choice questions with the R4D-Bench metric.

    python examples/run_eval.py --model runs/p4d --data runs/world4d --output runs/p4d-eval

Every answer is written as it comes (answers.jsonl), so an interrupted run goes on where it stopped. scores.json holds the
scores with n and 95 % intervals.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from datasets import load_dataset
from generate import add_geometry, load_teacher
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from datasets_rgpt4d import to_messages
from metrics_rgpt4d import R4DBench


def read_answers(path: Path) -> dict[str, dict]:
    """Finished answers by question id. A last line that was cut off by an interruption is taken away from the file."""
    if not path.exists():
        return {}
    lines = path.read_text().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    if whole != lines:
        unfinished = path.with_suffix(".part")
        unfinished.write_text("".join(whole))
        unfinished.replace(path)
    records = [json.loads(line) for line in whole]
    return {record["id"]: record for record in records}


@torch.no_grad()
def answer(model, processor, teacher, rows: list[dict], num_frames: int, max_new_tokens: int) -> list[str]:
    """Greedy replies to the questions of `rows`, one batch. `teacher` is `None`, or what a model with fusion needs."""
    options = {"num_frames": num_frames, "padding": True, "padding_side": "left"}
    inputs = processor.apply_chat_template(
        [to_messages(row, with_answer=False) for row in rows],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=options | ({"return_unmarked": True} if teacher else {}),
    ).to(model.device)
    if teacher is not None:
        add_geometry(inputs, teacher, processor)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    replies = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [reply.strip() for reply in replies]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--data", required=True, help="folder of a World4D data set (examples/render_world4d.py)")
    parser.add_argument("--split", default="test", help="split to answer (default: %(default)s)")
    parser.add_argument("--output", required=True, type=Path, help="folder for answers.jsonl and scores.json")
    parser.add_argument(
        "--num-frames", type=int, default=8, help="frames sampled from each video (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="questions at once (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="longest reply (default: %(default)s)")
    parser.add_argument("--teacher", help="folder or Hub id of the L4P model, for a model that fuses its latents")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True).to(device).eval()
    teacher = load_teacher(model, args.teacher)
    dataset = load_dataset(args.data, split=args.split)

    args.output.mkdir(parents=True, exist_ok=True)
    settings = {key: getattr(args, key) for key in ("model", "data", "split", "num_frames", "max_new_tokens")}
    if teacher is not None:
        settings["teacher"] = args.teacher
    settings_file = args.output / "settings.json"
    if settings_file.exists() and json.loads(settings_file.read_text()) != settings:
        raise SystemExit(f"{args.output} holds answers from other settings; choose another --output.")
    settings_file.write_text(json.dumps(settings))
    answers_file = args.output / "answers.jsonl"
    done = read_answers(answers_file)
    waiting = [index for index, id_ in enumerate(dataset["id"]) if id_ not in done]
    with answers_file.open("a") as file, tqdm(total=len(dataset), initial=len(done), unit="question") as progress:
        for start in range(0, len(waiting), args.batch_size):
            rows = [dataset[index] for index in waiting[start : start + args.batch_size]]
            replies = answer(model, processor, teacher, rows, args.num_frames, args.max_new_tokens)
            for row, reply in zip(rows, replies, strict=True):
                record = {key: row[key] for key in ("id", "task", "question", "options", "answer")} | {"reply": reply}
                file.write(json.dumps(record) + "\n")
                done[row["id"]] = record
            file.flush()
            os.fsync(file.fileno())
            progress.update(len(rows))

    records = [done[id_] for id_ in dataset["id"]]
    references = [{key: record[key] for key in ("id", "task", "options", "answer")} for record in records]
    metric = R4DBench(keep_in_memory=True)
    replies = [record["reply"] for record in records]
    scores = metric.compute(predictions=replies, references=references, return_items=True)
    unfinished = args.output / "scores.part"
    unfinished.write_text(json.dumps(scores, indent=1))
    unfinished.replace(args.output / "scores.json")
    columns = {
        **{column: scores[column] for column in scores["n"]},
        **{k: v["accuracy"] for k, v in scores["other"].items()},
    }
    print("  ".join(f"{column} {value:.1f}" for column, value in columns.items() if value is not None))
    print(f"n = {scores['n']['Avg']}, {scores['unparsable']} unparsable; the rest is in {args.output / 'scores.json'}")


if __name__ == "__main__":
    main()
