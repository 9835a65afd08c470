"""The models that must give the same values and gradients with and without the pipeline.

`CASES` has a function for each name, so that to collect tests over the names costs nothing:

    @pytest.mark.parametrize("name", CASES)
    def test_equal(name):
        case = CASES[name]()
"""

from collections.abc import Callable

from tests.models import linen as zoo_linen
from tests.models import nnx as zoo_nnx
from tests.models import plain as zoo_plain
from tests.models import transformers as zoo_transformers
from tests.support.zoo_case import BATCH, Case

__all__ = ["BATCH", "CASES", "Case"]

CASES: dict[str, Callable[[], Case]] = {
    make.__name__: make
    for make in (
        zoo_linen.mlp,
        zoo_linen.cnn,
        zoo_linen.resnet,
        zoo_linen.resnet_train,
        zoo_linen.unet,
        zoo_linen.mixture_of_experts,
        zoo_linen.two_towers,
        zoo_linen.lstm,
        zoo_transformers.gpt,
        zoo_transformers.gpt_scan,
        zoo_transformers.gpt_remat,
        zoo_transformers.gpt_scan_remat,
        zoo_transformers.gpt_dropout,
        zoo_transformers.gpt_dropout_shared,
        zoo_transformers.gpt_dropout_keys,
        zoo_transformers.gpt_scan_dropout,
        zoo_transformers.encoder_decoder,
        zoo_transformers.shared_blocks,
        zoo_nnx.nnx_mlp,
        zoo_nnx.nnx_transformer,
        zoo_nnx.nnx_batch_norm_train,
        zoo_plain.odd_outputs,
        zoo_plain.custom_derivatives,
        zoo_plain.branches,
        zoo_plain.bfloat16,
        zoo_plain.indexed,
        zoo_plain.inner_loops,
        zoo_plain.checkpointed,
        zoo_plain.jitted,
    )
}
