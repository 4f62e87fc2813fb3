"""examples/study_report.py and its statistics, on synthetic records with known effects."""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from datasets_rgpt4d.world4d_questions import TASKS

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LETTERS = np.array(list("ABCDE"))
SETTINGS = {
    **{"trainable": ["vision", "projector", "llm"], "max_steps": 3000, "per_device_train_batch_size": 32},
    **{"optimizer": "muon", "learning_rate": 1e-3},
}
SEEDS = (0, 1, 2)
with pytest.MonkeyPatch.context() as patch:  # scripts of a folder import each other by their bare names
    patch.syspath_prepend(EXAMPLES)
    import study_report
    from study_claims import all_claims, points_between
    from study_records import PAPER_SCORES, ROWS, Study
    from study_statistics import (
        FAILS,
        HOLDS,
        NOT_RUN,
        UNDECIDED,
        Estimate,
        Resamples,
        Sample,
        difference,
        holm,
        judge_difference,
        judge_level,
        paired_p,
        share,
    )

    import study

TESTS = {"sft": ("test", "shuffled", "zeroed"), "p4d": ("test", "shuffled", "zeroed")}
PERCEIVED = {"p4d": 0.1, "truth": 0.08, "probe_sft": 0.3}  # row -> depth error
SIGNALS = {"depth": 1, "flow": 2, "motion": 1, "camray": 6}


def items_of(num_clips: int) -> list[dict]:
    """A question of each task about each clip, with an answer drawn at random."""
    rng = np.random.default_rng(0)
    return [
        {
            "id": f"{clip}-{task}",
            "task": task,
            "clip": clip,
            "answer": str(rng.choice(LETTERS)),
            "num_options": 5,
        }
        for clip in range(num_clips)
        for task in TASKS
    ]


def replies(items: list[dict], accuracy: dict[str, float] | float, seed: int, shared: float = 0.8) -> str:
    """Letters that are right with the accuracy of their task. A share of the items is equally hard for all rows and seeds."""
    common, own = np.random.default_rng(1).random(len(items)), np.random.default_rng(seed).random(len(items))
    luck = np.where(np.random.default_rng(2).random(len(items)) < shared, common, own)
    found = []
    for item, draw in zip(items, luck, strict=True):
        wanted = accuracy if isinstance(accuracy, float) else accuracy.get(item["task"], accuracy["rest"])
        wrong = "-" if item["answer"] == "E" else "E"
        found.append(item["answer"] if draw < wanted else wrong)
    return "".join(found)


def write_record(folder: Path, items: list[dict], row: str, seed: int, letters: dict[str, str], **more) -> None:
    answers = np.array([item["answer"] for item in items])
    r4d = np.array([item["task"] != "TimeBench" for item in items])
    record = {
        "row": row,
        "seed": seed,
        "settings": SETTINGS,
        "versions": {"torch": "2.13.0"},
        "device": "NVIDIA H100 80GB HBM3",
        "parameters": 6_000_000,
        "seconds": {"train": 60.0 + seed, "evaluate": 8.0},
        "log": [
            {"step": step, "loss_sft": 3 / step, "loss_ld": 2 / step, "loss_depth": 1 / step, "grad_norm_sft": 0.1}
            for step in (50, 100, 150)
        ],
        "items_sha256": json.loads((folder / "items.json").read_text())["sha256"],
        "tests": {
            name: {"letters": text, "scores": {"Avg": 100 * float((np.array(list(text)) == answers)[r4d].mean())}}
            for name, text in letters.items()
        },
    }
    (folder / "records").mkdir(exist_ok=True)
    (folder / "records" / f"{row}-{seed}.json").write_text(json.dumps(record | more))


