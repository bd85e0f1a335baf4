"""The parts of ``cvworker bulk`` that need no Ray: manifests, stores, records, partitions, samples and suspects."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer

from cvworker.bulk import manifest as manifests
from cvworker.bulk.partitions import SCHEMA, Partitions, name_of
from cvworker.bulk.record import RECORD, Record, begun, check_same
from cvworker.bulk.samples import dumps, loads
from cvworker.bulk.store import FolderStore, S3Store, open_store
from cvworker.bulk.suspects import KILLS, Ledger
from cvworker.errors import StartupError, WorkerFailed
from world import BIN, MEAN


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.Session().client("s3")
    client.create_bucket(Bucket="pictures")
    yield client
    for entry in client.list_objects_v2(Bucket="pictures").get("Contents", []):
        client.delete_object(Bucket="pictures", Key=entry["Key"])
    client.delete_bucket(Bucket="pictures")
    server.stop()


# manifests


def test_parquet_csv_and_json_lines_of_the_same_rows_are_the_same_manifest(tmp_path: Path) -> None:
    rows = [{"image_url": f"https://example.com/{n}.jpg", "id": str(n), "metadata": {"lot": "a"}} for n in range(3)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "m.csv").write_text(
        "id,image_url,metadata.lot\n" + "".join(f"{row['id']},{row['image_url']},a\n" for row in rows)
    )
    numbered = [{**row, "id": int(row["id"]), "another": 1.5} for row in rows]  # as tables have them
    pq.write_table(pa.Table.from_pylist(numbered), tmp_path / "m.parquet")
    found = [manifests.read(str(tmp_path / f"m.{suffix}")) for suffix in ("jsonl", "csv", "parquet")]
    assert len({each.digest for each in found}) == 1
    assert [json.loads(body) for body in found[0].bodies] == rows


def test_a_file_that_send_takes_is_a_manifest_and_its_callbacks_are_left_out(tmp_path: Path) -> None:
    line = {"image_url": "https://example.com/1.jpg", "callback_url": "https://example.com/", "more": 1}
    (tmp_path / "m.jsonl").write_text(json.dumps(line) + "\n\nhttps://example.com/2.jpg\n")
    bodies = manifests.read(str(tmp_path / "m.jsonl")).bodies
    assert [json.loads(body) for body in bodies] == [
        {"image_url": "https://example.com/1.jpg"},
        {"image_url": "https://example.com/2.jpg"},
    ]


def test_a_folder_s_images_are_rows_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.png", "a/c.JPG", "a/.hidden.jpg", "notes.txt", "_tmp/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = manifests.read(str(tmp_path))
    assert [json.loads(body)["image_url"] for body in found.bodies] == ["a/c.JPG", "b.png"]
    assert found.base == tmp_path


def test_a_folder_of_parquet_files_without_images_is_one_manifest(tmp_path: Path) -> None:
    for n in range(2):
        table = pa.table({"image_url": [f"https://example.com/{n}.jpg"], "metadata": ['{"n": 1}']})
        pq.write_table(table, tmp_path / f"part-{n}.parquet")
    bodies = [json.loads(body) for body in manifests.read(str(tmp_path)).bodies]
    assert bodies[1] == {"image_url": "https://example.com/1.jpg", "metadata": {"n": 1}}


def test_a_prefix_and_a_manifest_in_s3(s3: Any) -> None:
    s3.put_object(Bucket="pictures", Key="in/a b.jpg", Body=b"")
    s3.put_object(Bucket="pictures", Key="in/notes.txt", Body=b"")
    s3.put_object(Bucket="pictures", Key="lists/m.jsonl", Body=b'{"image_url": "s3://pictures/in/a b.jpg"}')
    expected = [{"image_url": "s3://pictures/in/a b.jpg"}]
    for source in ("s3://pictures/in/", "s3://pictures/lists/m.jsonl"):
        found = manifests.read(source)
        assert [json.loads(body) for body in found.bodies] == expected
        assert found.buckets == {"pictures"}


BAD_MANIFESTS = {
    "no such column": ("m.csv", b"url,id\nhttps://example.com/1.jpg,1\n", "line 1: the column 'url'"),
    "no such column in a line": ("m.jsonl", b'{"url": "https://example.com/1.jpg"}\n', "no image_url in any row"),
    "empty": ("m.jsonl", b"", "is empty"),
    "only a header": ("m.csv", b"image_url\n", "is empty"),
    "a broken line": ("m.jsonl", b'{"image_url": "https://example.com/1.jpg"}\n{"image_url": \n', "line 2: not JSON"),
    "a cell too many": ("m.csv", b"image_url\nhttps://example.com/1.jpg,x\n", "line 2: has more cells"),
    "not text": ("m.jsonl", b"\xff\xd8\xff\xe0", "not UTF-8"),
    "not Parquet": ("m.parquet", b"PAR1 and no more", "cannot be read as Parquet"),
}


@pytest.mark.parametrize("kind", BAD_MANIFESTS)
def test_a_bad_manifest_is_one_line_with_exit_code_2_and_nothing_is_written(kind: str, tmp_path: Path) -> None:
    name, content, expected = BAD_MANIFESTS[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StartupError, match=expected) as raised:
        manifests.read(str(tmp_path / name))
    assert str(raised.value).startswith("input: ")


def test_a_parquet_without_image_url_names_the_columns_it_has(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["https://example.com/1.jpg"]}), tmp_path / "m.parquet")
    with pytest.raises(StartupError, match=r"has no column image_url .its columns: url"):
        manifests.read(str(tmp_path / "m.parquet"))


def test_what_does_not_exist_and_a_folder_without_images_are_told(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="does not exist"):
        manifests.read(str(tmp_path / "none.csv"))
    with pytest.raises(StartupError, match="is empty: it names no image"):
        manifests.read(str(tmp_path))


def test_the_command_tells_a_bad_manifest_in_one_line(tmp_path: Path) -> None:
    command = [BIN / "cvworker", "bulk", "--module", MEAN, "--input", "none.csv", "--output", "results"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "cvworker bulk: input: none.csv does not exist\n")
    assert list(tmp_path.iterdir()) == []


def test_without_ray_the_command_says_how_to_install_it(tmp_path: Path) -> None:
    hide = "import sys; sys.modules['ray'] = None; import cvworker.cli as c; sys.exit(c.main(sys.argv[1:]))"
    command = [BIN / "python", "-c", hide, "bulk", "--module", MEAN, "--input", ".", "--output", "results"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "cvworker bulk: bulk needs Ray and PyArrow: pip install 'cvworker[ray]'\n"


# where results go


def test_a_file_in_a_folder_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FolderStore(tmp_path / "a" / "results")
    assert store.names() == set()
    store.write("one", b"1")
    monkeypatch.setattr("os.fsync", _full_disk)
    with pytest.raises(WorkerFailed, match="two could not be written: No space left"):
        store.write("two", b"2")
    assert store.names() == {"one"}
    assert [path.name for path in (tmp_path / "a" / "results").iterdir()] == ["one"]


def _full_disk(_fd: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_second_run_on_one_folder_is_kept_out(tmp_path: Path) -> None:
    with (
        FolderStore(tmp_path).alone(),
        pytest.raises(StartupError, match="another run is writing"),
        FolderStore(tmp_path).alone(),
    ):
        pass


def test_an_output_that_is_no_folder_is_told_before_anything_is_done(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StartupError, match=r"output: .*file/results cannot be written"):
        FolderStore(tmp_path / "file" / "results").names()


def test_a_prefix_in_s3_is_a_store_like_a_folder(s3: Any) -> None:
    store = open_store("s3://pictures/results/")
    assert store.names() == set()
    store.write("part", b"1")
    assert store.names() == {"part"}
    assert store.read("part") == b"1"
    assert s3.get_object(Bucket="pictures", Key="results/part")["Body"].read() == b"1"
    assert S3Store("s3://pictures").names() == {"results/part"}
    with pytest.raises(StartupError, match="output: s3://no-such-bucket/results cannot be listed"):
        open_store("s3://no-such-bucket/results").names()


# going on


def record(**more: Any) -> Record:
    values: dict[str, Any] = {
        "input": "m.csv",
        "input_digest": "sha256:1",
        "rows": 5,
        "partition_rows": 2,
        "module": "mean",
        "module_digest": None,
        "weights": None,
        "precision": "fp32",
        "forms": ("channels-last",),
    }
    return Record(**{**values, **more})


@pytest.mark.parametrize(
    ("name", "value", "setting"),
    [
        ("input_digest", "sha256:2", "input"),
        ("module", "another", "module"),
        ("module_digest", "sha256:2", "module"),
        ("weights", "sha256:2", "weights"),
        ("partition_rows", 3, "partition_rows"),
    ],
)
def test_a_run_with_other_work_than_the_output_holds_is_refused(name: str, value: Any, setting: str) -> None:
    with pytest.raises(StartupError, match=f"^{setting}: results was begun with another one"):
        check_same(record(), record(**{name: value}), "results")


def test_a_run_with_the_same_work_goes_on_whatever_it_calls_its_input(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.write(RECORD, record().dump())
    before = begun(store, store.names())
    assert before == record()
    check_same(before, record(input="./m.csv", precision="", forms=()), store.place)


def test_a_folder_with_files_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_bytes(b"")
    with pytest.raises(StartupError, match=r"not of a bulk run .thesis.tex"):
        begun(FolderStore(tmp_path), {"thesis.tex"})
    with pytest.raises(StartupError, match="none that this version can go on from"):
        Record.load(b"{}", "results")


# partitions


def results(rows: list[int]) -> pa.Table:
    return pa.Table.from_pylist([{"row": row, "id": str(row), "status": "ok"} for row in rows], schema=SCHEMA)


class Dictionary(dict[str, bytes]):
    """A store in memory, for an invariant that is tried over and over."""

    place = "memory"

    def write(self, name: str, data: bytes) -> None:
        assert name not in self
        self[name] = data


@given(st.integers(1, 40), st.integers(1, 15), st.randoms())
@settings(deadline=None, max_examples=50)
def test_partitions_are_written_once_whole_whatever_the_order_of_their_rows(rows: int, size: int, random: Any) -> None:
    store = Dictionary()
    partitions = Partitions(store, rows, size, set())  # type: ignore[arg-type]
    assert partitions.rows_left() == rows
    order = list(range(rows))
    random.shuffle(order)
    for row in order:
        partitions.add(results([row]))
    assert partitions.left == []
    read = [pq.read_table(io.BytesIO(store[name]))["row"].to_pylist() for name in sorted(store)]
    assert [row for part in read for row in part] == list(range(rows))
    assert [len(part) for part in read[:-1]] == [size] * (len(read) - 1)


def test_partitions_that_are_there_are_not_left_to_do(tmp_path: Path) -> None:
    partitions = Partitions(FolderStore(tmp_path), 5, 2, {name_of(0), name_of(2), "_manifest.json"})
    assert partitions.left == [1]
    assert partitions.rows_left() == 2


def test_a_row_that_comes_twice_is_not_written_as_two(tmp_path: Path) -> None:
    partitions = Partitions(FolderStore(tmp_path), 2, 2, set())
    with pytest.raises(WorkerFailed, match="rows missing or twice"):
        partitions.add(results([1, 1]))
    assert list(tmp_path.iterdir()) == []


# samples


def test_samples_of_every_kind_come_back_as_they_were() -> None:
    turned = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4).permute(2, 0, 1)
    sample = {
        "turned": turned,
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "tree": (1, 2.5, "text", [torch.tensor([True])]),
    }
    found = loads(memoryview(dumps(sample)))
    for name in ("turned", "scalar", "empty", "half"):
        assert found[name].dtype == sample[name].dtype  # type: ignore[union-attr]
        assert torch.equal(found[name], sample[name])  # type: ignore[arg-type]
    assert found["tree"][:3] == (1, 2.5, "text")
    found["turned"][0] = 0  # memory of its own, that may be written to


def test_a_sample_costs_little_more_than_its_pixels() -> None:
    assert len(dumps(torch.zeros(3, 224, 224, dtype=torch.uint8))) < 3 * 224 * 224 + 500


# suspects


def test_rows_in_hand_when_a_process_ends_are_suspects_and_the_others_are_not() -> None:
    ledger = Ledger()
    assert ledger.begin("process", [1, 2]) == [0, 0]
    ledger.end("process", [1, 2])
    assert ledger.begin("process", [3, 4]) == [0, 0]  # and the process ends
    assert ledger.begin("process", [1, 2]) == [0, 0]
    assert ledger.begin("process", [3, 4]) == [1, 1]
    assert ledger.begin("preprocess", [3, 4]) == [0, 0]


def test_only_the_row_that_ends_a_second_process_alone_is_guilty() -> None:
    ledger = Ledger()
    ledger.begin("process", [1, 2, 3])  # ends the process
    assert ledger.begin("process", [1, 2, 3]) == [1, 1, 1]  # now one by one
    ledger.enter("process", 1)
    ledger.leave("process", 1)
    ledger.enter("process", 2)  # ends the process
    kills = ledger.begin("process", [1, 2, 3])
    assert [each >= KILLS for each in kills] == [False, True, False]
    ledger.end("process", [1, 2, 3])
    assert ledger.begin("process", [1, 2, 3]) == [0, 0, 0]


def test_starts_are_counted_until_a_row_is_done() -> None:
    ledger = Ledger()
    assert [ledger.started("process") for _ in range(3)] == [1, 2, 3]
    ledger.end("process", [1])
    assert ledger.started("process") == 1
