"""Results in files: runs on one machine, and their records by setting."""

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax

from layerwise_jax.cost import DEVICES, DeviceSpec

Record = Mapping[str, Any]


class Setting(NamedTuple):
    """Devices, network and sequences; strategies are compared within one setting."""

    device: str
    devices: int
    layers: int
    width: int
    mlp: int
    dtype: str
    batch: int
    context: int

    @property
    def layer_bytes(self) -> int:
        """Bytes of a layer's weights."""
        parameters = 4 * self.width**2 + 2 * self.width * self.mlp
        return parameters * (4 if self.dtype == "float32" else 2)

    def __str__(self) -> str:
        kind = self.device.removeprefix("NVIDIA ")
        return (
            f"{self.devices} x {kind}, {self.layers} x d={self.width}, batch {self.batch}, "
            f"context {self.context:,}"
        )


@dataclass(frozen=True)
class Run:
    """One file of results: machine, versions, date, command, records.

    Attributes:
      name: of the file, without its ending.
      machine: its devices' kinds under "gpus" (empty where they are emulated), their number under
        "count", and "cpu".
      versions: of what it ran with.
      date: when.
      command: how.
      records: what was measured.
    """

    name: str
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    date: str
    command: str
    records: Sequence[Record]

    @property
    def device(self) -> str:
        """Kind of the devices."""
        return self.machine["gpus"][0] if self.machine["gpus"] else "CPU"

    @property
    def spec(self) -> DeviceSpec | None:
        """Known figures of the device; None for an unknown one."""
        return next((device for device in DEVICES if device.name == self.device), None)

    @property
    def is_emulated(self) -> bool:
        return not self.machine["gpus"]

    def settings(self) -> dict[Setting, list[Record]]:
        """Records of strategies, by setting."""
        found: dict[Setting, list[Record]] = defaultdict(list)
        for record in self.records:
            if record["kind"] == "decode":
                model = record["model"]
                width = model["heads"] * model["head_dim"]
                network = (model["layers"], width, model["mlp"], model["dtype"])
                key = Setting(
                    self.device, self.machine["count"], *network, record["batch"], record["context"]
                )
                found[key].append(record)
        return dict(found)

    def __str__(self) -> str:
        kinds = self.machine["gpus"]
        what = (
            f"{self.machine['count']} x {kinds[0]}"
            if kinds
            else f"{self.machine['count']} emulated devices"
        )
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"`results/{self.name}.json`: {what}; {self.machine['cpu']}; {versions}; "
            f"{self.date}; `{self.command}`"
        )


def load_runs(results: Mapping[str, Path]) -> list[Run]:
    """Runs of these files, sorted by name; files of other content are skipped."""
    found = []
    for _, path in sorted(results.items()):
        content = json.loads(path.read_text(encoding="utf-8"))
        if "records" in content:
            known = {
                key: content[key] for key in ("machine", "versions", "date", "command", "records")
            }
            found.append(Run(path.stem, **known))
    return found


def circumstances() -> dict[str, Any]:
    """The machine, versions, date and command of this process."""
    devices = jax.devices()
    gpus = [device.device_kind for device in devices if device.platform == "gpu"]
    versions = {
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "python": platform.python_version(),
    }
    if gpus:
        versions["driver"] = getattr(devices[0].client, "platform_version", "").replace("\n", " ")
    return {
        "machine": {
            "gpus": gpus,
            "count": len(devices),
            "cpu": f"{os.cpu_count()} CPU cores ({platform.machine()})",
        },
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["python -m experiments.dense16", *_asked(sys.argv[1:])]),
    }


def _asked(arguments: Sequence[str]) -> list[str]:
    """Arguments of the command line, without those that name output folders."""
    return [each for each in arguments if not each.startswith(("--out=", "--update_results"))]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
