from datasets import Dataset

from datasets_rgpt4d import data_statistics, statistics_table
from datasets_rgpt4d.schema import TRAINING_FEATURES, training_row


def row(id, source, subset, question, answer, images=(), videos=(), turns=1):
    blocks = [{"type": "image"} for _ in images] + [{"type": "video"} for _ in videos]
    messages = []
    for turn in range(turns):
        text = {"type": "text", "text": question}
        messages.append({"role": "user", "content": [*(blocks if turn == 0 else []), text]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return training_row(id, source, subset, "r", messages, images, videos)


def content(what):
    return {"path": None, "bytes": what}


ROWS = Dataset.from_list(
    [
        row("0", "vsti", "far", "a b", "c", videos=["one.mp4"]),
        row("1", "vsti", "far", "a b", "c", videos=["one.mp4"], turns=2),
        row("2", "vsti", "near", "a", "c d e", videos=["two.mp4", "one.mp4"]),
        row("0", "sat", "", "a", "b", images=[content(b"x"), content(b"y")]),
        row("1", "sat", "", "a", "b", images=[content(b"x")]),
        row("2", "sat", "", "a", "b"),
    ],
    features=TRAINING_FEATURES,
)


def words(texts, add_special_tokens):
    assert not add_special_tokens
    return {"input_ids": [text.split() for text in texts]}


def counts(rows, questions, videos, images, question_tokens, answer_tokens):
    return dict(
        rows=rows,
        questions=questions,
        videos=videos,
        images=images,
        question_tokens=question_tokens,
        answer_tokens=answer_tokens,
    )


def test_counts_are_those_of_different_media_and_of_all_turns():
    found = data_statistics(ROWS, words)
    assert found == {
        "vsti": {
            "all": counts(3, 4, 2, 0, 7, 6),
            "far": counts(2, 3, 1, 0, 6, 3),
            "near": counts(1, 1, 2, 0, 1, 3),
        },
        "sat": {"all": counts(3, 3, 0, 2, 3, 3), "-": counts(3, 3, 0, 2, 3, 3)},
        "all": {"all": counts(6, 7, 2, 2, 10, 9)},
    }


def test_counts_are_those_of_the_rows_that_are_selected():
    """Columns of a selection lie elsewhere in Arrow than the rows say."""
    found = data_statistics(ROWS.select([4, 2, 2]))
    assert found["all"]["all"] == counts(3, 3, 2, 1, None, None)
    assert found["vsti"]["near"] == counts(2, 2, 2, 0, None, None)
    part = data_statistics(ROWS.select([2, 3]))  # neighbours stay a slice of the whole
    assert part["vsti"]["near"] == counts(1, 1, 2, 0, None, None)
    assert part["sat"]["all"] == counts(1, 1, 0, 2, None, None)


def test_table_has_sources_subsets_and_sum():
    table = statistics_table(data_statistics(ROWS)).splitlines()
    assert table[0] == "| source | subset | rows | questions | videos | images |"
    assert table[2:] == [
        "| sat | all | 3 | 3 | 0 | 2 |",
        "| vsti | far | 2 | 3 | 1 | 0 |",
        "| vsti | near | 1 | 1 | 2 | 0 |",
        "| vsti | all | 3 | 4 | 2 | 0 |",
        "| all | all | 6 | 7 | 2 | 2 |",
    ]
    assert "| question tokens | answer tokens |" in statistics_table(data_statistics(ROWS, words))
