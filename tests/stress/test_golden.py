"""What tests/stress/golden.py calls a difference, and what it does not."""

import copy
import json
from pathlib import Path
from typing import Any

import golden
import numpy as np
import pytest

STEP = {"key": "step", "train_loss": 6.9, "step_avg_ms": 12.5, "eta": "0:00:09"}
SIZES = {"code": 89998, "weights": 1000, "total": 90998, "cap": 16_000_000}
VALUES = {
    "metrics": [
        {"key": "config", "value": None, "SEED": "1(env)", "DEVICE": "cpu(env)"},
        {"key": "model_params", "value": 829868},
        *(STEP | {"value": f"{step}/3", "train_loss": 7.0 - step} for step in (1, 2, 3)),
        {"key": "final_ngram_exact", "value": None, "val_loss": 4.1, "val_bpb": 2.3},
        {"key": "final_artifact_bytes", "value": None} | SIZES,
        {"key": "peak_memory_mb", "value": 574},
    ],
    "artifact": {"header": {"model": {"SEED": "1", "DIM": "2"}}, "payload": "ab", "size": 3},
    "config": {"SEED": "1", "DEVICE": "cpu"},
    "submission": {"val_bpb": 2.3, "date": "2026-01-01", "sha256": {"code": "1", "artifact": "2"}},
    "scores.npz": {"logp_model": "<f8[3] ab"},
    "stream": {"shape": [1, 2, 3], "scoring": {"SCORER": "documents", "EVAL_LANES": "8"}},
    "files": ["artifact.bin", "metrics.jsonl"],
}
PLACES = {line["key"]: i for i, line in enumerate(VALUES["metrics"])}


def changed(path: str, value: Any) -> dict[str, Any]:
    """VALUES with another value at part/part/part; lines by key"""
    values = copy.deepcopy(VALUES)
    *parts, last = path.split("/")
    place: Any = values
    for part in parts:
        place = place[PLACES[part]] if isinstance(place, list) else place[part]
    place[last] = value
    return values


def places(found: dict[str, Any], unlike: tuple[str, ...] = ()) -> list[str]:
    """Of the differences from VALUES, both ways"""
    there = golden.differences(VALUES, found, unlike)
    back = golden.differences(found, VALUES, unlike)
    assert len(there) == len(back)
    return [difference.where for difference in there]


def renamed(values: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """The same with another name in the same place"""
    return {new if name == old else name: value for name, value in values.items()}


def test_equal_values_have_no_differences() -> None:
    assert places(copy.deepcopy(VALUES)) == []
    assert places(json.loads(json.dumps(VALUES))) == []


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        ("metrics/step/train_loss", np.nextafter(4.0, 5.0).item(), "metrics[step:3/3].train_loss"),
        ("metrics/step/train_loss", float("nan"), "metrics[step:3/3].train_loss"),
        ("metrics/model_params/value", 829869, "metrics[model_params:829868].value"),
        ("metrics/final_artifact_bytes/weights", 1001, "metrics[final_artifact_bytes].weights"),
        ("metrics/final_ngram_exact/val_bpb", 2, "metrics[final_ngram_exact].val_bpb"),
        ("metrics/config/SEED", "2(env)", "metrics[config].SEED"),
        ("artifact/payload", "ac", "artifact.payload"),
        ("artifact/header/model/DIM", "3", "artifact.header.model.DIM"),
        ("config/SEED", "2", "config.SEED"),
        ("submission/val_bpb", 2.4, "submission.val_bpb"),
        ("submission/sha256/artifact", "3", "submission.sha256.artifact"),
        ("scores.npz/logp_model", "<f8[3] ac", "scores.npz.logp_model"),
        ("stream/shape", [1, 2, 4], "stream.shape[2]"),
        ("stream/shape", [1, 2], "stream.shape"),
        ("files", ["artifact.bin"], "files"),
    ],
)
def test_another_value_is_a_difference(path: str, value: Any, where: str) -> None:
    there = golden.differences(VALUES, changed(path, value))
    assert [difference.where for difference in there] == [where]
    assert golden.differences(changed(path, value), VALUES)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("metrics/step/step_avg_ms", 99.0),
        ("metrics/step/eta", "1:00:00"),
        ("metrics/final_artifact_bytes/code", 1),
        ("metrics/final_artifact_bytes/total", 1001),
        ("metrics/peak_memory_mb/value", 99),
        ("submission/date", "2027-02-02"),
        ("submission/sha256/code", "9"),
    ],
)
def test_seconds_and_code_sizes_are_not_compared(path: str, value: Any) -> None:
    assert places(changed(path, value)) == []


def test_a_missing_line_is_one_difference() -> None:
    found = copy.deepcopy(VALUES)
    del found["metrics"][PLACES["step"] - 1]
    assert places(found) == ["metrics[step:2/3]"]
    assert golden.differences(VALUES, found)[0].found == golden.MISSING
    assert golden.differences(found, VALUES)[0].expected == golden.ADDED


def test_another_order_of_lines_is_a_difference() -> None:
    found = copy.deepcopy(VALUES)
    found["metrics"].reverse()
    assert places(found)


@pytest.mark.parametrize("key", ["step", "final_artifact_bytes", "peak_memory_mb"])
def test_a_renamed_key_is_a_difference(key: str) -> None:
    found = copy.deepcopy(VALUES)
    found["metrics"][PLACES[key]]["key"] = "other"
    assert places(found)


