import json
from collections import Counter

import pytest
import yaml
from datasets import Dataset
from datasets.distributed import split_dataset_by_node

from datasets_rgpt4d import Mixture, SourceShare
from datasets_rgpt4d.mixture import TABLE_A4


def source(name, count, subsets=("near", "far")):
    rows = [{"id": str(i), "source": name, "subset": subsets[i % len(subsets)]} for i in range(count)]
    return Dataset.from_list(rows)


SOURCES = {"vsti": source("vsti", 60), "wolf": source("wolf", 20), "sat": source("sat", 7)}


def names(rows):
    return [f"{row['source']} {row['id']}" for row in rows]


def mixture(seed=0, **shares):
    return Mixture({name: SourceShare(**share) for name, share in shares.items()}, seed)


def test_rows_of_table_a4_add_one_source_each():
    assert [Mixture.named(name).sources.keys() for name in ("V", "V+W", "V+W+R", "V+W+R+S")] == [
        {"vsti"},
        {"vsti", "wolf"},
        {"vsti", "wolf", "robofac"},
        {"vsti", "wolf", "robofac", "sat"},
    ]
    shares = [share for name in TABLE_A4 for share in Mixture.named(name).sources.values()]
    assert set(shares) == {SourceShare(weight=1.0, cap=None, subsets=())}
    with pytest.raises(ValueError, match=r"'V\+R' is no row of Table A4; expected one of V, V\+W, "):
        Mixture.named("V+R")


def test_weight_is_how_often_a_row_comes():
    mixed = mixture(vsti={"weight": 0.5}, wolf={"weight": 2}, sat={"weight": 1.4}).epoch(SOURCES)
    counts = Counter(names(mixed))
    of = {name: [n for key, n in counts.items() if key.startswith(name)] for name in SOURCES}
    assert of["vsti"] == [1] * 30 and of["wolf"] == [2] * 20
    assert sorted(of["sat"]) == [1] * 4 + [2] * 3  # round(1.4 * 7) = 10


def test_epochs_draw_other_rows_and_orders_but_the_same_cap():
    mixed = mixture(vsti={"weight": 0.5}, wolf={"cap": 5})
    first, second = mixed.epoch(SOURCES, 0), mixed.epoch(SOURCES, 1)

    def of(rows, name):
        return {one for one in names(rows) if one.startswith(name)}

    assert of(first, "wolf") == of(second, "wolf") and len(of(first, "wolf")) == 5
    assert of(first, "vsti") != of(second, "vsti")
    assert of(first, "wolf") != {f"wolf {i}" for i in range(5)}
    assert names(first) == names(mixed.epoch(SOURCES, 0))
    assert names(first) != names(mixture(1, vsti={"weight": 0.5}, wolf={"cap": 5}).epoch(SOURCES, 0))


def test_epoch_does_not_depend_on_the_order_of_sources_or_on_other_sources():
    one = mixture(vsti={}, wolf={}).epoch(SOURCES)
    other = mixture(wolf={}, vsti={}).epoch(dict(reversed(SOURCES.items())))
    assert names(one) == names(other)
    # A row drawn from a source does not change when its rows stand in another order
    backwards = SOURCES["vsti"].select(range(59, -1, -1))
    half = mixture(vsti={"weight": 0.5, "cap": 40})
    assert {*names(half.epoch(SOURCES))} == {*names(half.epoch({"vsti": backwards}))}


def test_epoch_is_shuffled_over_sources():
    order = [name.split()[0] for name in names(mixture(vsti={}, wolf={}).epoch(SOURCES))]
    changes = sum(a != b for a, b in zip(order, order[1:], strict=False))
    assert changes > 15  # 60 and 20 rows one after the other would change once


def test_subsets_are_chosen_before_the_cap():
    mixed = mixture(vsti={"subsets": ("far",), "cap": 25}).epoch(SOURCES)
    assert {*mixed["subset"]} == {"far"} and len(mixed) == 25
    with pytest.raises(ValueError, match=r"vsti has no subset \['afar'\]; it has \['far', 'near'\]"):
        mixture(vsti={"subsets": ("afar",)}).epoch(SOURCES)


def test_missing_or_empty_source_is_an_error():
    with pytest.raises(ValueError, match=r"sources \['robofac'\] are missing; there are \['sat', 'vsti', 'wolf'\]"):
        Mixture.named("V+W+R").epoch(SOURCES)
    with pytest.raises(ValueError, match=r"sources \['wolf'\] have no rows"):
        mixture(vsti={}, wolf={}).epoch({**SOURCES, "wolf": SOURCES["wolf"].select([])})


@pytest.mark.parametrize("share", [{"weight": 0}, {"weight": -1}, {"weight": float("nan")}, {"cap": 0}])
def test_share_that_takes_nothing_is_an_error(share):
    with pytest.raises(ValueError, match="leave a source out of the mixture instead"):
        SourceShare(**share)


