"""STUDY.md and its figures, from the study's records alone; the same records give the same bytes: `study.py --document`.

An explanation of a claim's result that was tested can stand in `notes.md` of the records' folder, below a line
`## claim 4` or `## claim 4b`; it is put below the table of claims.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from evaluation_report import table
from study_claims import Claim, accuracy, all_claims, percent, points, points_between
from study_figures import SIGNALS, curve, draw_curves, draw_label_efficiency, draw_pictures
from study_records import BASE_ROWS, DIFFICULTY, MOVEMENT, PAPER_SCORES, PAPER_TIMEBENCH, ROWS, Study
from study_statistics import FAILS, HOLDS, LEVEL, NOT_RUN, PERMUTATIONS, RESAMPLES, UNDECIDED, mean

from datasets_rgpt4d.whole_files import write_text
from metrics_rgpt4d.r4d_bench.r4d_bench import CATEGORIES

TABLES = {
    "Table 4: how 4D data are used": ("zero_shot", "sft", "concat", "pe", "p4d"),
    "Table 5: what is distilled": ("zero_shot", "ld", "ld_d", "ld_df", "ld_dfm", "ed", "p4d"),
    "Tables 6 and A3: how the time is told": ("zero_shot", "no_cue", "mark", "prompt", "p4d", "sft_no_cue", "sft"),
    "Table 7: which parts are trained": (
        *("zero_shot", "tune_all", "tune_v", "tune_p", "tune_llm", "tune_llm_lora", "tune_p_llm_lora", "tune_p_llm"),
    ),
    "Mixtures of questions, after Table A4": ("mix_static", "mix_dynamic", "mix_captions", "p4d"),
    "Beyond the paper": (
        "truth",
        "ed",
        "release_states",
        "release_weights",
        "linear_decoder",
        "p4d",
        "p4d_long",
        "sft_long",
        "sft_half_rate",
    ),
}
LABELS = {"sft": {0.05: "sft_5", 0.2: "sft_20", 1.0: "sft"}, "p4d": {0.05: "p4d_5", 0.2: "p4d_20", 1.0: "p4d"}}
ERRORS = {  # of trainer.signal_errors -> heading and digits
    "depth_abs_rel": ("depth, AbsRel", 3),
    "depth_delta_1.25": ("depth, δ < 1.25", 3),
    "flow_epe_px": ("flow, EPE (px)", 3),
    "motion_iou": ("motion, IoU", 3),
    "ray_angle_deg": ("rays, angle (°)", 2),
    "camera_centre_m": ("camera's place (m)", 3),
}
METHOD = f"""\
- **Accuracy** of a row is the mean over its seeds of the share of right answers; *Avg*, *Sta* and *Dyn* are over the questions of
  R4D-Bench's nine categories, of the three static and of the six dynamic ones, *macro* is the mean of the nine. A reply that chooses no option is wrong.
- **Intervals** are 95 % percentile intervals of a two-level bootstrap ({RESAMPLES:,} resamples): clips with all of their questions, and
  seeds, are drawn with replacement and independently, the same draws for all rows. A difference of two rows is that of the same clips and
  the same seeds; a seed decides the order of the questions and new weights. Seeds are drawn by the bootknife (Hesterberg, 2004), because a
  plain bootstrap of three has two thirds of their variance. Three seeds say little about the spread of seeds: where it is greater than that
  of the clips, the interval is too narrow, so the lowest and highest seed stand beside it. Base model and teacher were trained once: what another one would change
  is in no interval.
- **p** is of a two-sided sign-flip permutation test ({PERMUTATIONS:,} draws; the smallest p is {2 / (PERMUTATIONS + 1):g}) of the differences of the clips, summed
  over seeds. It asks whether these models differ on other clips. In parentheses: corrected by Holm for all tests of the table of claims.
  Of a ratio, too, p is of no difference.
- **Verdicts** are computed. A difference is decided if its interval excludes 0 and its corrected p is below {LEVEL:g}; then it holds if it
  reaches the target, and fails otherwise. It also fails if its whole interval is below a target above 0. A level holds if its whole
  interval meets the target, and fails if none of it does. All else is not decided. The best of several other rows is taken after the fact, so p of a
  comparison with it is multiplied by their number.
