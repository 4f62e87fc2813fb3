"""TimeBench (arXiv 2512.17012, appendix): how long is the video? Made from any videos, since it was never released."""

from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from hashlib import sha256
from pathlib import PurePosixPath
from typing import Any

from huggingface_hub.utils import tqdm

from modeling_rgpt4d.video_decoding import decode_video

from .multiple_choice import shuffled_options
from .published_dataset import Unusable
from .published_questions import PublishedQuestions
from .schema import evaluation_row
from .source_files import HASH_DIGITS, MissingDataError, SourceFiles

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
# The paper's text says 0.25x to 4x. Its figure A15 prints 59.10 as 4x of 19.70, which is 3x; the text is followed.
MULTIPLES = (0.25, 0.5, 1, 2, 4)
QUESTIONS = {
    "seconds": "How many seconds have passed in the input video?",
    "time": "How much time has passed in the video?",
}


class TimeBenchQuestions(PublishedQuestions):
    """Two questions, one a wording, for each video file in a folder, at any depth; the paper took those of STI-Bench and
    VLM4D, whose rows [`timebench_rows`] turns into the same. `category` is the rate, for example "30 fps".

    Five options: 0.25, 0.5, 1, 2 and 4 times the video's length in seconds, two decimals, in an order that depends on the
    id alone. The length is that of the frames' own times, from the first frame to the end of the last one; one frame of
    each video is decoded to check it. A set made from other videos is not the paper's, whose size and order are not known.
    """

    BENCHMARK = "timebench"
    LICENSE = "that of the videos"
    DESCRIPTION = "Questions about the length of a video, as in TimeBench (arXiv 2512.17012)."
    REMEDY = (
        f"Give location=, a folder with videos ({', '.join(VIDEO_SUFFIXES)}), for example those of STI-Bench and VLM4D."
    )

    @classmethod
    def read(cls, source: SourceFiles) -> Iterator[dict[str, Any] | Unusable]:
        names = [name for name in source.names("**/*") if PurePosixPath(name).suffix.lower() in VIDEO_SUFFIXES]
        if not names:
            raise MissingDataError(f"{source.location} has no videos. {cls.REMEDY}")
        yield from _time_rows([(name, str(source.media(name))) for name in names])


def timebench_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any] | Unusable]:
    """TimeBench from the videos of rows of other benchmarks, each video once.

    Args:
        rows: of `EVALUATION_FEATURES`; a question over several videos or none is passed over.
    Returns: two rows a video, with ids such as "vlm4d/validation_1#seconds" after the first row that shows it, and
        [`Unusable`] for a video that cannot be read.
    """
    videos = {}
    for row in rows:
        if len(row["videos"]) == 1:
            (video,) = row["videos"]
            content = video["bytes"]
            key = video["path"] if content is None else sha256(content).hexdigest()
            videos.setdefault(key, (f"{row['benchmark']}/{row['id']}", dict(video)))
    return list(_time_rows([*videos.values()]))


def _time_rows(videos: list[tuple[str, Any]]) -> Iterator[dict[str, Any] | Unusable]:
    found, unusable = [], []
    for id, video in tqdm(videos, desc="Lengths of videos", unit="video"):
        try:
            decoded = decode_video(video, num_frames=1)
        except ValueError as error:
            unusable.append(Unusable(id, "the video cannot be read", str(error)))
            continue
        # Decimals, half to even: 19.70 s / 4 is 4.92, as in the figure, and not what the last bit of a float makes of it.
        length = Decimal(f"{decoded.duration:.6f}")
        options = [str(round(length * Decimal(multiple), 2)) for multiple in MULTIPLES]
        if len(set(options)) < len(options) or options[0] == "0.00":
            unusable.append(Unusable(id, "the video is too short for five lengths", f"{decoded.duration:.3f} s"))
        else:
            found.append((id, video, options, decoded.total_num_frames / decoded.duration))
    yield from unusable
    # The lengths are what the benchmark consists of; they name it, wherever the files lie.
    lengths = "\n".join(f"{id}\0{options}" for id, _, options, _ in sorted(found, key=lambda one: one[0]))
    revision = f"sha256:{sha256(lengths.encode()).hexdigest()[:HASH_DIGITS]}"
    for id, video, options, fps in found:
        for wording, question in QUESTIONS.items():
            shuffled = shuffled_options(options, f"{id}#{wording}")
            multiple_of = dict(zip(options, MULTIPLES, strict=True))
            yield evaluation_row(
                id=f"{id}#{wording}",
                benchmark=TimeBenchQuestions.BENCHMARK,
                category=f"{fps:.0f} fps",
                revision=revision,
                question=question,
                options=shuffled,
                answer=options[MULTIPLES.index(1)],
                answer_kind="choice",
                videos=[video],
                details={"wording": wording, "multiples": [multiple_of[option] for option in shuffled], "fps": fps},
            )
