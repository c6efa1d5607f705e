"""Where numbers go: ``metrics.jsonl`` always, TensorBoard events by choice, progress on stderr."""

import json
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any


class Writer:
    """Appends one JSON object a line; lines after ``resume_step`` of an earlier attempt go."""

    def __init__(self, workdir: str | pathlib.Path, resume_step: int = 0, tensorboard: bool = True):
        """Open ``workdir/metrics.jsonl`` and, if asked, an event file beside it."""
        self.path = pathlib.Path(workdir) / "metrics.jsonl"
        _truncate(self.path, resume_step)
        self._file = self.path.open("a")
        self._events = (
            _Events(pathlib.Path(workdir) / "tensorboard", resume_step) if tensorboard else None
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record scalars at a step; not-finite ones become null, which JSON can hold."""
        line = {"step": step, **{k: _plain(v) for k, v in values.items()}}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._events is not None:
            self._events.write(step, values)

    def close(self) -> None:
        """Flush and close the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def write_json(path: pathlib.Path, content: Any) -> None:
    """Put a JSON file in place at once: readers see the old or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)


class Silent:
    """In the place of a Writer or a Progress, in processes that leave it to the first."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def update(self, done: int, note: str = "") -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def read(workdir: str | pathlib.Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; a last line that was cut short is left out."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    out = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return out


def _truncate(path: pathlib.Path, step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in read(path.parent) if line.get("step", 0) <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    temporary.replace(path)


def _plain(value: Any) -> float | None:
    number = float(value)
    return number if number - number == 0 else None  # inf - inf and nan are not 0


class _Events:
    """TensorBoard's own event writer; TensorFlow is not needed."""

    def __init__(self, folder: pathlib.Path, resume_step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        # Any: their classes are made at import, where no type checker sees them
        self._event_pb: Any = event_pb2
        self._summary_pb: Any = summary_pb2
        self._writer = EventFileWriter(str(folder))
        if resume_step:  # tells TensorBoard to drop what a killed attempt wrote beyond
            log = self._event_pb.SessionLog(status=self._event_pb.SessionLog.START)
            self._add(resume_step + 1, session_log=log)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        summary = self._summary_pb.Summary
        scalars = [summary.Value(tag=k, simple_value=float(v)) for k, v in values.items()]
        self._add(step, summary=summary(value=scalars))

    def _add(self, step: int, **content: Any) -> None:
        event = self._event_pb.Event(wall_time=time.time(), step=step, **content)
        self._writer.add_event(event)

    def close(self) -> None:
        self._writer.close()


class Progress:
    """A bar on a terminal; elsewhere one plain line every ``every`` seconds."""

    def __init__(
        self, what: str, total: int, start: int = 0, every: float = 15.0, unit: str = "step"
    ):
        """Begin at ``start`` of ``total`` units."""
        self.what, self.total, self.unit = what, total, unit
        self._every, self._last, self._t0, self._start = every, time.time(), time.time(), start
        self._bar = None
        if sys.stderr.isatty():
            import tqdm

            self._bar = tqdm.tqdm(
                total=total, initial=start, desc=what, unit=unit, unit_scale=True, leave=False
            )

    def update(self, done: int, note: str = "") -> None:
        """Say how far it is."""
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._bar.n)
        elif time.time() - self._last >= self._every:
            self._last = time.time()
            rate = (done - self._start) / max(self._last - self._t0, 1e-9)
            print(
                f"{self.what}: {done}/{self.total} {self.unit} ({rate:,.1f}/s) {note}",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
