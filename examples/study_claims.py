"""The claims that the study tests, each with what is compared, its target, and the verdict that the records give."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from study_records import PAPER_SCORES, TRAINED_PARTS, Study
from study_statistics import (
    FAILS,
    HOLDS,
    NOT_RUN,
    Estimate,
    difference,
    holm,
    judge_difference,
    judge_level,
    ratio,
    share,
)

from metrics_rgpt4d.r4d_bench.r4d_bench import CATEGORIES

CHANCE_MARGIN = 5.0  # points within which an accuracy is called chance
TIMEBENCH_TARGET, POINTS_TARGET, CEILING = 95.0, 4.0, 98.0  # percent, points, percent
ERROR_TARGET = 0.5  # of the linear probe's error
TIME_MARGIN = 0.05  # within which two times are called the same
HOURS_TARGET = 2.0


@dataclass
class Claim:
    """A line of the table of claims.

    Args:
        number: such as "4b".
        text: the claim.
        compared: of what the number is.
        shown: the number with its interval, as text.
        target: what the number should be, as text.
        judge: corrected p (1 where there is none) -> verdict.
        p: of the paired test, before correction.
        paper: the paper's difference in points.
    """

    number: str
    text: str
    compared: str
    target: str
    shown: str = "-"
    judge: Callable[[float], str] = lambda p_holm: NOT_RUN
    p: float | None = None
    paper: float | None = None
    p_holm: float | None = None
    verdict: str = NOT_RUN


def points(found: Estimate) -> str:
    return f"{found.value:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"


def percent(found: Estimate) -> str:
    return f"{found.value:.1f} [{found.low:.1f}, {found.high:.1f}]"


def points_between(
    study: Study,
    first: str,
    second: str,
    column: str = "Avg",
    tests: tuple[str, str] = ("test", "test"),
    rivals: int = 1,
) -> Estimate | None:
    """Difference of two rows' accuracies in points; `None` unless both were run."""
    one, other = (
        study.sample(study.run_as(row), column, test) for row, test in zip((first, second), tests, strict=True)
    )
    if one is None or other is None:
        return None
    found = difference(one, other, study.draws(one), rivals)
    return None if found is None else found.times(100)


def accuracy(study: Study, row: str, column: str = "Avg", test: str = "test") -> Estimate | None:
    """Percent of right answers; `None` if the row was not run."""
    sample = study.sample(study.run_as(row), column, test)
    return None if sample is None else share(sample, study.draws(sample)).times(100)


