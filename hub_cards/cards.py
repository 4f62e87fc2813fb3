"""Model, dataset and metric cards from run records. A card says what the record says: a missing field is an error."""

import os
import sys
import tempfile
from pathlib import Path

from huggingface_hub import (
    DatasetCard,
    DatasetCardData,
    EvalResult,
    ModelCard,
    ModelCardData,
    RepoCard,
    SpaceCard,
    SpaceCardData,
)
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hub_cards.lineage import NON_COMMERCIAL, data_license, model_license

SIZE_CATEGORIES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))

MODEL_FIELDS = (
    "name summary repo_id num_frames origins data results overlaps limits "
    "training.command training.steps training.seed training.device training.versions training.teacher "
    "training.losses.sft training.losses.latent training.losses.explicit training.losses.signals"
).split()
ORIGIN_FIELDS = ("name", "role", "license")
DATA_FIELDS = ("name", "id", "revision", "license")
RESULT_FIELDS = ("benchmark", "dataset_id", "split", "revision", "command", "scores")
OVERLAP_FIELDS = ("train", "test", "note")
DATASET_FIELDS = "name repo_id summary license revision command seed versions splits tasks columns limits".split()
SPLIT_FIELDS = ("name", "num_questions", "num_videos", "data_files")
TRAINING_DATA_FIELDS = (
    "name repo_id summary sources overlaps statistics embedded mixture command versions columns"
).split()
SOURCE_FIELDS = "name id revision license lineage read not_chosen unusable rows data_files".split()
TEACHER_FIELDS = (
    "parameters clips_shown training_seconds device versions evaluated_on errors "
    "settings.world4d settings.steps settings.seed settings.num_frames settings.image_size"
).split()
METRIC_FIELDS = "title look text summary load inputs arguments interval_method columns citation".split()
# Where the text of a metric's README.md ends.
GENERATED = "<!-- From here on hub_cards.metric_card writes what the metric says of itself; edit it there. -->"


