"""Trains the models that the distillation scripts start from.

    python tools/pretrain.py                                         the mini models of assets/, from shapes
    python tools/pretrain.py --dataset cifar10 --out runs/teacher    a class-conditional teacher of pixels
    python tools/pretrain.py --base assets/mini-sd --schedule pixart --out runs/mini-linear
                                                                     a base of PixArt's noise schedule
    python tools/pretrain.py --base assets/mini-sd --dataset shapes-rolled --out runs/mini-rolled
                                                                     a base of another palette
    python tools/pretrain.py --base assets/mini-sd --vae --dataset shapes-two --out runs/mini-two
                                                                     a base of pictures of two shapes

The mini models are ordinary diffusers and transformers directories, float16 safetensors, 32 x 32 pictures:
  mini-clip       CLIPModel + processor: pictures against captions
  mini-judge      the same from another seed, which no method optimises: it only measures
  mini-pickscore  mini-clip fine-tuned on preference pairs as PickScore was: which of two pictures is better
  mini-sd         StableDiffusionPipeline: UNet over 8 x 8 x 4 latents, AutoencoderKL, mini-clip's text tower,
                  SD's schedule
  mini-taesd      AutoencoderTiny, a cheap decoder for mini-sd's latents
Every part's training is kept in --runs: Ctrl-C saves, the same command continues, and a finished part is not
trained again.
"""

import copy
import json
import math
import os
import sys
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModel,
    CLIPTokenizer,
)

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import EMA, Draws, NoiseSchedule, UserError, class_labels, load
from plumbing.cli import SEED, RunFlags, check_writable, flag, parse_config, run_command
from plumbing.data import load_dataset, to_floats
from plumbing.files import CHECKSUMS, write_folder
from plumbing.run import Run, choose_device, start_processes
from plumbing.shapes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Shapes

IMAGE, LATENT_CHANNELS, LATENT, TOKENS, TEXT_WIDTH = 32, 4, 8, 16, 64
SD_SCHEDULE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1,
                   clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")
PIXART_SCHEDULE = dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
SCHEDULES = {"": {}, "sd": SD_SCHEDULE, "pixart": PIXART_SCHEDULE}
GROUPS = 16  # of a teacher's norms
NULL_SHARE = 0.1  # of captions that are emptied, so that guidance has something to subtract; SD: 10 %
HELD_OUT_SEED = 20_000  # drawings that no training sees


@dataclass
class Config:
    """One field a flag; the text is also its --help."""
    dataset: str = flag("shapes", "shapes: the mini models; cifar10 or a folder by class: a teacher in pixel "
                        "space; with --base, any", needed=True)
    base: str = flag("", "train the UNet of this Stable Diffusion on, on --dataset and for --schedule")
    schedule: str = flag("", "with --base, the noise levels: its own, sd (scaled linear) or pixart (linear)",
                         choices=tuple(SCHEDULES))
    vae: bool = flag(False, "with --base, train its autoencoder on first, on --dataset")
    preset: str = flag("shapes", "defaults of a teacher: shapes; cifar10, DDPM's, for a GPU; base: of --base")
    out: str = flag("assets", "folder of the mini models; for a teacher or with --base, a folder of its own",
                    needed=True)
    runs: str = flag("runs/pretrain", "folder of the training itself, where an interrupted one continues",
                     needed=True)
    scale: float = flag(1.0, "factor on every part's iterations", above=0, most=1000)
    seed: int = flag(0, "of weights, drawings and noise", **SEED)
    device: str = flag("auto", "auto, cpu, cuda or mps")
    precision: str = flag("fp32", "of the networks", choices=("fp32", "tf32", "bf16"))
    workers: int = flag(0, "processes that read pictures", least=0, most=1000)
    iterations: int = flag(20_000, "of a teacher or of --base; the mini models' stand in PARTS", least=1)
    batch_size: int = flag(64, "of a teacher or of --base", least=1, most=100_000)
    lr: float = flag(5e-4, "of a teacher, or of a mini --base; diffusers fine-tunes SD with 1e-5", above=0)
    image_size: int = flag(32, "pixels of a teacher", least=1, most=4096)
    channels: tuple = flag((32, 64, 64), "of a teacher, by resolution, multiples of 16", least=16,
                           most=10_000)
    attention: bool = flag(True, "of a teacher, at its lowest resolution")


