"""Exact: which examples a mixture takes, and how sources are written."""

import json

import pytest

from onecard.config import DataConfig, Source, TrainConfig
from onecard.data.load import load_dataset
from onecard.data.mixture import mixed
from onecard.data.sources import flags_of, sources_of
from onecard.errors import UserError
from tests.conftest import make_tokenizer, write_rows

TOKENIZER = make_tokenizer()


@pytest.mark.parametrize(
    "sizes, weights, under, over",
    [
        ([100, 100, 100], [0.5, 0.3, 0.2], [100, 60, 40], [250, 150, 100]),
        ([10, 1000], [0.5, 0.5], [10, 10], [1000, 1000]),
        ([3, 5], [2, 1], [3, 2], [10, 5]),
        ([7], [1.0], [7], [7]),
        ([1, 1000], [0.0001, 1], [1, 1000], [1, 10000]),
    ],
)
def test_the_shares_are_exact(sizes, weights, under, over):
    first = mixed(sizes, weights, "first_exhausted", 0)
    every = mixed(sizes, weights, "all_exhausted", 0)
    assert [len(taken) for taken in first] == under and [len(taken) for taken in every] == over
    for size, taken, again in zip(sizes, first, every):
        assert len(set(taken)) == len(taken) and set(taken) <= set(range(size))  # none twice
        counts = [again.count(index) for index in range(size)]
        assert min(counts) >= 1 and max(counts) - min(counts) <= 1  # all, as evenly as possible


def test_the_seed_alone_chooses():
    sizes, weights = [1000, 10], [0.5, 0.5]
    first, again, other = (mixed(sizes, weights, "first_exhausted", seed) for seed in (1, 1, 2))
    assert first == again and first[0] != other[0]
    assert mixed(sizes, [], "first_exhausted", 1) == [list(range(1000)), list(range(10))]


def files(folder):
    rows = {
        "a.jsonl": [{"question": f"how many {i}?", "answer": "two"} for i in range(8)],
        "b.jsonl": [{"text": f"the lazy dog {i}"} for i in range(6)],
        "c.csv": None,
    }
    for name, each in rows.items():
        if each:
            write_rows(folder / name, each)
    (folder / "c.csv").write_text("Frage;Antwort\n" + "".join(f"how {i}?;{i}\n" for i in range(4)))
    return folder


def mixture(folder, weights=(0.5, 0.25, 0.25)):
    path = files(folder)
    return [
        {"path": str(path / "a.jsonl"), "weight": weights[0]},
        {"path": str(path / "b.jsonl"), "weight": weights[1], "max_rows": 5},
        {"path": str(path / "c.csv"), "weight": weights[2], "columns": {"prompt": "Frage", "completion": "Antwort"}},
    ]


def test_a_mixture_of_three_sources(tmp_path):
    data = TrainConfig(model="m", data=mixture(tmp_path)).data
    dataset = load_dataset(data, TOKENIZER, DataConfig())
    assert [(share.rows, share.taken, share.weight) for share in dataset.shares] == [
        (8, 8, 0.5),
        (5, 4, 0.25),
        (4, 4, 0.25),
    ]
    assert len(dataset.examples) == len(list(dataset.records)) == 16
    assert all(example.where == record.where for example, record in zip(dataset.examples, dataset.records))
    assert dataset.shares[2].cells()["columns"] == "prompt=Frage,completion=Antwort"
    assert any("leave out 1 examples" in notice for notice in dataset.notices)
    assert any("c.csv: columns are separated by semicolons" in notice for notice in dataset.notices)
    assert dataset.fingerprint() == load_dataset(data, TOKENIZER, DataConfig()).fingerprint()
    assert dataset.fingerprint() != load_dataset(data, TOKENIZER, DataConfig(seed=1)).fingerprint()


def test_without_weights_all_rows_are_taken_once(tmp_path):
    path = files(tmp_path)
    dataset = load_dataset([str(path / "a.jsonl"), str(path / "b.jsonl")], TOKENIZER, DataConfig())
    assert len(dataset.examples) == 14 and [share.weight for share in dataset.shares] == [None, None]


def test_a_repeated_row_is_on_one_side_of_a_split(tmp_path):
    dataset = load_dataset(
        TrainConfig(model="m", data=mixture(tmp_path, (0.1, 0.1, 0.8))).data,
        TOKENIZER,
        DataConfig(stopping_strategy="all_exhausted"),
    )
    assert dataset.num_documents < len(dataset.examples)
    rest, held = dataset.split(0.3, 0)
    assert not {e.where for e in rest.examples} & {e.where for e in held.examples}
    assert len(rest.examples) + len(held.examples) == len(dataset.examples)


@pytest.mark.parametrize(
    "text, path, split, weight",
    [
        ("a.jsonl", "a.jsonl", None, None),
        ("a.jsonl:0.3", "a.jsonl", None, 0.3),
        ("a.jsonl:2", "a.jsonl", None, 2.0),
        ("org/name", "org/name", None, None),
        ("org/name:main", "org/name:main", None, None),
        ("org/name:main:train", "org/name:main", "train", None),
        ("org/name:main:train[:10%]", "org/name:main", "train[:10%]", None),
        ("org/name:main:train:.5", "org/name:main", "train", 0.5),
        ("saved:test:.5", "saved", "test", 0.5),
        ("odd:0.3", "odd:0.3", None, None),
    ],
)
def test_a_source_is_written_on_the_command_line(text, path, split, weight, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "odd:0.3"):
        (tmp_path / name).write_text("")
    (tmp_path / "saved").mkdir()
    found = sources_of([text, "a.jsonl:1"] if weight else text, DataConfig())[0]
    assert (found.path, found.split, found.weight) == (path, split, weight)


@pytest.mark.parametrize(
    "data, said",
    [
        (["a:0.3", "b"], "either all sources or none"),
        ("a:0.3", "one source"),
        (["a:0", "b:1"], "above 0"),
        ([Source(path="a:0.3", weight=0.3), "b:1"], "one weight"),
    ],
)
def test_weights_that_say_nothing_are_refused(data, said):
    with pytest.raises(UserError, match=said):
        sources_of(data, DataConfig())


def test_the_settings_of_a_source_go_before_the_general_ones():
    config = DataConfig(encoding="cp1252", columns="text=a")
    first, second = sources_of([Source(path="a", encoding="utf-8", columns={}), "b"], config)
    assert (first.encoding, first.columns) == ("utf-8", {}) and (second.encoding, second.columns) == (
        "cp1252",
        {"text": "a"},
    )


def test_the_flags_of_data_name_it_again(tmp_path):
    config = TrainConfig(
        model="m", data=["a b.jsonl:0.5", "c:0.5"], columns="prompt=x y,completion=z", on_bad_rows="skip"
    )
    words = flags_of(config.data, config)
    assert words == "--data 'a b.jsonl:0.5' c:0.5 --columns 'prompt=x y,completion=z' --on-bad-rows skip"
    assert flags_of([Source(path="a")], config) is None
    assert json.loads(TrainConfig(model="m", data=[{"path": "a"}]).model_dump_json())["data"][0]["path"] == "a"