def test_mixture_goes_to_yaml_and_back(tmp_path):
    mixed = mixture(3, vsti={"weight": 0.5, "subsets": ("near",)}, sat={"cap": 3}, wolf={})
    file = tmp_path / "mixture.yaml"
    file.write_text(yaml.safe_dump(mixed.to_dict()))
    assert Mixture.from_yaml(file) == mixed
    file.write_text("sources: {vsti: , wolf: {weight: 2}}")  # a source without a word is taken whole
    assert Mixture.from_yaml(file) == mixture(vsti={}, wolf={"weight": 2})
    for text, message in (
        ("sources: {vsti: {weigth: 2}}", r"unknown keys \['vsti.weigth'\]"),
        ("source: {vsti: {}}", "needs a mapping `sources`"),
        ("{sources: {vsti: {}}, epochs: 2}", r"unknown keys \['epochs'\]"),
        ("sources: {vsti: {weight: 0}}", "mixture.yaml: A weight must be positive"),
        ("sources: {vsti: {weight: much}}", "mixture.yaml"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            Mixture.from_yaml(file)


def test_epoch_as_a_stream_resumes_exactly_at_every_row():
    mixed = mixture(vsti={"weight": 0.5}, wolf={"weight": 2}).epoch(SOURCES)
    whole = names(mixed)
    for place in range(len(whole)):
        stream = mixed.to_iterable_dataset(num_shards=4)
        rows = iter(stream)
        for _ in range(place):
            next(rows)
        again = mixed.to_iterable_dataset(num_shards=4)
        again.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        assert names(again) == whole[place:] == names(mixed.skip(place))


def streams(shards=2):
    return {name: rows.to_iterable_dataset(num_shards=shards) for name, rows in SOURCES.items()}


NUM_ROWS = {"vsti": 60, "wolf": 20, "sat": 7}


def test_stream_resumes_exactly_at_every_row():
    mixed = mixture(vsti={"weight": 0.5}, wolf={"weight": 2}, sat={})

    def stream():
        return mixed.stream(streams(), NUM_ROWS, rows_shuffled=10)

    whole = names(stream())
    assert whole == names(stream()) and whole != names(mixed.stream(streams(), NUM_ROWS, epoch=1, rows_shuffled=10))
    for place in range(len(whole)):
        started = stream()
        rows = iter(started)
        for _ in range(place):
            next(rows)
        again = stream()
        again.load_state_dict(json.loads(json.dumps(started.state_dict())))
        assert names(again) == whole[place:], place


def test_stream_has_every_row_as_often_as_its_weight_says():
    mixed = mixture(vsti={"weight": 0.5}, wolf={"weight": 2}, sat={})
    counts = Counter(names(mixed.stream(streams(), NUM_ROWS, rows_shuffled=10)))
    of = {name: [n for key, n in counts.items() if key.startswith(name)] for name in SOURCES}
    assert of["wolf"] == [2] * 20 and of["sat"] == [1] * 7
    assert {*of["vsti"]} == {1} and 15 < len(of["vsti"]) < 45  # 30 of 60 coins: 4 deviations to each side
    whole = names(mixed.stream(streams(), NUM_ROWS, rows_shuffled=10))
    assert [one for one in whole if one.startswith("sat")] != [f"sat {i}" for i in range(7)]
    assert len({one.split()[0] for one in whole[:20]}) > 1  # sources take turns


def test_stream_shuffles_each_block_in_its_own_way():
    order = [int(name.split()[1]) for name in names(mixture(vsti={}).stream(streams(1), NUM_ROWS, rows_shuffled=20))]
    blocks = [[place - start for place in order[start : start + 20]] for start in (0, 20, 40)]
    assert all(sorted(block) == [*range(20)] for block in blocks)
    assert len({tuple(block) for block in [*blocks, [*range(20)]]}) == 4


def test_stream_takes_subsets_and_refuses_caps():
    rows = list(mixture(vsti={"subsets": ("far",)}).stream(streams(), NUM_ROWS))
    assert len(rows) == 30 and {row["subset"] for row in rows} == {"far"}
    with pytest.raises(ValueError, match="vsti has a cap, which a stream cannot keep"):
        mixture(vsti={"cap": 3}).stream(streams(), NUM_ROWS)


def test_ranks_share_a_stream_without_common_rows():
    mixed = mixture(vsti={}, wolf={})
    parts = [
        names(split_dataset_by_node(mixed.stream(streams(), NUM_ROWS, rows_shuffled=10), rank, 2)) for rank in (0, 1)
    ]
    assert len(parts[0]) + len(parts[1]) == len({*parts[0], *parts[1]}) == 80