PRESETS = {
    "shapes": {},
    "cifar10": dict(channels=(128, 256, 256, 256), batch_size=128, lr=2e-4, iterations=200_000),
    "base": dict(iterations=2000),  # measured here: a mini model takes on another palette
}

# Iterations, batch size, learning rate; measured here: what reaches the figures of docs/mini-sd.md in less
# than an hour of two cores.
PARTS = {
    "vae": (3000, 32, 2e-3),
    "taesd": (2000, 32, 2e-3),
    "clip": (2500, 128, 1e-3),
    "judge": (2500, 128, 1e-3),
    "pickscore": (1500, 128, 3e-4),
    "unet": (9000, 64, 1e-3),
    "base-vae": (700, 32, 1e-3),
}


@dataclass
class Part(RunFlags):
    """What the training of one part depends on, which its continuation must repeat."""
    save_every: int = 250
    iterations: int = 0
    batch_size: int = 0
    lr: float = 0.0
    scale: float = 1.0
    dataset: str = ""
    image_size: int = 0
    channels: tuple = ()
    attention: bool = False
    base: str = ""
    schedule: str = ""
    vae: bool = False


# Losses

def vae_loss(reconstruction, x0, kl, weight=0.01):
    """Squared error summed over the picture plus weight x KL to N(0, I); pictures [B, C, H, W], kl [B].

    Returns the sum and its parts.
    """
    L_rec, L_kl = (reconstruction - x0).square().sum((1, 2, 3)).mean(), kl.mean()
    return L_rec + weight * L_kl, dict(L_rec=L_rec, L_kl=L_kl)


