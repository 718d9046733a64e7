"""--precision bf16: which networks are held in bf16, which stay float32, and their outputs."""

import inspect

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from helpers import CAPTIONS, perturb, random_vgg

import diff_instruct_star as di
import swiftbrush_v2 as sb
import yoso
from common import (
    HalfUNet,
    add_lora,
    hold_in_bf16,
    load,
    load_decoder,
    load_distance,
    load_scorer,
    one_step,
    use_lora,
)
from plumbing.cli import parse_config
from plumbing.run import Run

BF16, FP32 = {torch.bfloat16}, {torch.float32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the tiny models lie, and another student of the same architecture."""
    tiny.save_models(root := tmp_path_factory.mktemp("models"))
    torch.manual_seed(3)
    tiny.sd().save_pretrained(root / "student")
    return root


def cast(script, folder, out, *flags):
    """(config, run, models) of a script in bf16 on the tiny models."""
    argv = ["--model", folder / "sd", "--precision", "bf16", "--batch-size", 4, "--device", "cpu",
            "--out", out, *flags]
    if script is yoso:
        argv += ["--preset", "mini"]
    else:
        argv += ["--preset", "shapes", "--decoder", folder / "tae", "--rank", 4, "--prediction", "epsilon"]
        argv += ["--clip", folder / "clip"] if script is sb else ["--reward", folder / "clip", "--probe", ""]
    config = parse_config(script.Config, script.PRESETS, [str(a) for a in argv], "")
    run = Run(config)
    return config, run, script.build(config, run, *([config.stage] if script is sb else []))


def dtypes(parameters):
    return {p.dtype for p in parameters}


def test_a_network_is_held_in_bf16(folder):
    """It takes float32, with and without autocast around it, and gives what autocast gives on float32."""
    (exact, codec), (held, _) = load(folder / "sd"), load(folder / "sd")
    hold_in_bf16(held.net)
    z, cond, t = torch.randn(2, *codec.shape), codec.cond(["a", "b"]), torch.tensor([5, 900])
    with torch.autocast("cpu", torch.bfloat16):
        wanted, inside = exact.predict(z, t, cond=cond), held.predict(z, t, cond=cond)
    outside = held.predict(z, t, cond=cond)
    assert dtypes(held.net.parameters()) == BF16 and outside.dtype == torch.float32
    assert torch.equal(inside, outside)
    error = lambda x: (x - exact.predict(z, t, cond=cond)).norm().item()
    assert 0 < error(outside) < 1.5 * error(wanted)


def test_a_lora_on_it_is_float32(folder):
    """Its weights, its gradient, and its effect."""
    net = load(folder / "sd")[0].net
    hold_in_bf16(net)
    weights = add_lora(net, "student", 4, 8)
    perturb(weights, 0.3)
    assert dtypes(weights.values()) == FP32
    x, cond = torch.randn(1, 4, 8, 8), dict(encoder_hidden_states=torch.randn(1, 16, 32))
    bare = net(x, timestep=5, **cond).sample
    with use_lora(net, "student"):
        output = net(x, timestep=5, **cond).sample
    output.float().square().mean().backward()
    assert dtypes(p.grad for p in weights.values()) == FP32
    assert all(p.grad.abs().sum() > 0 for p in weights.values()) and not torch.equal(bare, output)


def test_scorers_and_the_small_decoder(folder):
    """In bf16 they give float32, near that of float32, and a gradient to the picture."""
    codec = load(folder / "sd")[1]
    x0, found = torch.randn(3, *codec.shape), []
    for precision in ("fp32", "bf16", "tf32"):
        x = x0.clone().requires_grad_()
        scorer = load_scorer(str(folder / "clip"), precision=precision)
        pictures = load_decoder(str(folder / "tae"), codec, precision)(x)
        cosines = scorer(pictures, scorer.texts(["a", "b", "c"]))
        found.append((pictures, cosines, *torch.autograd.grad(cosines.sum(), x)))
    exact, rounded, tf32 = found
    assert all(tensor.dtype == torch.float32 for tensor in rounded)
    assert all(torch.equal(a, b) for a, b in zip(exact, tf32)) and not torch.equal(rounded[1], exact[1])
    for a, b, bound in zip(exact, rounded, (0.02, 0.02, 0.15)):  # the gradient passes through most roundings
        assert (a - b).norm() < bound * a.norm()


@pytest.mark.parametrize("name", ["l2", "lpips"])
def test_a_distance_of_pictures_is_float32_under_autocast(folder, name):
    """Also of what a whole VAE decodes; nearly equal pictures are where bf16's digits are too few."""
    codec, x0 = load(folder / "sd")[1], torch.randn(2, 4, 8, 8)
    with pytest.MonkeyPatch.context() as patched:
        random_vgg(patched)
        features, distance = load_distance(name, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        near = [features(load_decoder("", codec)(x)) for x in (x0, x0 + 0.01)]
        d = distance(*near)
    assert d.dtype == torch.float32 and torch.equal(d, distance(*near))


def test_yoso_holds_the_frozen_half_and_no_weights_that_it_exports(folder, tmp_path):
    """Where the half shares the weights below a LoRA, they stay float32."""
    _, _, full = cast(yoso, folder, tmp_path)
    _, _, lora = cast(yoso, folder, tmp_path, "--rank", 4)
    assert dtypes(full.half.parameters()) == BF16
    for models in (full, lora):
        held = [models.generator.net, models.discriminator, models.codec.vae, models.codec.pipe.text_encoder]
        assert set.union(*(dtypes(part.parameters()) for part in held)) == FP32
    assert isinstance(lora.half, HalfUNet) and dtypes(lora.half.parameters()) == FP32


@pytest.mark.parametrize("stage", "ab")
def test_swiftbrush_holds_a_teacher_from_which_no_student_starts(folder, stage, tmp_path):
    for student, dtype in (("", FP32), (folder / "student", BF16)):
        config, run, models = cast(sb, folder, tmp_path, "--stage", stage, "--student", student)
        bare = [p for name, p in models.teacher.net.named_parameters() if "lora_" not in name]
        assert dtypes(bare) == dtype
        trained = (*models.student.trainable().values(), *models.lora_teacher.trainable().values())
        assert dtypes(trained) == dtypes(models.ema.average.values()) == FP32
        assert dtypes(models.student.net.parameters()) == FP32
        scalars = sb.train_step(0, CAPTIONS[:4], config, run, models)
        assert all(value.isfinite() and value.dtype == torch.float32 for value in scalars.values())
        assert one_step(models.student, torch.randn(1, *models.loaded.codec.shape),
                        models.loaded.codec.cond(["a"])).dtype == torch.float32


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_diff_instruct_copies_the_reference_before_it_is_rounded(folder, kind, tmp_path):
    """Student and assistant start from all digits of its weights."""
    exact = load(folder / "sd")[0].net.state_dict()
    flags = ["--assistant", kind, "--assistant-warmup", 0, "--warmup", 0]
    config, run, models = cast(di, folder, tmp_path, *flags)
    bare = [p for name, p in models.reference.net.named_parameters() if "lora_" not in name]
    assert dtypes(bare) == BF16 and dtypes(models.assistant.trainable().values()) == FP32
    copies = [models.student.net, models.assistant.net][:2 if kind == "full" else 1]
    for net in copies:
        assert all(torch.equal(value, exact[key]) for key, value in net.state_dict().items())
    scalars = di.train_step(0, CAPTIONS[:4], config, run, models)
    assert all(value.isfinite() and value.dtype == torch.float32 for value in scalars.values())


@pytest.mark.parametrize("script", [yoso, sb, di])
def test_text_encoder_and_vae_run_under_autocast(script, folder, tmp_path):
    """In a training step; what they give is float32 again."""
    config, run, models = cast(script, folder, tmp_path, *["--stage", "b"] * (script is sb))
    codec = models.loaded.codec if script is sb else models.codec
    encoder, seen = codec.pipe.text_encoder, {}
    def note(name):
        def hook(module, args, output):
            seen.setdefault(name, output.dtype)
        return hook

    next(m for m in encoder.modules() if isinstance(m, torch.nn.Linear)).register_forward_hook(note("text"))
    codec.vae.encoder.conv_in.register_forward_hook(note("VAE"))
    encode = codec.encode
    codec.encode = lambda pictures: seen.setdefault("x0", encode(pictures))
    size = codec.picture_size
    pictures = [torch.rand(4, 3, size, size)] if script is yoso else []
    script.train_step(10**6 if script is di else 0, *pictures, CAPTIONS[:4], config, run, models)
    assert seen["text"] == torch.bfloat16
    if script is yoso:
        assert seen["VAE"] == torch.bfloat16 and seen["x0"].dtype == torch.float32


@pytest.mark.parametrize("script", [sb, di])
def test_a_script_holds_its_scorers_and_its_small_decoder_in_bf16(script, folder, tmp_path):
    models = cast(script, folder, tmp_path, *["--stage", "b"] * (script is sb))[2]
    decode = models.loaded.decode if script is sb else models.decode
    inside = lambda function, name: inspect.getclosurevars(function).nonlocals[name]
    networks = [inside(decode, "tiny"), *(inside(s.embed_images, "model") for s in models.scorers.values())]
    assert len(networks) == 2 and all(dtypes(network.parameters()) == BF16 for network in networks)


@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_every_lora_starts_as_its_flag_says(folder, init, tmp_path):
    flags = ["--lora-init", init, "--precision", "fp32"]
    yoso_lora = cast(yoso, folder, tmp_path, "--rank", 4, *flags)[2].generator
    stage_b = cast(sb, folder, tmp_path, "--stage", "b", "--rank-b", 4, *flags)[2]
    assistant = cast(di, folder, tmp_path, "--assistant", "lora", *flags)[2].assistant
    for denoiser in (yoso_lora, stage_b.student, stage_b.lora_teacher, assistant):
        A = {name: p for name, p in denoiser.trainable().items() if "lora_A" in name and "attn1.to_q" in name}
        width = next(iter(A.values())).shape[1]
        wanted = 1 / (3 * width)**0.5 if init == "default" else 1 / 4
        found = torch.cat([p.flatten() for p in A.values() if p.shape[1] == width]).std().item()
        assert found == pytest.approx(wanted, rel=0.3)


@pytest.mark.slow
def test_a_pipeline_is_exported_in_float32(folder, tmp_path):
    """Its VAE and text encoder are the model's, bit for bit."""
    flags = ["--model", folder / "sd", "--student", folder / "student", "--preset", "shapes", "--decoder",
             folder / "tae", "--clip", folder / "clip", "--rank", 4, "--rank-b", 4, "--batch-size", 4,
             "--prediction", "epsilon", "--iterations", 1, "--iterations-b", 1, "--device", "cpu",
             "--precision", "bf16", "--out", tmp_path]
    sb.main([str(flag) for flag in flags])
    model = DiffusionPipeline.from_pretrained(folder / "sd")
    for which in ("a/pipeline", "b/pipeline", "pipeline"):
        pipe = DiffusionPipeline.from_pretrained(tmp_path / which)
        for part in ("vae", "text_encoder"):
            ours, theirs = getattr(pipe, part).state_dict(), getattr(model, part).state_dict()
            assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
        rounded = [p for p in pipe.unet.parameters() if torch.equal(p, p.bfloat16().float())]
        assert sum(p.numel() for p in rounded) < 0.1 * sum(p.numel() for p in pipe.unet.parameters())
