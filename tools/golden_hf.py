"""Writes tests/golden/hf-*: tiny random models of four families, with the input and output of every attention module.

Needs torch, transformers 4.46 and safetensors; float32 on the CPU. Run in tests/golden: python ../../tools/golden_hf.py

Each folder gets config.json, model.safetensors and io.safetensors (input_ids, layers.N.attention_input and
layers.N.attention_output). BERT's output is the one before its output projection, the others' the one after it.
"""

import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 128}

# Model class, config, and where the attention modules are.
FAMILIES = {
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES, intermediate_size=96, num_attention_heads=8, num_key_value_heads=2, rope_theta=10000.0),
        lambda model: [layer.self_attn for layer in model.model.layers],
    ),
    "gpt_neox": (
        GPTNeoXForCausalLM,
        GPTNeoXConfig(**SIZES, intermediate_size=96, num_attention_heads=4, rotary_pct=0.25),
        lambda model: [layer.attention for layer in model.gpt_neox.layers],
    ),
    "opt": (
        OPTForCausalLM,
        OPTConfig(**SIZES, ffn_dim=96, num_attention_heads=4, word_embed_proj_dim=64, dropout=0.0, attention_dropout=0.0),
        lambda model: [layer.self_attn for layer in model.model.decoder.layers],
    ),
    "bert": (
        BertModel,
        BertConfig(**SIZES, intermediate_size=96, num_attention_heads=4),
        lambda model: [layer.attention.self for layer in model.encoder.layer],
    ),
}


def randomise(model):
    """Weights large enough for attention to be far from uniform."""
    for name, parameter in model.named_parameters():
        norm = "norm" in name.lower() and name.endswith("weight")
        parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.dim() == 2 else 0.1) + (1.0 if norm else 0.0))


def record(io, layer):
    """A forward hook that keeps what a module gets and gives."""

    def hook(module, args, kwargs, output):
        x = args[0] if args else kwargs["hidden_states"]
        io[f"layers.{layer}.attention_input"] = x.detach().clone()
        io[f"layers.{layer}.attention_output"] = (output[0] if isinstance(output, tuple) else output).detach().clone()

    return hook


@torch.no_grad()
def main():
    for name, (model_class, config, attention_modules) in FAMILIES.items():
        torch.manual_seed(11)
        config._attn_implementation = "eager"
        model = model_class(config).eval()
        randomise(model)
        io = {"input_ids": torch.randint(0, 96, (2, 40))}
        for layer, module in enumerate(attention_modules(model)):
            module.register_forward_hook(record(io, layer), with_kwargs=True)
        model(io["input_ids"])
        model.save_pretrained(f"hf-{name}")
        save_file({key: tensor.contiguous() for key, tensor in io.items()}, f"hf-{name}/io.safetensors")


if __name__ == "__main__":
    main()
