"""Pretrained models: every backbone through load(), against diffusers; half UNets, LoRA, scorers."""

import copy
import json

import pytest
import tiny
import torch
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel
from helpers import perturb, plain
from peft import get_peft_model_state_dict
from peft.tuners.lora import Conv2d, Linear
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torchvision.transforms.v2 import functional as TF

import common
import plumbing.students
from common import (
    Denoiser,
    HalfUNet,
    NoiseSchedule,
    UserError,
    add_lora,
    ddim_sample,
    draw_many_steps,
    draw_samples,
    enable_checkpointing,
    load,
    load_decoder,
    load_scorer,
    map_cond,
    remove_lora,
    use_lora,
)
from plumbing.data import load_prompts
from plumbing.students import export_one_step, save_lora

PROMPTS = ["a large red circle on white", "a small blue square on black"]
BUILDERS = dict(sd=tiny.sd, sdxl=tiny.sdxl, pixart=tiny.pixart)


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    """name -> the folder of a tiny pipeline; no test changes it."""
    folder = tmp_path_factory.mktemp("pipes")
    torch.manual_seed(0)
    for name, build in BUILDERS.items():
        build().save_pretrained(folder / name)
    return {name: str(folder / name) for name in BUILDERS}


SLOW = pytest.mark.slow  # what a checkpoint predicts is read in the same way for every backbone


@pytest.mark.parametrize("name, prediction_type", [
    *((name, "epsilon") for name in BUILDERS), ("sd", "v_prediction"),
    pytest.param("sdxl", "v_prediction", marks=SLOW), pytest.param("pixart", "v_prediction", marks=SLOW)])
def test_every_backbone_equals_diffusers(pipes, tmp_path, name, prediction_type):
    """Prompts, denoising with and without guidance, and decoding give what the diffusers pipeline gives."""
    path = pipes[name]
    if prediction_type != "epsilon":
        BUILDERS[name](prediction_type).save_pretrained(path := tmp_path / "pipe")
    denoiser, codec = load(path)
    pipe, x_T = plain(path), torch.randn(2, *codec.shape)
    assert denoiser.prediction_type == prediction_type
    extra = dict(use_resolution_binning=False, max_sequence_length=16) if name == "pixart" else {}
    cond, null = codec.cond(PROMPTS), codec.null(2)
    for steps, guidance in ((1, 1.0), (4, 3.0)):
        ours = ddim_sample(denoiser, x_T, steps, cond, null, guidance)
        call = dict(latents=x_T, num_inference_steps=steps, guidance_scale=guidance)
        theirs = pipe(PROMPTS, output_type="latent", **call, **extra).images
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max(), (steps, guidance)
    pixels = pipe(PROMPTS, output_type="pt", **call, **extra).images
    pictures = codec.decode(ours)
    torch.testing.assert_close((pictures / 2 + 0.5).clamp(0, 1), pixels, atol=1e-4, rtol=0)
    assert pictures.shape == (2, 3, codec.picture_size, codec.picture_size)


@pytest.mark.parametrize("name", BUILDERS)
def test_conditions_matter_and_can_be_mixed(pipes, name):
    """Each prompt changes the prediction; rows of conditions can be taken and replaced."""
    denoiser, codec = load(pipes[name])
    x_t, t = torch.randn(1, *codec.shape).repeat(2, 1, 1, 1), torch.tensor([500, 500])
    cond, null = codec.cond(PROMPTS), codec.null(2)
    first, second = denoiser.predict(x_t, t, cond=cond)
    unconditional = denoiser.predict(x_t, t, cond=null)[1]
    for other in (first, unconditional):
        assert not torch.allclose(second, other, atol=1e-2)
    rows = torch.tensor([True, False])
    mixed = map_cond(lambda a, b: torch.where(rows.view(-1, *[1] * (a.ndim - 1)), a, b), cond, null)
    mixed = denoiser.predict(x_t, t, cond=mixed)
    torch.testing.assert_close(mixed[0], first, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mixed[1], unconditional, atol=1e-4, rtol=1e-4)