def _cell(value) -> str:
    """A value inside a Markdown table: one line, no bar."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _interval(value: list[float] | None) -> str:
    return "-" if value is None else f"{value[0]:.1f} to {value[1]:.1f}"


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters |= {"cell": _cell, "percent": _percent, "interval": _interval}


def _require(record: dict, fields, where: str) -> None:
    """Raises a `ValueError` that names the first field ("training.steps") that `record` lacks."""
    for field in fields:
        value = record
        for key in field.split("."):
            if not isinstance(value, dict) or key not in value:
                raise ValueError(
                    f"{where} lacks {field!r}; a card is filled from what was recorded and invents nothing"
                )
            value = value[key]


def _card(kind: type[RepoCard], data, template: str, **fields) -> RepoCard:
    body = _TEMPLATES.get_template(template).render(**fields)
    return kind(f"---\n{data.to_yaml()}\n---\n\n{body}", ignore_metadata_errors=False)


def _evaluations(result: dict) -> list[EvalResult]:
    """Entries of the model index: Avg under both scorings and every other task, with n and interval in the name."""
    scores = result["scores"]
    entries = []

    def add(what: str, value: float | None, n: int, interval: list[float] | None) -> None:
        if value is not None:
            entries.append(
                EvalResult(
                    task_type="video-text-to-text",
                    dataset_type=result["dataset_id"],
                    dataset_name=result["benchmark"],
                    dataset_split=result["split"],
                    dataset_revision=result["revision"],
                    metric_type="accuracy",
                    metric_name=f"{what}, n = {n}, 95 % interval {_interval(interval)}",
                    metric_value=round(value, 2),
                )
            )

    for scoring in ("letter_or_value", "letter"):
        block = scores[scoring]
        add(f"Avg ({scoring})", block["accuracy"]["Avg"], scores["n"]["Avg"], block["interval"]["Avg"])
    for task, tally in scores["other"].items():
        add(f"{task} ({scores['scoring']})", tally["accuracy"], tally["n"], tally["interval"])
    return entries


def model_card(run: dict) -> ModelCard:
    """The card of a trained model.

    Args:
        run (`dict`): what was recorded of the run:
            `name`, `summary` (one sentence), `repo_id`, `num_frames` (of the example);
            `origins`: weights that these ones descend from, `{"name", "role", "license"}`, the role `"initial weights"`
                or `"teacher"`; empty if trained from scratch. The card's license follows from them ([`model_license`]);
            `data`: training sets, `{"name", "id": Hub id or None, "revision", "license"}`;
            `training`: `{"command", "steps", "seed", "device", "versions": {package: version}, "teacher": str or None,
                "losses": {"sft", "latent" (alpha), "explicit" (beta), "signals": {signal: lambda}}}`;
            `results`: `{"benchmark", "dataset_id", "split", "revision", "command", "scores"}`, scores as `R4DBench`
                returns them;
            `overlaps`: `{"train", "test", "note"}` for every pair of a training set and a benchmark;
            `limits`: sentences;
            `perception` (may be left out, or None): errors of the signals that the model perceives, `{"student": {error:
                {"mean", "low", "high", "n"}}, "teacher": the same}`.
    Returns: [`~huggingface_hub.ModelCard`].
    Raises: `ValueError` naming a field that is missing, a pair of sets without a word on overlap, or an unknown
        license.
    """
    _require(run, MODEL_FIELDS, "the run record")
    parts = (
        ("origins", ORIGIN_FIELDS),
        ("data", DATA_FIELDS),
        ("results", RESULT_FIELDS),
        ("overlaps", OVERLAP_FIELDS),
    )
    for part, fields in parts:
        for position, entry in enumerate(run[part]):
            _require(entry, fields, f"{part}[{position}] of the run record")
    covered = {(overlap["train"], overlap["test"]) for overlap in run["overlaps"]}
    for trained in run["data"]:
        for result in run["results"]:
            if (trained["name"], result["benchmark"]) not in covered:
                raise ValueError(
                    f"the run record's 'overlaps' says nothing of {trained['name']} (training) and "
                    f"{result['benchmark']} (test); say which videos or questions they share, or that none are"
                )
    license = model_license(run["origins"])
    evaluations = [entry for result in run["results"] for entry in _evaluations(result)]
    base_models = [origin["name"] for origin in run["origins"] if origin["role"] == "initial weights"]
    data = ModelCardData(
        model_name=run["name"],
        license=license,
        library_name="transformers",
        pipeline_tag="video-text-to-text",
        tags=["custom_code", "rgpt4d"],
        base_model=base_models or None,
        datasets=[entry["id"] for entry in run["data"] if entry["id"] is not None] or None,
        eval_results=evaluations or None,
    )
    return _card(ModelCard, data, "model_card.md", run=run, license=license, non_commercial=license in NON_COMMERCIAL)


def teacher_card(record: dict, name: str, repo_id: str, command: str) -> ModelCard:
    """The card of a small L4P that examples/train_teacher.py trained on World4D.

    Args:
        record (`dict`): what that script wrote to `teacher_errors.json`.
        name, repo_id, command (`str`): what the model is called, where it is loaded from, and how it was trained.
    Returns: [`~huggingface_hub.ModelCard`].
    Raises: `ValueError` naming a field that is missing.
    """
    _require(record, TEACHER_FIELDS, "the teacher's record")
    data = ModelCardData(
        model_name=name,
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="depth-estimation",
        tags=["custom_code", "rgpt4d", "optical-flow", "video"],
    )
    return _card(ModelCard, data, "teacher_card.md", record=record, name=name, repo_id=repo_id, command=command)


def dataset_card(record: dict) -> DatasetCard:
    """The card of a rendered World4D data set.

    Args:
        record (`dict`): `name`, `repo_id`, `summary`, `license` (Hub id), `revision` (of the code that rendered it),
            `command`, `seed`, `versions` ({package: version}), `splits` (`{"name", "num_questions", "num_videos",
            "data_files"}`, the last a pattern inside the repository), `tasks` ({task: number of questions}),
            `columns` ({name: meaning}), `limits` (sentences).
    Returns: [`~huggingface_hub.DatasetCard`].
    Raises: `ValueError` naming a field that is missing, or if tasks and splits count different questions.
    """
    _require(record, DATASET_FIELDS, "the data set's record")
    for position, split in enumerate(record["splits"]):
        _require(split, SPLIT_FIELDS, f"splits[{position}] of the data set's record")
    total = sum(split["num_questions"] for split in record["splits"])
    if sum(record["tasks"].values()) != total:
        raise ValueError(f"the splits hold {total} questions, but 'tasks' counts {sum(record['tasks'].values())}")
    data = DatasetCardData(
        pretty_name=record["name"],
        license=record["license"],
        task_categories=["visual-question-answering", "video-text-to-text"],
        size_categories=next((name for limit, name in SIZE_CATEGORIES if total < limit), "n>1M"),
        tags=["rgpt4d", "synthetic", "video", "4d"],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": s["name"], "path": s["data_files"]} for s in record["splits"]],
            }
        ],
    )
    return _card(DatasetCard, data, "dataset_card.md", record=record, total=total)


def metric_record(metric, folder: str | Path, load: str) -> dict:
    """What a metric says of itself, for [`metric_card`].

    Inputs, outputs, description and citation are those of the metric's `info`; the method of its intervals and the
    meaning of its columns are `INTERVAL_METHOD` and, if it has columns, `CATEGORIES` ({column: what}) of its module.
    Title, colours and the text, which only a person can write, stand in the folder's README.md.

    Args:
        metric (`evaluate.EvaluationModule`): of `evaluate.load(folder)`, or of its class.
        folder (`str` or `Path`): the metric's folder.
        load (`str`): what `evaluate.load` shall take in the card: a folder or the id of a Space.
    Raises: `ValueError` if the folder has no README.md with a title, or the module no `INTERVAL_METHOD`.
    """
    file = Path(folder) / "README.md"
    if not file.is_file():
        raise ValueError(f"{folder} has no README.md; write one with a title in its front matter, and what to know")
    card = RepoCard.load(file, ignore_metadata_errors=True)
    title = card.data.get("title")
    if not title:
        raise ValueError(f"{file} has no title in its front matter")
    module = sys.modules[type(metric).__module__]
    if not hasattr(module, "INTERVAL_METHOD"):
        raise ValueError(f"{module.__name__} has no INTERVAL_METHOD; a card says how sure the numbers are")
    return {
        "title": title,
        "look": {key: card.data.get(key) for key in ("emoji", "colorFrom", "colorTo") if card.data.get(key)},
        "text": card.text.split(GENERATED)[0].strip().removeprefix(f"# {title}").strip(),
        "summary": " ".join(metric.description.split()),
        "load": load,
        "inputs": list(metric.features),
        "arguments": metric.inputs_description,
        "interval_method": module.INTERVAL_METHOD,
        "columns": getattr(module, "CATEGORIES", {}),
        "citation": metric.citation,
    }


def training_data_card(record: dict) -> DatasetCard:
    """The card of training data that examples/prepare_data.py put together.

    Args:
        record (`dict`): `name`, `repo_id`, `summary`, `command`, `versions` ({package: version}), `columns` ({name: meaning}),
            `mixture` (its YAML), `statistics` (a table in Markdown), `embedded` (whether rows hold the media's bytes);
            `sources`: `{"name", "id" (Hub id, or words), "revision", "license" (Hub id, or words), "lineage" (a sentence),
            "read", "not_chosen", "rows" (numbers of rows), "unusable" ({reason: count}), "data_files" (list of paths)}`;
            `overlaps`: `{"train", "test", "note"}` for every source and each of one or more benchmarks.
    Returns: [`~huggingface_hub.DatasetCard`]; its license is the strictest of the sources', or "other" if one of them is
        none that the Hub has an id for. The configuration "default" has all sources, others one source each.
    Raises: `ValueError` naming a field that is missing, or a source without a word on overlap.
    """
    _require(record, TRAINING_DATA_FIELDS, "the training data's record")
    for part, fields in (("sources", SOURCE_FIELDS), ("overlaps", OVERLAP_FIELDS)):
        for position, entry in enumerate(record[part]):
            _require(entry, fields, f"{part}[{position}] of the training data's record")
    silent = {source["name"] for source in record["sources"]} - {overlap["train"] for overlap in record["overlaps"]}
    if silent:
        raise ValueError(f"the training data's 'overlaps' says nothing of {sorted(silent)}")
    total = sum(source["rows"] for source in record["sources"])
    license = data_license([source["license"] for source in record["sources"]])
    files = {source["name"]: source["data_files"] for source in record["sources"]}
    files = {"default": [file for some in files.values() for file in some], **files}
    data = DatasetCardData(
        pretty_name=record["name"],
        license=license,
        license_name="licenses-of-the-sources" if license == "other" else None,
        task_categories=["visual-question-answering", "video-text-to-text"],
        size_categories=next((name for limit, name in SIZE_CATEGORIES if total < limit), "n>1M"),
        tags=["rgpt4d", "video", "4d"],
        configs=[
            {"config_name": name, "data_files": [{"split": "train", "path": some}]} for name, some in files.items()
        ],
    )
    return _card(DatasetCard, data, "training_data_card.md", record=record, license=license)


def metric_card(record: dict) -> SpaceCard:
    """The card of a metric's Space: its text, and behind it what follows from the metric itself.

    Args:
        record (`dict`): `title`, `look` (`emoji`, `colorFrom`, `colorTo`, or nothing), `text` (Markdown), `summary` (one
            sentence), `load` (what `evaluate.load` takes), `inputs` (names of what `compute` takes), `arguments` (the
            metric's own description of its inputs and outputs), `interval_method`, `columns` ({column: what}),
            `citation`. [`metric_record`] makes it.
    Returns: [`~huggingface_hub.SpaceCard`].
    Raises: `ValueError` naming a field that is missing.
    """
    _require(record, METRIC_FIELDS, "the metric's record")
    data = SpaceCardData(
        title=record["title"],
        **record["look"],
        sdk="gradio",
        pinned=False,
        license="apache-2.0",
        tags=["evaluate", "metric"],
        description=record["summary"],
    )
    return _card(SpaceCard, data, "metric_card.md", record=record, generated=GENERATED)


def write_card(card: RepoCard, folder: str | Path) -> Path:
    """Writes `README.md` into an existing folder, whole or not at all, over one that may be there.

    Returns: the file's path. Raises: `ValueError` if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; save the model or the data first, then write its card")
    handle, unfinished = tempfile.mkstemp(prefix=".README.", suffix=".part", dir=folder)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(card.content)
        os.chmod(unfinished, 0o644)  # mkstemp's 0600 would make a shared folder's card unreadable
        os.replace(unfinished, folder / "README.md")
    except BaseException:
        os.unlink(unfinished)
        raise
    return folder / "README.md"
