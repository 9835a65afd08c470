"""Progress of a soak on disk: cases done and findings of every part; a run can be resumed."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS_BETWEEN_WRITES = 5


class Journal:
    """File of one soak.

    A case is a pair (seed, index). A resumed part continues at the first index that is not done.

    Attributes:
      path: the JSON file; None keeps the progress in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.parts: dict[str, dict[str, Any]] = (
            json.loads(path.read_text()) if path and path.exists() else {}
        )
        self._written = 0.0

    def run(self, part: str, seed: int, count: int, check: Callable[[int, int], str]) -> list[str]:
        """Check cases up to `count`; returns the findings of this part.

        Args:
          part: name of the part; with the seed it names the entry of the file.
          seed: seed of all cases.
          count: number of cases, those of earlier runs included.
          check: `check(seed, index)` returns a word for the table ("equal", "refused") or raises.
        """
        entry = self.parts.setdefault(
            f"{part}, seed {seed}", {"done": 0, "results": {}, "findings": [], "seconds": 0.0}
        )
        results = Counter(entry["results"])
        for index in range(entry["done"], count):
            started = time.monotonic()
            try:
                results[check(seed, index)] += 1
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{Path(last.filename).name}:{last.lineno}"
                results["finding"] += 1
                entry["findings"].append(
                    f"seed {seed}, index {index}: {type(error).__name__} at {place}: {error}"[:600]
                )
                print(f"{part}: {entry['findings'][-1]}", flush=True)
            entry["done"] = index + 1
            entry["results"] = dict(results)
            entry["seconds"] += time.monotonic() - started
            self._write(is_last=index + 1 == count)
        return list(entry["findings"])

    def table(self) -> str:
        """Cases, results, findings and seconds of every part, as a Markdown table."""
        rows = ["| part | cases | results | findings | seconds |", "|---|---|---|---|---|"]
        for name, entry in self.parts.items():
            results = ", ".join(f"{word} {n:,}" for word, n in sorted(entry["results"].items()))
            rows.append(
                f"| {name} | {entry['done']:,} | {results} | {len(entry['findings'])} | "
                f"{entry['seconds']:.0f} |"
            )
        return "\n".join(rows)

    def _write(self, is_last: bool) -> None:
        now = time.monotonic()
        if self.path is None or (not is_last and now - self._written < SECONDS_BETWEEN_WRITES):
            return
        self._written = now
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.parts, indent=1))
        os.replace(new, self.path)
