"""Cards for the Hub, filled from run records, and publishing."""

from hub_cards.cards import (
    dataset_card,
    metric_card,
    metric_record,
    model_card,
    teacher_card,
    training_data_card,
    write_card,
)
from hub_cards.lineage import model_license
from hub_cards.publishing import publish
from hub_cards.training_lineage import LINEAGE, training_overlaps

__all__ = [
    "LINEAGE",
    "dataset_card",
    "metric_card",
    "metric_record",
    "model_card",
    "model_license",
    "publish",
    "teacher_card",
    "training_data_card",
    "training_overlaps",
    "write_card",
]