@pytest.mark.parametrize("name", ["train_loss", "eta", "step_avg_ms"])
def test_a_renamed_field_is_a_difference_even_of_seconds(name: str) -> None:
    found = copy.deepcopy(VALUES)
    line = found["metrics"][PLACES["step"]]
    found["metrics"][PLACES["step"]] = renamed(line, name, "other")
    assert places(found) == [f"metrics[step:3/3].{x}" for x in (name, "other")]


def test_the_order_of_names_is_compared_except_in_sets_of_settings() -> None:
    found = copy.deepcopy(VALUES)
    for values in (found["metrics"][0], found["config"], found["stream"]["scoring"]):
        for name in [*values][:-1]:
            values[name] = values.pop(name)
    assert places(found) == []
    header = found["artifact"]["header"]["model"]
    header["SEED"] = header.pop("SEED")
    line = found["metrics"][PLACES["final_ngram_exact"]]
    line["val_loss"] = line.pop("val_loss")
    wanted = {"metrics[final_ngram_exact] (order)", "artifact.header.model (order)"}
    assert set(places(found)) == wanted


def test_a_row_can_have_more_names_that_are_not_compared() -> None:
    assert places(changed("config/SEED", "2"), ("SEED",)) == []


def test_a_row_that_failed_is_a_difference() -> None:
    (only,) = golden.differences(VALUES, {"failed": "RowError: exit status 2"})
    assert only.found == "RowError: exit status 2"
    assert golden.differences({"failed": "x"}, {"failed": "x"})


def test_a_row_is_held_against_the_row_it_must_equal() -> None:
    names = ["tiny_1337", "tiny_resumed"]
    found = dict.fromkeys(names, VALUES)
    assert not any(golden.compare_rows(names, found, found).values())
    both = found | {"tiny_resumed": changed("artifact/payload", "ac")}
    result = golden.compare_rows(names, both, both)
    assert [len(result[name]) for name in names] == [0, 1]


def test_containers_are_taken_apart() -> None:
    header = {"model": {"DIM": "2"}}
    text = json.dumps(header).encode()
    body = b"PGOLFGPT\1\0\0\0" + len(text).to_bytes(4, "little") + text
    plain, other = (artifact(body + payload) for payload in (b"abc", b"abd"))
    assert plain["header"] == header
    assert [x.where for x in golden.differences(plain, other)] == ["payload"]
    with pytest.raises(golden.RowError):
        golden.artifact_values(body + bytes(golden.DIGEST_BYTES))


def artifact(body: bytes) -> dict[str, Any]:
    """Values of a container with a right digest"""
    return golden.artifact_values(body + bytes.fromhex(golden.sha(body)))


def test_arrays_are_compared_by_type_shape_and_contents(tmp_path: Path) -> None:
    column = np.arange(6.0)
    others = [column.astype("f4"), column.reshape(2, 3), np.append(column[:5], 9.0)]
    values = {golden.array_values(array) for array in [column, *others]}
    assert len(values) == 4
    np.savez(tmp_path / "plain.npz", a=column)
    np.savez_compressed(tmp_path / "packed.npz", a=column)
    plain, packed = (golden.column_values(tmp_path / f"{x}.npz") for x in ("plain", "packed"))
    assert plain == packed == {"a": golden.array_values(column)}


def test_printed_lines_are_sets_of_names() -> None:
    lines = [
        "config A:1(env) B:x",
        "hardware:1 x cpu threads:2",
        "group:a rate:1",
        "group:b rate:2",
    ]
    found = golden.printed_values("\n".join(lines))
    assert found["config"] == [{"": "", "A": "1(env)", "B": "x"}]
    assert found["hardware"] == [{"": "1 x cpu", "threads": "2"}]
    assert [group[""] for group in found["group"]] == ["a", "b"]
    lines[0] = "config B:x A:1(env)"
    there = {"printed": golden.printed_values("\n".join(lines))}
    assert golden.differences({"printed": found}, there) == []
    lines[0] = "config A:2(env) B:x"
    there = {"printed": golden.printed_values("\n".join(lines))}
    assert [x.where for x in golden.differences({"printed": found}, there)] == [
        "printed.config[0].A"
    ]


def test_a_second_start_is_cut_out_of_the_log() -> None:
    config, step = {"key": "config"}, {"key": "step"}
    steps = [step | {"value": f"{i}/3"} for i in (1, 2, 3)]
    lines = [config, steps[0], config, {"key": "resumed", "step": 1}, *steps[1:]]
    assert golden.without_second_start(lines) == [config, *steps]
    with pytest.raises(golden.RowError):
        golden.without_second_start([config, *steps])


def test_a_technique_that_did_nothing_fails_its_row() -> None:
    row = golden.Row("x", alive=("averages.swa_snapshots",))
    golden.require_alive(row, {"metrics": [{"key": "averages", "swa_snapshots": 2}]})
    for line in ({"key": "averages", "swa_snapshots": 0}, {"key": "other"}):
        with pytest.raises(golden.RowError):
            golden.require_alive(row, {"metrics": [line]})


def test_rows_bring_what_they_need() -> None:
    assert golden.with_needed(["decode"]) == ["data", "tiny_1337", "decode"]
    for row in golden.ROWS:
        for other in {row.needs, row.same_as} - {""}:
            names = [*golden.BY_NAME]
            assert names.index(other) < names.index(row.name)


def test_values_are_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "values.json"
    golden.write_values(path, {"revision": "1"}, {"a": VALUES, "b": {"failed": "x"}})
    assert golden.read_values(path) == ({"revision": "1"}, {"a": VALUES})