def all_claims(study: Study) -> list[Claim]:
    """Every claim, judged, with p values corrected for all claims that have one."""
    claims = [
        *_time_cues(study),
        _over(study, "2a", "P4D improves over SFT", "p4d", "sft", POINTS_TARGET, p_below=0.001),
        _over(
            study,
            "2b",
            "P4D improves over SFT when both train twice as long",
            "p4d_long",
            "sft_long",
            POINTS_TARGET,
            p_below=0.001,
        ),
        _over(study, "2c", "P4D improves over SFT at half the learning rate", "p4d", "sft_half_rate"),
        _over(study, "3a", "P4D is better than 4D-Concat", "p4d", "concat"),
        _over(study, "3b", "P4D is better than 4D-PE", "p4d", "pe"),
        _over(study, "4a", "LD alone improves over zero-shot", "ld", "zero_shot"),
        _over(study, "4b", "ED alone improves over zero-shot", "ed", "zero_shot"),
        _over(study, "4c", "LD alone improves over SFT", "ld", "sft"),
        _over(study, "4d", "ED alone improves over SFT", "ed", "sft"),
        _best(study, "4e", "LD+ED is the best of Table 5", "p4d", ("zero_shot", "ld", "ld_d", "ld_df", "ld_dfm", "ed")),
        _over(study, "4f", "depth adds to LD", "ld_d", "ld"),
        _over(study, "4g", "flow adds to LD+D", "ld_df", "ld_d"),
        _over(study, "4h", "motion adds to LD+D+F", "ld_dfm", "ld_df"),
        _over(study, "4i", "camera rays add to LD+D+F+M", "p4d", "ld_dfm"),
        _over(study, "5a", "TPE is better than marks", "p4d", "mark"),
        _over(study, "5b", "TPE is better than prompts", "p4d", "prompt"),
        _best(
            study,
            "6",
            "Tune-P+LLM is the best of Table 7",
            "tune_p_llm",
            ("zero_shot", *(row for row in TRAINED_PARTS if row != "tune_p_llm")),
        ),
        _error(study, "7a", "P4D perceives depth (AbsRel)", "depth_abs_rel"),
        _error(study, "7b", "P4D perceives flow (end-point error)", "flow_epe_px"),
        _over(study, "8a", "the frame tokens' states beat the release's", "p4d", "release_states"),
        _over(study, "8b", "the paper's loss weights beat the release's", "p4d", "release_weights"),
        _over(study, "8c", "an MLP decoder beats a linear one", "p4d", "linear_decoder"),
        _over(study, "9a", "P4D on 20 % of the questions beats SFT on all", "p4d_20", "sft"),
        _over(study, "9b", "P4D improves over SFT on 5 % of the questions", "p4d_5", "sft_5"),
        _over(study, "9c", "P4D improves over SFT on 20 % of the questions", "p4d_20", "sft_20"),
        _over(study, "10a", "P4D needs the order of the frames", "p4d", "p4d", tests=("test", "shuffled")),
        _over(study, "10b", "P4D needs the pixels", "p4d", "p4d", tests=("test", "zeroed")),
        _over(study, "10c", "SFT needs more than one frame", "sft", "one_frame"),
        _inference(study),
        _ceiling(study),
        _cost(study),
    ]
    tested = [claim for claim in claims if claim.p is not None]
    for claim, p in zip(tested, holm([claim.p for claim in tested]), strict=True):
        claim.p_holm = p
    for claim in claims:
        claim.verdict = claim.judge(1.0 if claim.p_holm is None else claim.p_holm)
    return claims


def _judged(claim: Claim, found: Estimate | None, target: float = 0.0, p_below: float = 1.0) -> Claim:
    if found is not None:
        claim.shown, claim.p = points(found), found.p
        claim.judge = lambda p_holm: judge_difference(found, p_holm, target, p_below)
    return claim


def _over(
    study: Study,
    number: str,
    text: str,
    first: str,
    second: str,
    target: float = 0.0,
    p_below: float = 1.0,
    column: str = "Avg",
    tests: tuple[str, str] = ("test", "test"),
) -> Claim:
    titles = [
        study.title(row) + ("" if test == "test" else f", {test}")
        for row, test in zip((first, second), tests, strict=True)
    ]
    wanted = f"≥ {target:g} points" if target else "> 0 points"
    claim = Claim(
        number, text, f"{column}: {titles[0]} − {titles[1]}", wanted + (f", p < {p_below:g}" if p_below < 1 else "")
    )
    if column == "Avg" and tests == ("test", "test") and {first, second} <= PAPER_SCORES.keys():
        claim.paper = PAPER_SCORES[first][0] - PAPER_SCORES[second][0]
    return _judged(claim, points_between(study, first, second, column, tests), target, p_below)


def _best(study: Study, number: str, text: str, row: str, others: Sequence[str]) -> Claim:
    """Against the best of the others, once all of them were run."""
    claim = Claim(number, text, f"Avg: {study.title(row)} − the best other row", "> 0 points")
    claim.paper = PAPER_SCORES[row][0] - max(PAPER_SCORES[other][0] for other in others)
    samples = {other: study.sample(study.run_as(other)) for other in others}
    if study.sample(study.run_as(row)) is None or None in samples.values():
        return claim
    best = max(others, key=lambda other: samples[other].mean)
    claim.compared = f"Avg: {study.title(row)} − {study.title(best)}, the best other row"
    return _judged(claim, points_between(study, row, best, rivals=len(others)))


