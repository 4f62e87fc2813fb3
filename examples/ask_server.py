"""Ask a served 4D-RGPT about a video and about marked regions in it, through OpenAI's client. Start examples/serve.py first.

    python examples/ask_server.py --model runs/p4d --video clip.mp4 --region obj_1:225,255,525,560 \
        --question "Which way does <obj_1> move?"
"""

import argparse
import base64
from pathlib import Path

from generate import parse_region


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="http://localhost:8000/v1", help="address (default: %(default)s)")
    parser.add_argument("--model", required=True, help="folder or Hub id, as the server was given it")
    parser.add_argument("--video", type=Path, required=True, help="video file; it is sent to the server")
    parser.add_argument("--question", required=True, help="may name regions: <obj_1>, <obj_2>, ...")
    parser.add_argument("--region", type=parse_region, action="append", default=[], help="name:x1,y1,x2,y2 or name:x,y")
    parser.add_argument(
        "--num-frames", type=int, default=16, help="frames sampled from the video (default: %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer (default: %(default)s)")
    args = parser.parse_args()
    from openai import OpenAI  # of the extra "serve"; here, because --help needs none of it

    video = base64.b64encode(args.video.read_bytes()).decode("ascii")
    content = [
        {
            "type": "video_url",
            "video_url": {"url": f"data:video/mp4;base64,{video}"},
            "regions": args.region,  # in pixels of the first frame
        },
        {"type": "text", "text": args.question},
    ]
    answer = OpenAI(base_url=args.server, api_key="not needed").chat.completions.create(
        model=args.model,
        messages=[{"role": "user", "content": content}],
        max_completion_tokens=args.max_new_tokens,
        temperature=0,
        extra_body={"chat_template_kwargs": {"num_frames": args.num_frames}},
    )
    print(answer.choices[0].message.content.strip())


if __name__ == "__main__":
    main()
