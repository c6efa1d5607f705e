"""Numbers are written once, survive a resume, and TensorBoard reads them without TensorFlow."""

import json
import sys

from saex import metrics


def test_lines_after_the_resumed_step_are_dropped_and_nothing_stands_twice(tmp_path):
    writer = metrics.Writer(tmp_path, tensorboard=False)
    for step in (1, 2, 3):
        writer.write(step, {"loss": step / 2})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut short by a kill
    writer = metrics.Writer(tmp_path, resume_step=2, tensorboard=False)
    writer.write(3, {"loss": 9.0})
    writer.close()
    assert [(m["step"], m["loss"]) for m in metrics.read(tmp_path)] == [
        (1, 0.5),
        (2, 1.0),
        (3, 9.0),
    ]


def test_numbers_that_json_cannot_hold_become_null(tmp_path):
    writer = metrics.Writer(tmp_path, tensorboard=False)
    writer.write(1, {"a": float("nan"), "b": float("inf"), "c": 1})
    writer.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 1, "a": None, "b": None, "c": 1.0}


def test_tensorboard_reads_the_events(tmp_path):
    writer = metrics.Writer(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, {"loss": step / 2})
    writer.close()
    writer = metrics.Writer(tmp_path, resume_step=2)
    writer.write(3, {"loss": 7.0})
    writer.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 1.0), (3, 7.0)]
    assert "tensorflow" not in sys.modules


def test_without_a_terminal_progress_is_a_plain_line_now_and_then(capsys):
    progress = metrics.Progress("train", 100, every=0.0)
    progress.update(7, "loss 1")
    progress.close()
    assert capsys.readouterr().err.startswith("train: 7/100 step (")
