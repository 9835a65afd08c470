"""Execution of stages in one `shard_map` program: tick loops, VJPs, stashes and outputs."""
