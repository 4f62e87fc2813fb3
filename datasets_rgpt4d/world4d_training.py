"""World4D's training questions as rows of the schema that all training data have."""

from collections.abc import Iterator
from typing import Any

import pyarrow.parquet as pq
from datasets import Split

from .multiple_choice import to_messages
from .published_dataset import PublishedDataset, Unusable
from .schema import TRAINING_FEATURES, training_row
from .source_files import SourceFiles
from .world4d import DESCRIPTION, FEATURES

ROWS_AT_ONCE = 64


class World4DTraining(PublishedDataset):
    """The train split of a folder written by `save_world4d`, or of its copy on the Hub.

    The scene, and with it the exact signals, stays behind: to distil those, train on World4D itself.
    """

    REMEDY = "Render it with examples/render_world4d.py."
    FEATURES = TRAINING_FEATURES
    SPLIT = Split.TRAIN
    LICENSE = "apache-2.0"
    DESCRIPTION = DESCRIPTION

    @classmethod
    def read(cls, source: SourceFiles) -> Iterator[dict[str, Any] | Unusable]:
        source.annotations("world4d.json")  # all that a row depends on
        revision = source.revision
        names = source.names("data/train-*.parquet")
        columns = [name for name in FEATURES if name not in ("video", "scene")]
        # A folder has the clips as files, too: paths instead of ten copies of the bytes
        has_files = bool(source.names("videos/train/*.mp4"))
        for name in names:
            file = pq.ParquetFile(source.media(name))
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns if has_files else [*columns, "video"]):
                for row in batch.to_pylist():
                    path = source.media(f"videos/train/{row['source']}") if has_files else None
                    if has_files and path is None:
                        yield Unusable(row["id"], "the video is missing", f"videos/train/{row['source']}")
                        continue
                    yield world4d_training_row(row, revision, str(path) if has_files else row["video"])


def world4d_training_row(row: dict[str, Any], revision: str, video: str | dict[str, Any]) -> dict[str, Any]:
    """A question of World4D as a row of `TRAINING_FEATURES`. `video` is its path, or a dict with `path` and `bytes`."""
    user, answer = to_messages({**row, "video": video})
    return training_row(
        id=row["id"],
        source="world4d",
        subset=row["task"],
        revision=revision,
        messages=[{"role": "user", "content": [{"type": "video"}, user["content"][1]]}, answer],
        videos=[video],
        regions=[{"video": 0, **region} for region in row["regions"]],
    )