def contrastive_loss(logits, captions):
    """CLIP's symmetric cross-entropy over a batch's pictures and captions; logits [B, B].

    A caption that occurs twice in the batch is not its twin's negative: the twin is left out.
    """
    twins = torch.tensor([[a == b for b in captions] for a in captions], device=logits.device)
    itself = torch.eye(len(captions), dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(twins & ~itself, -torch.inf)
    labels = torch.arange(len(captions), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def preference_loss(score_better, score_worse):
    """Bradley-Terry: -log sigmoid(score_better - score_worse), scores [B] (PickScore, Kirstain et al.)."""
    return F.softplus(score_worse - score_better).mean()


def denoising_loss(unet, schedule, x0, cond, draw, prediction_type="epsilon"):
    """Denoising score matching on x0 [B, C, H, W] with the condition: squared error in epsilon, or in v."""
    t, eps = draw.randint(0, len(schedule)), draw.randn(*x0.shape[1:])
    v = schedule.add_noise(eps, -x0, t)  # alpha eps - sigma x0
    target = eps if prediction_type == "epsilon" else v
    return (unet(schedule.add_noise(x0, eps, t), t, **cond).sample - target).square().mean()


def emptied(captions, draw):
    """The captions, a share of them empty."""
    drop = (draw.rand() < NULL_SHARE).tolist()
    return ["" if dropped else caption for dropped, caption in zip(drop, captions)]


def preset_of(given):
    """The preset that fits the flags given."""
    return "base" if given.get("base") else "cifar10" if given.get("dataset") == "cifar10" else "shapes"


def distance_from_middle(attributes):
    """The stated taste: the nearer the shape's centre to the picture's, the better; [N], picture units."""
    return torch.hypot(attributes["x"] - 0.5, attributes["y"] - 0.5)


# Training

def train(config, name, build, loss_of, dataset):
    """AdamW with warm-up and cosine decay on loss_of(module, x0, captions, draw, first) -> (loss, its parts).

    draw: the random numbers of the iteration; first: the number of the batch's first sample. Returns the
    module, frozen, with its averaged weights. After Ctrl-C it saves and ends the program.
    """
    iterations, batch_size, lr = PARTS.get(name, (config.iterations, config.batch_size, config.lr))
    shared = {f.name: getattr(config, f.name) for f in fields(Part) if hasattr(config, f.name)}
    part = Part(**shared | dict(out=str(Path(config.runs) / name), batch_size=batch_size, lr=lr,
                                iterations=max(1, round(iterations * config.scale))))
    run = Run(part)
    module = build().to(run.device).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(module.parameters(), lr, weight_decay=0.01, fused=True)
    ema = EMA(module.named_parameters(), 0.998)

    def loss_module(p):
        loss, parts = loss_of(module, p.x0, p.captions, draw, first)
        return loss, dict(loss=loss, **parts)

    run.begin(dict(module=module, optimizer=optimizer, ema=ema))
    run.bar.set_description(name)
    for iteration, (x0, captions) in enumerate(run.batches(dataset), run.start):
        progress = iteration / part.iterations
        warmup, decay = min(1, 20 * progress + 0.01), (1 + math.cos(math.pi * progress)) / 2
        optimizer.param_groups[0]["lr"] = lr * warmup * decay
        draw, first = run.draws(iteration), iteration * batch_size + run.rows.start
        losses = run.descend(optimizer, run.split(x0=x0, captions=captions), loss_module, 1.0)
        ema.update(iteration)
        if run.finish_iteration(iteration, losses):
            break
    run.end()
    with torch.no_grad():
        for name, parameter in ema.parameters.items():
            parameter.copy_(ema.average[name])
    return module.eval().requires_grad_(False)


def train_vae(config, name, build, dataset):
    """An autoencoder; its scaling factor gives the latents of the dataset's first pictures unit variance."""
    def loss_of_vae(vae, x0, captions, draw, first):
        posterior = vae.encode(x0).latent_dist
        z = posterior.mean + posterior.std * draw.randn(*posterior.mean.shape[1:])
        return vae_loss(vae.decode(z).sample, x0, posterior.kl())

    vae = train(config, name, build, loss_of_vae, dataset)
    pictures = to_floats(torch.stack([dataset[i]["image"] for i in range(1000)]).to(vae.device))
    vae.register_to_config(scaling_factor=1 / vae.encode(pictures).latent_dist.mean.std().item())
    return vae


def write(path, save):
    """save(folder), complete or not at all and by one process; says how large it is."""
    if int(os.environ.get("RANK", 0)):
        return
    write_folder(path, save)
    print(f"{path}: {sum(f.stat().st_size for f in path.rglob('*') if f.is_file()) / 2**20:.2f} MB")


# The mini models

def build_tokenizer():
    """A CLIPTokenizer with one token for each word of the captions; other text falls back to its bytes."""
    letters = sorted(ByteLevel.alphabet())
    vocabulary, merges = [*letters, *(letter + "</w>" for letter in letters)], []
    for word in sorted({"a", "on", *COLOURS, *BACKGROUNDS, *SHAPES, *SIZES}):
        done, *rest = *word[:-1], word[-1] + "</w>"
        for piece in rest:
            merges.append((done, piece))
            done += piece
            vocabulary.append(done)
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    return CLIPTokenizer(vocab=ids, merges=list(dict.fromkeys(merges)), model_max_length=TOKENS)


def tokens_of(tokenizer, captions, device):
    """Token ids [B, TOKENS] as StableDiffusionPipeline makes them."""
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return tokens.input_ids.to(device)


def build_clip(tokenizer):
    """A CLIPModel of 0.5 M parameters for 32 x 32 pictures."""
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = dict(hidden_size=TEXT_WIDTH, intermediate_size=4 * TEXT_WIDTH, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=TOKENS, vocab_size=len(tokenizer), **ends)
    vision = dict(hidden_size=96, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
                  image_size=IMAGE, patch_size=4)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=TEXT_WIDTH))


def build_vae():
    """An AutoencoderKL of 0.7 M parameters: 32 x 32 x 3 -> 8 x 8 x 4."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64), layers_per_block=1, latent_channels=LATENT_CHANNELS,
        norm_num_groups=8, sample_size=IMAGE)


def build_taesd():
    """An AutoencoderTiny for the same latents."""
    return AutoencoderTiny(encoder_block_out_channels=(16, 16, 16), decoder_block_out_channels=(16, 16, 16),
                           num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1))


def build_unet():
    """SD's UNet2DConditionModel in small, 2.4 M parameters: two resolutions, cross-attention at both."""
    return UNet2DConditionModel(
        sample_size=LATENT, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 96), down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2, layers_per_block=1, cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4, norm_num_groups=16)


