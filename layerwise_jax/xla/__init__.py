"""Compiler access: programs compiled ahead of time, their buffer assignments and XLA options."""

from layerwise_jax.xla.aot import (
    CompiledProgram,
    CompilerMissingError,
    absent_devices,
    absent_mesh,
    can_compile_for_absent_gpus,
    compile_for,
)
from layerwise_jax.xla.buffers import BufferAssignment, decode_buffer_assignment
from layerwise_jax.xla.cuda_driver import CudaDriver
from layerwise_jax.xla.option_trials import CompiledPipeline
from layerwise_jax.xla.options import OptionError, OptionsReport, check_options, choose_options
from layerwise_jax.xla.persisting import persisting_l2

__all__ = [
    "CompiledProgram",
    "CompilerMissingError",
    "absent_devices",
    "absent_mesh",
    "can_compile_for_absent_gpus",
    "compile_for",
    "BufferAssignment",
    "decode_buffer_assignment",
    "CompiledPipeline",
    "CudaDriver",
    "OptionError",
    "OptionsReport",
    "check_options",
    "choose_options",
    "persisting_l2",
]
