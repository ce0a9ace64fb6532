"""The driver's ear on a training run: progress line, `log/loss.jsonl` and TensorBoard curves beside the artifact.

Training runs in other processes, perhaps on other nodes; rank 0 sends rows through a Ray queue and a thread of the
driver writes them down. On a remote root the files are written locally and copied up, at every checkpoint and every
`FLUSH_S` seconds.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from raysynth.core.progress import Progress, say
from raysynth.core.storage import LocalStorage, Storage

FLUSH_S = 20.0


class TrainingLog:
    """Use as a context manager around `trainer.fit()`; give `queue` to the workers.

    Args:
        folder: of the log, relative to the root.
        stage: name on the progress line.
        steps: optimizer steps in all.
        checkpoint_every: the file is brought up to date at every checkpoint, because a run that was killed goes on
            from there.
    """

    def __init__(self, storage: Storage, folder: str, stage: str, steps: int, checkpoint_every: int) -> None:
        from ray.util.queue import Queue

        self.queue: Any = Queue(actor_options={"num_cpus": 0})
        self.storage, self.folder, self.stage, self.steps = storage, folder, stage, steps
        self.checkpoint_every = checkpoint_every
        self._local = isinstance(storage, LocalStorage)
        self._place = Path(storage.url(folder) if self._local else tempfile.mkdtemp(prefix="raysynth-log-"))
        self._place.mkdir(parents=True, exist_ok=True)
        self._rows: list[dict[str, Any]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> TrainingLog:
        if self.storage.exists(f"{self.folder}/loss.jsonl"):
            text = self.storage.get(f"{self.folder}/loss.jsonl").decode()
            # A driver that was killed may have left half a line.
            self._rows = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(30)
        self.queue.shutdown(grace_period_s=1)

    def _listen(self) -> None:
        from tensorboardX import SummaryWriter

        curves = SummaryWriter(str(self._place), flush_secs=10)
        progress, flushed = None, time.monotonic()
        while True:
            last = due = self._stop.is_set()
            for row in self._received():
                if "resumed" in row:
                    # Steps after the checkpoint are trained, and logged, again.
                    self._rows = [r for r in self._rows if r["step"] <= row["resumed"]]
                    if row["resumed"]:
                        say(f"{self.stage}: continues at step {row['resumed']:,}")
                    if progress is None:
                        progress = Progress(self.stage, self.steps, "steps", done=row["resumed"])
                    continue
                self._rows.append(row)
                due |= row["step"] % self.checkpoint_every == 0
                for name in ("loss", "lr", "images_per_s"):
                    curves.add_scalar(name, row[name], row["step"])
                if progress is not None:
                    progress.advance(max(0, row["step"] - progress.done), facts=f"loss {row['loss']:.4f}")
            if due or time.monotonic() - flushed > FLUSH_S:
                curves.flush()
                self._flush()
                flushed = time.monotonic()
            if last:
                break
            self._stop.wait(0.5)
        curves.close()
        if progress is not None:
            progress.__exit__(None, None, None)

    def _received(self) -> list[dict[str, Any]]:
        try:
            return self.queue.get_nowait_batch(self.queue.qsize())
        except Exception:  # noqa: BLE001 - the log must never end a training run
            return []

    def _flush(self) -> None:
        text = "".join(json.dumps(row) + "\n" for row in self._rows)
        self.storage.put(f"{self.folder}/loss.jsonl", text.encode())
        if not self._local:
            for file in self._place.glob("events.*"):
                self.storage.put(f"{self.folder}/{file.name}", file.read_bytes())
