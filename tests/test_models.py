"""Pretrained models: every backbone through load(), against diffusers; half UNets, LoRA, scorers."""

import json

import pytest
import tiny
import torch
from diffusers import (
    DiffusionPipeline,
    LCMScheduler,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.v2 import functional as TF

import common
from common import (
    Denoiser,
    HalfUNet,
    NoiseSchedule,
    UserError,
    add_lora,
    ddim_sample,
    enable_checkpointing,
    load,
    load_scorer,
    map_cond,
    use_lora,
)
from plumbing.data import load_prompts

PROMPTS = ["a large red circle on white", "a small blue square on black"]
BUILDERS = dict(sd=tiny.sd, sdxl=tiny.sdxl, pixart=tiny.pixart)


def saved(tmp_path, pipe):
    pipe.save_pretrained(tmp_path / "pipe")
    return str(tmp_path / "pipe")


def call(path, x_T, **arguments):
    """The pipeline as diffusers itself runs it."""
    pipe = DiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    extra = dict(use_resolution_binning=False, max_sequence_length=16) if "PixArt" in type(pipe).__name__ else {}
    return pipe(PROMPTS, latents=x_T, output_type=arguments.pop("output_type", "latent"), **extra, **arguments).images


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", BUILDERS)
def test_every_backbone_equals_diffusers(tmp_path, name, prediction_type):
    """load -> encode the prompts -> denoise -> decode gives what the diffusers pipeline gives, with and without guidance."""
    path = saved(tmp_path, BUILDERS[name](prediction_type))
    denoiser, codec = load(path)
    assert denoiser.prediction_type == prediction_type
    x_T = torch.randn(2, *codec.shape)
    cond, null = codec.cond(PROMPTS), codec.null(2)
    for steps, guidance in ((1, 1.0), (5, 1.0), (5, 3.0)):
        ours = ddim_sample(denoiser, x_T, steps, cond, null, guidance)
        theirs = call(path, x_T, num_inference_steps=steps, guidance_scale=guidance)
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max(), (steps, guidance)
    pixels = call(path, x_T, num_inference_steps=1, guidance_scale=1.0, output_type="pt")
    ours = codec.decode(ddim_sample(denoiser, x_T, 1, cond))
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), pixels, atol=1e-4, rtol=0)
    assert ours.shape == (2, 3, codec.picture_size, codec.picture_size)


@pytest.mark.parametrize("name", BUILDERS)
def test_conditions_matter_and_can_be_mixed(tmp_path, name):
    """Each prompt changes the prediction; rows of conditions can be taken and replaced."""
    denoiser, codec = load(saved(tmp_path, BUILDERS[name]()))
    x_t, t = torch.randn(1, *codec.shape).repeat(2, 1, 1, 1), torch.tensor([500, 500])
    cond, null = codec.cond(PROMPTS), codec.null(2)
    first, second = denoiser.predict(x_t, t, cond=cond)
    assert not torch.allclose(first, second, atol=1e-5)
    mixed = map_cond(lambda a, b: torch.where(torch.tensor([True, False]).view(-1, *[1] * (a.ndim - 1)), a, b), cond, null)
    mixed = denoiser.predict(x_t, t, cond=mixed)
    torch.testing.assert_close(mixed[0], first, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mixed[1], denoiser.predict(x_t, t, cond=null)[1], atol=1e-4, rtol=1e-4)


def test_sdxl_null_is_zeros_with_the_micro_conditioning(tmp_path):
    _, codec = load(saved(tmp_path, tiny.sdxl()))
    null = codec.null(3)
    assert not null["encoder_hidden_states"].any() and not null["added_cond_kwargs"]["text_embeds"].any()
    assert null["added_cond_kwargs"]["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 3


def test_everything_loaded_is_frozen_and_in_eval_mode(tmp_path):
    denoiser, codec = load(saved(tmp_path, tiny.sd()))
    for module in (denoiser.net, codec.vae, codec.pipe.text_encoder):
        assert not module.training and not any(p.requires_grad for p in module.parameters())


def test_encode_draws_from_the_posterior(tmp_path):
    _, codec = load(saved(tmp_path, tiny.sd()))
    pictures, noise = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, *codec.shape)
    posterior = codec.vae.encode(pictures).latent_dist
    torch.testing.assert_close(codec.encode(pictures), posterior.mode() * 0.18215)
    torch.testing.assert_close(codec.encode(pictures, noise), (posterior.mean + posterior.std * noise) * 0.18215)


def test_tiny_autoencoder_takes_unscaled_latents(tmp_path):
    _, codec = load(saved(tmp_path, tiny.sd(tiny_vae=True)))
    pictures, x0 = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(codec.encode(pictures), codec.vae.encode(pictures).latents)
    torch.testing.assert_close(codec.decode(x0), codec.vae.decode(x0).sample)