def _level(claim: Claim, found: Estimate | None, shown: Callable[[Estimate], str], **bounds: float) -> Claim:
    if found is not None:
        claim.shown, claim.judge = shown(found), lambda p_holm: judge_level(found, **bounds)
    return claim


def _time_cues(study: Study) -> list[Claim]:
    chance = study.columns["TimeBench"].chance
    near = {"low": chance - CHANCE_MARGIN, "high": chance + CHANCE_MARGIN}
    without = Claim(
        "1a",
        "without a time cue TimeBench is at chance",
        f"TimeBench: {study.title('no_cue')}",
        f"{near['low']:g} to {near['high']:g} %",
    )
    with_tpe = Claim("1b", "with TPE it is solved", f"TimeBench: {study.title('p4d')}", f"≥ {TIMEBENCH_TARGET:g} %")
    return [
        _level(without, accuracy(study, "no_cue", "TimeBench"), percent, **near),
        _level(with_tpe, accuracy(study, "p4d", "TimeBench"), percent, low=TIMEBENCH_TARGET),
        _over(study, "1c", "TPE adds to TimeBench", "p4d", "no_cue", column="TimeBench"),
    ]


def _error(study: Study, number: str, text: str, error: str) -> Claim:
    claim = Claim(number, text, f"error of {study.title('p4d')} / of {study.title('probe_sft')}", f"≤ {ERROR_TARGET:g}")
    samples = [study.perceived(row, error) for row in ("p4d", "probe_sft")]
    found = None if None in samples else ratio(*samples, study.draws(samples[0]))
    claim = _level(claim, found, lambda one: f"{one.value:.2f} [{one.low:.2f}, {one.high:.2f}]", high=ERROR_TARGET)
    claim.p = None if found is None else found.p
    return claim


def _inference(study: Study) -> Claim:
    claim = Claim(
        "11",
        "the decoder costs nothing at inference",
        "time with the decoder in the model / without",
        f"equal logits, {1 - TIME_MARGIN:g} to {1 + TIME_MARGIN:g}",
    )
    found = [run["inference"] for run in study.records.get("p4d", {}).values() if run.get("inference")]
    if found:
        equal = sum(one["logits_equal"] for one in found)
        ratios = [one["milliseconds_with_decoder"] / one["milliseconds_without"] for one in found]
        middle = float(np.median(ratios))
        claim.shown = (
            f"{middle:.3f} (runs {min(ratios):.3f} to {max(ratios):.3f}); logits equal in {equal} of {len(found)} runs"
        )
        holds = equal == len(found) and abs(middle - 1) <= TIME_MARGIN
        claim.judge = lambda p_holm: HOLDS if holds else FAILS
    return claim


def _ceiling(study: Study) -> Claim:
    claim = Claim(
        "12", "no category is at its ceiling", "the highest category of the row with the best Avg", f"< {CEILING:g} %"
    )
    scored = [row for row in study.records if study.sample(row) is not None]
    if scored:
        best = max(scored, key=lambda row: study.sample(row).mean)
        columns = [column for column in CATEGORIES if column in study.columns]
        highest = max(columns, key=lambda column: study.sample(best, column).mean)
        found = accuracy(study, best, highest)
        claim.compared = (
            f"{CATEGORIES[highest]}, the highest category of {study.title(best)}, the row with the best Avg"
        )
        claim = _level(claim, found, percent, high=CEILING)
    return claim


def _cost(study: Study) -> Claim:
    hours = study.device_seconds() / 3600
    claim = Claim(
        "13",
        "the study is small",
        "hours of one device, in which all runs, the base model and the teacher were made",
        f"≤ {HOURS_TARGET:g}",
    )
    if study.is_complete():
        claim.shown, claim.judge = f"{hours:.2f}", lambda p_holm: HOLDS if hours <= HOURS_TARGET else FAILS
    return claim