def write_items(folder: Path, num_clips: int) -> list[dict]:
    items = items_of(num_clips)
    digest = hashlib.sha256(json.dumps(items).encode()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    clips = [
        {
            **{"objects": 1 + clip % 6, "occluded": 0.3 * (clip % 2), "camera_turn_deg": 10.0 * (clip % 4 == 0)},
            **{"camera_path_m": 0.0 if clip % 10 == 5 else 0.4, "shapes": ["box", "sphere"]},
            "motions": ["still", "spin" if clip % 10 == 5 else "translate_spin"],
        }
        for clip in range(num_clips)
    ]
    content = {"data": {"num_frames": 8}, "seeds": SEEDS, "sha256": digest, "clips": clips, "items": items}
    (folder / "items.json").write_text(json.dumps(content))
    return items


def write_pictures(folder: Path, frames: int = 4, size: int = 8) -> None:
    rng = np.random.default_rng(0)
    arrays = {"frames": rng.integers(0, 255, (frames, size, size, 3), dtype=np.uint8), "steps": np.array([0, 50, 100])}
    for signal, channels in SIGNALS.items():
        truth = rng.random((channels, frames, size, size)) + (1 if signal == "depth" else 0)
        arrays |= {f"truth_{signal}": truth.astype(np.float16), f"teacher_{signal}": truth.astype(np.float16)}
        arrays[f"student_{signal}"] = np.stack([truth * part for part in (0.2, 0.6, 1)]).astype(np.float16)
    np.savez(folder / "pictures.npz", **arrays)


def make_study(folder: Path, num_clips: int = 80, missing: tuple[str, ...] = ("tune_v",)) -> Path:
    """Records of every row with three seeds, but of `missing` and of P4D's own row of Table 7.

    P4D is 8 points over SFT, however long both train; TPE takes TimeBench from chance to 98 %; LD+D is LD with other luck.
    """
    items = write_items(folder, num_clips)
    accuracy = {row: {"rest": 0.55, "TimeBench": 0.98} for row in ROWS}
    accuracy["p4d"] = accuracy["p4d_long"] = {"rest": 0.63, "TimeBench": 0.98, "Counting": 0.8}
    accuracy["zero_shot"] = {"rest": 0.25, "TimeBench": 0.2}
    accuracy["blind"] = {"rest": 0.3, "TimeBench": 0.2}
    accuracy["one_frame"] = {"rest": 0.5, "TimeBench": 0.2, "Spatial Relation": 0.55}
    accuracy["no_cue"] = {"rest": 0.6, "TimeBench": 0.2}
    errors = np.random.default_rng(3).random((2, 30)) / 50
    for index, (row, wanted) in enumerate(accuracy.items()):
        if row in (*missing, "tune_all", "probe_sft"):
            continue
        for seed in SEEDS:
            letters = {"test": replies(items, wanted, 10 + 0 if row == "zero_shot" else 100 * index + seed)}
            letters |= {name: replies(items, 0.3, 100 * index + seed) for name in TESTS.get(row, ())[1:]}
            more = {}
            if row in PERCEIVED:
                more["perception"] = perception(PERCEIVED[row] + errors)
            if row == "p4d":
                more["inference"] = {
                    "logits_equal": True, "milliseconds_with_decoder": 10.1, "milliseconds_without": 10.0
                }  # fmt: skip
            write_record(folder, items, row, seed, letters, **more)
    for seed in SEEDS:
        write_record(
            folder, items, "probe_sft", seed, {}, perception=perception(PERCEIVED["probe_sft"] + errors), log=[]
        )
    settings = {**SETTINGS, "tasks": ["Counting", "TimeBench"]}
    write_record(folder, items, "mix_counting", 0, {"test": replies(items, 0.4, 9)}, settings=settings)
    write_record(folder, items, "base", 0, {})
    sides = {side: {"mean": 0.2, "low": 0.1, "high": 0.3, "n": 30} for side in ("teacher", "baseline")}
    teacher = {
        "parameters": 1_000_000, "clips_shown": 4_000, "training_seconds": 99.0, "errors": {"depth_abs_rel": sides},
        "evaluated_on": "the first 30 clips of World4D tiny, test split",
    }  # fmt: skip
    (folder / "records" / "teacher.json").write_text(json.dumps(teacher))
    write_pictures(folder)
    return folder


def perception(errors: np.ndarray) -> dict:
    side = {
        "depth_abs_rel": errors[0].tolist(),
        "flow_epe_px": (3 * errors[1]).tolist(),
        "motion_iou": [None, 0.5] * 15,
    }
    return {"student": side, "teacher": side}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def document(folder) -> str:
    study_report.write_study(folder, folder.parent / "STUDY.md")
    return (folder.parent / "STUDY.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def claims(folder) -> dict:
    return {claim.number: claim for claim in all_claims(Study(folder))}


def samples(num_clips: int, effects: np.ndarray, rng: np.random.Generator) -> tuple[Sample, Sample]:
    """Two rows with three seeds whose true accuracies are 0.6 + effect and 0.6; clips have 3 to 8 questions."""
    counts = rng.integers(3, 9, num_clips)
    hardness = rng.normal(0, 0.15, num_clips)
    rows = []
    for effect in effects:
        chances = np.clip(0.6 + effect + hardness, 0, 1)
        sums = np.stack([rng.binomial(counts, chances) for _ in SEEDS]).astype(float)
        rows.append(Sample(SEEDS, sums, np.broadcast_to(counts, sums.shape).astype(float)))
    return rows[0], rows[1]


# ---------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("effect", [0.0, 0.05])
def test_interval_of_a_difference_covers_the_true_one(effect):
    rng, resamples, inside = np.random.default_rng(5), Resamples(100), 0
    for _ in range(40):
        first, second = samples(100, np.array([effect, 0.0]), rng)
        low, high = np.quantile(resamples.means(first) - resamples.means(second), [0.025, 0.975])
        inside += low <= effect <= high
    assert inside >= 36  # 95 % of 40 are 38; fewer than 36 happens once in 100 times at that coverage


def test_interval_grows_with_the_spread_of_the_seeds():
    sums = np.full((3, 50), 5.0) + np.random.default_rng(0).integers(-2, 3, 50)
    counts, resamples = np.full((3, 50), 10.0), Resamples(50)
    alike = share(Sample(SEEDS, sums, counts), resamples)
    apart = share(Sample(SEEDS, sums + np.array([[-2.0], [0], [2]]), counts), resamples)
    assert apart.value == pytest.approx(alike.value)
    assert apart.high - apart.low > 3 * (alike.high - alike.low)
    assert apart.by_seed == pytest.approx((alike.value - 0.2, alike.value, alike.value + 0.2))


def test_bootstrap_of_seeds_has_the_unbiased_variance_of_their_mean():
    values = np.array([0.1, 0.4, 0.9])
    sample = Sample(SEEDS, np.repeat(values[:, None], 5, 1), np.ones((3, 5)))  # all clips alike: only seeds vary
    drawn = Resamples(5).means(sample)
    assert drawn.mean() == pytest.approx(values.mean(), abs=0.01)
    assert drawn.var() == pytest.approx(values.var(ddof=1) / 3, rel=0.05)


def test_rows_are_resampled_in_pairs():
    first, _ = samples(60, np.array([0.0, 0.0]), np.random.default_rng(0))
    second = Sample(first.seeds, first.sums - (first.counts > 5), first.counts)  # one right answer less in some clips
    found = difference(first, second, Resamples(60))
    alone = share(first, Resamples(60))
    assert found.value > 0 and found.high - found.low < 0.5 * (alone.high - alone.low)


def test_difference_takes_the_seeds_in_common():
    first, second = samples(20, np.array([0.0, 0.0]), np.random.default_rng(0))
    kept = second.of((1, 2))
    found = difference(first, kept, Resamples(20))
    assert found.by_seed == pytest.approx(tuple(first.by_seed[1:] - kept.by_seed))
    assert difference(first.of((0,)), kept, Resamples(20)) is None


def test_paired_p_is_the_share_of_sign_flips_as_extreme():
    # Six clips, each better by one: of 64 sign flips 2 are as extreme, and scipy goes through all of them.
    sums = np.array([[3.0, 2, 4, 1, 3, 2]])
    one, other = (Sample((0,), sums + better, np.full((1, 6), 5.0)) for better in (1, 0))
    assert paired_p(one, other) == pytest.approx(2 / 64)
    assert paired_p(one, one) == 1.0


def test_p_of_a_null_effect_is_small_as_often_as_it_says():
    rng = np.random.default_rng(7)
    p_values = [paired_p(*samples(30, np.zeros(2), rng)) for _ in range(60)]
    assert 0.25 < np.mean(np.array(p_values) < 0.5) < 0.75 and np.mean(np.array(p_values) < 0.05) < 0.15


def test_holm_is_the_step_down_correction():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_perfect_row_has_an_interval():
    found = share(Sample(SEEDS, np.ones((3, 40)), np.ones((3, 40))), Resamples(40))
    assert (found.value, found.high) == (1.0, 1.0) and 0.9 < found.low < 0.93  # Wilson, n = 40


@pytest.mark.parametrize(
    ("numbers", "p_holm", "target", "verdict"),
    [
        ((2.0, 1.0, 3.0), 0.01, 0.0, HOLDS),
        ((2.0, 1.0, 3.0), 0.2, 0.0, UNDECIDED),  # not after correction
        ((0.5, -1.0, 2.0), 0.5, 0.0, UNDECIDED),  # the interval covers 0
        ((-2.0, -3.0, -1.0), 0.01, 0.0, FAILS),
        ((4.5, 3.0, 6.0), 0.01, 4.0, HOLDS),
        ((3.5, 2.0, 5.0), 0.01, 4.0, FAILS),  # above 0, but the target is missed
        ((0.5, -1.0, 2.0), 0.5, 4.0, FAILS),  # wherever it is, the target is missed
        ((3.0, -1.0, 7.0), 0.5, 4.0, UNDECIDED),
    ],
)
def test_verdict_on_a_difference(numbers, p_holm, target, verdict):
    assert judge_difference(Estimate(*numbers, (), 0.0001), p_holm, target) == verdict


def test_verdict_needs_the_p_that_the_claim_names():
    assert judge_difference(Estimate(5.0, 4.0, 6.0, (), 0.002), 0.01, 4.0, p_below=0.001) == UNDECIDED


@pytest.mark.parametrize(("ends", "verdict"), [((95.5, 99.0), HOLDS), ((90.0, 94.0), FAILS), ((94.0, 97.0), UNDECIDED)])
def test_verdict_on_a_level(ends, verdict):
    assert judge_level(Estimate(sum(ends) / 2, *ends, ()), low=95.0) == verdict


# -------------------------------------------------------------------------------------------------------------- claims


def test_known_effects_get_their_verdicts(claims):
    verdicts = {number: claim.verdict for number, claim in claims.items()}
    holding = ("1c", "2a", "2b", "3a", "3b", "4a", "4b", "7a", "7b", "10a", "10b", "11", "12")
    assert {number: verdicts[number] for number in holding} == dict.fromkeys(holding, HOLDS)
    assert verdicts["4f"] == UNDECIDED and verdicts["9b"] == UNDECIDED  # equal in truth
    assert verdicts["6"] == NOT_RUN and claims["6"].shown == "-"  # the best of rows that are not all there


def test_time_cue_takes_timebench_from_chance_to_the_target(tmp_path):
    items = write_items(tmp_path, 700)
    for seed in SEEDS:
        write_record(tmp_path, items, "no_cue", seed, {"test": replies(items, 0.2, seed)})
        write_record(tmp_path, items, "p4d", seed, {"test": replies(items, 0.975, 10 + seed)})
    found = {claim.number: claim for claim in all_claims(Study(tmp_path))}
    assert [found[number].verdict for number in ("1a", "1b", "1c", "12")] == [HOLDS, HOLDS, HOLDS, UNDECIDED]
    assert found["1a"].target == "15 to 25 %"


def test_interval_of_the_study_covers_the_known_effect(folder):
    found = points_between(Study(folder), "p4d", "sft")
    assert found.low < 8 + (80 - 63) / 9 < found.high  # eight tasks by 8 points, Counting by 25


def test_time_of_runs_side_by_side_counts_once_on_each_device(tmp_path):
    items = write_items(tmp_path, 5)
    for seed, (unit, span) in enumerate(
        [("a", [0, 50]), ("a", [10, 40]), ("a", [45, 60]), ("b", [0, 30]), ("a", [90, 95])]
    ):
        write_record(tmp_path, items, "sft", seed, {"test": replies(items, 0.5, seed)}, unit=unit, from_to=span)
    write_record(tmp_path, items, "base", 0, {}, seconds={"train": 7.0, "evaluate": 1.0})  # does not tell when
    assert Study(tmp_path).device_seconds() == 60 + 30 + 5 + 8
    (tmp_path / "records" / "teacher.json").write_text(json.dumps({"training_seconds": 100.0}))
    assert Study(tmp_path).device_seconds() == 203


@pytest.mark.parametrize(("hours", "verdict"), [(1.9, HOLDS), (2.1, FAILS)])
def test_cost_is_judged_once_every_row_was_run(tmp_path, hours, verdict):
    make_study(tmp_path, 5, missing=("tune_v",))
    (tmp_path / "records" / "teacher.json").unlink()
    assert {claim.number: claim for claim in all_claims(Study(tmp_path))}["13"].verdict == NOT_RUN
    items = json.loads((tmp_path / "items.json").read_text())["items"]
    for seed in SEEDS:
        write_record(tmp_path, items, "tune_v", seed, {"test": replies(items, 0.5, seed)})
    for file in (tmp_path / "records").iterdir():
        record = json.loads(file.read_text())
        file.write_text(json.dumps(record | {"unit": "a", "from_to": [0, 3600 * hours]}))
    claim = {claim.number: claim for claim in all_claims(Study(tmp_path))}["13"]
    assert (claim.verdict, claim.shown) == (verdict, f"{hours:.2f}")


def test_p_values_are_corrected_for_all_tests_of_the_table(claims):
    tested = [claim for claim in claims.values() if claim.p is not None]
    assert [claim.p_holm for claim in tested] == holm([claim.p for claim in tested])
    assert min(claim.p for claim in tested) == pytest.approx(2 / 10_000)
    assert claims["1a"].p is None and claims["11"].p is None


def test_failing_claim_is_reported_as_failing(tmp_path):
    items = write_items(tmp_path, 80)
    for seed in SEEDS:
        write_record(tmp_path, items, "p4d", seed, {"test": replies(items, 0.5, seed)})
        write_record(tmp_path, items, "sft", seed, {"test": replies(items, 0.55, 10 + seed)})
        write_record(tmp_path, items, "concat", seed, {"test": replies(items, 0.7, 20 + seed)})
    found = {claim.number: claim.verdict for claim in all_claims(Study(tmp_path))}
    assert (found["2a"], found["3a"], found["3b"]) == (FAILS, FAILS, NOT_RUN)


def test_paper_differences_are_those_of_its_tables(claims):
    shown = {number: claims[number].paper for number in ("2a", "3a", "4a", "4e", "6")}
    assert shown == pytest.approx({"2a": 2.1, "3a": 2.7, "4a": 2.3, "4e": 0.2, "6": 0.8})
    assert claims["8a"].paper is None and claims["1c"].paper is None


def test_row_of_table_7_that_is_the_methods_own_is_not_run_twice(tmp_path):
    items = write_items(tmp_path, 10)
    parts = {**SETTINGS, "trainable": ["projector", "llm"], "llm_lora": False}
    write_record(tmp_path, items, "p4d", 0, {"test": replies(items, 0.5, 0)}, settings=parts)
    write_record(tmp_path, items, "tune_v", 0, {"test": replies(items, 0.5, 1)})
    study = Study(tmp_path)
    assert [study.run_as(row) for row in ("tune_p_llm", "tune_p_llm_lora", "tune_all", "tune_v")] == [
        "p4d", "tune_p_llm_lora", "tune_all", "tune_v"
    ]  # fmt: skip
    write_record(tmp_path, items, "tune_p_llm", 0, {"test": replies(items, 0.5, 2)})
    assert Study(tmp_path).run_as("tune_p_llm") == "tune_p_llm"  # but if it is, it stands for itself


def test_paper_scores_are_those_of_its_other_tables(folder):
    own = json.loads((EXAMPLES / "paper_scores.json").read_text())["Table 3"]["rows"]
    assert PAPER_SCORES["zero_shot"] == tuple(own["NVILA-Lite-8B"][:3])
    assert PAPER_SCORES["p4d"] == PAPER_SCORES["tune_p_llm"] == tuple(own["4D-RGPT-8B"][:3])


# ------------------------------------------------------------------------------------------------------------ document


def test_document_has_every_row_and_says_what_is_missing(document):
    for row in ("Zero-shot", "4D-Concat", "LD+D+F+M", "P4D+mark", "Tune-LLM-LoRA", "Release's states", "mix_counting"):
        assert f"\n| {row} " in document
    assert re.search(r"\| Tune-V +\| +not run \|", document)
    assert "Tune-All (= P4D)" in document
    (there, expected) = map(int, re.search(r"(\d+) of (\d+) runs are in", document).groups())
    assert expected - there == 5  # Tune-V, and two seeds of the mixture
    assert "Missing: seed 0, 1, 2 of tune_v; seed 1, 2 of mix_counting." in document
    assert '`tasks` ["Counting", "TimeBench"]' in document


def test_categories_are_counted(document):
    names, *_, counts = [
        [cell.strip() for cell in line.split("|")[2:-1]]
        for line in document.split("### By category")[1].split("\n\n")[1].splitlines()
    ]
    assert dict(zip(names, counts, strict=True)) == dict.fromkeys(names[:10], "80") | {"macro": ""}


def test_easy_and_hard_clips_are_told_apart(document):
    section = document.split("## How hard the test is")[1].split("\n## ")[0]
    lines = re.findall(r"^\| ([^|]+?) +\| +(\d+) % \| +([\d,]+) \|", section, flags=re.MULTILINE)
    assert {name: (share, n) for name, share, n in lines} == {
        "hidden < 5 %": ("50", "360"),
        "hidden ≥ 25 %": ("50", "360"),
        "camera does not turn": ("75", "540"),
        "camera turns": ("25", "180"),
        "1 or 2 objects": ("35", "252"),
        "3 or 4 objects": ("32", "234"),
        "5 or 6 objects": ("32", "234"),
    }
    assert "The camera turns in 25 % of the clips and travels in 90 %." in section
    assert "others hide 15 % of the most hidden object of a clip in the median, 30 % in the 90th" in section


def test_time_that_is_read_off_movement_is_told_apart(document, folder):
    section = document.split("## Is 4D information used?")[1].split("\n## ")[0]
    heads, _, *lines = [line.split("|")[1:-1] for line in section.strip().splitlines()[-5:]]
    assert [head.strip() for head in heads] == ["", "something moves", "all stays in place"]
    assert [cell.strip() for cell in lines[-1]] == ["n", "72", "8"]
    items = json.loads((folder / "items.json").read_text())["items"]
    for line, row in zip(lines, ("sft_no_cue", "no_cue"), strict=False):
        for cell, still in zip(line[1:], (False, True), strict=True):
            right = []
            for seed in (0, 1, 2):
                letters = json.loads((folder / f"records/{row}-{seed}.json").read_text())["tests"]["test"]["letters"]
                right += [
                    letter == item["answer"]
                    for letter, item in zip(letters, items, strict=True)
                    if item["task"] == "TimeBench" and (item["clip"] % 10 == 5) == still
                ]
            assert cell.split()[0] == f"{100 * sum(right) / len(right):.1f}"


def test_items_without_clips_are_refused(tmp_path):
    write_items(tmp_path, 10)
    content = json.loads((tmp_path / "items.json").read_text())
    del content["clips"]
    (tmp_path / "items.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=r"items\.json does not tell what the test clips show: run a row"):
        Study(tmp_path)


def test_document_names_hash_device_versions_and_commands(document, folder):
    assert json.loads((folder / "items.json").read_text())["sha256"] in document
    assert "- Device: NVIDIA H100 80GB HBM3 (" in document and "several devices" not in document
    assert "torch 2.13.0" in document and "--rows p4d --seeds 0" in document


def test_document_links_figures_that_exist(document, folder):
    links = re.findall(r"!\[[^]]*\]\(([^)]+)\)", document)
    assert [Path(link).name for link in links] == [
        "labels.png", *(f"perceived_{signal}.png" for signal in SIGNALS), "training.png"
    ]  # fmt: skip
    for link in links:
        assert not Path(link).is_absolute() and (folder.parent / link).read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (folder / "figures").iterdir()} == {Path(link).name for link in links}


def test_same_records_give_the_same_bytes(document, folder):
    before = {path: path.read_bytes() for path in (folder / "figures").iterdir()}
    study_report.write_study(folder, folder.parent / "STUDY.md")
    assert (folder.parent / "STUDY.md").read_text(encoding="utf-8") == document
    assert {path: path.read_bytes() for path in (folder / "figures").iterdir()} == before


def test_the_document_of_the_project_is_what_its_records_give(tmp_path):
    project = EXAMPLES.parent
    shutil.copytree(
        project / "study", tmp_path / "study", ignore=shutil.ignore_patterns("student", "teacher", "figures")
    )
    study_report.write_study(tmp_path / "study", tmp_path / "STUDY.md")
    written, stored = ((folder / "STUDY.md").read_text(encoding="utf-8") for folder in (tmp_path, project))
    assert written == stored, "write it again: python examples/study.py --document"
    figures = [{path.name for path in (folder / "study" / "figures").iterdir()} for folder in (tmp_path, project)]
    assert figures[0] == figures[1]


def test_several_devices_are_told(tmp_path):
    items = write_items(tmp_path, 10)
    for seed, device in enumerate(("NVIDIA H100", "NVIDIA H200")):
        write_record(tmp_path, items, "sft", seed, {"test": replies(items, 0.5, seed)}, device=device)
    study_report.write_study(tmp_path, tmp_path / "STUDY.md")
    told = "**Runs come from several devices**: NVIDIA H100 (1 runs); NVIDIA H200 (1 runs)."
    assert told in (tmp_path / "STUDY.md").read_text()


def test_document_is_written_without_any_record(tmp_path):
    write_items(tmp_path, 10)
    study_report.write_study(tmp_path, tmp_path / "STUDY.md")
    assert "0 of " in (tmp_path / "STUDY.md").read_text()


def test_note_stands_below_the_table_of_claims(folder, tmp_path):
    items = write_items(tmp_path, 10)
    write_record(tmp_path, items, "sft", 0, {"test": replies(items, 0.5, 0)})
    (tmp_path / "notes.md").write_text("## claim 4b\nTested: no.\n\n## claim 2\nTested: yes.\n")
    study_report.write_study(tmp_path, tmp_path / "STUDY.md")
    text = (tmp_path / "STUDY.md").read_text()
    assert "### Claim 2\n\nTested: yes.\n\n### Claim 4b\n\nTested: no." in text
    (tmp_path / "notes.md").write_text("## claim 40\nTested.\n")
    with pytest.raises(SystemExit, match=r"not \['40'\]"):
        study_report.write_study(tmp_path, tmp_path / "STUDY.md")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items_sha256": "0"}, "other questions"),
        ({"tests": {"test": {"letters": "AB", "scores": {}}}}, "2 letters, not 100"),
        ({"tests": {"test": {"letters": "-" * 100, "scores": {"Avg": 50.0}}}}, r"0.00 % of the letters .* 50.00 %"),
    ],
)
def test_record_that_does_not_fit_is_refused(tmp_path, change, message):
    items = write_items(tmp_path, 10)
    write_record(tmp_path, items, "sft", 0, {"test": replies(items, 0.5, 0)}, **change)
    with pytest.raises(SystemExit, match=message):
        Study(tmp_path)


