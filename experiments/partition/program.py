"""Program of the partition experiment: runs the parts that the flags select."""

from experiments import command
from experiments.partition import options


def main() -> None:
    """Measure and draw; each part imports what it needs."""
    output = command.output("partition")
    console = command.make_console()
    if "balancers" in options.ONLY.value:
        from experiments.partition.balancers import measure

        measure(output.folder, console)
    if "model" in options.ONLY.value:
        from experiments.partition.model import draw

        draw(output.folder, console)
