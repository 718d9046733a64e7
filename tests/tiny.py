"""Tiny random pipelines of every supported class, from configs: no download."""

import json

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from pretrain import build_tokenizer
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

SD_BETAS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def scheduler(prediction_type="epsilon", **betas):
    return DDIMScheduler(**(betas or SD_BETAS), steps_offset=1, clip_sample=False, set_alpha_to_one=True,
                         timestep_spacing="trailing", prediction_type=prediction_type)


def unet(width=16, text=32, **extra):
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
        block_out_channels=(width, 2 * width), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=8, cross_attention_dim=text,
        attention_head_dim=4, **extra)


def vae(tiny=False):
    if tiny:
        return AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1))
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4)


def text_config(tokenizer, **extra):
    return dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=16, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **extra)


def sd(prediction_type="epsilon", tiny_vae=False):
    tokenizer = build_tokenizer()
    return StableDiffusionPipeline(
        vae(tiny_vae), CLIPTextModel(CLIPTextConfig(**text_config(tokenizer))), tokenizer, unet(),
        scheduler(prediction_type), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)


def sdxl(prediction_type="epsilon"):
    tokenizer = build_tokenizer()
    config = text_config(tokenizer, projection_dim=32)
    net = unet(
        text=64, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1), projection_class_embeddings_input_dim=6 * 8 + 32)
    return StableDiffusionXLPipeline(
        vae(), CLIPTextModel(CLIPTextConfig(**config)), CLIPTextModelWithProjection(CLIPTextConfig(**config)),
        tokenizer, build_tokenizer(), net, scheduler(prediction_type), add_watermarker=False)


def pixart(prediction_type="epsilon"):
    words = "a small large red green blue yellow circle square triangle on white gray black".split()
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{w}", -1.0) for w in words)]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=16)
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    text = T5EncoderModel(config)
    net = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=32, sample_size=8, patch_size=2, caption_channels=32,
        use_additional_conditions=False, norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6)
    # A fresh PixArt ends in a layer of zeros, which would hide its condition.
    torch.nn.init.normal_(net.proj_out.weight, std=0.1)
    linear = scheduler(prediction_type, beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    return PixArtAlphaPipeline(tokenizer, text, vae(), net, linear)


def pixel(path, classes=("cat", "dog"), flat=False):
    """A pixel-space model saved in `path`; flat: in one folder, as google/ddpm-cifar10-32 has its files."""
    net = UNet2DModel(
        sample_size=8, block_out_channels=(16, 32), down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2, layers_per_block=1, norm_num_groups=8,
        num_class_embeds=len(classes) + 1 if classes else None)
    DDPMPipeline(net, DDPMScheduler()).save_pretrained(path)
    if classes:
        (path / "classes.json").write_text(json.dumps(classes))
    if flat:
        for part in ("unet", "scheduler"):
            for file in (path / part).iterdir():
                file.rename(path / file.name)
            (path / part).rmdir()
    return net.eval()


def clip():
    """(CLIPModel, CLIPProcessor)."""
    tokenizer = build_tokenizer()
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                  image_size=16, patch_size=4)
    ends = {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos", "pad")}
    config = CLIPConfig(text_config=text_config(tokenizer), vision_config=vision, projection_dim=24, **ends)
    model = CLIPModel(config)
    processor = CLIPImageProcessor(size=dict(shortest_edge=16), crop_size=16, image_mean=[0.4, 0.5, 0.6],
                                   image_std=[0.2, 0.3, 0.4])
    return model.eval(), CLIPProcessor(processor, tokenizer)


def save_models(folder):
    """Saves a tiny SD pipeline, an AutoencoderTiny and two CLIPModels to folder/sd, tae, clip, judge."""
    torch.manual_seed(0)
    sd().save_pretrained(folder / "sd")
    vae(tiny=True).save_pretrained(folder / "tae")
    for name in ("clip", "judge"):
        for part in clip():
            part.save_pretrained(folder / name)
    return folder