@pytest.mark.parametrize("flat", [False, True])
def test_pixel_space_models(tmp_path, flat):
    """Class-conditional with a null class, and unconditional, in the layout of google/ddpm-cifar10-32 too."""
    net = tiny.pixel(tmp_path / "classes", flat=flat)
    denoiser, codec = load(str(tmp_path / "classes"))
    cond, null = codec.cond(["a photo of a dog", "cat"]), codec.null(2)
    assert cond["class_labels"].tolist() == [1, 0] and null["class_labels"].tolist() == [2, 2]
    x_t, t = torch.randn(2, 3, 8, 8), torch.tensor([10, 900])
    torch.testing.assert_close(denoiser.predict(x_t, t, "epsilon", cond), net(x_t, t, torch.tensor([1, 0])).sample)
    assert codec.decode(x_t) is x_t and codec.encode(x_t) is x_t and codec.picture_size == 8
    with pytest.raises(UserError, match="names no class.*cat, dog"):
        codec.cond(["a photo of a ship"])
    net = tiny.pixel(tmp_path / "plain", classes=None, flat=flat)
    denoiser, codec = load(str(tmp_path / "plain"))
    assert codec.cond(PROMPTS) == codec.null(2) == {} and not codec.guided
    torch.testing.assert_close(denoiser.predict(x_t, t, "epsilon", {}), net(x_t, t).sample)


def test_an_exported_one_step_pipeline_loads(tmp_path):
    """LCMScheduler's schedule and prediction type come through."""
    pipe = tiny.sd("v_prediction")
    pipe.scheduler = LCMScheduler(**tiny.SD_BETAS, prediction_type="v_prediction", original_inference_steps=4, clip_sample=False)
    path = saved(tmp_path, pipe)
    denoiser, codec = load(path)
    x_T = torch.randn(2, *codec.shape)
    ours = ddim_sample(denoiser, x_T, 1, codec.cond(PROMPTS))
    torch.testing.assert_close(ours, call(path, x_T, num_inference_steps=1, guidance_scale=1.0), atol=1e-4, rtol=1e-4)


# Wrong input

def test_wrong_models_are_named(tmp_path):
    for name, message in (("no-such-dir", "there is no such directory"), (str(tmp_path), "no model_index.json"),
                          ("nobody/no-such-model", "hub")):
        with pytest.raises(UserError, match=message):
            load(name)
    path = tmp_path / "pipe"
    tiny.sd().save_pretrained(path)
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(UserError, match="a FluxPipeline, which is not supported.*StableDiffusionPipeline"):
        load(str(path))
    (path / "model_index.json").write_text(json.dumps(index))
    for file in (path / "unet").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="a part is missing or damaged"):
        load(str(path))
    (path / "unet").rename(path / "other")
    with pytest.raises(UserError, match="a part is missing, the folder unet/"):
        load(str(path))
    (path / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="pipe: "):
        load(str(path))