def test_sdxl_null_is_zeros_with_the_micro_conditioning(pipes):
    _, codec = load(pipes["sdxl"])
    null = codec.null(3)
    assert not null["encoder_hidden_states"].any() and not null["added_cond_kwargs"]["text_embeds"].any()
    assert null["added_cond_kwargs"]["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 3


def test_everything_loaded_is_frozen_and_in_eval_mode(pipes):
    denoiser, codec = load(pipes["sd"])
    for module in (denoiser.net, codec.vae, codec.pipe.text_encoder):
        assert not module.training and not any(p.requires_grad for p in module.parameters())


def test_encoding_gives_the_mean_of_the_posterior(pipes):
    """Without a draw; what are latents already stay as they are."""
    _, codec = load(pipes["sd"])
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = codec.encode(pictures)
    torch.testing.assert_close(latents, codec.vae.encode(pictures).latent_dist.mode() * 0.18215)
    assert codec.encode(latents) is latents


def test_tiny_autoencoder_takes_unscaled_latents(tmp_path):
    tiny.sd(tiny_vae=True).save_pretrained(tmp_path)
    _, codec = load(tmp_path)
    pictures, x0 = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(codec.encode(pictures), codec.vae.encode(pictures).latents)
    torch.testing.assert_close(codec.decode(x0), codec.vae.decode(x0).sample)


def test_a_smaller_decoder_for_the_losses(pipes, tmp_path):
    """An AutoencoderTiny of the same latents, with the gradient; without a name it is the model's own."""
    _, codec = load(pipes["sd"])
    vae = tiny.vae(tiny=True).eval()
    vae.save_pretrained(tmp_path)
    x0 = torch.randn(2, 4, 8, 8, requires_grad=True)
    pictures = load_decoder(str(tmp_path), codec)(x0)
    torch.testing.assert_close(pictures, vae.decode(x0).sample)
    pictures.square().mean().backward()
    assert x0.grad.abs().sum(dim=(1, 2, 3)).min() > 0
    assert torch.equal(load_decoder("", codec)(x0), codec.decode(x0))


@pytest.mark.parametrize("flat", [False, True])
def test_pixel_space_models(tmp_path, flat):
    """Class-conditional with a null class, and unconditional, in the layout of google/ddpm-cifar10-32 too."""
    net = tiny.pixel(tmp_path / "classes", flat=flat)
    denoiser, codec = load(str(tmp_path / "classes"))
    cond, null = codec.cond(["a photo of a dog", "cat"]), codec.null(2)
    assert cond["class_labels"].tolist() == [1, 0] and null["class_labels"].tolist() == [2, 2]
    x_t, t = torch.randn(2, 3, 8, 8), torch.tensor([10, 900])
    expected = net(x_t, t, torch.tensor([1, 0])).sample
    torch.testing.assert_close(denoiser.predict(x_t, t, "epsilon", cond), expected)
    assert codec.decode(x_t) is x_t and codec.encode(x_t) is x_t and codec.picture_size == 8
    with pytest.raises(UserError, match="names no class.*cat, dog"):
        codec.cond(["a photo of a ship"])
    net = tiny.pixel(tmp_path / "plain", classes=None, flat=flat)
    denoiser, codec = load(str(tmp_path / "plain"))
    assert codec.cond(PROMPTS) == codec.null(2) == {} and not codec.guided
    torch.testing.assert_close(denoiser.predict(x_t, t, "epsilon", {}), net(x_t, t).sample)


def test_pictures_of_one_column_start_from_one_noise(pipes, monkeypatch):
    """A one-step student is its teacher's DDIM with one step, however many pictures are drawn at once."""
    teacher, codec = load(pipes["sd"])
    prompts = (PROMPTS * 4)[:7]
    for chunk in (1, 3, 64):
        monkeypatch.setattr(common, "chunk_for", lambda codec, chunk=chunk: chunk)
        one = draw_samples(teacher, codec, prompts, 0)
        many = draw_many_steps(teacher, codec, prompts, 1, 1.0)
        assert one.shape == (7, 3, 32, 32) and torch.equal(one, many)
        assert not torch.equal(one[0], one[2]), "the same prompt has another noise in each column"


# Wrong input

def test_wrong_models_are_named(tmp_path):
    for name, message in (("no-such-dir", "there is no such directory"),
                          (str(tmp_path), "no model_index.json"), ("nobody/no-such-model", "hub")):
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


@pytest.mark.parametrize("kind", ["sd", "sdxl", "pixart"])
def test_a_model_with_missing_weights_is_refused(tmp_path, kind):
    """Of every part: the libraries would go on with random numbers, or with none."""
    path = tmp_path / kind
    getattr(tiny, kind)().save_pretrained(path)
    files = sorted(path.glob("*/*.safetensors"))
    assert len(files) == (4 if kind == "sdxl" else 3)
    for file in files:
        whole, state = file.read_bytes(), load_file(file)
        for lost in (sorted(state)[0], sorted(state)[-1]):
            kept = {key: value for key, value in state.items() if key != lost}
            save_file(kept, file, dict(format="pt"))
            message = f"{file.parent.name} lacks the weights .*{lost.split('.')[-2]}"
            with pytest.raises(UserError, match=message):
                load(str(path))
        file.write_bytes(whole)
    load(str(path))


def test_a_decoder_with_missing_weights_is_refused(tmp_path):
    tiny.vae(tiny=True).save_pretrained(tmp_path / "tae")
    _, codec = load_tiny(tmp_path)
    file = tmp_path / "tae" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state.pop("decoder.layers.0.weight")
    save_file(state, file, dict(format="pt"))
    with pytest.raises(UserError, match="lacks the weights decoder.layers.0.weight"):
        load_decoder(str(tmp_path / "tae"), codec)


def load_tiny(folder):
    """A tiny Stable Diffusion, saved and loaded."""
    tiny.sd().save_pretrained(folder / "sd")
    return load(str(folder / "sd"))


def test_the_exported_tokenizer_is_the_loaded_one(tmp_path):
    """Byte for byte, whatever was tokenised, with padding or without, before the export."""
    start, codec = load_tiny(tmp_path)
    (tmp_path / "sd" / "tokenizer" / "more.txt").write_text("kept too")
    start, codec = load(str(tmp_path / "sd"))
    codec.cond(["a large red circle on white"])
    codec.pipe.tokenizer(["a circle"], padding="max_length", max_length=9, truncation=True)
    codec.pipe.tokenizer.chat_template = "{{ a file of its own }}"
    export_one_step(codec, start.net, "epsilon", tmp_path / "out")
    files = lambda name: {f.name: f.read_bytes() for f in (tmp_path / name / "tokenizer").iterdir()}
    assert files("out") == files("sd") and len(files("out")) > 2
    codec.pipe.save_pretrained(tmp_path / "plain")
    assert files("plain") != files("sd"), "the library alone would write what was left of the last call"
    assert not files("plain").keys() <= files("sd").keys(), "nor would it stop at the files that there were"
    load(str(tmp_path / "out"))


def test_ddim_has_at_most_a_step_a_timestep(tmp_path):
    """More would repeat timesteps; pictures for a comparison then take all timesteps."""
    denoiser, codec = load_tiny(tmp_path)
    few = Denoiser(denoiser.net, denoiser.schedule.up_to(9), "epsilon")
    z, cond = torch.randn(1, *codec.shape), codec.cond(["a circle"])
    assert ddim_sample(few, z, 10, cond).isfinite().all()
    for steps in (11, 0, -1):
        with pytest.raises(UserError, match=f"DDIM of {steps} steps: the model has 10 timesteps"):
            ddim_sample(few, z, steps, cond)
    ten, many = (draw_many_steps(few, codec, ["a circle"], steps, 1.0) for steps in (10, 25))
    assert torch.equal(ten, many)


def test_lora_files_that_do_not_fit_are_refused(pipes, tmp_path):
    denoiser, _ = load(pipes["sd"])
    add_lora(denoiser.net, "student", 4, 4)
    state = get_peft_model_state_dict(denoiser.net, adapter_name="student")
    other = {f"transformer.{key}": value.contiguous() for key, value in state.items()}
    save_file(other, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(UserError, match="another base|cannot be loaded"):
        load(pipes["sd"], lora=str(tmp_path))
    with pytest.raises(UserError, match="cannot be loaded as LoRA"):
        load(pipes["sd"], lora=str(tmp_path / "none"))


def test_prompt_files(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("one\n\n two \n", encoding="utf-8")
    assert load_prompts(file) == ["one", "two"]
    rows = tmp_path / "p.jsonl"
    rows.write_text('{"prompt": "a"}\n{"caption": "b"}\n{"text": "ü"}\n', encoding="utf-8")
    assert load_prompts(rows) == ["a", "b", "ü"]
    for path, content, message in (
            (rows, b'{"prompt": null}\n', "JSON object"), (rows, b'{"title": "a"}\n', "JSON object"),
            (file, b"", "no prompt"), (file, b"caf\xe9", "not UTF-8"),
            (tmp_path / "none.txt", None, "cannot be read")):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_prompts(path)


@pytest.mark.parametrize("name", BUILDERS)
def test_long_prompts_are_counted_once(pipes, name, capsys):
    _, codec = load(pipes[name])
    long = "a red circle " * 10
    capsys.readouterr()
    codec.warn_of_long([long, *PROMPTS])
    text = capsys.readouterr().err
    assert text.startswith("1 of 3 prompts are longer than the text encoder's 16 tokens")
    assert text.count("\n") == 1
    if name == "sd":
        codec.warn_of_long([long] * 9000)
        assert capsys.readouterr().err.startswith("2250 of 2250 prompts looked at are longer")
    codec.cond([long])
    codec.warn_of_long(PROMPTS)
    assert capsys.readouterr().err == ""


# Real architectures, without their weights

SD15 = dict(sample_size=64, in_channels=4, out_channels=4, layers_per_block=2,
            block_out_channels=(320, 640, 1280, 1280),
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            cross_attention_dim=768, attention_head_dim=8)
SD21 = dict(SD15, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
SDXL = dict(sample_size=128, in_channels=4, out_channels=4, layers_per_block=2,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=2048, attention_head_dim=(5, 10, 20), transformer_layers_per_block=(1, 2, 10),
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816)
PIXART = dict(num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28,
              cross_attention_dim=1152, attention_bias=True, sample_size=64, patch_size=2, norm_eps=1e-6,
              activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
              norm_elementwise_affine=False, caption_channels=4096, use_additional_conditions=False)


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("config, parameters, half, features", [
    pytest.param(SD15, 859_520_964, 348_712_960, (1280, 8, 8), id="SD 1.5"),
    pytest.param(SD21, 865_910_724, 351_662_080, (1280, 8, 8), id="SD 2.1"),
    pytest.param(SDXL, 2_567_463_684, 1_243_367_040, (1280, 32, 32), id="SDXL", marks=pytest.mark.slow)])
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


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("share", [False, True])
def test_half_unet_gives_the_mid_block_of_the_whole_one(pipes, name, share):
    """A copy is trained apart from the whole one; with share the weights are the same."""
    denoiser, codec = load(pipes[name])
    unet, seen = denoiser.net, []
    x_t, t, cond = torch.randn(2, *codec.shape), torch.tensor([3, 700]), codec.cond(PROMPTS)
    hook = unet.mid_block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    output = unet(x_t, t, **cond).sample
    hook.remove()
    half = HalfUNet(unet, share)
    torch.testing.assert_close(half(x_t, t, cond), seen[0], atol=0, rtol=0)
    perturb(dict(half.named_parameters()), 1.0)
    assert torch.equal(unet(x_t, t, **cond).sample, output) == (not share)


# LoRA

def inputs():
    return torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), dict(encoder_hidden_states=torch.randn(2, 5, 32))


LAYERS = {
    "linear": (Linear, lambda: torch.nn.Linear(6, 8), (4, 16, 6)),
    "linear without bias": (Linear, lambda: torch.nn.Linear(6, 8, bias=False), (1, 64, 6)),
    "convolution": (Conv2d, lambda: torch.nn.Conv2d(6, 8, 3, stride=2, padding=1), (4, 6, 8, 8)),
    "1 x 1": (Conv2d, lambda: torch.nn.Conv2d(6, 8, 1), (4, 6, 4, 4))}


def lora_layer(name, dtype=torch.float64):
    """(peft's class, network, its layer with the LoRAs "student" and "fake", input, calls of their A)."""
    kind, build, shape = LAYERS[name]
    net = torch.nn.ModuleDict(dict(to_q=build().to(dtype)))
    for adapter, rank, alpha in (("student", 8, 4), ("fake", 5, 9)):
        perturb(add_lora(net, adapter, rank, alpha), 0.5)
    net.to_q.to(dtype)
    calls = []
    for A in net.to_q.lora_A.values():
        A.register_forward_hook(lambda *_: calls.append(1))
    return kind, net, net.to_q, torch.randn(shape, dtype=dtype), calls


@pytest.mark.parametrize("name", LAYERS)
def test_a_merged_lora_is_pefts(name):
    """With either of two adapters, on the bare weights, in a copy, and after one was removed."""
    peft, net, layer, x, calls = lora_layer(name)
    before, results = copy.deepcopy(net.state_dict()), {}
    with torch.no_grad():
        for adapter in ("student", "fake", None):
            with use_lora(net, adapter):
                results[adapter] = layer(x)
                assert not calls
                torch.testing.assert_close(results[adapter], peft.forward(layer, x), atol=1e-12, rtol=0)
                calls.clear()
        assert torch.equal(results[None], layer.base_layer(x))
        assert all((results[adapter] - results[None]).abs().max() > 0.1 for adapter in ("student", "fake"))
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
        other = copy.deepcopy(net)
        perturb({"B": layer.lora_B["fake"].weight})
        remove_lora(net, "student")
        with use_lora(net, "fake"), use_lora(other, "fake"):
            assert torch.equal(other.to_q(x), results["fake"])
            torch.testing.assert_close(layer(x), peft.forward(layer, x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_the_gradients_of_a_merged_lora_are_pefts(name, trained):
    """Those of the adapter, if it is trained, and of the input; the bare weights and the other get none."""
    peft, net, layer, x, calls = lora_layer(name)
    A, B = layer.lora_A["student"].weight, layer.lora_B["student"].weight
    for p in (A, B):
        p.requires_grad_(trained)
    gradients = []
    with use_lora(net, "student"):
        for forward in (layer, lambda x: peft.forward(layer, x)):
            assert not calls
            net.zero_grad()
            forward(leaf := x.clone().requires_grad_()).square().sum().backward()
            gradients.append([p.grad for p in ((leaf, A, B) if trained else (leaf,))])
            assert all(p.grad is None for p in net.parameters() if p is not A and p is not B)
    torch.testing.assert_close(*gradients, atol=1e-11, rtol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_a_lora_is_not_merged_at_few_places_nor_in_bf16(name):
    """Then it is peft's own, bit for bit."""
    peft, net, layer, x, calls = lora_layer(name, torch.float32)

    def same(x):
        calls.clear()
        y = layer(x)
        assert calls and torch.equal(y, peft.forward(layer, x))
        return y

    with torch.no_grad(), use_lora(net, "student"):
        same(x[:1, :2] if "linear" in name else x[:1, :, :1, :2])
        with torch.autocast("cpu", torch.bfloat16):
            assert same(x).dtype == torch.bfloat16
        layer.base_layer.bfloat16()
        assert same(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("init, deviation", [("default", 1 / (3 * 320)**0.5), ("gaussian", 1 / 32)])
def test_how_a_lora_starts(init, deviation):
    """B is 0, and A has the standard deviation that add_lora names."""
    net = torch.nn.ModuleDict(dict(to_q=torch.nn.Linear(320, 320)))
    torch.manual_seed(0)
    weights = common.add_lora(net, "student", 32, 32, ("to_q",), init)
    A, B = (next(p for name, p in weights.items() if which in name) for which in ("lora_A", "lora_B"))
    assert A.std().item() == pytest.approx(deviation, rel=0.02) and not B.any()


def test_two_adapters_share_one_frozen_network():
    """Off is the network itself, bit for bit; fresh adapters change nothing; each acts where it is on."""
    net = tiny.unet().eval().requires_grad_(False)
    x_t, t, cond = inputs()
    base = net(x_t, t, **cond).sample
    off = Denoiser(net, NoiseSchedule.from_config(tiny.SD_BETAS), "epsilon")
    student, fake = off.with_lora("student", 4, 8), off.with_lora("fake", 2, 2, ("to_q", "to_v"))
    assert student.trainable().keys().isdisjoint(fake.trainable()) and not off.trainable()
    assert len(fake.trainable()) < len(student.trainable())
    predict = lambda denoiser: denoiser.predict(x_t, t, "epsilon", cond)
    for denoiser in (off, student, fake):
        assert torch.equal(predict(denoiser), base)
    perturb(student.trainable())
    changed = predict(student)
    assert (changed - base).abs().max() > 0.1 and torch.equal(predict(fake), base)
    perturb(fake.trainable(), 0.5)
    assert torch.equal(predict(student), changed)
    assert (predict(fake) - base).abs().max() > 0.1 and not torch.allclose(predict(fake), changed, atol=0.1)
    # None is on any more: not in the bare denoiser, nor in the network itself, nor inside another's block.
    assert torch.equal(predict(off), base) and torch.equal(net(x_t, t, **cond).sample, base)
    with use_lora(net, "student"):
        assert torch.equal(net(x_t, t, **cond).sample, changed)
        assert torch.equal(predict(off), base)
        assert torch.equal(net(x_t, t, **cond).sample, changed)


def test_an_adapters_gradient_does_not_depend_on_what_is_on_when_backward_runs():
    """It reaches the weights of the adapter that the forward pass used, and no others."""
    net = tiny.unet().eval().requires_grad_(False)
    x_t, t, cond = inputs()
    off = Denoiser(net, NoiseSchedule.from_config(tiny.SD_BETAS), "epsilon")
    student, fake = off.with_lora("student", 4, 8), off.with_lora("fake", 4, 8)
    perturb(student.trainable()), perturb(fake.trainable())
    loss = student.predict(x_t, t, "epsilon", cond).square().mean()
    with use_lora(net, "fake"):
        loss.backward()
    assert all(p.grad.any() for p in student.trainable().values())
    assert all(p.grad is None for name, p in net.named_parameters() if name not in student.trainable())


def test_checkpointing_recomputes_with_the_adapter_of_the_forward_pass():
    x_t, t, cond = inputs()
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        net = tiny.unet().train().requires_grad_(False)
        student, fake = add_lora(net, "student", 4, 8), add_lora(net, "fake", 4, 8)
        perturb(student), perturb(fake)
        if checkpointing:
            enable_checkpointing(net)
        with use_lora(net, "student"):
            loss = net(x_t, t, **cond).sample.square().mean()
        with use_lora(net, "fake"):
            loss = loss + net(x_t, t, **cond).sample.square().mean()
        loss.backward()
        gradients.append([p.grad for p in (*student.values(), *fake.values())])
    for kept, recomputed in zip(*gradients):
        torch.testing.assert_close(recomputed, kept, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_loras_files_give_its_predictions(pipes, tmp_path, name):
    """Read by load(lora=), and by diffusers in its own format and in kohya's; PixArt's is a folder of peft.

    alpha is neither the rank nor peft's default, 8, and the LoRA changes the prediction a thousand times more
    than the files may.
    """
    denoiser, codec = load(pipes[name])
    x_t, t, cond = torch.randn(2, *codec.shape), torch.tensor([3, 700]), codec.cond(PROMPTS)
    base = denoiser.predict(x_t, t, "epsilon", cond)
    student = denoiser.with_lora("student", 4, 6)
    perturb(student.trainable())
    expected = student.predict(x_t, t, "epsilon", cond)
    assert torch.equal(denoiser.predict(x_t, t, "epsilon", cond), base)
    change = (expected - base).abs().max()
    assert change > 0.1
    save_lora(codec, denoiser.net, "student", tmp_path)
    merged, _ = load(pipes[name], lora=str(tmp_path))
    assert not any("lora" in key for key, _ in merged.net.named_parameters())
    assert (merged.predict(x_t, t, "epsilon", cond) - expected).abs().max() < 1e-3 * change
    for file in ("pytorch_lora_weights.safetensors", "kohya.safetensors") if name != "pixart" else ():
        pipe = plain(pipes[name])
        pipe.load_lora_weights(tmp_path, weight_name=file)
        with torch.no_grad():
            theirs = pipe.unet(x_t, t, **cond).sample
        assert (theirs - expected).abs().max() < 1e-3 * change, file


@pytest.mark.parametrize("name", ["sd", "pixart"])
def test_a_lora_that_cannot_be_written_is_named(pipes, tmp_path, monkeypatch, name):
    """safetensors has an error of its own for a full disk."""
    def full(*arguments, **more):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")
    denoiser, codec = load(pipes[name])
    denoiser.with_lora("student", 4, 6)
    monkeypatch.setattr(plumbing.students, "save_file", full)
    with pytest.raises(UserError, match="loras: cannot be written .*No space left"):
        save_lora(codec, denoiser.net, "student", tmp_path / "loras")


# Scorers

@pytest.mark.parametrize("size, bound", [((16, 20), 1e-5), ((24, 40), 1e-3)])
def test_scorer_equals_transformers(tmp_path, size, bound):
    """The differentiable path gives the CLIPModel's own cosine; where it resizes, up to 8-bit rounding."""
    model, processor = tiny.clip()
    model.save_pretrained(tmp_path), processor.save_pretrained(tmp_path)
    scorer = load_scorer(str(tmp_path))
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    with torch.no_grad():
        batch = processor(text=PROMPTS, images=[TF.to_pil_image(i) for i in images], return_tensors="pt",
                          padding="max_length")
        expected = model(**batch).logits_per_image / model.logit_scale.exp()
    assert expected.max() - expected.min() > 0.03
    pictures = (images.float() / 127.5 - 1).requires_grad_()
    scores = scorer(pictures, scorer.texts(PROMPTS))
    torch.testing.assert_close(scores, expected.diag(), atol=bound, rtol=0)
    scores.sum().backward()
    assert pictures.grad.abs().sum(dim=(1, 2, 3)).min() > 0


def test_scorers_that_cannot_be_had(tmp_path):
    for name in ("clip", "pickscore", str(tmp_path)):
        with pytest.raises(UserError, match="local directory works"):
            load_scorer(name)


def test_hps_scorer_equals_open_clip(tmp_path, monkeypatch):
    """HPS v2.1 is an open_clip checkpoint; here a tiny network of that kind, read from a file like it."""
    import huggingface_hub
    import open_clip
    vision = dict(image_size=28, layers=1, width=32, head_width=16, patch_size=14)
    text = dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1)
    config = dict(embed_dim=16, vision_cfg=vision, text_cfg=text)
    (tmp_path / "tiny-hps.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    model = open_clip.create_model("tiny-hps").eval()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / "hps.pt")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name: str(tmp_path / "hps.pt"))
    scorer = common._open_clip_scorer("cpu", "tiny-hps")
    pictures = torch.rand(2, 3, 28, 28) * 2 - 1
    with torch.no_grad():
        mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        normalised = TF.normalize(pictures / 2 + 0.5, mean, std)
        texts = model.encode_text(open_clip.get_tokenizer("tiny-hps")(PROMPTS), normalize=True)
        expected = (model.encode_image(normalised, normalize=True) * texts).sum(-1)
    torch.testing.assert_close(scorer(pictures, scorer.texts(PROMPTS)), expected, atol=1e-5, rtol=1e-5)