def better_first(shapes, first, draw, device, other_share=0.25):
    """Preference pairs for the prompts of drawings first, first + 1, ...: (better, worse, prompts).

    better, worse: pictures [B, 3, H, W]. One picture of each pair shows the prompt. Mostly so does the other,
    and the taste decides (distance_from_middle); in other_share of the pairs it shows another drawing's
    prompt, and is worse unless the two prompts are equal.
    """
    other_prompt = (draw.rand() < other_share).cpu()
    counters = range(first, first + len(other_prompt))
    a = shapes.attributes(counters)
    like = {k: torch.where(other_prompt, v.roll(1), v) for k, v in a.items()}
    b = shapes.attributes([c + 10**12 for c in counters], like=like)
    same = torch.stack([a[k] == b[k] for k in ("colour", "background", "shape", "scale")]).all(0)
    keep = (~same | (distance_from_middle(a) < distance_from_middle(b)))[:, None, None, None]
    x_a, x_b = (to_floats(shapes.draw(v)) for v in (a, b))
    better, worse = torch.where(keep, x_a, x_b), torch.where(keep, x_b, x_a)
    return better.to(device), worse.to(device), shapes.captions(a)


def train_mini_models(config):
    """All five, in the order in which they need each other; then the held-out measures."""
    shapes, out, tokenizer = Shapes(IMAGE, config.seed), Path(config.out), build_tokenizer()

    vae = train_vae(config, "vae", build_vae, shapes)
    device = next(vae.parameters()).device

    def loss_of_taesd(taesd, x0, captions, draw, first):
        with torch.no_grad():
            latents = vae.encode(x0).latent_dist.mean * vae.config.scaling_factor
        L_enc = (taesd.encode(x0).latents - latents).square().mean()
        L_dec = (taesd.decode(latents).sample - x0).square().mean()
        return L_enc + L_dec, dict(L_enc=L_enc, L_dec=L_dec)

    taesd = train(config, "taesd", build_taesd, loss_of_taesd, shapes)

    def loss_of_clip(clip, x0, captions, draw, first):
        # A little noise, so that later not only perfect drawings are recognised.
        x0 = x0 + 0.1 * draw.randn(1)[:, :, None, None].abs() * draw.randn(3, IMAGE, IMAGE)
        output = clip(input_ids=tokens_of(tokenizer, captions, device), pixel_values=x0)
        return contrastive_loss(output.logits_per_image, captions), {}

    clip = train(config, "clip", lambda: build_clip(tokenizer), loss_of_clip, shapes)

    # What a loss optimises cannot also measure it: the same model from other weights and other drawings.
    judge = train(replace(config, seed=config.seed + 1), "judge", lambda: build_clip(tokenizer), loss_of_clip,
                  Shapes(IMAGE, config.seed + 1))

    def loss_of_pickscore(pickscore, x0, captions, draw, first):
        better, worse, prompts = better_first(shapes, first, draw, device)
        tokens, pictures = tokens_of(tokenizer, prompts, device), torch.cat([better, worse])
        logits = pickscore(input_ids=tokens, pixel_values=pictures).logits_per_text
        high, low = logits[:, :len(better)].diag(), logits[:, len(better):].diag()
        return preference_loss(high, low), dict(agreement=(high > low).float().mean())

    pickscore = train(config, "pickscore", lambda: copy.deepcopy(clip), loss_of_pickscore, shapes)

    text_encoder = CLIPTextModel(clip.config.text_config).to(device).eval().requires_grad_(False)
    text_encoder.load_state_dict(clip.text_model.state_dict())
    scheduler = DDIMScheduler(**SD_SCHEDULE)
    schedule = NoiseSchedule.from_config(scheduler.config).to(device)

    def loss_of_unet(unet, x0, captions, draw, first):
        with torch.no_grad():
            # The mean: where a drawing is flat the posterior is as wide as the prior, noise for the UNet to
            # learn.
            latents = vae.encode(x0).latent_dist.mean * vae.config.scaling_factor
            text = text_encoder(tokens_of(tokenizer, emptied(captions, draw), device)).last_hidden_state
        return denoising_loss(unet, schedule, latents, dict(encoder_hidden_states=text), draw), {}

    unet = train(config, "unet", build_unet, loss_of_unet, shapes)

    measures = measure_clip(clip, tokenizer) | measure_pickscore(pickscore, tokenizer)
    print(json.dumps(dict(seed=HELD_OUT_SEED, **measures)))
    pictures = CLIPImageProcessor(size=dict(shortest_edge=IMAGE), crop_size=IMAGE, image_mean=[0.5] * 3,
                                  image_std=[0.5] * 3)
    processor = CLIPProcessor(pictures, tokenizer)

    def save_clip(model, path):
        model.half().save_pretrained(path)
        processor.save_pretrained(path)

    for name, model in (("mini-clip", clip), ("mini-judge", judge), ("mini-pickscore", pickscore)):
        write(out / name, partial(save_clip, model))
    write(out / "mini-taesd", taesd.half().save_pretrained)
    # Diffusers loads its own float16 files as float32, transformers does not: the text tower stays float32,
    # with rounded values.
    text_encoder = text_encoder.half().float()
    pipeline = StableDiffusionPipeline(
        vae.half(), text_encoder, tokenizer, unet.half(), scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)
    write(out / "mini-sd", pipeline.save_pretrained)


