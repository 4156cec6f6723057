"""The language model of a folder of text and images: what transformers computes of a text, from its own files."""

import numpy as np
import pytest

import qjax

SMALL = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "sliding_window": 7,
}  # fmt: skip
EYES = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
GEMMA4_EYES = {"model_type": "gemma4_vision", "num_key_value_heads": 1, "head_dim": 8, "position_embedding_size": 4}
OTHER_EYES = {
    "mistral3": {"model_type": "pixtral", "head_dim": 8},
    "gemma4": GEMMA4_EYES,
    "qwen3_5": {"depth": 1, "num_heads": 1, "out_hidden_size": 48, "num_position_embeddings": 4, "patch_size": 14},
}
ROPE = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
OTHER_TEXTS = {
    "gemma4": {"hidden_size_per_layer_input": 0, "global_head_dim": 24},
    "qwen3_5": {
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"], "rope_parameters": ROPE,
    },
}  # fmt: skip
KINDS = {"gemma3": "gemma3_text", "mistral3": "mistral", "gemma4": "gemma4_text", "qwen3_5": "qwen3_5_text"}


@pytest.mark.slow
@pytest.mark.parametrize("kind, inner", KINDS.items())
def test_the_text_part_is_transformers(tmp_path, kind, inner):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    extra = {"mm_tokens_per_image": 4} if kind == "gemma3" else {}
    eyes, small = EYES | OTHER_EYES.get(kind, {}), SMALL | OTHER_TEXTS.get(kind, {})
    settings = transformers.AutoConfig.for_model(
        kind, text_config=small | {"model_type": inner}, vision_config=eyes, **extra
    )
    theirs = transformers.AutoModelForImageTextToText.from_config(settings, attn_implementation="eager").eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
        theirs.save_pretrained(tmp_path / "whole")
        tokens = np.arange(20)[None] * 5 % 101
        expected = theirs(torch.tensor(tokens)).logits.numpy()

    model = qjax.load(tmp_path / "whole")
    assert model.config.family == inner and np.abs(expected).max() > 0.5
    np.testing.assert_allclose(np.asarray(model.logits(tokens)), expected, atol=1e-4, rtol=1e-4)
    qjax.save(model, tmp_path / "text")
    alone = qjax.load(tmp_path / "text")
    assert alone.config == model.config
    np.testing.assert_array_equal(np.asarray(alone.logits(tokens)), np.asarray(model.logits(tokens)))
