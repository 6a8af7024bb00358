"""Writes tests/golden/hf-*: tiny random models, with the input and output of every attention module, and
tables of rotary embeddings.

Needs torch, transformers and safetensors; float32 on the CPU. Run in tests/golden:

    python ../../tools/golden_hf.py NAME ...        all of them without a name

llama, gpt_neox, opt and bert were written by transformers 4.46, the others by 5.24.

Each folder gets config.json, model.safetensors and io.safetensors (input_ids, layers.N.attention_input and
layers.N.attention_output). BERT's output is the one before its output projection, the others' the one after it.
hf-rope/cases.json has configs with what their rotary embedding gives: cos and sin of some positions, for
sequences of `length` tokens.
"""

import importlib
import json
import os
import sys

import torch
import transformers
from safetensors.torch import save_file

OLD = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 128}
NEW = {
    "vocab_size": 16,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}

# Classes of config and model, the config, and where the attention modules are.
FAMILIES = {
    "llama": (
        "LlamaConfig LlamaForCausalLM",
        {**OLD, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 2, "rope_theta": 10000.0},
        lambda model: [layer.self_attn for layer in model.model.layers],
    ),
    "gpt_neox": (
        "GPTNeoXConfig GPTNeoXForCausalLM",
        {**OLD, "intermediate_size": 96, "num_attention_heads": 4, "rotary_pct": 0.25},
        lambda model: [layer.attention for layer in model.gpt_neox.layers],
    ),
    "opt": (
        "OPTConfig OPTForCausalLM",
        {
            **OLD,
            "ffn_dim": 96,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 64,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        lambda model: [layer.self_attn for layer in model.model.decoder.layers],
    ),
    "bert": (
        "BertConfig BertModel",
        {**OLD, "intermediate_size": 96, "num_attention_heads": 4},
        lambda model: [layer.attention.self for layer in model.encoder.layer],
    ),
    # Every layer with a window, heads of another width than D / h.
    "mistral": ("MistralConfig MistralForCausalLM", {**NEW, "head_dim": 12, "sliding_window": 7}),
    # Biases, a window from the second layer on, YaRN.
    "qwen2": (
        "Qwen2Config Qwen2ForCausalLM",
        {
            **NEW,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    # Norms of queries and keys, biases, heads of another width.
    "qwen3": ("Qwen3Config Qwen3ForCausalLM", {**NEW, "head_dim": 16, "attention_bias": True, "rms_norm_eps": 1e-3}),
    # Fused weights, half of each head rotated, LongRoPE beyond its short context.
    "phi3": (
        "Phi3Config Phi3ForCausalLM",
        {
            **NEW,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.0, 1.5, 2.5, 4.0],
            },
        },
    ),
    "gemma": ("GemmaConfig GemmaForCausalLM", {**NEW, "head_dim": 16}),
    # A scale of its own, the first layer with a window; without the soft cap.
    "gemma2": (
        "Gemma2Config Gemma2ForCausalLM",
        {**NEW, "head_dim": 12, "query_pre_attn_scalar": 24, "sliding_window": 7, "attn_logit_softcapping": None},
    ),
    # Norms, a scale of its own, two rotary embeddings.
    "gemma3": (
        "Gemma3TextConfig Gemma3ForCausalLM",
        {
            **NEW,
            "head_dim": 12,
            "query_pre_attn_scalar": 24,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        },
    ),
    # The second layer without rotary embedding.
    "smollm3": ("SmolLM3Config SmolLM3ForCausalLM", {**NEW, "no_rope_layer_interval": 2}),
}

BASE = {"hidden_size": 16, "num_attention_heads": 1, "num_hidden_layers": 1, "max_position_embeddings": 64}
LLAMA = {**BASE, "model_type": "llama", "num_key_value_heads": 1, "head_dim": 16}
PHI3 = {**BASE, "model_type": "phi3", "num_key_value_heads": 1, "rope_theta": 1e4}
NEOX = {**BASE, "model_type": "gpt_neox"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
FACTORS = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [1.0 + i for i in range(8)]}
HALF = {"short_factor": [1.0 + i / 8 for i in range(4)], "long_factor": [1.0 + i for i in range(4)]}

# A name, a config, and the number of tokens.
ROPE = [
    ("default", LLAMA, 40),
    ("base beside", {**LLAMA, "rope_theta": 5e5}, 40),
    ("empty objects", {**LLAMA, "rope_theta": 5e5, "rope_scaling": {}, "rope_parameters": {}}, 40),
    ("base in rope_scaling", {**LLAMA, "rope_scaling": {"rope_type": "default", "rope_theta": 5e5}}, 40),
    (
        "base in both places",
        {**LLAMA, "rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        40,
    ),
    ("older name of the type", {**LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}}, 40),
    ("linear with a base", {**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}, 40),
    (
        "empty beside linear",
        {**LLAMA, "rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        40,
    ),
    ("llama3", {**LLAMA, "rope_theta": 5e5, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32}}, 40),
    (
        "llama3, context beside",
        {
            **LLAMA,
            "original_max_position_embeddings": 32,
            "rope_parameters": {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 8192},
        },
        40,
    ),
    ("dynamic within", {**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 4.0}}, 40),
    ("dynamic beyond", {**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 4.0}}, 100),
    ("yarn", {**LLAMA, "rope_scaling": YARN}, 40),
    ("yarn, context beside", {**LLAMA, "original_max_position_embeddings": 32, "rope_scaling": YARN}, 40),
    (
        "yarn, whole numbers",
        {**LLAMA, "rope_theta": 10000, "rope_scaling": {**YARN, "factor": 4, "beta_fast": 8, "beta_slow": 2}},
        40,
    ),
    ("yarn, attention factor", {**LLAMA, "rope_scaling": {**YARN, "attention_factor": 1.5}}, 40),
    ("yarn, two scales", {**LLAMA, "rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}}, 40),
    ("yarn, one scale", {**LLAMA, "rope_scaling": {**YARN, "mscale": 0.7}}, 40),
    (
        "longrope, short",
        {**LLAMA, "rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 32, **FACTORS}},
        32,
    ),
    (
        "longrope, long",
        {**LLAMA, "rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 32, **FACTORS}},
        33,
    ),
    (
        "longrope, factor",
        {
            **LLAMA,
            "rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 32, "factor": 3.0, **FACTORS},
        },
        33,
    ),
    (
        "longrope, attention factor",
        {
            **LLAMA,
            "rope_scaling": {
                "rope_type": "longrope",
                "original_max_position_embeddings": 32,
                "attention_factor": 1.25,
                **FACTORS,
            },
        },
        20,
    ),
    ("phi3", PHI3, 40),
    ("phi3, half", {**PHI3, "partial_rotary_factor": 0.5}, 40),
    ("phi3, half, inside", {**PHI3, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, 40),
    ("phi3, context by default", {**PHI3, "rope_scaling": {"type": "longrope", **FACTORS}}, 40),
    (
        "phi3, half, longrope",
        {
            **PHI3,
            "original_max_position_embeddings": 32,
            "partial_rotary_factor": 0.5,
            "rope_scaling": {"type": "longrope", **HALF},
        },
        40,
    ),
    ("neox", NEOX, 40),
    ("neox, half", {**NEOX, "rotary_pct": 0.5, "rotary_emb_base": 5e5}, 40),
    (
        "neox, inside",
        {
            **NEOX,
            "rotary_pct": 0.5,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5, "partial_rotary_factor": 1.0},
        },
        40,
    ),
]


def randomise(model, brief):
    """Weights large enough for attention to be far from uniform; with few digits if brief."""
    for name, parameter in model.named_parameters():
        norm = "norm" in name.lower() and name.endswith("weight")
        scale = (0.4 if brief else 0.2) if parameter.dim() == 2 else 0.1
        numbers = torch.randn_like(parameter) * scale + (1.0 if norm else 0.0)
        parameter.copy_(numbers.to(torch.bfloat16) if brief else numbers)


def record(io, layer):
    """A forward hook that keeps what a module gets and gives."""

    def hook(module, args, kwargs, output):
        x = args[0] if args else kwargs["hidden_states"]
        io[f"layers.{layer}.attention_input"] = x.detach().clone()
        io[f"layers.{layer}.attention_output"] = (output[0] if isinstance(output, tuple) else output).detach().clone()

    return hook


def write_model(
    name, classes, config, attention_modules=lambda model: [layer.self_attn for layer in model.model.layers]
):
    torch.manual_seed(11)
    brief = config["hidden_size"] == 32
    config_class, model_class = (getattr(transformers, name) for name in classes.split())
    config = config_class(**config)
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    randomise(model, brief)
    io = {"input_ids": torch.randint(0, config.vocab_size, (1, 24) if brief else (2, 40))}
    for layer, module in enumerate(attention_modules(model)):
        module.register_forward_hook(record(io, layer), with_kwargs=True)
    model(io["input_ids"])
    if brief:
        model.to(torch.bfloat16)  # exact
    model.save_pretrained(f"hf-{name}")
    save_file({key: tensor.contiguous() for key, tensor in io.items()}, f"hf-{name}/io.safetensors")
    generation = f"hf-{name}/generation_config.json"
    if os.path.exists(generation):
        os.remove(generation)


def write_rope():
    cases = []
    for name, config, length in ROPE:
        kind = {"llama": "Llama", "phi3": "Phi3", "gpt_neox": "GPTNeoX"}[config["model_type"]]
        config_class = getattr(transformers, kind + "Config")
        family = config["model_type"]
        modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        rotary = getattr(modeling, kind + "RotaryEmbedding")(config_class.from_dict(json.loads(json.dumps(config))))
        cos, sin = rotary(torch.zeros(1), torch.arange(length)[None])
        half = cos.shape[-1] // 2
        positions = [1, 5, length - 1]
        rows = {
            key: [[float(f"{x:.7g}") for x in table[0, p, :half].tolist()] for p in positions]
            for key, table in (("cos", cos), ("sin", sin))
        }
        cases.append({"name": name, "config": config, "length": length, "positions": positions, **rows})
    os.makedirs("hf-rope", exist_ok=True)
    with open("hf-rope/cases.json", "w") as file:
        file.write("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")


@torch.no_grad()
def main():
    for name in sys.argv[1:] or [*FAMILIES, "rope"]:
        if name == "rope":
            write_rope()
        else:
            write_model(name, *FAMILIES[name])


if __name__ == "__main__":
    main()
