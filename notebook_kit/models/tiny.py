"""Real transformers architectures with two layers and random weights: what works on them works on the large ones."""

from typing import Any

import torch

_SIZES = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_DECODER = {**_SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 128}
_NO_TEXT_ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def _build(architecture: str, config: str, seed: int, settings: dict[str, Any], overrides: dict[str, Any]):
    import transformers

    configuration = getattr(transformers, config)(**(settings | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(transformers, architecture)(configuration).eval()


def tiny_llama(seed: int = 0, **overrides):
    """Return a LlamaForCausalLM over bytes: 2 layers, hidden 32, 4 query heads on 2 key-value heads.

    Args:
        seed: of the random weights.
        overrides: any field of LlamaConfig.

    Returns:
        The model in evaluation mode.
    """
    return _build("LlamaForCausalLM", "LlamaConfig", seed, _DECODER | _NO_TEXT_ENDS, overrides)


def tiny_mixtral(seed: int = 0, **overrides):
    """Return a MixtralForCausalLM over bytes: 2 layers, hidden 32, 8 experts of which 2 are used.

    Args:
        seed: of the random weights.
        overrides: any field of MixtralConfig.

    Returns:
        The model in evaluation mode.
    """
    moe = {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}
    return _build("MixtralForCausalLM", "MixtralConfig", seed, _DECODER | _NO_TEXT_ENDS | moe, overrides)


def tiny_bert(seed: int = 0, **overrides):
    """Return a BertModel: 2 layers, hidden 32, 4 heads.

    Args:
        seed: of the random weights.
        overrides: any field of BertConfig.

    Returns:
        The model in evaluation mode.
    """
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    settings = _SIZES | dropout | {"intermediate_size": 64, "max_position_embeddings": 128}
    return _build("BertModel", "BertConfig", seed, settings, overrides)


def tiny_vit(seed: int = 0, **overrides):
    """Return a ViTForImageClassification: 16 x 16 grey images, patches of 4, 2 layers, 10 classes.

    Args:
        seed: of the random weights.
        overrides: any field of ViTConfig.

    Returns:
        The model in evaluation mode.
    """
    settings = {k: v for k, v in _SIZES.items() if k != "vocab_size"}
    settings |= {"intermediate_size": 64, "image_size": 16, "patch_size": 4, "num_channels": 1, "num_labels": 10}
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return _build("ViTForImageClassification", "ViTConfig", seed, settings, overrides)


def tiny_t5(seed: int = 0, **overrides):
    """Return a T5ForConditionalGeneration with tied embeddings: 2 + 2 layers, hidden 32, 4 heads of 8.

    Args:
        seed: of the random weights.
        overrides: any field of T5Config.

    Returns:
        The model in evaluation mode.
    """
    settings = {"vocab_size": 256, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    settings |= {"dropout_rate": 0.0, "decoder_start_token_id": 0}
    return _build("T5ForConditionalGeneration", "T5Config", seed, settings, overrides)


def tiny_qwen3_moe(seed: int = 0, **overrides):
    """Return a Qwen3MoeForCausalLM over bytes: 2 layers, hidden 32, 8 experts of which 2 are used.

    Args:
        seed: of the random weights.
        overrides: any field of Qwen3MoeConfig.

    Returns:
        The model in evaluation mode.
    """
    moe = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}
    return _build("Qwen3MoeForCausalLM", "Qwen3MoeConfig", seed, _DECODER | _NO_TEXT_ENDS | moe, overrides)


def tiny_olmoe(seed: int = 0, **overrides):
    """Return an OlmoeForCausalLM over bytes: 2 layers, hidden 32, 8 experts of which 2 are used.

    Args:
        seed: of the random weights.
        overrides: any field of OlmoeConfig.

    Returns:
        The model in evaluation mode.
    """
    moe = {"num_experts": 8, "num_experts_per_tok": 2}
    return _build("OlmoeForCausalLM", "OlmoeConfig", seed, _DECODER | _NO_TEXT_ENDS | moe, overrides)


def tiny_deepseek_v3(seed: int = 0, **overrides):
    """Return a DeepseekV3ForCausalLM over bytes: a dense layer, then one with a shared and 8 routed experts.

    Args:
        seed: of the random weights.
        overrides: any field of DeepseekV3Config.

    Returns:
        The model in evaluation mode.
    """
    moe = {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    moe |= {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    settings = _DECODER | _NO_TEXT_ENDS | moe | latent
    return _build("DeepseekV3ForCausalLM", "DeepseekV3Config", seed, settings, overrides)


def tiny_switch(seed: int = 0, **overrides):
    """Return a SwitchTransformersForConditionalGeneration: 2 + 2 layers, hidden 32, the second of each with 8 experts.

    Args:
        seed: of the random weights.
        overrides: any field of SwitchTransformersConfig.

    Returns:
        The model in evaluation mode; each token uses one expert, and an expert at most 64 tokens of a sequence.
    """
    settings = {"vocab_size": 256, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    settings |= {"num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    settings |= {"num_experts": 8, "dropout_rate": 0.0, "decoder_start_token_id": 0}
    return _build("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", seed, settings, overrides)


def tiny_gpt2(seed: int = 0, **overrides):
    """Return a GPT2LMHeadModel over bytes with tied embeddings: 2 layers, hidden 32, 4 heads.

    Args:
        seed: of the random weights.
        overrides: any field of GPT2Config.

    Returns:
        The model in evaluation mode.
    """
    settings = {"vocab_size": 256, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    settings |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0} | _NO_TEXT_ENDS
    return _build("GPT2LMHeadModel", "GPT2Config", seed, settings, overrides)
