"""Every way to compute a pair's log-probabilities gives the same, and the same gradients."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from dpo_lightning.model import attention
from dpo_lightning.model.layout import choose_layout, probe, set_layout
from dpo_lightning.model.logps import pair_logps, plain_logps
from dpo_lightning.model.lora import add_lora
from dpo_lightning.model.segments import ScoreRule
from dpo_lightning.model.source import checkpoint_activations
from dpo_lightning.types import Batch, UserError

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SHARED = {
    "llama": {},
    "gemma": {},
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 6},
    "phi3": {},
    "granite": {"logits_scaling": 2.0},
    "cohere": {},
    # Latent attention: keys of 16, values of 8.
    "minicpm3": {
        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "dim_model_base": 32,
    },
}  # fmt: skip
RECURRENT = {
    "mamba": ({}, "4 of 4 layers do not attend by transformers' interface"),
    "lfm2": ({"layer_types": ["conv", "full_attention", "conv", "conv"]}, "3 of 4 layers do not attend by"),
    "falcon_h1": (
        {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
        "it convolves the row",
    ),  # it attends, too
    "bloom": ({}, "4 of 4 layers do not attend by"),  # its attention is its own, with a bias by distance
}


def model_of(architecture, options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[architecture](**{**SMALL, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # larger weights, so that a wrong mask shows in the log-probabilities
    return model.train()


def measured(model, layout, batch):
    """Log-probabilities, and gradients of a function that weighs the two sides differently."""
    set_layout(model, layout)
    model.zero_grad()
    out = pair_logps(model, batch)
    (out.chosen.sum() - 2 * out.rejected.sum()).backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("architecture", SHARED)
def test_shared_prefix_equals_padded_pairs(architecture, lora):
    model = model_of(architecture, SHARED[architecture])
    if lora:
        model = add_lora(model, r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear")
    assert choose_layout(model, "auto") == "shared"
    batch = probe(97, torch.device("cpu"))
    assert batch.opening > 0
    padded, padded_grads = measured(model, "padded", batch)
    shared, shared_grads = measured(model, "shared", batch)
    torch.testing.assert_close(shared, padded, atol=2e-5, rtol=0)
    assert padded_grads.keys() == shared_grads.keys() and padded_grads
    largest = max(g.abs().max() for g in padded_grads.values())
    for name, grad in padded_grads.items():
        assert (shared_grads[name] - grad).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "phi3"])
def test_gradient_checkpointing_changes_nothing(architecture):
    model = model_of(architecture, SHARED[architecture])
    batch = probe(97, torch.device("cpu"))
    _, without = measured(model, "shared", batch)
    checkpoint_activations(model)
    _, with_it = measured(model, "shared", batch)
    for name, grad in without.items():
        torch.testing.assert_close(with_it[name], grad, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("architecture", RECURRENT)
def test_a_model_that_cannot_share_is_scored_padded_and_says_so(architecture):
    options, told = RECURRENT[architecture]
    model = model_of(architecture, options)
    assert choose_layout(model, "auto").startswith(f"padded ({told}")
    with pytest.raises(UserError, match=r"data\.layout=shared: .*; use data\.layout=auto or padded"):
        choose_layout(model, "shared")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_reach_others_behind_attentions_back_are_seen(dtype):
    model = model_of("llama", {}).to(dtype)
    mlp = model.model.layers[1].mlp
    stock = mlp.forward
    mlp.forward = lambda x: stock(x.cumsum(1))
    assert choose_layout(model, "auto").startswith("padded (in the shared prefix chosen tokens reach the rejected ones")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_log_probabilities_are_seen(dtype, monkeypatch):
    model = model_of("llama", {}).to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)  # logits so large that 16 bits tell
    monkeypatch.setattr(attention, "ScoreRule", lambda scale, *rest: ScoreRule(3 * scale, *rest))
    assert choose_layout(model, "auto").startswith("padded (the shared prefix gives other log-probabilities, by ")


@pytest.mark.parametrize("layout", ["auto", "padded", "shared"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_damaged_weights_are_told(value, layout):
    model = model_of("llama", {})
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = value
    with pytest.raises(UserError, match="log-probabilities are not finite: its weights are damaged, or too large"):
        choose_layout(model, layout)


def test_dropout_in_training_is_scored_padded_unless_shared_is_asked_for():
    dropping = add_lora(model_of("llama", {}), r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear")
    assert choose_layout(dropping, "auto") == (
        "padded (dropout is on: chosen and rejected would share its mask over the prompt)"
    )
    assert choose_layout(dropping, "shared") == "shared"


@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_equals_the_models_own_logits(layout):
    model = model_of("llama", {})
    set_layout(model, layout)
    batch = probe(97, torch.device("cpu"))
    ours = pair_logps(model, batch)
    set_layout(model, "padded")
    torch.testing.assert_close(ours, plain_logps(model, batch), atol=2e-5, rtol=0)


@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_a_pair_does_not_depend_on_its_batch(layout):
    model = model_of("llama", {})
    set_layout(model, layout)
    both = probe(97, torch.device("cpu"))
    first = int(both.lengths_B3[0].sum())
    alone = [
        Batch(both.ids_T[:first], both.lengths_B3[:1], both.rows_B[:1], 1),
        Batch(both.ids_T[first:], both.lengths_B3[1:], both.rows_B[1:], 1),
    ]
    together = pair_logps(model, both)
    for row, batch in enumerate(alone):
        single = pair_logps(model, batch)
        torch.testing.assert_close(single.chosen[0], together.chosen[row], atol=2e-5, rtol=0)
        torch.testing.assert_close(single.rejected[0], together.rejected[row], atol=2e-5, rtol=0)


# Without the cap the log-probabilities of a completion would differ by 0.004 nats (Gemma) up to 20 (xLSTM).
CAPPED = {
    "gemma3_text": {"final_logit_softcapping": 2.0},
    "recurrent_gemma": {"logits_soft_cap": 2.0, "lru_width": 32},
    "xlstm": {"output_logit_soft_cap": 2.0, "num_heads": 4},
}


@pytest.mark.parametrize("architecture", CAPPED)
def test_a_cap_on_logits_is_kept_whatever_a_family_calls_it(architecture):
    model = model_of(architecture, CAPPED[architecture])
    choose_layout(model, "padded")
    batch = probe(97, torch.device("cpu"))
    torch.testing.assert_close(pair_logps(model, batch), plain_logps(model, batch), atol=2e-5, rtol=0)


def test_a_trunk_that_its_class_misnames_is_found():
    """Llama 4's class says that its trunk is called language_model; it is called model."""
    model = model_of("llama4_text", {"attention_chunk_size": 6, "num_local_experts": 2, "intermediate_size_mlp": 48})
    assert choose_layout(model, "auto") == "padded (its attention is chunked by a mask)"
    batch = probe(97, torch.device("cpu"))
    torch.testing.assert_close(pair_logps(model, batch), plain_logps(model, batch), atol=2e-5, rtol=0)


