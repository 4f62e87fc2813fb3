"""Ask a 4D-RGPT about a video, and about marked regions in it. Needs transformers, torch, PyAV and the model's folder only.

    python examples/generate.py --model runs/p4d --video clip.mp4 --region obj_1:225,255,525,560 \
        --question "Which way does <obj_1> move?"

The baselines that fuse the teacher's latents (4D-Concat, 4D-PE) also need --teacher, and this project.
"""

import argparse
import json
import time

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor


def parse_region(text: str) -> dict:
    """`obj_1:x1,y1,x2,y2` -> a box, `obj_1:x,y` -> a point, in pixels of the video's frame."""
    name, _, numbers = text.partition(":")
    try:
        values = [float(number) for number in numbers.split(",")]
    except ValueError:
        values = []
    if len(values) not in (2, 4):
        raise argparse.ArgumentTypeError(f"{text!r} should be name:x1,y1,x2,y2 (a box) or name:x,y (a point)")
    return {"name": name, "box" if len(values) == 4 else "point": values}


def load_teacher(model, folder: str | None):
    """The 4D perception model that `model` needs for its input, on its device, or `None` if it needs none."""
    fusion = getattr(model.config, "geometry_fusion", "none")
    if fusion == "none" and folder is not None:
        raise SystemExit(
            "The model does not use a teacher to answer (its geometry_fusion is 'none'): leave out --teacher."
        )
    if fusion == "none":
        return None
    if folder is None:
        raise SystemExit(
            f"The model's geometry_fusion is {fusion!r}: give the teacher that it was trained with, --teacher FOLDER."
        )
    from modeling_rgpt4d import L4PModel
    from trainer import L4PTeacher

    return L4PTeacher(L4PModel.from_pretrained(folder), signals=()).to(model.device)


def add_geometry(inputs, teacher, processor) -> None:
    """Add the teacher's `video_geometry` to what the processor returned with `return_unmarked=True`."""
    # A mark is no part of the scene, and was not shown to the teacher in training
    frames = inputs.pop("unmarked_pixel_values_videos", inputs["pixel_values_videos"])
    if (inputs["video_timestamps"] < 0).any():
        raise SystemExit(f"A video has fewer than the {teacher.num_frames} frames that the teacher sees at once.")
    video_processor = processor.video_processor
    seen = teacher.perceive(frames, image_mean=video_processor.image_mean, image_std=video_processor.image_std)
    inputs["video_geometry"] = seen.latents[:, -1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--video", required=True, help="video file")
    parser.add_argument("--question", required=True, help="may name regions: <obj_1>, <obj_2>, ...")
    parser.add_argument("--region", type=parse_region, action="append", default=[], help="name:x1,y1,x2,y2 or name:x,y")
    parser.add_argument(
        "--num-frames", type=int, default=16, help="frames sampled from the video (default: %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer (default: %(default)s)")
    parser.add_argument(
        "--device-map",
        help='where the weights go, for example "auto": spread over GPUs, memory and disk (needs accelerate)',
    )
    parser.add_argument("--teacher", help="folder or Hub id of the L4P model, for a model that fuses its latents")
    parser.add_argument("--json", action="store_true", help="print a JSON record instead of the answer alone")
    args = parser.parse_args()

    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    if args.device_map is not None:
        model = AutoModelForImageTextToText.from_pretrained(
            args.model, trust_remote_code=True, device_map=args.device_map
        )
    else:
        model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    teacher = load_teacher(model, args.teacher)
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "video", "video": args.video, "regions": args.region},
                {"type": "text", "text": args.question},
            ],
        }
    ]
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_frames": args.num_frames} | ({"return_unmarked": True} if teacher else {}),
    ).to(model.device)
    started = time.perf_counter()
    if teacher is not None:
        add_geometry(inputs, teacher, processor)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    if args.json:
        record = {
            "answer": answer,
            "seconds_to_answer": time.perf_counter() - started,
            "timestamps": inputs["video_timestamps"][0].tolist(),
            "model_class": f"{type(model).__module__}.{type(model).__qualname__}",
        }
        print(json.dumps(record))
    else:
        print(answer)


if __name__ == "__main__":
    main()