# Held-out measures

@torch.no_grad()
def measure_clip(clip, tokenizer, num=2000):
    """Zero-shot accuracy of a CLIPModel among all captions on held-out drawings, in whole and by word."""
    shapes, device = Shapes(IMAGE, HELD_OUT_SEED), clip.device
    attributes = shapes.attributes(range(num))
    words = dict(zip(("colour", "background", "shape", "scale"), torch.cartesian_prod(
        *(torch.arange(len(names)) for names in (COLOURS, BACKGROUNDS, SHAPES, SIZES))).unbind(1)))
    tokens = tokens_of(tokenizer, shapes.captions(words), device)
    pictures = to_floats(shapes.draw(attributes)).to(device)
    logits = [clip(input_ids=tokens, pixel_values=x).logits_per_image for x in pictures.split(250)]
    choice = torch.cat(logits).argmax(1).cpu()
    right = torch.stack([words[k][choice] == attributes[k] for k in words])
    return dict(clip_zero_shot=right.all(0).float().mean().item(),
                **{f"clip_{k}": r.float().mean().item() for k, r in zip(words, right)})


@torch.no_grad()
def measure_pickscore(pickscore, tokenizer, num=2000):
    """Share of held-out pairs of which a CLIPModel scores the better picture higher.

    taste: both pictures show the prompt; other_prompt: one of them shows another.
    """
    device, report = pickscore.device, {}
    for name, other_share in (("taste", 0.0), ("other_prompt", 1.0)):
        draw = Draws(HELD_OUT_SEED, 0, num, slice(None), "cpu")
        better, worse, prompts = better_first(Shapes(IMAGE, HELD_OUT_SEED), 0, draw, device, other_share)
        agreement = []
        for rows in torch.arange(num).split(250):
            tokens = tokens_of(tokenizer, [prompts[i] for i in rows], device)
            scores = [pickscore(input_ids=tokens, pixel_values=x[rows]).logits_per_text.diag()
                      for x in (better, worse)]
            agreement.append(scores[0] > scores[1])
        report[f"pickscore_{name}"] = torch.cat(agreement).float().mean().item()
    return report


# A pipeline that goes on from another