def test_an_unknown_head_is_refused():
    model = model_of("llama", {})
    stock = model.forward

    def forward(*args, **kwargs):
        out = stock(*args, **kwargs)
        out.logits = out.logits * 1.5
        return out

    model.forward = forward
    with pytest.raises(UserError, match="head does something that is not supported"):
        choose_layout(model, "auto")


def test_the_default_device_that_a_model_is_built_under_does_not_matter():
    """Lightning makes the model's device the default one there; meta stands in for a device that computes nothing."""
    model = model_of("llama", {})
    with torch.device("meta"):
        assert choose_layout(model, "shared") == "shared"


def test_a_window_that_layers_do_not_ask_for_is_not_left_out():
    model = model_of("phimoe", {"sliding_window": 6, "num_local_experts": 2})  # it stands in its mask alone
    assert choose_layout(model, "auto") == "padded (its sliding window is in a mask alone)"
    with pytest.raises(UserError, match=r"its sliding window is in a mask alone; use data\.layout=auto or padded"):
        choose_layout(model, "shared")


def test_attention_in_chunks_is_not_left_out():
    model = model_of("llama", {})
    model.config.attention_chunk_size = 6
    assert choose_layout(model, "auto") == "padded (its attention is chunked by a mask)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("architecture", "options", "taken"),
    [
        ("granite_swa", {"sliding_window": 6}, "s_aux"),
        ("doge", {}, "its own mask"),
        # Every query chooses blocks of keys, which begins behind the probe's end.
        (
            "minimax_m3_vl_text",
            {
                "layer_types": ["minimax_m3_sparse"] * 4, "index_block_size": 8, "index_topk_blocks": 3,
                "index_n_heads": 2, "index_head_dim": 16, "index_local_blocks": 1, "num_local_experts": 2,
                "num_experts_per_tok": 1, "moe_intermediate_size": 16,
            },
            "block_indices",
        ),
    ],
)  # fmt: skip
def test_what_attention_takes_besides_is_not_left_out_where_16_bits_would_hide_it(architecture, options, taken, dtype):
    model = model_of(architecture, options).to(dtype)
    told = f"the shared prefix cannot run on this model: its attention takes {taken}"
    assert choose_layout(model, "auto") == f"padded ({told})"
    with pytest.raises(UserError, match=taken):
        choose_layout(model, "shared")