"""
AGAIN = """\
```bash
python examples/study.py --document           # this document, from the records in `study`
python examples/study.py --rows p4d --seeds 0 # make a run (again, if you remove its record)
python examples/study.py                      # all runs that have no record
```
"""


def write_study(folder: Path, output: Path) -> None:
    """Write the document and `figures/` in the records' folder.

    Args:
        folder: holds `items.json`, `records/`, and perhaps `pictures.npz` and `notes.md`.
        output: the document; its links are relative.

    Raises: `SystemExit` if records or notes do not fit ([`Study`]).
    """
    study, figures = Study(folder), folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)

    def picture(path: Path, text: str) -> str:
        return f"![{text}]({Path(os.path.relpath(path, output.parent)).as_posix()})\n\n*{text}*"

    claims = all_claims(study)
    parts = [
        "# The paper's claims, tested on World4D",
        _opening(study),
        "## Claims",
        _verdicts(claims),
        _claims_table(claims),
        *_notes(folder / "notes.md", claims),
        "### How to read it",
        METHOD.strip(),
        "## Scores",
        f"Right answers in percent, with 95 % interval; n = {_counts(study)}. *Seeds* has the lowest and the highest Avg of a seed, and how many seeds; *no letter* "
        f"the percentage of replies that choose no option. A guess gets {study.columns['Avg'].chance:.1f} % (TimeBench: "
        f"{study.columns['TimeBench'].chance:.1f} %). *Paper* is R4D-Bench with an 8B model (4D-RGPT, arXiv:2512.17012v2): other questions and another "
        "model, so order and differences compare, levels do not.",
        *_score_tables(study),
        "### By category",
        *_category_table(study),
        "## How hard the test is",
        *_difficulty(study),
        "## Is 4D information used?",
        *_information(study),
        "## Does distillation save labels?",
        *_label_efficiency(study, figures, picture),
        "## What is perceived",
        *_perception(study, folder, figures, picture),
        "## Training",
        *_training(study, figures, picture),
        "## How it was made",
        *_provenance(study),
        "### Make it again",
        AGAIN.strip(),
    ]
    write_text(output, "\n\n".join(parts) + "\n")


# ------------------------------------------------------------------------------------------------------------- opening


def _opening(study: Study) -> str:
    expected = {row for row in ROWS if study.run_as(row) == row} | (study.records.keys() - {*BASE_ROWS})
    missing: dict[tuple[int, ...], list[str]] = {}  # seeds -> the rows that they are missing of
    for row in sorted(expected):
        seeds = tuple(seed for seed in study.seeds if seed not in study.records.get(row, {}))
        missing.setdefault(seeds, []).append(row)
    missing.pop((), None)
    there = sum(len(runs) for row, runs in study.records.items() if row not in BASE_ROWS)
    told = f"{there} of {there + sum(len(seeds) * len(rows) for seeds, rows in missing.items())} runs are in."
    if missing:
        listed = [f"seed {', '.join(map(str, seeds))} of {', '.join(rows)}" for seeds, rows in sorted(missing.items())]
        told += f" Missing: {'; '.join(listed)}."
    return (
        "4D-RGPT ([arXiv:2512.17012](https://arxiv.org/abs/2512.17012)) distils a 4D perception model into a video language model. Here its claims are tested with a "
        f"small model on World4D, whose scenes, signals and answers are exact: {len(study.answers):,} questions about {study.num_clips:,} test clips. "
        f"{told} This document is written by `examples/study_report.py` from the records alone, verdicts included."
    )


def _verdicts(claims: Sequence[Claim]) -> str:
    counts = Counter(claim.verdict for claim in claims)
    told = ", ".join(f"*{verdict}* {counts[verdict]}" for verdict in (HOLDS, FAILS, UNDECIDED, NOT_RUN))
    return f"Verdicts on {len(claims)} claims: {told}. Where the paper has both rows, its own difference stands beside ours."


def _claims_table(claims: Sequence[Claim]) -> str:
    rows = []
    for claim in claims:
        p = "-" if claim.p is None else f"{claim.p:.4f} ({claim.p_holm:.4f})"
        paper = "-" if claim.paper is None else f"{claim.paper:+.1f}"
        rows.append(
            [claim.number, claim.text, claim.compared, claim.shown, p, paper, claim.target, f"**{claim.verdict}**"]
        )
    head = ["", "claim", "what is compared", "result [95 %]", "p (Holm)", "paper", "target", "verdict"]
    top, rule, *lines = table(head, rows).split("\n")
    return "\n".join([top, rule.replace(":", "-"), *lines])  # columns of words, to the left


def _notes(path: Path, claims: Sequence[Claim]) -> list[str]:
    """Sections of the notes, in the order of the claims."""
    if not path.exists():
        return []
    before, *pieces = re.split(r"^## claim (\w+)[ \t]*$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    notes = dict(zip(pieces[::2], pieces[1::2], strict=True))
    groups = ((re.match(r"\d+", claim.number)[0], claim.number) for claim in claims)
    numbers = list(dict.fromkeys(number for group in groups for number in group))
    unknown = [number for number in notes if number not in numbers]
    if unknown or before.strip():
        raise SystemExit(
            f"{path}: every line must stand below `## claim N`, where N is one of {numbers}, not {unknown}."
        )
    return [part for number in numbers if number in notes for part in (f"### Claim {number}", notes[number].strip())]


# -------------------------------------------------------------------------------------------------------------- tables


def _counts(study: Study) -> str:
    return ", ".join(f"{study.columns[name].n:,} ({name})" for name in ("Avg", "Sta", "Dyn", "TimeBench"))


def _seeds(study: Study, row: str) -> str:
    by_seed = 100 * study.sample(row).by_seed
    return f"{by_seed.min():.1f} to {by_seed.max():.1f} ({len(by_seed)})"


def _score_table(study: Study, rows: Sequence[str]) -> str:
    with_time = any(row in ("no_cue", "mark", "prompt") for row in rows)
    lines = []
    for row in rows:
        run, paper = study.run_as(row), PAPER_SCORES.get(row)
        title = study.title(row) + ("" if run == row else f" (= {study.title(run)})")
        published = ["-" if paper is None else " / ".join(f"{value:.1f}" for value in paper)]
        if with_time:
            published.append(str(PAPER_TIMEBENCH.get(row, "-")))
        if study.sample(run) is None:
            lines.append([title, NOT_RUN, *["-"] * 6, *published])
            continue
        cells = [percent(accuracy(study, run, column)) for column in ("Avg", "Sta", "Dyn", "TimeBench")]
        beside = None if run == "p4d" else points_between(study, run, "p4d")
        less = "-" if beside is None else points(beside)
        lines.append([title, *cells, _seeds(study, run), less, f"{study.without_letter(run):.1f}", *published])
    head = ["", "Avg", "Sta", "Dyn", "TimeBench", "seeds", "Avg − P4D's", "no letter", "paper: Avg / Sta / Dyn"]
    return table([*head, "paper: TimeBench"] if with_time else head, lines)


def _score_tables(study: Study) -> list[str]:
    shown = {row for rows in TABLES.values() for row in rows} | {
        row for rows in LABELS.values() for row in rows.values()
    }
    shown |= {"one_frame", "blind"}
    others = [row for row in study.records if row not in shown and study.sample(row) is not None]
    parts = []
    for title, rows in (TABLES | {"Other rows": others}).items():
        if rows:
            described = "\n".join(f"- **{study.title(row)}**: {study.description(row)}." for row in rows)
            parts += [f"### {title}", _score_table(study, rows), described]
    return parts


def _category_table(study: Study) -> list[str]:
    columns = [column for column in (*CATEGORIES, "TimeBench") if column in study.columns]
    lines, widths = [], []
    for row in [*ROWS, *(row for row in study.records if row not in ROWS)]:
        if study.sample(row) is None:
            continue
        found = {column: accuracy(study, row, column) for column in columns}
        widths += [(one.high - one.low) / 2 for column, one in found.items() if column in CATEGORIES]
        macro = np.mean([found[column].value for column in columns if column in CATEGORIES])
        lines.append([study.title(row), *(f"{one.value:.1f}" for one in found.values()), f"{macro:.1f}"])
    if not lines:
        return ["No row was run."]
    chances = [study.columns[column].chance for column in columns]
    macro = np.mean([study.columns[column].chance for column in columns if column in CATEGORIES])
    lines.insert(0, ["a guess", *(f"{chance:.1f}" for chance in chances), f"{macro:.1f}"])
    lines.append(["n", *(f"{study.columns[column].n:,}" for column in columns), ""])
    names = "; ".join(f"{column}: {CATEGORIES[column]}" for column in columns if column in CATEGORIES)
    return [
        table(["", *columns, "macro"], lines),
        f"{names}. Half of a category's interval is {np.median(widths):.1f} points in the median of these numbers, and "
        f"{np.max(widths):.1f} at most.",
    ]


def _difficulty(study: Study) -> list[str]:
    """What the test clips show, and how rows fare where it is more or less."""
    clips = study.clips
    hidden = np.array([clip["occluded"] for clip in clips])
    shapes, motions = (Counter(one for clip in clips for one in clip[kind]) for kind in ("shapes", "motions"))

    def shares(counts: Counter) -> str:
        return ", ".join(
            f"{name.replace('_', ' and ')} {100 * n / counts.total():.0f} %" for name, n in counts.most_common()
        )

    turns = np.mean([clip["camera_turn_deg"] > 0 for clip in clips])
    moves = np.mean([clip["camera_path_m"] > 0 for clip in clips])
    told = (
        f"{len(clips):,} clips with {np.mean([clip['objects'] for clip in clips]):.1f} objects in the mean; all surfaces are "
        f"textured. Shapes: {shares(shapes)}. Motions: {shares(motions)}. The camera turns in {100 * turns:.0f} % of the clips and "
        f"travels in {100 * moves:.0f} %. At the worst frame, others hide {100 * np.median(hidden):.0f} % of the most hidden object of a "
        f"clip in the median, {100 * np.quantile(hidden, 0.9):.0f} % in the 90th percentile. No combination of shape, colour and motion "
        "of a test object was shown in training. Right answers in percent where a clip is easier and where it is harder:"
    )
    lines = [
        [
            name,
            f"{100 * np.mean([*map(is_in, clips)]):.0f} %",
            f"{study.columns[name].n:,}",
            f"{study.columns[name].chance:.1f}",
        ]
        + [percent(accuracy(study, row, name)) if study.sample(row) else NOT_RUN for row in ("sft", "p4d")]
        for name, is_in in DIFFICULTY.items()
        if name in study.columns
    ]
    return [told, table(["", "of the clips", "n", "a guess", "4D-SFT", "P4D"], lines)]


def _information(study: Study) -> list[str]:
    """What a guess, the text alone, one frame, and frames without order or content give in each category."""
    sides = {
        "blind": ("blind", "test"),
        "one frame": ("one_frame", "test"),
        "SFT, zeroed": ("sft", "zeroed"),
        "SFT, shuffled": ("sft", "shuffled"),
        "SFT": ("sft", "test"),
        "P4D, zeroed": ("p4d", "zeroed"),
        "P4D, shuffled": ("p4d", "shuffled"),
        "P4D": ("p4d", "test"),
    }
    lines, needs, undecided = [], [], []
    for column in [column for column in (*CATEGORIES, "TimeBench", "Avg") if column in study.columns]:
        found = {side: accuracy(study, row, column, test) for side, (row, test) in sides.items()}
        gain = points_between(study, "sft", "one_frame", column)
        if gain is not None and column != "Avg":
            (needs if gain.low > 0 else undecided).append(CATEGORIES.get(column, column))
        values = ["-" if one is None else f"{one.value:.1f}" for one in found.values()]
        chance = f"{study.columns[column].chance:.1f}"
        lines.append([CATEGORIES.get(column, column), chance, *values, "-" if gain is None else points(gain)])
    text = (
        "Right answers in percent. *Blind* was trained and tested on zeroed pixels, *one frame* on one frame of each clip: what they answer can be "
        "read off the text or a single frame. *Zeroed* and *shuffled* are models trained on whole clips, whose test clips have zeroed pixels, or their frames in "
        "random order."
    )
    parts = [text, table(["", "a guess", *sides, "SFT − one frame [95 %]"], lines)]
    if needs or undecided:
        told = [
            f"cannot be read off a single frame alone (interval above 0, not corrected for ten categories): {_listed(needs)}"
        ]
        if undecided:
            told.append(f"no gain from more frames is shown in: {_listed(undecided)}")
        parts.append("What " + "; ".join(told) + ".")
    return [*parts, *_time_in_movement(study)]


def _time_in_movement(study: Study) -> list[str]:
    """TimeBench without a time cue where something moves, and where nothing does."""
    groups = [column for column in MOVEMENT if column in study.columns]
    rows = [row for row in ("sft_no_cue", "no_cue") if study.sample(row)]
    if not rows or len(groups) < len(MOVEMENT):
        return []
    text = (
        "How far things get from one frame to the next grows with the time between them. Right answers to TimeBench, in percent, of "
        "models that are told nothing of the time, where something moves in the picture and where all stays in its place (though it may turn there):"
    )
    lines = [[study.title(row), *(percent(accuracy(study, row, column)) for column in groups)] for row in rows]
    counts = [f"{study.columns[column].n:,}" for column in groups]
    return [text, table(["", *(name.split(", ")[1] for name in groups)], [*lines, ["n", *counts]])]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


# ------------------------------------------------------------------------------------------------------------- figures


def _label_efficiency(study: Study, figures: Path, picture: Callable[[Path, str], str]) -> list[str]:
    lines, curves = [], {"4D-SFT": {}, "P4D": {}}
    for share, (sft, p4d) in zip(
        LABELS["sft"], zip(LABELS["sft"].values(), LABELS["p4d"].values(), strict=True), strict=True
    ):
        found = {"4D-SFT": accuracy(study, sft), "P4D": accuracy(study, p4d)}
        for label, one in found.items():
            if one is not None:
                curves[label][share] = one
        gain = points_between(study, p4d, sft)
        cells = [NOT_RUN if one is None else percent(one) for one in found.values()]
        lines.append([f"{100 * share:g} %", *cells, "-" if gain is None else points(gain)])
    text = "Of the rest of the clips P4D has the frames alone: half of each of its batches are these, and the teacher says what it sees in them."
    parts = [text, table(["questions", *curves, "P4D − 4D-SFT [95 %]"], lines)]
    less, more = curves["P4D"].get(0.2), curves["4D-SFT"].get(1.0)
    if less and more:
        parts.append(
            f"P4D on 20 % of the questions is right in {less.value:.1f} %, 4D-SFT on all of them in {more.value:.1f} %."
        )
    curves = {label: points for label, points in curves.items() if points}
    if len({share for points in curves.values() for share in points}) > 1:
        levels = {"a guess": study.columns["Avg"].chance}
        zero_shot = accuracy(study, "zero_shot")
        if zero_shot is not None:
            levels["zero-shot"] = zero_shot.value
        draw_label_efficiency(figures / "labels.png", curves, levels)
        parts.append(
            picture(
                figures / "labels.png",
                "Accuracy over the share of the questions that is trained on, with 95 % intervals",
            )
        )
    return parts


def _perception(study: Study, folder: Path, figures: Path, picture: Callable[[Path, str], str]) -> list[str]:
    lines, clips = [], []
    perceived = {
        row: [run["perception"] for run in runs.values() if run.get("perception")]
        for row, runs in study.records.items()
    }
    rows = [row for row, found in perceived.items() if found]
    # Records that are older than an error do not have it.
    known = {error for found in perceived.values() for one in found for error in one["student"]}
    known |= set() if study.teacher is None else {*study.teacher["errors"]}
    errors = {error: shown for error, shown in ERRORS.items() if error in known}
    sides = [(study.title(row), row, "student") for row in sorted(rows, key=[*ROWS, *rows].index)]
    for title, row, side in [*sides, ("the teacher itself", "p4d", "teacher")]:
        cells = []
        for error, (_, digits) in errors.items():
            sample = study.perceived(row, error, side)
            if sample is None:
                cells.append("-")
                continue
            clips.append(sample.sums.shape[1])
            found = mean(sample, study.draws(sample))
            cells.append(f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]")
        if set(cells) != {"-"}:
            lines.append([title, *cells])
    if study.teacher is not None:
        baseline = {error: sides["baseline"] for error, sides in study.teacher["errors"].items()}
        cells = [
            f"{baseline[error]['mean']:.{digits}f} [{baseline[error]['low']:.{digits}f}, {baseline[error]['high']:.{digits}f}]"
            if error in baseline
            else "-"
            for error, (_, digits) in errors.items()
        ]
        lines.append(["the same for every clip", *cells])
    parts = []
    if lines:
        told = (
            f"Errors against the exact signals on {max(clips):,} test clips"
            if clips
            else "Errors against the exact signals"
        )
        if study.teacher is not None:
            told += (
                f" (*the same for every clip*: average depth and rays, no motion; on {study.teacher['evaluated_on']})"
            )
        parts += [
            told
            + ". δ and IoU: more is better; else less is. A clip in which nothing moves and nothing is said to move has no IoU.",
            table(["", *(name for name, _ in errors.values())], lines),
        ]
    if (folder / "pictures.npz").exists():
        with np.load(folder / "pictures.npz", allow_pickle=False) as pictures:
            paths = draw_pictures(figures, pictures)
        seed = study.seeds[0]
        absent = "" if seed in study.records.get("p4d", {}) else ", whose record is not here,"
        parts.append(f"The pictures show a test clip as the P4D run of seed {seed}{absent} saw it while it trained.")
        for path, signal in zip(
            paths, [one for one in SIGNALS if figures / f"perceived_{one}.png" in paths], strict=True
        ):
            parts.append(
                picture(
                    path,
                    f"Perceived {'camera rays' if signal == 'camray' else signal} over training steps, as in Fig. 5 and A20",
                )
            )
    return parts or ["No perceived signals were recorded."]


def _training(study: Study, figures: Path, picture: Callable[[Path, str], str]) -> list[str]:
    logs = {row: [run["log"] for run in runs.values() if run.get("log")] for row, runs in study.records.items()}
    terms = ("ld", *SIGNALS)
    panels = {
        "answer loss, nats a token": {
            study.title(row): curve(logs.get(row, []), "loss_sft") for row in ("sft", "p4d", "ld", "ed")
        },
        "P4D: terms of distillation": {term: curve(logs.get("p4d", []), f"loss_{term}") for term in terms},
        "P4D: gradient norm at the hidden states": {
            term: curve(logs.get("p4d", []), f"grad_norm_{term}") for term in ("sft", "ed", *terms)
        },
    }
    panels = {title: {label: one for label, one in curves.items() if len(one[0])} for title, curves in panels.items()}
    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        return ["No losses were recorded."]
    draw_curves(figures / "training.png", panels)
    return [picture(figures / "training.png", "Losses and gradient norms over training steps, means over seeds")]


# ---------------------------------------------------------------------------------------------------------- provenance


def _trained(settings: dict[str, Any]) -> str:
    """How a row is trained that says nothing else itself."""
    return (
        f"- Training: {settings['max_steps']:,} steps of {settings['per_device_train_batch_size']} clips with all of their "
        f"questions; {settings['optimizer']} with a learning rate of {settings['learning_rate']:g}. Rows that differ say so in "
        "`examples/study.yaml`."
    )


def _provenance(study: Study) -> list[str]:
    runs = [run for runs in study.records.values() for run in runs.values()]
    if not runs:
        return ["There are no records yet."]
    devices = Counter(run["device"] for run in runs)
    versions = Counter(
        ", ".join(f"{name} {number}" for name, number in sorted(run["versions"].items())) for run in runs
    )
    described = [f"{name} ({count} runs)" for name, count in sorted(devices.items())]
    settings = ", ".join(f"{name} {value}" for name, value in study.data.items())
    told = [
        f"- Data: World4D; {settings}. Questions: SHA-256 `{study.sha256}`.",
        f"- Device: {described[0]}."
        if len(described) == 1
        else f"- **Runs come from several devices**: {'; '.join(described)}.",
        f"- Versions: {'; '.join(f'{name} ({count} runs)' for name, count in sorted(versions.items()))}.",
    ]
    seconds = [run["seconds"] for run in runs]
    slowest = max(runs, key=lambda run: sum(run["seconds"].values()))
    told.append(
        f"- Time: {study.device_seconds() / 3600:.2f} hours of one device for all runs, several side by side, the base model and the teacher; "
        f"training {np.median([one['train'] for one in seconds]):.0f} s and tests {np.median([one['evaluate'] for one in seconds]):.0f} s a "
        f"run in the median; the slowest run is {slowest['row']} (seed {slowest['seed']}) with {sum(slowest['seconds'].values()):.0f} s."
    )
    if "p4d" in study.records:
        record = next(iter(study.records["p4d"].values()))
        told += [f"- Model: {record['parameters']:,} parameters.", _trained(record["settings"])]
    if study.teacher is not None:
        record = study.teacher
        told.append(
            f"- Teacher: {record['parameters']:,} parameters, {record['clips_shown']:,} clips, {record['training_seconds']:.0f} s."
        )
    return ["\n".join(told)]
