"""Executor `host`: stages as separate programs, driven by one host thread per device column.

    Stage ──split_stages──▶ StageProgram ──differentiate──▶ StageFunctions ──compile──▶
    CompiledStage
    Schedule ──lay_out_columns──▶ Column[device]           params ──HostPlacement.place──▶
    HostStaged

Everything is decided before the first step; a running thread calls compiled programs and
`device_put`, nothing else.
"""
