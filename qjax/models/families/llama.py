"""Llama: what the others differ from."""

from qjax.models.families.family import Family

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    arch="llama",
    absent={"max_position_embeddings": 2048, "num_key_value_heads": "num_attention_heads"},
    pairs=True,
)
