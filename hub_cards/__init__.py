"""Cards for the Hub, filled from run records, and publishing."""

from hub_cards.cards import dataset_card, metric_card, model_card, write_card
from hub_cards.lineage import model_license
from hub_cards.publishing import publish

__all__ = ["dataset_card", "metric_card", "model_card", "model_license", "publish", "write_card"]