def train_base(config):
    """--base with its UNet trained on, on other data or for other noise levels; nothing else changes.

    With --vae, so is its autoencoder, before.
    """
    denoiser, codec = load(config.base, choose_device(config.device))
    known = denoiser.prediction_type in ("epsilon", "v_prediction")
    if not known or not isinstance(denoiser.net, UNet2DConditionModel):
        raise UserError(f"--base {config.base}: give a Stable Diffusion that predicts epsilon or v")
    scheduler = DDIMScheduler.from_config(codec.pipe.scheduler.config, **SCHEDULES[config.schedule])
    schedule = NoiseSchedule.from_config(scheduler.config).to(codec.device)

    def loss_of(unet, x0, captions, draw, first):
        latents, cond = codec.encode(x0).detach(), codec.cond(emptied(captions, draw))
        return denoising_loss(unet, schedule, latents, cond, draw, denoiser.prediction_type), {}

    dataset = load_dataset(config.dataset, codec.picture_size, config.seed)
    config = replace(config, runs=str(Path(config.runs) / Path(config.out).name))
    if config.vae:
        train_vae(config, "base-vae", lambda: codec.vae, dataset)
    unet = train(config, "base", lambda: denoiser.net, loss_of, dataset)
    codec.pipe.register_modules(unet=unet, scheduler=scheduler)
    write(Path(config.out), codec.pipe.save_pretrained)


# The pixel-space teacher

def train_pixel_teacher(config):
    """A class-conditional UNet2DModel that predicts epsilon on DDPM's linear schedule.

    The class after the last is "no class".
    """
    size, out = config.image_size, Path(config.out)
    dataset = load_dataset(config.dataset, size, config.seed)
    classes = dataset.classes
    if not classes:
        raise UserError(f"--dataset {config.dataset}: has no classes; give cifar10 or a folder by class")
    scheduler = DDPMScheduler(clip_sample=False)
    schedule = NoiseSchedule.from_config(scheduler.config)

    def build():
        down, up = ["DownBlock2D"] * len(config.channels), ["UpBlock2D"] * len(config.channels)
        if config.attention:
            down[-1], up[0] = "AttnDownBlock2D", "AttnUpBlock2D"
        return UNet2DModel(sample_size=size, block_out_channels=config.channels, down_block_types=down,
                           up_block_types=up, layers_per_block=2, norm_num_groups=GROUPS,
                           num_class_embeds=len(classes) + 1)

    def loss_of(unet, x0, captions, draw, first):
        schedule.to(x0.device)
        labels = class_labels(captions, classes).to(x0.device)
        labels = torch.where(draw.rand() < NULL_SHARE, len(classes), labels)
        return denoising_loss(unet, schedule, x0, dict(class_labels=labels), draw), {}

    unet = train(config, "teacher", build, loss_of, dataset)

    def save(path):
        DDPMPipeline(unet, scheduler).save_pretrained(path)
        (path / "classes.json").write_text(json.dumps(classes))

    write(out, save)


def check(config):
    """Raises UserError on flags that cannot work together, and on folders that cannot be written."""
    out, alone = Path(config.out).resolve(), config.base or config.dataset != "shapes"
    for name in ("schedule", "vae"):
        if getattr(config, name) and not config.base:
            raise UserError(f"--{name}: only with --base")
    if alone and not config.base:
        if odd := [width for width in config.channels if width % GROUPS]:
            raise UserError(f"--channels {odd[0]}: must be a multiple of {GROUPS}")
        if config.image_size % (least := 2**(len(config.channels) - 1)):
            raise UserError(f"--image-size {config.image_size}: must be a multiple of {least}")
    for name, path in (("--out", config.out), ("--runs", config.runs)):
        check_writable(Path(path, CHECKSUMS), name, deep=True)
    # The mini models lie in Config.out, each in a folder of its own.
    kept = alone and out in [Path(path).resolve() for path in (Config.out, config.base) if path]
    other = alone and out.exists() and any(out.iterdir()) and not (out / "model_index.json").exists()
    if kept or other:
        raise UserError(f"--out {config.out}: would be replaced as a whole; give a folder of its own")


def main(argv):
    """The mini models, or a teacher for pictures, or a pipeline trained on."""
    config = parse_config(Config, PRESETS, argv, __doc__.splitlines()[0], preset_of)
    check(config)
    start_processes(choose_device(config.device))  # before CIFAR-10 is downloaded, by one of them
    if config.base:
        train_base(config)
    elif config.dataset == "shapes":
        train_mini_models(config)
    else:
        train_pixel_teacher(config)


if __name__ == "__main__":
    run_command(main)
