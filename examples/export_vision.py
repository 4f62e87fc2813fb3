"""Export the vision tower and projector of a 4D-RGPT by torch.export: frames and their seconds to language-model tokens.

    python examples/export_vision.py --model runs/p4d --output vision.pt2

torch.export.load("vision.pt2").module()(frames, seconds) takes `frames` (num_frames, 3, image_size, image_size), normalised
as the processor does it, and `seconds` (num_frames,) float32, any number of frames; it gives (num_frames, g * g, D).
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForImageTextToText


class FrameEncoder(nn.Module):
    """What `get_video_features` does with the frames of one video: E_P(E_V(I) + p)."""

    def __init__(self, model):
        super().__init__()
        self.model = model.base_model.eval()
        del self.model.language_model  # its weights do not belong into the exported file

    def forward(self, frames: torch.Tensor, seconds: torch.Tensor) -> torch.Tensor:
        _, features = self.model._encode_frames(frames, seconds, None)
        return self.model._project(features)


@torch.no_grad()
def export_vision(model) -> torch.export.ExportedProgram:
    """The program of the vision part of `model`, which loses its language model by it.

    Raises: `ValueError` if the model fuses a teacher's latents, which would be a third input.
    """
    fusion = getattr(model.config, "geometry_fusion", "none")
    if fusion != "none":
        raise ValueError(
            f"the model's geometry_fusion is {fusion!r}: its tokens need the teacher's latents of each "
            "video, and the exported program has no such input. Export a model with geometry_fusion='none'"
        )
    size, num_frames = model.config.image_size, 2
    frames = torch.zeros(num_frames, 3, size, size, dtype=model.dtype, device=model.device)
    seconds = torch.arange(num_frames, dtype=torch.float32, device=model.device)
    any_number = {0: torch.export.Dim("num_frames", min=1)}
    return torch.export.export(FrameEncoder(model).eval(), (frames, seconds), dynamic_shapes=(any_number, any_number))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--output", required=True, type=Path, help="file to write, *.pt2")
    parser.add_argument("--dtype", default="float32", help="of the exported weights (default: %(default)s)")
    args = parser.parse_args()
    if args.output.suffix != ".pt2":
        raise SystemExit(f"--output must end with .pt2, got {args.output}")

    model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True, dtype=args.dtype)
    program = export_vision(model)
    unfinished = args.output.with_name(f".{args.output.stem}.part.pt2")
    torch.export.save(program, unfinished)
    unfinished.replace(args.output)
    megabytes = args.output.stat().st_size / 2**20
    print(f"{args.output}: {megabytes:.1f} MiB, frames of {model.config.image_size} px, any number of them")


if __name__ == "__main__":
    main()
