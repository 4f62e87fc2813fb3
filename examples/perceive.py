"""See what a trained model perceives in a video: depth, optical flow, motion and camera rays.

    python examples/perceive.py --model runs/p4d --video clip.mp4 --region obj_1:225,255,525,560 \
        --question "Which way does <obj_1> move?" --output runs/perceived

The perception decoder that P4D has trained lies beside the model; its latents are read by the heads of the teacher that
it was trained with. --output gets perception.png (everything at a few moments), depth.png, flow.png, motion.png,
camray.png (with the camera's path), perception.mp4 (frames and maps at the times of the frames) and
signals.safetensors (every value).
"""

import argparse
import json
from pathlib import Path

import torch
from generate import add_geometry, parse_region
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_rgpt4d import L4PModel, PerceptionDecoder
from trainer import L4PTeacher, PerceivedVideo, draw_perception, draw_signal, perceive, stitch, write_perception_video
from trainer.distillation_windows import cut
from trainer.p4d_trainer import DECODER_FOLDER
from trainer.perception_pictures import shown_frames
from trainer.signal_errors import camera_centres

SIGNALS_FILE = "signals.safetensors"
# What the arrays of signals.safetensors are; its metadata, so that the file explains itself.
CONVENTIONS = {
    "seconds": "(N,) s after the first frame of the video",
    "depth": "(1, N, H, W) along the optical axis, in the teacher's unit; up to one scale a window for released teachers",
    "flow": "(2, N, H, W) backward: (x, y) of frame t was at (x + u, y + v) in frame t - 1; px of H x W, u right, v down",
    "flow_valid": "(N,) 0 where the window holds no earlier frame: the flow of this frame means nothing",
    "motion": "(1, N, H, W) probability that the point moves in the world",
    "camray": "(6, N, h, w) direction d and moment o x d, in the frame of the window's first camera: x right, y down, "
    "z forward",
    "camera_centres": "(N, 3) o, fitted to the rays of each frame, in the same frame as these",
    "window_starts": "(W,) first frames of the windows; each has its own first camera",
    "teacher.*": "with --compare: the same of the teacher itself",
}


def teacher_of(run: str) -> str:
    """The teacher that `run.json` of examples/train.py names."""
    record = Path(run) / "run.json"
    teacher = json.loads(record.read_text(encoding="utf-8"))["settings"].get("teacher") if record.exists() else None
    if teacher is None:
        raise SystemExit(f"{run} does not tell its teacher: give the one that it was trained with, --teacher FOLDER.")
    return teacher


def load_decoder(run: str) -> PerceptionDecoder:
    try:
        return PerceptionDecoder.from_pretrained(run, subfolder=DECODER_FOLDER)
    except OSError as error:
        raise SystemExit(
            f"{run} has no {DECODER_FOLDER}: it is not there, was not trained with P4D, or was published without it. Take the "
            "folder that P4DTrainer wrote."
        ) from error


def read_video(args: argparse.Namespace, processor, num_frames: int):
    """The model's inputs, with the frames as the teacher sees them, and the video's (height, width)."""
    content = [{"type": "video", "video": args.video, "regions": args.region}]
    if args.question:
        content.append({"type": "text", "text": args.question})
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_frames": num_frames, "return_unmarked": True, "return_metadata": True},
    )
    (source,) = inputs.pop("video_metadata")
    distinct = len(inputs["video_timestamps"][0].unique())
    if distinct < num_frames:
        raise SystemExit(f"{args.video} has {distinct} frames: they cannot be sampled {num_frames} times.")
    return inputs, (source.height, source.width)


