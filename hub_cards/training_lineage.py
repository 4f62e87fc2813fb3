"""Where training data come from, and what they share with the benchmarks: for the cards of data and of models."""

from collections.abc import Sequence

BENCHMARKS = ("r4d_bench", "sti_bench", "vlm4d", "omnispatial", "mmsi_bench", "sat_real", "vstibench", "timebench")

# As in the column `source` of training rows. Terms of the media, which the license of annotations does not cover.
LINEAGE = {
    "vsti": "Questions: VSTI-Bench's training part (VLM-3R), made by templates from ScanNet's geometry. Videos: ScanNet, "
    "training scenes, under ScanNet's terms of use, which do not allow passing them on.",
    "wolf": "Captions: Wolf's nuScenes part, by models from nuScenes' annotations. Questions: made from the captions by whoever "
    "prepared the data, for the paper's own were never published. Videos: nuScenes, CC BY-NC-SA 4.0.",
    "robofac": "Questions and videos: RoboFAC's training part, simulated robot arms; its code has the MIT license.",
    "sat": "Questions and images: SAT's training part, rendered rooms, MIT.",
    "world4d": "Questions and videos: rendered by rgpt4d.",
}

# Of pairs that are not here nothing is known but that their authors name no common origin.
OVERLAPS = {
    (
        "vsti",
        "vstibench",
    ): "No common video: training has ScanNet's training scenes, the test its validation scenes. The "
    "kinds of question and their templates are the same, so this test measures a task that was trained.",
    ("vsti", "sti_bench"): "STI-Bench's indoor videos are from ScanNet. Whether they are of training scenes is not "
    "established: common scenes are possible. The questions differ.",
    (
        "vsti",
        "r4d_bench",
    ): "R4D-Bench's questions from STI-Bench include its indoor videos, which are from ScanNet. Whether "
    "they are of training scenes is not established: common scenes are possible.",
    (
        "vsti",
        "timebench",
    ): "TimeBench is made of videos of STI-Bench, among which are indoor ones from ScanNet: common scenes "
    "are possible. The questions differ.",
    (
        "vsti",
        "mmsi_bench",
    ): "MMSI-Bench's images come from several public data sets. Whether ScanNet's training scenes are among "
    "them was not established.",
    (
        "wolf",
        "mmsi_bench",
    ): "MMSI-Bench's images come from several public data sets. Whether nuScenes is among them was not established.",
    ("wolf", "sti_bench"): "No common video is known: STI-Bench's outdoor videos are from Waymo, not from nuScenes.",
    (
        "sat",
        "sat_real",
    ): "No common image: training has rendered rooms, the test photographs. The authors and most kinds of "
    "question are the same.",
}
NO_KNOWN_OVERLAP = "No common origin of videos or images is named by the authors; the items were not compared."
RENDERED = "Nothing in common: every training clip is rendered by rgpt4d's own code."


def training_overlaps(sources: Sequence[str], benchmarks: Sequence[str] = BENCHMARKS) -> list[dict[str, str]]:
    """`{"train", "test", "note"}` for every pair, as `model_card` and `training_data_card` take them.

    Raises: `ValueError` for a source or a benchmark of which nothing is known here.
    """
    unknown = sorted({*sources} - {*LINEAGE}) + sorted({*benchmarks} - {*BENCHMARKS})
    if unknown:
        raise ValueError(f"nothing is known here of {unknown}; known are {sorted(LINEAGE)} and {list(BENCHMARKS)}")
    return [
        {
            "train": source,
            "test": benchmark,
            "note": RENDERED if source == "world4d" else OVERLAPS.get((source, benchmark), NO_KNOWN_OVERLAP),
        }
        for source in sources
        for benchmark in benchmarks
    ]
