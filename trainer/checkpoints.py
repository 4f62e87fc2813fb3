"""Finding the checkpoint to go on from."""

import json
import os
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

TRAINER_STATE = "trainer_state.json"

logger = logging.get_logger(__name__)


def last_complete_checkpoint(folder: str | os.PathLike) -> str | None:
    """The newest checkpoint in `folder` that was written to its end; `None` if there is none.

    `transformers.trainer_utils.get_last_checkpoint` also takes one whose writing was cut off by a kill. A checkpoint is whole if
    its `trainer_state.json` is: the Trainer writes it last, after weights, optimizer and random states.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return None
    steps = {
        int(path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")): path
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-").isdecimal()
    }
    for _, path in sorted(steps.items(), reverse=True):
        try:
            json.loads((path / TRAINER_STATE).read_text(encoding="utf-8"))
            return str(path)
        except (OSError, ValueError):
            logger.warning(f"{path} was not written to its end; going on from the checkpoint before it")
    return None
