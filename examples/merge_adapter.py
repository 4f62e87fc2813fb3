"""Merge a PEFT adapter of a 4D-RGPT into its model: a folder that needs neither peft nor the base model.

python examples/merge_adapter.py --adapter runs/lora --output runs/merged
"""

import argparse
import shutil
from pathlib import Path

from peft import PeftConfig, PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="folder or Hub id of the adapter")
    parser.add_argument("--base", help="folder or Hub id of its model (default: what the adapter names)")
    parser.add_argument("--output", required=True, type=Path, help="folder for the merged model and its processor")
    args = parser.parse_args()
    if args.output.exists():
        raise SystemExit(f"{args.output} exists; remove it or choose another --output.")

    base = args.base or PeftConfig.from_pretrained(args.adapter).base_model_name_or_path
    if not base:
        raise SystemExit(f"{args.adapter} does not name the model it belongs to; give it with --base.")
    model = AutoModelForImageTextToText.from_pretrained(base, trust_remote_code=True)
    merged = PeftModel.from_pretrained(model, args.adapter).merge_and_unload(progressbar=True, safe_merge=True)
    unfinished = args.output.with_name(f".{args.output.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    merged.save_pretrained(unfinished)
    AutoProcessor.from_pretrained(base, trust_remote_code=True).save_pretrained(unfinished)
    unfinished.replace(args.output)
    print(f"{args.output}: {args.adapter} merged into {base}")


if __name__ == "__main__":
    main()
