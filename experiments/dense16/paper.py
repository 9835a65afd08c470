"""Rows of the paper's table and its configuration; the network is `model.PRESETS["paper"]`."""

from dataclasses import dataclass

DEVICES = 16
LAYERS = 16
HEADS = 32
MLP = 16_384
BATCH = 128
CONTEXT = 10_000
# The baseline: two stages of eight devices that share each layer.
BASELINE_STAGES = 2


@dataclass(frozen=True)
class Claim:
    """A row of the paper's table.

    Attributes:
      strategy: what it is called here.
      tokens_per_second: TPS as printed.
      seconds_per_token: TPOT as printed. It is 1 / TPS, not the time between two tokens of a
        sequence.
    """

    strategy: str
    tokens_per_second: float
    seconds_per_token: float

    def inter_token_latency(self, batch: int = BATCH) -> float:
        """Seconds between two tokens of one sequence with all of the batch in flight: batch/TPS."""
        return batch / self.tokens_per_second


BASELINE = Claim("tensor x pipeline", 12_800, 0.078e-3)
LAYER_WISE = Claim("layer-wise", 15_360, 0.065e-3)
CLAIMS = {claim.strategy: claim for claim in (BASELINE, LAYER_WISE)}
CLAIMED_RATIO = LAYER_WISE.tokens_per_second / BASELINE.tokens_per_second