def as_probability(signals: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The heads' logits of motion as probabilities."""
    return {name: values.sigmoid() if name == "motion" else values for name, values in signals.items()}


def save_signals(path: Path, video: PerceivedVideo) -> None:
    arrays = {
        "seconds": torch.from_numpy(video.seconds),
        "flow_valid": torch.from_numpy(video.flow_valid).to(torch.uint8),
        "window_starts": torch.tensor(video.window_starts),
    }
    for side, signals in video.sides.items():
        prefix = "" if side == "student" else f"{side}."
        arrays |= {prefix + name: values.contiguous() for name, values in signals.items()}
        arrays[prefix + "camera_centres"] = camera_centres(signals["camray"]).float()
    unfinished = path.with_name(f".{path.name}.part")
    save_file(arrays, unfinished, metadata=CONVENTIONS)
    unfinished.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help=f"folder or Hub id of a model with its {DECODER_FOLDER}")
    parser.add_argument("--video", required=True, help="video file")
    parser.add_argument("--region", type=parse_region, action="append", default=[], help="name:x1,y1,x2,y2 or name:x,y")
    parser.add_argument(
        "--question",
        help="is answered, too; it does not change what is perceived, because the frames stand before it",
    )
    parser.add_argument("--teacher", help="folder or Hub id of the L4P model (default: the one that run.json names)")
    parser.add_argument("--compare", action="store_true", help="show what the teacher itself perceives, too")
    parser.add_argument("--num-frames", type=int, help="frames sampled from the video (default: the teacher's window)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("perception"), help="folder (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of model and teacher (default: as they are stored)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    args = parser.parse_args()

    # What can be wrong is found before the large files are read.
    decoder = load_decoder(args.model)
    folder = args.teacher or teacher_of(args.model)
    try:
        heads = L4PTeacher(L4PModel.from_pretrained(folder, dtype=args.dtype))
    except OSError as error:
        raise SystemExit(
            f"There is no teacher {folder}: give the one that the model was trained with, --teacher."
        ) from error
    heads.check_student(heads.num_frames, decoder.config.latent_shape)
    num_frames = args.num_frames or heads.num_frames
    if num_frames < heads.num_frames:
        raise SystemExit(f"--num-frames is {num_frames}, but the teacher sees {heads.num_frames} frames at once.")
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    inputs, (height, width) = read_video(args, processor, num_frames)

    model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True, dtype=args.dtype)
    model.to(args.device).eval()
    decoder.to(args.device)
    heads.to(args.device)
    inputs = inputs.to(args.device)
    marked, seconds = inputs["pixel_values_videos"], inputs["video_timestamps"][0]
    unmarked = inputs.get("unmarked_pixel_values_videos", marked)
    if getattr(model.config, "geometry_fusion", "none") != "none":
        add_geometry(inputs, heads, processor)
    inputs.pop("unmarked_pixel_values_videos", None)

    windows, signals = perceive(model, decoder, heads, inputs, show_progress=True)
    perceived = {"student": signals}
    if args.compare:
        parts = torch.stack(cut(unmarked, windows, heads.num_frames))
        normalisation = (processor.video_processor.image_mean, processor.video_processor.image_std)
        perceived["teacher"] = heads.perceive(parts, *normalisation).signals
    video = PerceivedVideo(
        frames=shown_frames(marked[0], processor.video_processor),
        seconds=seconds.cpu().numpy(),
        sides={
            side: {name: v.cpu() for name, v in as_probability(stitch(windows, values, [num_frames])[0]).items()}
            for side, values in perceived.items()
        },
        window=heads.num_frames,
        window_starts=[window.first for window in windows],
        aspect_ratio=width / height,
    )
    title = Path(args.video).name
    if args.question:
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        title += f": {args.question} {answer}"
        print(answer)

    draw_perception(args.output / "perception.png", video, title)
    for signal in video.signals:
        draw_signal(args.output / f"{signal}.png", video, signal)
    write_perception_video(args.output / "perception.mp4", video, show_progress=True)
    save_signals(args.output / SIGNALS_FILE, video)
    print(f"Pictures, perception.mp4 and {SIGNALS_FILE} are in {args.output}.")


if __name__ == "__main__":
    main()
