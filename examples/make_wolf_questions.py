"""Make question/answer pairs from captions of driving clips, for `WolfQA`, with a model or by rules.

    python examples/make_wolf_questions.py --captions captions.jsonl --output wolf --rules
    python examples/make_wolf_questions.py --captions captions.jsonl --output wolf --model meta-llama/Llama-3.1-70B-Instruct
    python examples/make_wolf_questions.py --captions captions.jsonl --output wolf --model served-name \
        --base-url http://localhost:8000/v1

Captions are lines {"clip_id", "video", "caption"}. The folder gets wolf_qa.jsonl, rejected.jsonl and report.json; a run
that was interrupted goes on when it is started again. The prompt is our own: the result is not the paper's data.
"""

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--captions", type=Path, required=True, help="JSONL of clip_id, video and caption")
    parser.add_argument("--output", type=Path, required=True, help="folder for the pairs")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--model", help="instruction model: folder or Hub id, or what the endpoint calls it")
    how.add_argument("--rules", action="store_true", help="by patterns, without a model")
    parser.add_argument("--base-url", help="OpenAI-compatible endpoint; its key is in OPENAI_API_KEY")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at once (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=8, help="clips at once of a local model (default: %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest reply (default: %(default)s)")
    args = parser.parse_args()
    if args.base_url and not args.model:
        parser.error("--base-url needs --model")
    if min(args.concurrency, args.batch_size, args.max_new_tokens) < 1:
        parser.error("--concurrency, --batch-size and --max-new-tokens must be at least 1")
    # Here, because --help needs none of it.
    from datasets_rgpt4d.wolf_questions import Endpoint, LocalModel, make_wolf_questions

    try:
        if args.rules:
            replies = None
        elif args.base_url:
            replies = Endpoint(args.base_url, args.model, args.concurrency, max_new_tokens=args.max_new_tokens)
        else:
            replies = LocalModel(args.model, args.batch_size, args.max_new_tokens)
        report = make_wolf_questions(args.captions, args.output, replies, progress=True)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    print(json.dumps(report, indent=1, ensure_ascii=False))
    if report["failed"]:
        raise SystemExit(f"{len(report['failed'])} clips got no reply; start the same command again to ask for them.")


if __name__ == "__main__":
    main()