def test_damaged_parts_are_named(tmp_path):
    path = tmp_path / "pipe"
    tiny.sd().save_pretrained(path)
    tokenizer = (path / "tokenizer" / "tokenizer.json").read_text()
    (path / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer|missing"):
        load(str(path))
    (path / "tokenizer" / "tokenizer.json").write_text(tokenizer)
    weights = next((path / "text_encoder").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="missing or damaged"):
        load(str(path))


def test_lora_of_another_base_is_refused(tmp_path):
    path = saved(tmp_path, tiny.sd())
    denoiser, _ = load(path)
    add_lora(denoiser.net, "student", 4, 4)
    state = {f"transformer.{k}": v.contiguous() for k, v in get_peft_model_state_dict(denoiser.net, adapter_name="student").items()}
    (tmp_path / "lora").mkdir()
    save_file(state, tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    with pytest.raises(UserError, match="another base|cannot be loaded"):
        load(path, lora=str(tmp_path / "lora"))


def test_prompt_files(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("one\n\n two \n", encoding="utf-8")
    assert load_prompts(file) == ["one", "two"]
    rows = tmp_path / "p.jsonl"
    rows.write_text('{"prompt": "a"}\n{"caption": "b"}\n{"text": "ü"}\n', encoding="utf-8")
    assert load_prompts(rows) == ["a", "b", "ü"]
    rows.write_text('{"prompt": null}\n')
    with pytest.raises(UserError, match="JSON object"):
        load_prompts(rows)
    rows.write_text('{"title": "a"}\n')
    for path, content, message in ((rows, None, "JSON object"), (file, b"", "no prompt"), (file, b"caf\xe9", "not UTF-8"),
                                   (tmp_path / "none.txt", None, "cannot be read")):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_prompts(path)


def test_long_prompts_are_counted_once(tmp_path, capsys):
    for name, build in BUILDERS.items():
        _, codec = load(saved(tmp_path / name, build()))
        capsys.readouterr()
        codec.warn_of_long(["a red circle " * 10, *PROMPTS])
        text = capsys.readouterr().err
        assert text.startswith("1 of 3 prompts are longer than the text encoder's 16 tokens") and text.count("\n") == 1
        codec.warn_of_long(["a red circle " * 10] * 9000)
        assert capsys.readouterr().err.startswith("2250 of 2250 prompts looked at are longer")
        codec.cond(["a red circle " * 10])
        codec.warn_of_long(PROMPTS)
        assert capsys.readouterr().err == ""


# Real architectures, without their weights

SD15 = dict(sample_size=64, in_channels=4, out_channels=4, down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
            cross_attention_dim=768, attention_head_dim=8)
SD21 = dict(SD15, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
SDXL = dict(sample_size=128, in_channels=4, out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(320, 640, 1280),
            layers_per_block=2, cross_attention_dim=2048, attention_head_dim=(5, 10, 20), transformer_layers_per_block=(1, 2, 10),
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816)
PIXART = dict(num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28, cross_attention_dim=1152,
              attention_bias=True, sample_size=64, patch_size=2, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
              norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6, caption_channels=4096, use_additional_conditions=False)


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("config, parameters, half, features", [
    (SD15, 859_520_964, 348_712_960, (1280, 8, 8)), (SD21, 865_910_724, 351_662_080, (1280, 8, 8)),
    (SDXL, 2_567_463_684, 1_243_367_040, (1280, 32, 32))], ids=["SD 1.5", "SD 2.1", "SDXL"])
def test_real_unets_and_their_halves(config, parameters, half, features):
    """Published parameter counts; the half UNet's size and output shape; the whole one is left as it was."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        assert count(unet) == parameters
        half_unet = HalfUNet(unet)
        assert count(half_unet) == half and count(unet) == parameters
        cond = dict(encoder_hidden_states=torch.zeros(1, 77, config["cross_attention_dim"]))
        if config is SDXL:
            cond["added_cond_kwargs"] = dict(text_embeds=torch.zeros(1, 1280), time_ids=torch.zeros(1, 6))
        size = config["sample_size"]
        assert half_unet(torch.zeros(1, 4, size, size), torch.zeros(1), cond).shape == (1, *features)


def test_real_pixart_has_its_published_size():
    with torch.device("meta"):
        assert count(PixArtTransformer2DModel(**PIXART)) == 610_856_096


def test_half_unet_gives_the_mid_block_of_the_whole_one():
    unet = tiny.unet().eval()
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), dict(encoder_hidden_states=torch.randn(2, 5, 32))
    seen = []
    hook = unet.mid_block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    output = unet(x, t, **cond).sample
    hook.remove()
    half = HalfUNet(unet)
    torch.testing.assert_close(half(x, t, cond), seen[0], atol=0, rtol=0)
    with torch.no_grad():
        for p in half.parameters():
            p.add_(1)
    torch.testing.assert_close(unet(x, t, **cond).sample, output, atol=0, rtol=0)


# LoRA

def perturb(parameters):
    with torch.no_grad():
        for p in parameters.values():
            p.add_(0.1 * torch.randn_like(p))


def inputs():
    return torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), dict(encoder_hidden_states=torch.randn(2, 5, 32))


def test_two_adapters_share_one_frozen_network():
    """Off is the network itself, bit for bit; a fresh adapter changes nothing; each acts alone; gradients reach its own only."""
    net = tiny.unet().eval().requires_grad_(False)
    x, t, cond = inputs()
    base = net(x, t, **cond).sample
    student, fake = add_lora(net, "student", 4, 8), add_lora(net, "fake", 2, 2, ("to_q", "to_v"))
    assert student.keys().isdisjoint(fake.keys()) and len(fake) < len(student)
    schedule = NoiseSchedule.from_config(tiny.SD_BETAS)
    off, on, other = (Denoiser(net, schedule, "epsilon", name) for name in (None, "student", "fake"))
    for denoiser in (off, on, other):
        torch.testing.assert_close(denoiser.predict(x, t, "epsilon", cond), base, atol=0, rtol=0)
    perturb(student)
    assert not torch.allclose(on.predict(x, t, "epsilon", cond), base)
    for denoiser in (off, other):
        torch.testing.assert_close(denoiser.predict(x, t, "epsilon", cond), base, atol=0, rtol=0)
    # Another adapter is on when backward runs.
    loss = on.predict(x, t, "epsilon", cond).square().mean()
    with use_lora(net, "fake"):
        loss.backward()
    assert all(p.grad is not None for p in student.values())
    assert all(p.grad is None for name, p in net.named_parameters() if name not in student)


def test_checkpointing_recomputes_with_the_adapter_of_the_forward_pass():
    x, t, cond = inputs()
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        net = tiny.unet().train().requires_grad_(False)
        student, fake = add_lora(net, "student", 4, 8), add_lora(net, "fake", 4, 8)
        perturb(student), perturb(fake)
        if checkpointing:
            enable_checkpointing(net)
        with use_lora(net, "student"):
            loss = net(x, t, **cond).sample.square().mean()
        with use_lora(net, "fake"):
            loss = loss + net(x, t, **cond).sample.square().mean()
        loss.backward()
        gradients.append([p.grad for p in (*student.values(), *fake.values())])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(recomputed, plain, atol=1e-7, rtol=1e-5)


def test_lora_file_is_merged_on_loading(tmp_path):
    """A file that diffusers wrote, with alpha != rank, on SD; an adapter folder of peft on PixArt."""
    path = saved(tmp_path, tiny.sd())
    denoiser, codec = load(path)
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), codec.cond(PROMPTS)
    perturb(add_lora(denoiser.net, "student", 4, 8))
    expected = Denoiser(denoiser.net, denoiser.schedule, "epsilon", "student").predict(x, t, "epsilon", cond)
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", get_peft_model_state_dict(denoiser.net, adapter_name="student"),
                                              unet_lora_adapter_metadata=denoiser.net.peft_config["student"].to_dict())
    merged, _ = load(path, lora=str(tmp_path / "lora"))
    torch.testing.assert_close(merged.predict(x, t, "epsilon", cond), expected, atol=1e-5, rtol=1e-5)
    assert not any("lora" in name for name, _ in merged.net.named_parameters())
    with pytest.raises(UserError, match="cannot be loaded as LoRA"):
        load(path, lora=str(tmp_path / "none"))


def test_lora_on_pixart(tmp_path):
    denoiser, codec = load(saved(tmp_path, tiny.pixart()))
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), codec.cond(PROMPTS)
    base = denoiser.predict(x, t, "epsilon", cond)
    student = add_lora(denoiser.net, "student", 4, 8, ("to_q", "to_k", "to_v", "to_out.0"))
    perturb(student)
    on = Denoiser(denoiser.net, denoiser.schedule, "epsilon", "student")
    torch.testing.assert_close(denoiser.predict(x, t, "epsilon", cond), base, atol=0, rtol=0)
    assert not torch.allclose(on.predict(x, t, "epsilon", cond), base, atol=1e-4)
    assert get_peft_model_state_dict(denoiser.net, adapter_name="student").keys()


# Scorers

def test_scorer_equals_transformers(tmp_path):
    """The differentiable path gives the CLIPModel's own cosine, up to the processor's rounding to 8 bits."""
    model, processor = tiny.clip()
    model.save_pretrained(tmp_path), processor.save_pretrained(tmp_path)
    scorer = load_scorer(str(tmp_path))
    images = [Image.effect_noise((40, 24), 80).convert("RGB") for _ in PROMPTS]
    with torch.no_grad():
        batch = processor(text=PROMPTS, images=images, return_tensors="pt", padding="max_length")
        expected = model(**batch).logits_per_image.diag() / model.logit_scale.exp()
    pictures = torch.stack([TF.pil_to_tensor(i) for i in images]).float() / 127.5 - 1
    pictures.requires_grad_()
    scores = scorer(pictures, scorer.texts(PROMPTS))
    torch.testing.assert_close(scores, expected, atol=5e-3, rtol=0)
    scores.sum().backward()
    assert pictures.grad.abs().sum(dim=(1, 2, 3)).min() > 0


def test_scorers_that_cannot_be_had(tmp_path):
    for name in ("clip", "pickscore", str(tmp_path)):
        with pytest.raises(UserError, match="local directory works"):
            load_scorer(name)


def test_hps_scorer_equals_open_clip(tmp_path, monkeypatch):
    """HPS v2.1 is an open_clip checkpoint; here a tiny network of that kind, read from a file as the real one is."""
    import huggingface_hub
    import open_clip
    config = dict(embed_dim=16, vision_cfg=dict(image_size=28, layers=1, width=32, head_width=16, patch_size=14),
                  text_cfg=dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1))
    (tmp_path / "tiny-hps.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    model = open_clip.create_model("tiny-hps").eval()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / "hps.pt")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name: str(tmp_path / "hps.pt"))
    scorer = common._open_clip_scorer("cpu", "tiny-hps")
    pictures = torch.rand(2, 3, 28, 28) * 2 - 1
    with torch.no_grad():
        normalised = TF.normalize(pictures / 2 + 0.5, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        texts = model.encode_text(open_clip.get_tokenizer("tiny-hps")(PROMPTS), normalize=True)
        expected = (model.encode_image(normalised, normalize=True) * texts).sum(-1)
    torch.testing.assert_close(scorer(pictures, scorer.texts(PROMPTS)), expected, atol=1e-5, rtol=1e-5)
