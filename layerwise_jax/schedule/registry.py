"""Registry of schedules by name. A new schedule is a generator and one entry here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from layerwise_jax._arguments import checked_choice
from layerwise_jax.schedule import generators, v_shaped
from layerwise_jax.schedule.table import Schedule
from layerwise_jax.schedule.validation import check

# Name of an entry of SCHEDULES.
ScheduleName = str


@dataclass(frozen=True)
class ScheduleFamily:
    """A kind of schedule for any number of devices and microbatches.

    Attributes:
      generate: (num_devices, stages_per_device, num_microbatches, paired) -> schedule. `paired`
        puts a forward and a backward into each tick, in families that can.
      stages_per_device: the number of stages that each device must have; None for any.
      in_flight: (places, num_microbatches) -> live microbatches of a stage under the schedule
        without pairs. Place 0 is the last stage, 1 the one before it. None if the number does not
        follow from the place.
    """

    generate: Callable[[int, int, int, bool], Schedule]
    stages_per_device: int | None = 1
    in_flight: Callable[[NDArray[np.int64], int], NDArray[np.float64]] | None = None

    def num_devices(self, num_stages: int | None, most: int) -> int:
        """The most devices, up to `most`, that a number of stages suits.

        Args:
          num_stages: stages; None for two on each of `most` devices, or the family's number.
          most: devices at hand.
        """
        per_device = self.stages_per_device
        if per_device is not None:
            return most if num_stages is None else max(1, num_stages // per_device)
        return max(d for d in range(1, most + 1) if (num_stages or 2 * most) % d == 0)

    def num_stages(self, num_devices: int) -> int:
        """Stages on `num_devices` if no number is asked for: two a device where any would do."""
        return (self.stages_per_device or 2) * num_devices

    def checked_stages_per_device(self, name: str, num_stages: int, num_devices: int) -> int:
        """The stages of each device.

        Raises:
          ValueError: the stages do not divide over the devices as the family demands.
        """
        if num_stages % num_devices:
            raise ValueError(
                f"num_stages must be a multiple of the {num_devices} pipeline devices with "
                f"schedule '{name}', got {num_stages}."
            )
        count = num_stages // num_devices
        if self.stages_per_device not in (None, count):
            raise ValueError(
                f"num_stages must be {self.stages_per_device * num_devices} with schedule "
                f"'{name}' on {num_devices} pipeline devices, {self.stages_per_device} on each, "
                f"got {num_stages}."
            )
        return count


def _all_in_flight(places: NDArray[np.int64], num_microbatches: int) -> NDArray[np.float64]:
    return np.full(len(places), float(num_microbatches))


def _as_far_as_the_end(places: NDArray[np.int64], num_microbatches: int) -> NDArray[np.float64]:
    return np.minimum(float(num_microbatches), places + 1.0)


SCHEDULES: Mapping[str, ScheduleFamily] = MappingProxyType(
    {
        "1f1b": ScheduleFamily(
            lambda d, v, m, paired: generators.one_f_one_b(d, m, paired),
            in_flight=_as_far_as_the_end,
        ),
        "gpipe": ScheduleFamily(
            lambda d, v, m, paired: generators.gpipe(d, m), in_flight=_all_in_flight
        ),
        "interleaved_1f1b": ScheduleFamily(generators.interleaved_1f1b, stages_per_device=None),
        "zero_bubble": ScheduleFamily(lambda d, v, m, paired: generators.zero_bubble(d, m)),
        "looped_bfs": ScheduleFamily(
            lambda d, v, m, paired: generators.looped_bfs(d, v, m), stages_per_device=None
        ),
        "interleaved_zero_bubble": ScheduleFamily(
            lambda d, v, m, paired: generators.interleaved_zero_bubble(d, v, m),
            stages_per_device=None,
        ),
        "zb_v": ScheduleFamily(lambda d, v, m, paired: v_shaped.zb_v(d, m), stages_per_device=2),
        "dualpipe_v": ScheduleFamily(
            lambda d, v, m, paired: v_shaped.dualpipe_v(d, m), stages_per_device=2
        ),
    }
)


def make_schedule(
    schedule: ScheduleName | Schedule, num_stages: int, num_microbatches: int, num_devices: int
) -> Schedule:
    """The named schedule for a pipeline, or the given table if it fits the pipeline.

    Args:
      schedule: a name in `SCHEDULES`, or a table.
      num_stages: stages of the pipeline.
      num_microbatches: microbatches of a step.
      num_devices: pipeline devices. Families of one stage a device ignore it.

    Raises:
      ValueError: an unknown name, a family that the stages do not suit, or a table for other stages
        or microbatches.
      ScheduleError: `check` refuses the table.
    """
    if isinstance(schedule, Schedule):
        return _checked(schedule, num_stages, num_microbatches)
    family = SCHEDULES[checked_schedule_name(schedule)]
    if family.stages_per_device == 1:
        num_devices = num_stages
    per_device = family.checked_stages_per_device(schedule, num_stages, num_devices)
    return family.generate(num_devices, per_device, num_microbatches, True)


def checked_schedule_name(name: str) -> str:
    """A name in `SCHEDULES`.

    Raises:
      ValueError: any other value.
    """
    return checked_choice("schedule", name, tuple(SCHEDULES))


def _checked(schedule: Schedule, num_stages: int, num_microbatches: int) -> Schedule:
    """A valid table for a pipeline of these stages and microbatches."""
    check(schedule)
    given = (schedule.num_stages, schedule.num_microbatches)
    if given != (num_stages, num_microbatches) or not schedule.has_backward:
        raise ValueError(
            f"schedule must be for {num_stages} stages and {num_microbatches} microbatches with "
            f"backward, got one for {given[0]} stages and {given[1]} microbatches"
            f"{'' if schedule.has_backward else ', forward only'}."
        )
    return schedule
