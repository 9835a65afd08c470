"""Command line of the soak: runs the parts one after the other and prints a table."""

import argparse
import sys
from pathlib import Path

import jax

NUM_DEVICES = 4


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--triples", type=int, default=10_000, help="(program, cut, schedule)")
    parser.add_argument("--mutations", type=int, default=10_000, help="of texts and files")
    parser.add_argument("--kills", type=int, default=200, help="kill -9 while saving")
    parser.add_argument("--runs", type=int, default=1_000, help="ring runs, and training steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--progress", type=Path, help="file that a later run resumes from")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    # After the devices are configured: models make arrays when they are imported.
    from tests.soak import kills, memory, mutations, triples
    from tests.soak.journal import Journal

    print(f"seed {options.seed}, jax {jax.__version__}", flush=True)
    journal = Journal(options.progress)
    findings = journal.run("mutations", options.seed, options.mutations, mutations.check)
    with kills.Saver() as saver:
        findings += journal.run("kills", options.seed, options.kills, saver.check)
    for part, check in memory.PARTS.items():
        findings += journal.run(part, options.seed, options.runs, check())
    findings += journal.run("triples", options.seed, options.triples, triples.check)
    print(journal.table())
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
