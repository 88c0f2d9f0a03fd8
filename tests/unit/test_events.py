from __future__ import annotations

from pathlib import Path

from edgelam_fl.telemetry.events import EventLog, EventTail, read_events


def numbers(path: Path) -> list[int]:
    return [event["number"] for event in read_events(path)]


def test_events_come_as_they_were_written(tmp_path: Path) -> None:
    log, tail = EventLog(tmp_path / "new" / "events.jsonl"), EventTail(tmp_path / "new" / "events.jsonl")
    log("step", number=1)
    assert [event["number"] for event in tail.poll()] == [1]
    log("step", number=2)
    with log.path.open("a") as half:
        half.write('{"event": "st')
    assert [event["number"] for event in tail.poll()] == [2]
    assert numbers(log.path) == [1, 2]


def test_a_log_with_a_limit_begins_anew_and_keeps_one_older_file(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log, tail = EventLog(path, most_bytes=1000), EventTail(path)
    heard: list[int] = []
    for number in range(100):
        log("step", number=number, text="." * 50)
        heard += [event["number"] for event in tail.poll()]
        assert path.stat().st_size < 1000 + 150
    assert heard == list(range(100)), "whoever follows misses nothing that was there when it looked"
    kept = numbers(path.with_name("events.jsonl.old")) + numbers(path)
    assert kept == list(range(100 - len(kept), 100))
    assert 1000 <= path.with_name("events.jsonl.old").stat().st_size < 1150
    assert sorted(file.name for file in tmp_path.iterdir()) == ["events.jsonl", "events.jsonl.old"]
    log.close()
    log("step", number=100)
    assert numbers(path)[-1] == 99, "a closed log stays as it is"


def test_a_limit_counts_what_an_earlier_process_wrote(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"number": 0}\n' * 10)
    EventLog(path, most_bytes=100)("step", number=1)
    assert numbers(path) == [1]


def test_without_a_limit_it_grows(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    for number in range(100):
        log("step", number=number)
    assert numbers(log.path) == list(range(100))
