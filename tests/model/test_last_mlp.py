"""The last layer's MLP sees the rows that are read and no others; that no number changes is test_layout.py's."""

import copy

import pytest
import torch

from dpo_lightning.model.layout import probe, set_layout
from dpo_lightning.model.logps import pair_logps
from dpo_lightning.model.shared_prefix import plan
from dpo_lightning.model.source import checkpoint_activations
from dpo_lightning.types import Batch
from tests.model.test_layout import SHARED, model_of


def rows_seen(model, layout, batch):
    """Return how many rows each layer's down_proj multiplies."""
    seen = []
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2] * len(args[0])))
        for layer in model.base_model.layers
    ]
    set_layout(model, layout)
    pair_logps(model, batch)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("architecture", SHARED)
def test_only_the_last_layer_leaves_rows_out_and_only_in_the_shared_layout(architecture):
    model, batch = model_of(architecture, SHARED[architecture]), probe(97, torch.device("cpu"))
    row = plan(batch.lengths_B3, batch.opening, torch.device("cpu"))
    tokens, read = len(row.tokens_T), len(row.rows_S.unique())
    assert read == len(row.rows_S) - len(batch) < tokens  # a pair's first two tokens are predicted by one row
    assert rows_seen(model, "shared", batch) == [tokens, tokens, tokens, read]
    padded = rows_seen(model, "padded", batch)
    assert padded == [padded[0]] * 4 and padded[0] > tokens


def test_a_batch_that_comes_between_does_not_change_what_checkpointing_computes_again():
    """A forward pass in parts scores several batches before the first backward pass."""
    model = model_of("llama", {})
    set_layout(model, "shared")
    first = probe(97, torch.device("cpu"))
    second = Batch(first.ids_T[:25], first.lengths_B3[:1], first.rows_B[:1], 1)

    def gradients():
        model.zero_grad()
        both = [pair_logps(model, batch) for batch in (first, second)]
        torch.cat([out.chosen - 2 * out.rejected for out in both]).sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    without = gradients()
    checkpoint_activations(model)
    torch.testing.assert_close(gradients(), without, atol=1e-6, rtol=1e-6)


def test_a_copy_of_the_model_computes_with_weights_of_its_own():
    model, batch = model_of("llama", {}), probe(97, torch.device("cpu"))
    set_layout(model, "shared")
    before = pair_logps(model, batch)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.base_model.layers[-1].parameters():
            parameter.zero_()
    assert torch.equal(pair_logps(twin, batch).chosen, before.chosen)
    assert not torch.equal(pair_logps(model, batch).chosen, before.chosen)


def test_a_call_of_the_mlp_alone_sees_all_rows():
    model, batch = model_of("llama", {}), probe(97, torch.device("cpu"))
    set_layout(model, "shared")
    mlp, x = model.base_model.layers[-1].mlp, torch.randn(1, 50, 32)
    before = mlp(x)
    pair_logps(model, batch)
    assert torch.equal(mlp(x), before)


def test_experts_keep_all_rows():
    model = model_of("mixtral", {"num_local_experts": 2})
    set_layout(model, "shared")
    pair_logps(model, probe(97, torch.device("cpu")))
    assert not hasattr(model.base_model, "dpo_read_rows")
