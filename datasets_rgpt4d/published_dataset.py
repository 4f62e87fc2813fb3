"""What the builders of published data sets share: where their files lie, one split, and what happens to unusable rows."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
from datasets import BuilderConfig, DatasetInfo, GeneratorBasedBuilder, Split, SplitGenerator
from datasets.utils.logging import get_logger

from .source_files import SourceFiles

logger = get_logger(__name__)

VERSION = datasets.Version("1.0.0")
EXAMPLES_NAMED = 5


@dataclass
class Unusable:
    """A row of the source that cannot be used, for example because its video is missing."""

    id: str
    reason: str  # a few words that are the same for all rows with this problem, for counting
    detail: str  # what exactly, for example the file's name


class UnusableRowsError(ValueError):
    """Rows cannot be used and are not to be left out, or none would be left; the builder's `unusable` has them all."""


@dataclass
class PublishedConfig(BuilderConfig):
    """Where a published data set lies.

    `location` is a local folder laid out as the authors publish it, or a Hub id (the builder's own by default); `revision`
    a branch, tag or commit there. `media` is a local folder in which the images and videos that the rows name are looked
    for first, where they lie apart from the annotations. `skip_unusable=True` leaves rows out whose media are missing or
    whose answer contradicts their options, and says how many; by default the first few are named in an error.
    """

    location: str | None = None
    revision: str | None = None
    media: str | None = None
    skip_unusable: bool = False


class PublishedDataset(GeneratorBasedBuilder):
    """Base of the builders: `VSTITrain(location="folder").download_and_prepare()`, then `.as_dataset(split="train")`.

    A subclass gives `HUB_ID`, `REMEDY`, `FEATURES`, `SPLIT`, `LICENSE`, and `read`, which yields checked rows and
    [`Unusable`]. Building reads annotations only: media are paths, never decoded. After a build, `unusable` has what was
    left out.
    """

    VERSION = VERSION
    BUILDER_CONFIG_CLASS = PublishedConfig
    HUB_ID: ClassVar[str | None] = None
    REMEDY: ClassVar[str]
    FEATURES: ClassVar[datasets.Features]
    SPLIT: ClassVar[Split]
    LICENSE: ClassVar[str]
    DESCRIPTION: ClassVar[str] = ""

    @classmethod
    def source(cls, location: str | None = None, revision: str | None = None, media: str | None = None) -> SourceFiles:
        if location is None and cls.HUB_ID is None:
            raise ValueError(f"{cls.__name__} is on no Hub: give location=, the folder with its files. {cls.REMEDY}")
        return SourceFiles(location or cls.HUB_ID, cls.REMEDY, revision, media)

    @classmethod
    @abstractmethod
    def read(cls, source: SourceFiles) -> Iterator[dict[str, Any] | Unusable]:
        """Checked rows of `FEATURES`, and what cannot be used."""

    def _info(self) -> DatasetInfo:
        return DatasetInfo(description=self.DESCRIPTION, features=self.FEATURES, license=self.LICENSE)

    def _create_builder_config(self, config_name=None, custom_features=None, **config_kwargs):
        config, config_id = super()._create_builder_config(config_name, custom_features, **config_kwargs)
        source = self.source(config.location, config.revision, config.media)
        if source.folder is None:
            config.revision = source.commit  # a branch may move before the rows are read
        # `datasets` caches by module and configuration alone, and would give the rows of what lay in this folder before, or
        # of another builder of the same module.
        return config, f"{config_id}-{type(self).__name__}-{source.fingerprint}"

    def _split_generators(self, dl_manager):
        return [SplitGenerator(name=self.SPLIT)]

    def _generate_examples(self):
        self.unusable: list[Unusable] = []
        seen = set()
        for row in self.read(self.source(self.config.location, self.config.revision, self.config.media)):
            if isinstance(row, Unusable):
                self.unusable.append(row)
            elif row["id"] in seen:
                raise ValueError(f"{type(self).__name__}: the id {row['id']} comes twice.")
            else:
                seen.add(row["id"])
                yield row["id"], row
        if self.unusable and self.config.skip_unusable and seen:
            reasons = Counter(one.reason for one in self.unusable).most_common()
            logger.warning(
                f"{type(self).__name__}: left out {len(self.unusable)} of {len(self.unusable) + len(seen)} rows: "
                + "; ".join(f"{reason} ({count})" for reason, count in reasons)
            )
        elif self.unusable:  # without any row `datasets` would build, and fail when the split is read
            shown = "; ".join(f"{one.id}: {one.reason} ({one.detail})" for one in self.unusable[:EXAMPLES_NAMED])
            raise UnusableRowsError(
                f"{type(self).__name__}: {len(self.unusable)} of {len(self.unusable) + len(seen)} rows are unusable, for "
                f"example {shown}. {self.REMEDY} Or leave them out with skip_unusable=True."
            )
