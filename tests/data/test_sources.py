"""Exact: files of every kind, folders, patterns and hub datasets give the rows that were put in, and say how."""

import gzip
import json
import shutil
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
from datasets.arrow_writer import ArrowWriter

from onecard.config import DataConfig, Source
from onecard.data.files import Reading
from onecard.data.load import load_dataset
from onecard.data.records import read_records
from onecard.errors import UserError
from tests.conftest import make_tokenizer, write_rows

TEXTS = ["the fox", "zwei Grüße"]


def texts(path, on_bad_rows="error", reading=None, **settings):
    read = read_records(Source(path=str(path), **settings), on_bad_rows, reading=reading)
    return [record.text for record in read.records], read


@pytest.mark.parametrize("mark, name", [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_separators_are_recognised_and_named(mark, name, tmp_path):
    (tmp_path / "d.csv").write_text(f"id{mark}text\n1{mark}the fox, lazy\n2{mark}zwei Grüße\n")
    found, read = texts(tmp_path / "d.csv")
    assert found == ["the fox, lazy", "zwei Grüße"]
    assert read.notices[0] == f"columns are separated by {name}"


def test_a_tsv_file_and_an_export_that_names_its_separator(tmp_path):
    (tmp_path / "d.tsv").write_text("id;x\ttext\n1\tthe fox\n")
    assert texts(tmp_path / "d.tsv")[0] == ["the fox"]
    (tmp_path / "d.csv").write_text("sep=;\nid;text\n1;the fox\n")
    found, read = texts(tmp_path / "d.csv")
    assert found == ["the fox"] and read.records[0].line == 3


def test_a_spreadsheets_export(tmp_path):
    raw = "\ufeffText;Note;;\r\nthe fox;a;;\r\nzwei Grüße;;;\r\n;;;\r\n;;;\r\n"
    (tmp_path / "d.csv").write_bytes(raw.encode())
    found, read = texts(tmp_path / "d.csv")
    assert found == TEXTS and "read Text as text" in read.notices


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252", "utf-16-le"])
@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.txt", "d.jsonl.gz"])
def test_encodings(name, encoding, tmp_path):
    content = {
        "d.jsonl": "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS),
        "d.json": json.dumps([{"text": text} for text in TEXTS], ensure_ascii=False),
        "d.csv": "text\n" + "\n".join(TEXTS),
        "d.txt": "\n\n".join(TEXTS),
    }[name.removesuffix(".gz")].encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    marked = encoding in ("utf-8", "utf-8-sig", "utf-16")
    found, read = texts(tmp_path / name, encoding=None if marked else encoding)
    assert found == TEXTS
    assert read.notices == ([] if encoding.startswith("utf-8") else [f"read as {encoding.upper()}"])


def test_utf_16_without_its_mark_is_refused(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "fox"}\n')
    with pytest.raises(UserError, match=r"encoding utf-16(.|\n)*BOM"):
        texts(tmp_path / "d.jsonl", encoding="utf-16")


def test_an_encoding_that_is_not_the_files(tmp_path):
    path = tmp_path / "d.csv"
    path.write_bytes("text\nGrüße\n".encode("utf-8-sig"))
    with pytest.raises(UserError, match="the mark of UTF-8"):
        texts(path, encoding="cp1252")
    path.write_bytes("text\nGrüße\n".encode())
    assert "also UTF-8" in texts(path, encoding="cp1252")[1].notices[0]
    path.write_bytes("text\nGrüße\nfox\n".encode("cp1252"))
    found, read = texts(path, "skip")
    assert found == ["fox"] and "--encoding cp1252" in read.bad[0].do
    path.write_bytes(b"text\na\x81\nfox\n")  # a byte that cp1252 lacks
    found, read = texts(path, "skip", encoding="cp1252")
    assert found == ["fox"] and read.bad[0].where == f"{path}:2:text"


@pytest.mark.parametrize(
    "sample_by, found",
    [
        ("paragraph", [(2, "one\ntwo"), (5, "three")]),
        ("line", [(2, "one"), (3, "two"), (5, "three")]),
        ("document", [(2, "one\ntwo\n\nthree")]),
    ],
)
def test_documents_of_a_text_file(sample_by, found, tmp_path):
    (tmp_path / "d.txt").write_text("\none\ntwo\n\nthree\n \n")
    read = texts(tmp_path / "d.txt", reading=Reading(sample_by=sample_by))[1]
    assert [(record.line, record.text.rstrip()) for record in read.records] == found


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_inside_an_object(indent, tmp_path):
    path, rows = tmp_path / "d.json", [{"text": text} for text in TEXTS]
    path.write_text(json.dumps({"version": "1", "data": rows}, indent=indent))
    found, read = texts(path)
    assert found == TEXTS and read.notices == ['rows are those of "data"; "version" is not read']
    path.write_text(json.dumps({"train": rows, "test": rows[:1]}, indent=indent))
    assert texts(path)[0] == TEXTS and texts(path, split="test")[0] == TEXTS[:1]
    with pytest.raises(UserError, match='"dev".*arrays train, test'.replace(".*", "(?s:.*)")):
        texts(path, split="dev")
    path.write_text(json.dumps({"text": "one row"}))
    assert texts(path)[0] == ["one row"]


def test_a_folder_and_a_pattern(tmp_path):
    for name, text in (("b.jsonl", "two"), ("a.jsonl", "one"), ("c.json", "three")):
        write_rows(tmp_path / name, [{"text": text}])
    (tmp_path / ".hidden.jsonl").write_text("{")
    (tmp_path / "README.md").write_text("read me")
    found, read = texts(tmp_path)
    assert found == ["one", "two", "three"] and read.notices == ["not read in the folder: README.md: 1 of 3 files"]
    assert [Path(record.file).name for record in read.records] == ["a.jsonl", "b.jsonl", "c.json"]
    assert texts(tmp_path / "*.jsonl")[0] == ["one", "two"]
    (tmp_path / "d.csv").write_text("text\nfour\n")
    with pytest.raises(UserError, match=r"3 of \.jsonl, 1 of \.csv"):
        texts(tmp_path)
    (tmp_path / "sub").mkdir()
    with pytest.raises(UserError, match="must have data files"):
        texts(tmp_path / "sub")
    with pytest.raises(UserError, match="no such file"):
        texts(tmp_path / "*.parquet")


def test_bad_rows_of_several_files_are_in_their_order(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}\n{"text": "<|im_end|>"}\n{\n')
    config = DataConfig(on_bad_rows="skip")
    dataset = load_dataset(str(tmp_path), make_tokenizer(), config)
    assert [(error.where or "").removeprefix(f"{tmp_path}/") for error in dataset.bad] == [
        "a.jsonl:2:text",
        "a.jsonl:3:row",
        "b.jsonl:2:text",
        "b.jsonl:3:row",
    ]


def test_the_first_rows_only(tmp_path):
    write_rows(tmp_path / "d.jsonl", [{"text": f"fox {i}"} for i in range(9)])
    assert texts(tmp_path / "d.jsonl", max_rows=2)[0] == ["fox 0", "fox 1"]


def test_a_split_of_a_saved_dataset(tmp_path):
    splits = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert texts(tmp_path / "saved", split="test")[0] == ["test"]
    write_rows(tmp_path / "d.jsonl", [{"text": "x"}])
    with pytest.raises(UserError, match="a split must be of"):
        texts(tmp_path / "d.jsonl", split="test")


def cached(folder, config, **splits):
    """Put a hub dataset, org/tiny, into a cache of datasets, as a download would."""
    home = folder / "org___tiny" / config / "0.0.0" / "0123456789abcdef"
    home.mkdir(parents=True)
    infos = {}
    for split, rows in splits.items():
        table = datasets.Dataset.from_list(rows)
        with ArrowWriter(path=str(home / f"tiny-{split}.arrow"), features=table.features) as writer:
            writer.write_table(table.data.table)
            writer.finalize()
        infos[split] = datasets.SplitInfo(split, num_examples=len(rows), dataset_name="tiny")
    info = datasets.DatasetInfo(
        features=table.features, builder_name="parquet", dataset_name="tiny", config_name=config, version="0.0.0"
    )
    info.splits = datasets.SplitDict(infos, dataset_name="tiny")
    info.write_to_directory(home)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def test_a_hub_dataset_of_the_cache(hub):
    cached(hub, "main", train=[{"text": "one"}, {"text": "two"}], test=[{"text": "three"}])
    found, read = texts("org/tiny")
    assert found == ["one", "two"] and read.records[1].where == "org/tiny:2"
    found, read = texts("org/tiny:main", split="test")
    assert found == ["three"] and read.records[0].where == "org/tiny:main:test:1"
    assert texts("org/tiny:main", split="train[1:]")[0] == ["two"]
    for path, split, said in (
        ("org/tiny", "dev", "dev"),
        ("org/tiny:other", None, "other"),
        ("org/none", None, "org/none"),
    ):
        with pytest.raises(UserError, match="hub dataset in reach") as error:
            texts(path, split=split)
        assert said in str(error.value)
    cached(hub, "more", train=[{"text": "four"}])
    with pytest.raises(UserError, match="main"):  # two configs, and none named
        texts("org/tiny")
    assert load_dataset("org/tiny:more", make_tokenizer(), DataConfig()).examples[0].where == "org/tiny:more:1"


def test_a_hub_dataset_without_a_split_train(hub):
    cached(hub, "main", a=[{"text": "one"}], b=[{"text": "two"}])
    with pytest.raises(UserError, match="org/tiny:CONFIG:a"):
        texts("org/tiny")
    shutil.rmtree(hub)
    cached(hub, "main", b=[{"text": "two"}])
    assert texts("org/tiny")[0] == ["two"]


def test_pictures_of_a_hub_dataset_are_refused_and_not_opened(hub):
    rows = [{"image": {"bytes": b"no picture", "path": None}, "text": "one", "question": "a", "answer": "b"}]
    cached(hub, "main", train=rows)
    with pytest.raises(UserError, match="images, videos and audio are not learned"):
        texts("org/tiny")


def test_parquet_of_a_pattern(tmp_path):
    for name in ("a", "b"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": name}]), tmp_path / f"{name}.parquet")
    assert texts(tmp_path / "?.parquet")[0] == ["a", "b"]
