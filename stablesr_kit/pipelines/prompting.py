"""Prompts, or none, as the embeddings the UNet attends to."""

from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import TextualInversionLoaderMixin
from diffusers.utils import scale_lora_layers, unscale_lora_layers
from torch import Tensor


class PromptEncoding(TextualInversionLoaderMixin, DiffusionPipeline):
    """The step of a call that encodes prompts."""

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(prompt_embeds, negative_prompt_embeds), each (len(prompt) * num_images_per_prompt, tokens, channels).

        No prompt means the empty one: its embedding comes from the text encoder, so that LoRA layers and new tokens
        count, or, if there is none, from the adapter. The second is None without guidance.

        Raises:
            ValueError: there is a prompt but no text encoder and tokenizer.
        """
        if prompt_embeds is None:
            prompt_embeds = self._embed(prompt, device, lora_scale, clip_skip)
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            negative_prompt_embeds = self._embed(negative_prompt, device, lora_scale, clip_skip)

        dtype = self.unet.dtype if self.unet is not None else prompt_embeds.dtype
        prompt_embeds = prompt_embeds.to(device, dtype).repeat_interleave(num_images_per_prompt, dim=0)
        if negative_prompt_embeds is not None:
            negative_prompt_embeds = negative_prompt_embeds.to(device, dtype)
            negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        return prompt_embeds, negative_prompt_embeds

    def _embed(
        self, prompt: str | list[str] | None, device: torch.device, lora_scale: float | None, clip_skip: int | None
    ) -> Tensor:
        if self.text_encoder is None or self.tokenizer is None:
            stored = self.adapter.empty_prompt_embeds if self.adapter is not None else None
            if prompt in (None, "") and stored is not None:
                return stored
            raise ValueError(
                f"prompt={prompt!r} needs the components text_encoder and tokenizer, which this pipeline lacks; "
                "load them, or give no prompt"
            )
        texts = [prompt or ""] if not isinstance(prompt, list) else prompt
        tokens = self.tokenizer(
            self.maybe_convert_prompt(texts, self.tokenizer),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        with_mask = getattr(self.text_encoder.config, "use_attention_mask", False)
        if lora_scale is not None:
            scale_lora_layers(self.text_encoder, lora_scale)
        try:
            outputs = self.text_encoder(
                tokens.input_ids.to(device),
                attention_mask=tokens.attention_mask.to(device) if with_mask else None,
                output_hidden_states=clip_skip is not None,
            )
        finally:
            if lora_scale is not None:
                unscale_lora_layers(self.text_encoder, lora_scale)
        if clip_skip is None:
            return outputs[0]
        # transformers 5 moved the tower one level up
        tower: Any = getattr(self.text_encoder, "text_model", self.text_encoder)
        return tower.final_layer_norm(outputs.hidden_states[-(clip_skip + 1)])


def batch_size_of(pictures: int, prompt: str | list[str] | None, prompt_embeds: Tensor | None) -> int:
    """Number of pictures times prompts of a call: one of the two may be single and then serves all of the other.

    Raises:
        ValueError: several pictures and another number of prompts.
    """
    prompts = len(prompt) if isinstance(prompt, list) else 1 if prompt_embeds is None else len(prompt_embeds)
    if pictures != prompts and 1 not in (pictures, prompts):
        raise ValueError(f"{prompts} prompts are given for {pictures} pictures; give one, or one per picture")
    return max(pictures, prompts)


def embeds_of_batch(
    prompt_embeds: Tensor, negative_prompt_embeds: Tensor | None, batch_size: int, num_images_per_prompt: int
) -> tuple[Tensor, Tensor | None]:
    """Embeddings for all results of a call, with guidance the negative ones first, and those once more.

    Arguments as `expand_batch`; negative_prompt_embeds: None without guidance.

    Raises:
        ValueError: another number of prompts, or negative ones of another shape.
    """
    prompt_embeds = expand_batch(prompt_embeds, batch_size, num_images_per_prompt)
    if negative_prompt_embeds is None:
        return prompt_embeds, None
    negative_prompt_embeds = expand_batch(negative_prompt_embeds, batch_size, num_images_per_prompt)
    if negative_prompt_embeds.shape != prompt_embeds.shape:
        raise ValueError(
            f"prompt_embeds of shape {tuple(prompt_embeds.shape[1:])} and negative_prompt_embeds of shape "
            f"{tuple(negative_prompt_embeds.shape[1:])} are given; give both, padded to one length"
        )
    return torch.cat([negative_prompt_embeds, prompt_embeds]), negative_prompt_embeds


def expand_batch(embeds: Tensor, batch_size: int, num_images_per_prompt: int) -> Tensor:
    """Embeddings (batch_size, tokens, channels), of one prompt for all results or of one per picture.

    embeds: as `encode_prompt` returns them, `num_images_per_prompt` rows per prompt.

    Raises:
        ValueError: another number of prompts.
    """
    if len(embeds) not in (num_images_per_prompt, batch_size):
        prompts, pictures = len(embeds) // num_images_per_prompt, batch_size // num_images_per_prompt
        raise ValueError(f"{prompts} prompts are given for {pictures} pictures; give one, or one per picture")
    return embeds.repeat(batch_size // len(embeds), 1, 1)