def test_runs_of_a_seed_that_went_on_from_different_models_are_refused(tmp_path):
    folder = tmp_path / "study"
    items = write_items(folder, 4)
    letters = {"test": replies(items, 0.5, 0)}
    for row, seed, start in (("sft", 0, "old"), ("sft", 1, "new"), ("p4d", 1, "new")):
        write_record(folder, items, row, seed, letters, settings={**SETTINGS, "start": "base"}, start_sha256=start)
    assert [*Study(folder).records["sft"]] == [0, 1]  # other seeds may
    write_record(folder, items, "p4d", 0, letters, settings={**SETTINGS, "start": "base"}, start_sha256="new")
    with pytest.raises(SystemExit, match="p4d-0 and sft-0 went on from different models 'base'"):
        Study(folder)


def test_runs_of_different_teachers_are_refused(tmp_path):
    folder = tmp_path / "study"
    items = write_items(folder, 4)
    letters = {"test": replies(items, 0.5, 0)}
    write_record(folder, items, "sft", 0, letters)
    for row, seed in (("p4d", 0), ("ld", 1)):
        write_record(folder, items, row, seed, letters, teacher_sha256="new")
    Study(folder)
    write_record(folder, items, "ld", 0, letters, teacher_sha256="old")
    with pytest.raises(SystemExit, match="ld-0 and .* learnt from different teachers"):
        Study(folder)


def test_command_writes_the_document(folder, tmp_path, monkeypatch):
    arguments = ["--document", "--records", str(folder), "--output", str(tmp_path / "STUDY.md")]
    monkeypatch.setattr(sys, "argv", ["study.py", *arguments])
    study.main()
    assert (tmp_path / "STUDY.md").read_text().startswith("# ")
    with pytest.raises(SystemExit, match=r"run examples/study\.py first"):
        study_report.write_study(tmp_path / "nothing", tmp_path / "STUDY.md")


def test_the_document_tells_how_rows_were_trained(document):
    assert "3,000 steps of 32 clips with all of their questions; muon with a learning rate of 0.001" in document
