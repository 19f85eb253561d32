"""Tiny random models of every supported architecture, built from config, offline and seeded.

Sizes are no multiples of one another, so that a swapped axis cannot go unnoticed. Two blocks: a
first one, and one after what another has left.
"""

import importlib

import torch

VOCAB = 67
POSITIONS = 40
BLOCKS = 2

_GQA = {
    "vocab_size": VOCAB,
    "hidden_size": 40,
    "intermediate_size": 54,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEAD = {"head_dim": 10}
_SLIDING = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 6,
}

# name -> (config class, model class, settings)
_RECIPES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GQA),
    "mistral": ("MistralConfig", "MistralForCausalLM", _GQA | _HEAD | {"sliding_window": 6}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _GQA),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _GQA | _HEAD | {"tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        _GQA | _HEAD | {"query_pre_attn_scalar": 10, "sliding_window": 6},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        _GQA | _HEAD | _SLIDING | {"query_pre_attn_scalar": 10},
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _GQA),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCAB,
            "n_embd": 40,
            "n_layer": BLOCKS,
            "n_head": 4,
            "n_positions": POSITIONS,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {k: v for k, v in _GQA.items() if k != "num_key_value_heads"}
        | {"use_parallel_residual": True},
    ),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 40,
            "ffn_dim": 54,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 4,
            "max_position_embeddings": POSITIONS,
            "word_embed_proj_dim": 40,
            "pad_token_id": None,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        _GQA | {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 28},
    ),
}

ARCHITECTURES = tuple(_RECIPES)


def tiny(name, **changes):
    """Return `(model, vocab_size)`: fp32, evaluation mode, the same weights at every call.

    `changes` are other values of the configuration.
    """
    config_class, model_class, settings = _RECIPES[name]
    transformers = importlib.import_module("transformers")
    config = getattr(transformers, config_class)(**settings | changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(map(ord, name)))
        model = getattr(transformers, model_class)(config).to(torch.float32).eval()
        # The stock initialisation (0.02, zero biases, unit norms) hides mistakes in tiny models.
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(0.0, 1.2 * parameter.shape[-1] ** -0.5)
                elif parameter_name.endswith("bias"):
                    parameter.normal_(0.0, 0.1)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model, VOCAB


def family(kind, model_class=None, **changes):
    """A tiny random model of any family that transformers knows by its `model_type`, fp32."""
    transformers = importlib.import_module("transformers")
    known = transformers.AutoConfig.for_model(kind)
    names = {*vars(known), *known.attribute_map}
    sizes = {name: value for name, value in (_GQA | _HEAD).items() if name in names}
    config = transformers.AutoConfig.for_model(kind, **sizes | changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(map(ord, kind)))
        if model_class is not None:
            model = getattr(transformers, model_class)(config)
        else:
            model = transformers.AutoModelForCausalLM.from_config(config)
    return model.to(torch.float32).eval()


_MOE = {"moe_intermediate_size": 20, "num_experts_per_tok": 2}
_MLA = {
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
_DEEP = _MOE | {"n_routed_experts": 6, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
_LOCAL = {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 28}
_ALWAYS = {"num_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 28}

# Mixtures of experts, by `model_type`: stacked and interleaved matrices, both orientations, biases,
# shared experts, dense blocks in front, groups of experts, experts without a gate.
MIXTURES = {
    "mixtral": _LOCAL,
    "qwen3_moe": _MOE | {"num_experts": 6},
    "qwen2_moe": _MOE | {"num_experts": 6, "shared_expert_intermediate_size": 22},
    "deepseek_v2": _DEEP | _MLA | {"topk_method": "greedy"},
    "deepseek_v3": _DEEP | _MLA,
    "olmoe": _ALWAYS,
    "gpt_oss": _LOCAL | {"layer_types": ["full_attention"] * BLOCKS},
    "glm4_moe": _DEEP | {"n_shared_experts": 1},
    "granitemoe": _LOCAL,
    "llama4_text": _LOCAL
    | {"num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 54},
    "phimoe": _LOCAL,
    "nemotron_h": _MOE
    | {"n_routed_experts": 5, "layers_block_type": ["attention", "moe"], "n_group": 1}
    | {"moe_shared_expert_intermediate_size": 22, "mamba_num_heads": 4, "mamba_head_dim": 10}
    | {"topk_group": 1},
}


def mixture(kind, **changes):
    """A tiny mixture of experts whose weights are large enough for its routers to decide."""
    model = family(kind, **MIXTURES[kind] | changes)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.15, generator=generator)
    return model


def windows(n, length=12, *, seed=0, vocab_size=VOCAB):
    """Random token ids of shape (n, length), int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (n, length), generator=generator)
