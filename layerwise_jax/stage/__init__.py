"""Stages as values: cut, aligned, wired and assigned to weight slots."""

from layerwise_jax.stage.cut import CutError, Stage, cut_stages
from layerwise_jax.stage.placement import Placement, Staged
from layerwise_jax.stage.staged_program import StagedProgram

__all__ = ["CutError", "Stage", "cut_stages", "Placement", "Staged", "StagedProgram"]
