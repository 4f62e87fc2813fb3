"""lmms-eval runs 4D-RGPT, and tasks for R4D-Bench, STI-Bench, VLM4D and VSTI-Bench as this project asks and scores them.

See README.md in this folder. Nothing else in the project imports it; it stands on the data sets and the metrics, because a
task is both. lmms-eval finds `manifest` by the entry point group `lmms_eval.models`.
"""

from typing import Any


def manifest() -> Any:
    """The `ModelManifest` of `--model rgpt4d`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="rgpt4d", chat_class_path="metrics_rgpt4d.lmms_eval_plugin.lmms_eval_model.RGPT4DForLmmsEval"
    )
