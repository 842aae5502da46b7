"""Prompts, guidance, and the words that LoRA and textual inversion add."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from stablesr_kit import StableSRPipeline
from stablesr_kit.models.steering import steered_prediction
from tests.helpers.pipeline_runs import differs, run, same
from tests.helpers.tiny import (
    PROMPT_LENGTH,
    TEXT_CHANNELS,
    seeded,
    tiny_adapter,
    tiny_pipeline,
    tiny_unet,
    unit_noise,
)


def test_prompt_and_negative_prompt_steer_the_result() -> None:
    pipeline = tiny_pipeline()
    plain = run(pipeline, prompt="cat")
    assert differs(plain, run(pipeline, prompt="a dog in the rain"), by=1e-4)
    guided = run(pipeline, prompt="cat", guidance_scale=4.0)
    assert differs(guided, plain, by=1e-4)
    assert differs(guided, run(pipeline, prompt="cat", negative_prompt="blurry", guidance_scale=4.0), by=1e-4)
    same(run(pipeline, prompt="cat", negative_prompt="cat", guidance_scale=4.0), plain)
    assert torch.equal(run(pipeline, prompt="cat", negative_prompt="blurry"), plain)  # no guidance, no negative


def test_guidance_is_the_formula() -> None:
    pipeline = tiny_pipeline()
    x, lq = unit_noise(2, 4, 4, 4), unit_noise(2, 4, 4, 4, seed=1)
    positive, negative = unit_noise(2, 5, TEXT_CHANNELS), unit_noise(2, 5, TEXT_CHANNELS, seed=1)
    with torch.no_grad():
        predict = partial(steered_prediction, pipeline.unet, pipeline.adapter, x, 500, lq)
        cond, uncond = predict(positive), predict(negative)
        guided = predict(torch.cat([negative, positive]), guidance_scale=3.0)
        shared, repeated = predict(positive[:1]), predict(positive[:1].repeat(2, 1, 1))
    same(guided, uncond + 3.0 * (cond - uncond))
    same(shared, repeated)


def test_embeddings_stand_for_their_prompts() -> None:
    pipeline = tiny_pipeline()
    expected = run(pipeline, prompt="cat", negative_prompt="blurry", guidance_scale=3.0)
    with torch.no_grad():
        positive, negative = pipeline.encode_prompt("cat", torch.device("cpu"), 1, True, "blurry")
    bare = tiny_pipeline(with_text=False)
    embeds = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    same(run(bare, guidance_scale=3.0, **embeds), expected)
    one_each = {"prompt_embeds": positive.repeat(2, 1, 1), "negative_prompt_embeds": negative}
    same(run(bare, guidance_scale=3.0, generator=[seeded(0), seeded(0)], **one_each)[1:], expected)


def test_without_a_text_encoder_the_adapter_knows_the_empty_prompt() -> None:
    with_text, without = tiny_pipeline(), tiny_pipeline(with_text=False)
    with torch.no_grad():
        empty, _ = with_text.encode_prompt(None, torch.device("cpu"), 1, False)
    assert empty.shape == (1, PROMPT_LENGTH, TEXT_CHANNELS)
    assert torch.equal(run(with_text), run(with_text, prompt=""))
    assert differs(run(without), run(with_text), by=1e-4)
    without.adapter.empty_prompt_embeds.copy_(empty)
    same(run(without), run(with_text))
    same(run(without, prompt=""), run(with_text))
    same(run(without, guidance_scale=3.0), run(with_text))


@pytest.mark.parametrize("arguments", [{"prompt": "cat"}, {"negative_prompt": "blurry", "guidance_scale": 3.0}])
def test_a_prompt_without_a_text_encoder_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs the components text_encoder and tokenizer.*; load them, or give no"):
        run(tiny_pipeline(with_text=False), **arguments)


def test_no_text_encoder_and_no_stored_empty_prompt_is_refused() -> None:
    pipeline = tiny_pipeline(with_text=False, adapter=tiny_adapter(tiny_unet(), prompt_length=0))
    with pytest.raises(ValueError, match="prompt=None needs the components text_encoder and tokenizer"):
        run(pipeline)


def test_clip_skip_takes_an_earlier_layer() -> None:
    pipeline = tiny_pipeline()
    encoder = pipeline.text_encoder
    tokens = pipeline.tokenizer("cat", padding="max_length", max_length=PROMPT_LENGTH, return_tensors="pt").input_ids
    with torch.no_grad():
        hidden = encoder(tokens, output_hidden_states=True).hidden_states[-2]
        ours, _ = pipeline.encode_prompt("cat", torch.device("cpu"), 1, False, clip_skip=1)
    norm = next(module for name, module in encoder.named_modules() if name.endswith("final_layer_norm"))
    same(ours, F.layer_norm(hidden, (TEXT_CHANNELS,), norm.weight, norm.bias))
    assert differs(run(pipeline, prompt_embeds=ours), run(pipeline, prompt="cat"), by=1e-5)


def save_lora(folder: Path) -> None:
    """LoRA weights of the UNet, residual convolutions included, and of the text encoder."""
    pipeline = tiny_pipeline()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        targets = {"unet": ["to_q", "to_v", "conv2"], "text_encoder": ["q_proj", "v_proj"]}
        for name, modules in targets.items():
            config = LoraConfig(r=2, lora_alpha=2, target_modules=modules, init_lora_weights=False)
            getattr(pipeline, name).add_adapter(config)
    StableSRPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipeline.text_encoder),
    )


def test_lora_weights_load_scale_fuse_and_unload(tmp_path: Path) -> None:
    save_lora(tmp_path)
    pipeline = tiny_pipeline()
    base = run(pipeline, prompt="cat")
    pipeline.load_lora_weights(tmp_path, adapter_name="style")
    styled = run(pipeline, prompt="cat")
    assert differs(styled, base)

    same(run(pipeline, prompt="cat", cross_attention_kwargs={"scale": 0.0}), base)
    half = run(pipeline, prompt="cat", cross_attention_kwargs={"scale": 0.5})
    assert differs(half, base) and differs(half, styled)
    assert torch.equal(run(pipeline, prompt="cat"), styled)  # the scale does not outlive its call
    pipeline.set_adapters(["style"], [0.5])
    same(run(pipeline, prompt="cat"), half)
    pipeline.set_adapters(["style"], [1.0])

    pipeline.fuse_lora()
    same(run(pipeline, prompt="cat"), styled, atol=1e-4)
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()
    same(run(pipeline, prompt="cat"), base, atol=1e-4)


def test_lora_weights_of_the_text_encoder_count_without_a_prompt_too(tmp_path: Path) -> None:
    save_lora(tmp_path)
    pipeline = tiny_pipeline()
    empty = {"prompt": None, "device": torch.device("cpu"), "num_images_per_prompt": 1}
    with torch.no_grad():
        before, _ = pipeline.encode_prompt(**empty, do_classifier_free_guidance=False)
        pipeline.load_lora_weights(tmp_path)
        after, _ = pipeline.encode_prompt(**empty, do_classifier_free_guidance=False)
    assert differs(before, after)


def test_textual_inversion_adds_a_word() -> None:
    pipeline = tiny_pipeline()
    before = run(pipeline, prompt="<toy>")
    word = unit_noise(TEXT_CHANNELS)
    pipeline.load_textual_inversion({"<toy>": word})
    token = pipeline.tokenizer.convert_tokens_to_ids("<toy>")
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[token], word)
    assert differs(run(pipeline, prompt="<toy>"), before, by=1e-4)
