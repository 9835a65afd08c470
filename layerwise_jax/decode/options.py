"""Options of a decode ring: the choices of `decode_ring`, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from layerwise_jax._arguments import checked_int, checked_ints, updated_options
from layerwise_jax.decode.prefill import check_prefill
from layerwise_jax.decode.sampling import Sampler
from layerwise_jax.decode.step import StepFunction
from layerwise_jax.decode.transport import Transport


@dataclass(frozen=True)
class DecodeOptions:
    """Choices of how tokens are generated. Each value is checked when it is made.

    Attributes:
      num_groups: groups in flight; None for one a stage, which keeps all stages busy.
      sampler: draws tokens from logits; None takes the likeliest.
      stop_tokens: tokens that end a sequence and are its last.
      pad_token: input of an ended sequence.
      selects: whether all devices run what only some stages have (an embedding, a head) and select.
        That saves a branch, but every device reads those weights. None decides by their size.
      param_specs: specs of the parameters over the mesh axes other than `stage`: a tree of
        `PartitionSpec`, or a prefix of one. The step is then written for shards, with its own
        collectives over these axes, and returns the same logits on all of them; `params` and
        `cache` are whole.
      cache_specs: specs of the cache, in the same form.
      prefill_fn: reads prompts at once: `prefill_fn(params, cache, tokens, lengths) -> (logits,
        cache)` for int32[sequences, prefill_length] tokens padded on the right and int32[sequences]
        lengths gives float[sequences, vocabulary] logits of every prompt's last token. It has the
        layers of the step; groups are its microbatches. Cache entries behind a prompt's length must
        not matter, as where attention is masked by position. None reads prompts one token a step.
      prefill_length: tokens that it reads at most; the rest of a longer prompt is read one token a
        step. Where sequences share a part of the cache (a counter), a group is read at once only if
        all of its prompts are at least that long.
      transport: how stages pass messages: "permute", one `ppermute` an array; "peer_store", stores
        into the next device's memory by a kernel of the loop, for CUDA devices of one process;
        "auto", peer stores where the devices are there and reach each other, otherwise permute; or
        `PeerStore(wait_seconds=...)`. Tokens are the same.

    Raises:
      ValueError: a value is not one of those above; the message names the option.
    """

    num_groups: int | None = None
    sampler: Sampler | None = None
    stop_tokens: tuple[int, ...] = ()
    pad_token: int = 0
    selects: bool | None = None
    param_specs: Any = None
    cache_specs: Any = None
    prefill_fn: StepFunction | None = None
    prefill_length: int | None = None
    transport: str | Transport = "auto"

    def __post_init__(self) -> None:
        for name in ("num_groups", "prefill_length"):
            if getattr(self, name) is not None:
                checked_int(name, getattr(self, name))
        checked_int("pad_token", self.pad_token, least=0)
        object.__setattr__(self, "stop_tokens", checked_ints("stop_tokens", self.stop_tokens))
        if self.sampler is not None and not isinstance(self.sampler, Sampler):
            raise ValueError(
                f"sampler must be None or an lw.Sampler, got {self.sampler!r}. None takes the "
                "likeliest token."
            )
        check_prefill(self.prefill_fn, self.prefill_length)

    @property
    def draw(self) -> Sampler:
        """The sampler; the likeliest token without one."""
        return self.sampler or Sampler()

    def updated(self, **choices: Any) -> DecodeOptions:
        """These options with some of them replaced; see `updated_options` for what is refused."""
        return updated_options(self, choices)
