"""Render World4D into a folder that `datasets.load_dataset(folder)` reads.

    python examples/render_world4d.py --size tiny --output world4d-tiny

The same command goes on where an interrupted one stopped.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

from datasets_rgpt4d import CONFIGS, save_world4d


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = "; ".join(f"{config.name}: {config.description}" for config in CONFIGS)
    parser.add_argument(
        "--size", choices=[config.name for config in CONFIGS], default="tiny", help=f"{sizes} (default: tiny)"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write; empty, or one that this command began"
    )
    parser.add_argument(
        "--num-proc", type=int, default=os.cpu_count(), help="processes that render (default: one a core)"
    )
    parser.add_argument("--device", default="cpu", help="where frames are rendered, e.g. cuda (default: cpu)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other clips (default: 0)")
    parser.add_argument("--size-px", type=int, help="side of the videos in pixels, even (default: that of --size)")
    for split in ("train", "validation", "test"):
        parser.add_argument(f"--{split}-clips", type=int, help=f"number of {split} clips (default: that of --size)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    config = next(config for config in CONFIGS if config.name == args.size)
    overrides = {
        name: getattr(args, name)
        for name in ("size_px", "train_clips", "validation_clips", "test_clips")
        if getattr(args, name) is not None
    }
    try:
        config = dataclasses.replace(config, seed=args.seed, device=args.device, **overrides)
        folder = save_world4d(args.output, config, num_proc=args.num_proc, progress=True)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f'Wrote {folder}. Load it with datasets.load_dataset("{folder}").')


if __name__ == "__main__":
    main()
