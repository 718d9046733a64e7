"""The steps of the three scripts against tests/reference.py: three iterations in float64 leave the same
weights, averages and scalars.

Every rate, weight and threshold has a value of its own, so that one taken for another shows. With
REFERENCE_TABLE=1 and -s the largest differences are printed: of weights relative to the furthest that one
moved, of scalars relative to themselves.
"""

import copy
import os
from types import SimpleNamespace

import pytest
import reference
import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import common
import diff_instruct_star as di
import swiftbrush_v2 as sb
import yoso
from common import Codec, Denoiser, NoiseSchedule, Scorer
from plumbing.run import Run
from plumbing.students import convert, fold_lora

CAPTIONS = ["a large red circle on white", "a small blue square on black", "a large green triangle on gray",
            "a small red square on white", "a small green circle on black", "a large blue circle on gray"]
TOLERANCE = 1e-8


@pytest.fixture(autouse=True)
def double(monkeypatch):
    """float64 everywhere, .float() included, so that the only differences are of meaning."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.to(torch.get_default_dtype()))
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def pipeline(seed=0, prediction="epsilon"):
    """(pipe, Denoiser, Codec) of a tiny Stable Diffusion, frozen, as common.load gives them."""
    torch.manual_seed(seed)
    pipe = tiny.sd(prediction)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.eval().requires_grad_(False)
    schedule = NoiseSchedule.from_config(pipe.scheduler.config)
    return pipe, Denoiser(pipe.unet, schedule, prediction), Codec(pipe)


def scorers_of(*names):
    """name -> (CLIPModel, its processor), each of its own weights."""
    made = {}
    for seed, name in enumerate(names, 10):
        torch.manual_seed(seed)
        model, processor = tiny.clip()
        made[name] = model.eval().requires_grad_(False), processor
    return made


def shake(parts):
    """Moves weights away from their start, so that no gradient is zero and no two networks are the same."""
    torch.manual_seed(5)
    with torch.no_grad():
        for part in parts.values():
            for name, p in part.items() if isinstance(part, dict) else part.named_parameters():
                p.add_((0.1 if "lora_B" in name or name.startswith("end.") else 0.02) * torch.randn_like(p))


def states(parts):
    """name -> the tensors by name of a network, an average or a LoRA, copied."""
    parts = {name: part if isinstance(part, dict) else part.state_dict() for name, part in parts.items()}
    return {name: {k: value.detach().clone() for k, value in part.items()} for name, part in parts.items()}


# The real steps: only this section knows their signatures

class Stopped(Exception):
    """Raised where a run would begin to export."""


def record(train, runs=1):
    """Calls train() -> a record for each of its runs: run, parts, their start, batches, scalars and end."""
    records = []

    def begin(run, parts):
        parts = {name: part for name, part in parts.items() if not isinstance(part, torch.optim.Optimizer)}
        ema = parts.pop("ema", None)
        if not records:
            shake(parts)
        parts |= dict(ema=ema.average) if ema else {}
        run.skipped = set()
        records.append(SimpleNamespace(run=run, parts=parts, start=states(parts), batches=[], scalars=[]))

    def noted(batches):
        def generator(run, data):
            for batch in batches(run, data):
                records[-1].batches.append(batch if isinstance(batch, tuple) else (batch,))
                yield batch
        return generator

    def finish(run, iteration, losses, draw=None):
        records[-1].scalars.append({name: value.item() for name, value in losses.items()})
        return iteration + 1 == 3  # as if stopped: nothing is drawn or written after the last

    def end(run):
        records[-1].end = states(records[-1].parts)
        if len(records) == runs:
            raise Stopped

    with pytest.MonkeyPatch.context() as patched:
        notes = dict(batches=noted(Run.batches), prompts=noted(Run.prompts), check_finite=lambda *_: None)
        for name, value in dict(begin=begin, finish_iteration=finish, end=end, **notes).items():
            patched.setattr(Run, name, value)
        with pytest.raises(Stopped):
            train()
    return records


class Pictures(torch.utils.data.Dataset):
    """Twelve random pictures with captions."""

    endless = False

    def __init__(self, size):
        generator = torch.Generator().manual_seed(3)
        self.images = torch.randint(0, 256, (12, 3, size, size), dtype=torch.uint8, generator=generator)

    def __len__(self):
        return len(self.images)

    def state(self):
        return []

    def __getitem__(self, index):
        return dict(image=self.images[index], caption=CAPTIONS[index % len(CAPTIONS)], skipped=[])


COMMON = dict(out="unused", device="cpu", iterations=3, seed=4, sample_every=99)
# The decay is 0, 2 / 11, and not 3 / 12; the rates are the half, and twice the whole.
RISING = dict(ema_ramp=True, ema=0.2, lr_warmup=2)


def real_yoso(networks=None, lpips=None, **settings):
    """yoso.py on these networks, or from scratch: config, record, what load_networks gives."""
    config, load, networks = yoso.Config(**COMMON, **settings), yoso.load_networks, networks or []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lpips.LPIPS", lambda **_: lpips)
        patched.setattr(yoso, "load_dataset", lambda *_: Pictures(32 if config.model else config.image_size))
        patched.setattr(yoso, "load_networks", lambda *a: networks or networks.extend(load(*a)) or networks)
        patched.setattr(yoso, "check", lambda _: None)
        patched.setattr(Run, "make_folder", lambda _: None)
        patched.setattr(yoso, "ends_in_noise", lambda _: True)  # no prior, no pictures of the original
        patched.setattr(yoso, "original_pictures", lambda *_: None)
        patched.setattr(common.Codec, "warn_of_long", lambda *_: None)
        found, = record(lambda: yoso.train(config))
    return config, found, networks


def real_fine_tune(start, codec, other, codec_d, **settings):
    """yoso.py on a pretrained model, D and the features made of other: config, record, D, features."""
    half = common.HalfUNet(other.net, share=settings.get("rank", 0) > 0)
    discriminator, kept = yoso.LatentDiscriminator(other.net, 8), copy.deepcopy(half.state_dict())
    networks = [start, codec, discriminator, half, codec_d]
    config, found, _ = real_yoso(networks, model="given", flip=False, latent_z=0, **settings)
    assert equal(half.state_dict(), kept), "the features are frozen"
    return config, found, discriminator, half


def real_adapt(teacher, codec, **settings):
    """yoso.py --adapt: config, a record for each stage."""
    config = yoso.Config(**COMMON, model="a pipeline", adapt_iterations=3, **settings)
    stages = 2 if teacher.prediction_type == "epsilon" else 1
    return config, record(lambda: yoso.adapt(config, teacher, codec, Pictures(32)), stages)


def real_swiftbrush(stage, teacher, codec, start, scorers, pairs, **settings):
    """swiftbrush_v2.py, stage a or b: config, record."""
    config = sb.Config(**COMMON, iterations_b=5, **settings)
    scorers = {name: real_scorer(*scorer) for name, scorer in scorers.items()}
    frozen = sb.Loaded(teacher, start, codec, codec.decode, scorers, common.load_distance("l2", "cpu"),
                       pairs if config.regularise else None)
    found, = record(lambda: sb.train_student(stage, config, frozen, CAPTIONS))
    return config, found


def real_convert(start, codec, **settings):
    """A student's conversion to v, which begins a run of swiftbrush_v2.py: config, record."""
    config = sb.Config(**COMMON, **settings)
    found, = record(lambda: convert(Run(config), codec, start, "v_prediction", CAPTIONS))
    return config, found


def real_diff_instruct(teacher, codec, start, scorers, **settings):
    """diff_instruct_star.py: config, record."""
    config = di.Config(**COMMON, prompts="given", **settings)
    if config.student_timestep:
        start = Denoiser(start.net, start.schedule.up_to(config.student_timestep), start.prediction_type)
    scorers = {name: real_scorer(*scorer) for name, scorer in scorers.items()}
    loaded = di.Loaded(teacher, start, codec, codec.decode, scorers)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(di, "remember_before", lambda *_: None)
        patched.setattr(di, "load_networks", lambda *_: loaded)
        patched.setattr(di, "prompts_of", lambda *_: CAPTIONS)
        patched.setattr(di, "resolve_start", lambda config: config)
        found, = record(lambda: di.train(config))
    return config, found


def real_scorer(model, processor):
    """The project's Scorer of a CLIPModel."""
    def embed_texts(prompts):
        tokens = processor.tokenizer(prompts, padding="max_length", truncation=True, max_length=16,
                                     return_tensors="pt")
        return model.get_text_features(**tokens).pooler_output
    image = processor.image_processor
    return Scorer(lambda x: model.get_image_features(pixel_values=x).pooler_output, embed_texts, 16,
                  image.image_mean, image.image_std, "cpu")


def yoso_losses(D_real, D_fake, e_rec, e_con, w_rec, w_con):
    """The project's (L_D, L_rec, L_con, L_adv), from logits, errors and weights, [B] each."""
    parts = yoso.generator_loss(D_fake, e_rec, e_con, w_rec, w_con)[1]
    return yoso.discriminator_loss(D_real, D_fake), parts["L_rec"], parts["L_con"], parts["L_adv"]


# Comparison

def equal(a, b):
    """Whether two state dicts are the same to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def loaded(module, state):
    """A trainable copy of a module with these weights."""
    module = copy.deepcopy(module)
    module.load_state_dict(state)
    return module.requires_grad_(True)


def named(module):
    """Its weights by the names that the scripts have for them."""
    return module.lora if isinstance(module, reference.Adapted) else module.state_dict()


def compare(reals, iterate, networks, average=None, clip_norm=None, thresholds=()):
    """Runs the reference once, and compares scalars, weights and averages with each record of a real run.

    iterate: a function of (iteration, *batch, draws); networks: the reference's by the names of the record's
    parts. A threshold must matter: one network's gradients lie on both sides of clip_norm, the cosines on
    both sides of each of thresholds.
    """
    norms, cosines, scalars, real = {}, [], [], reals[0]
    with pytest.MonkeyPatch.context() as patched:
        descend, cosine = reference.descend, reference.cosine

        def noted_descend(loss, parameters, optimizer, *clip):
            norms.setdefault(optimizer, []).append(descend(loss, parameters, optimizer, *clip))
            return norms[optimizer][-1]

        def noted_cosine(*arguments):
            cosines.append(cosine(*arguments))
            return cosines[-1]
        patched.setattr(reference, "descend", noted_descend)
        patched.setattr(reference, "cosine", noted_cosine)
        for i, batch in enumerate(real.batches):
            scalars.append({name: value.item() for name, value in iterate(i, *batch, real.run.draws).items()})
    after = {name: named(module) for name, module in networks.items()}
    after |= dict(ema=average) if average else {}
    table = []
    for real in reals:
        assert len(real.scalars) == len(scalars) == 3
        differences = dict(scalars=0.0)
        for found, expected in zip(real.scalars, scalars):
            # What an iteration does not have is either missing or 0.
            assert {name for name, value in found.items() if value or name in expected} == expected.keys()
            for name, value in expected.items():
                difference = abs(found[name] - value) / (abs(value) + 1e-3)
                differences["scalars"] = max(differences["scalars"], difference)
        assert after.keys() == real.start.keys()
        for name, start in real.start.items():
            assert start.keys() == after[name].keys() == real.end[name].keys(), name
            moved = max((after[name][key] - value).abs().max().item() for key, value in start.items())
            assert moved > 1e-5, f"{name} has not moved"
            apart = max((after[name][k] - value).abs().max().item() for k, value in real.end[name].items())
            differences[name] = apart / moved
        table.append(differences)
    if os.environ.get("REFERENCE_TABLE"):
        worst = {name: max(row[name] for row in table) for name in table[0]}
        print("   ", "  ".join(f"{name} {value:.1e}" for name, value in worst.items()))
        print("      norms", *([float(f"{norm:.3g}") for norm in one] for one in norms.values()),
              "cosines", *(f"{c.min():.4f} {c.max():.4f}" for c in cosines))
    assert all(value < TOLERANCE for differences in table for value in differences.values()), table
    norms = [sorted(one) for one in norms.values()]
    assert not clip_norm or any(one[0] < clip_norm < one[-1] for one in norms), norms
    for i, tau in enumerate(thresholds):
        mine = torch.cat(cosines[i::len(thresholds)])
        assert mine.min() < tau < mine.max(), (tau, mine)


# YOSO

class TinyLpips(torch.nn.Module):
    """What lpips.LPIPS is, of two random layers: squared differences of unit vectors, weighted by channel."""

    def __init__(self):
        super().__init__()
        self.scaling_layer = torch.nn.Conv2d(3, 3, 1)
        self.first, self.second = torch.nn.Conv2d(3, 6, 9, stride=8), torch.nn.Conv2d(6, 8, 3, stride=2)
        self.lins = torch.nn.ModuleList(torch.nn.Conv2d(c, 1, 1, bias=False) for c in (6, 8))

    def net(self, x):
        """The features of each layer."""
        first = self.first(x).relu()
        return first, self.second(first).relu()

    def forward(self, a, b):
        """[B, 3, H, W] twice -> [B, 1, 1, 1]."""
        total = 0
        for lin, x, y in zip(self.lins, *(self.net(self.scaling_layer(v)) for v in (a, b))):
            x, y = (v / (v.norm(dim=1, keepdim=True) + 1e-10) for v in (x, y))
            total = total + lin((x - y)**2).mean((2, 3), keepdim=True)
        return total


SCRATCH = dict(
    image_size=8, batch_size=8, channels=(8, 16), channels_d=(8, 16), layers=1, attention=False, latent_z=0,
    flip=False, lr=2e-3, lr_d=1.3e-3, lr_decay=0.9, ema=0.87, ema_ramp=False, levels=4, rec_distance="l2",
    con_distance="l2", lambda_rec=1.7, lambda_con=2.9, r1=0.3, r1_every=2)


@pytest.mark.parametrize("settings", [
    dict(), dict(adversary="data", flip=True), dict(adversary="ufogen", latent_z=5),
    dict(latent_z=5, flip=True, attention=True, r1=0.0), dict(con_distance="lpips", weight_decay=0.4),
    dict(lambda_con=0.0, levels=7, rec_distance="lpips"), RISING,
    dict(levels=9, real_offset=500, con_offset=200, con_weight="sqrt", weight_limit=0.3)], ids=str)
def test_yoso_from_scratch(settings):
    torch.manual_seed(6)
    lpips, reals = TinyLpips(), []
    for micro in (0, 4):
        config, real, networks = real_yoso(lpips=lpips, **SCRATCH | settings, micro_batch=micro)
        start, _, discriminator, *_ = networks
        reals.append(real)
    generator = loaded(start.net, real.start["generator"])
    discriminator = loaded(discriminator, real.start["discriminator"])
    m = SimpleNamespace(vae=None, text_encoder=None, shape=(3, 8, 8), lpips=lpips)
    m.discriminator, m.of_d, m.average = discriminator, m, dict(real.start["ema"])
    m.generator = reference.Net(generator, "sample", start.schedule.alpha, start.schedule.sigma)
    reference.yoso_optimizers(m, config)
    compare(reals, lambda i, *batch: reference.yoso(i, *batch[:2], config, batch[2], m),
            dict(generator=generator, discriminator=discriminator), m.average)


FINE = dict(
    batch_size=4, lr=2e-4, lr_d=1.3e-4, weight_decay=0.7, clip_norm=2.0, ema=0.87, ema_ramp=False, alpha=6,
    lora_init="gaussian",
    real_offset=451, con_offset=137, con_weight="sqrt", rec_distance="l2", con_distance="latent",
    lambda_rec=0.6, lambda_con=1.9, weight_limit=0.9)


def base(pipe):
    """The pipeline's parts that a reference needs."""
    return SimpleNamespace(tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder, vae=pipe.vae,
                           shape=(4, 8, 8))


def untouched(net, bare):
    """Whether a network, its LoRAs aside, is what it was."""
    return equal(fold_lora(net, None), bare.state_dict())


@pytest.mark.parametrize("settings", [
    dict(), dict(adversary="data", con_weight="snr"),
    dict(rec_distance="latent", con_distance="l2", clip_norm=10.0),
    dict(rank=3, clip_norm=0.9), dict(lambda_con=0.0, clip_norm=1.0), dict(real_offset=137),
    dict(adversary="ufogen", lr_decay=0.9), dict(r1=0.3, r1_every=2),
    dict(prediction="v_prediction", of_d=True, clip_norm=1.5),
    dict(zero_snr=True, rec_distance="latent")], ids=str)
def test_yoso_fine_tune(settings):
    settings, reals = FINE | settings, []
    prediction, zero_snr, of_d = (settings.pop(name, other) for name, other in (
        ("prediction", "epsilon"), ("zero_snr", False), ("of_d", False)))
    for micro in (0, 2):
        pipe, start, codec = pipeline(0, "v_prediction" if zero_snr else prediction)
        if zero_snr:
            start.schedule = start.schedule.zero_terminal_snr()
        pipe_d, half, codec_d = pipeline(1) if of_d else (pipe, start, codec)
        bare = copy.deepcopy(start.net)
        config, real, discriminator, features = real_fine_tune(start, codec, half, codec_d, **settings,
                                                               micro_batch=micro)
        assert not config.rank or untouched(start.net, bare)
        reals.append(real)
    module = (reference.Adapted(bare, real.start["generator"], config.alpha / config.rank) if config.rank else
              loaded(bare, real.start["generator"]))
    m = base(pipe)
    m.of_d, m.features = base(pipe_d), copy.deepcopy(features)
    m.discriminator = loaded(discriminator, real.start["discriminator"])
    m.generator = reference.Net(module, start.prediction_type, start.schedule.alpha, start.schedule.sigma)
    m.average = dict(real.start["ema"])
    reference.yoso_optimizers(m, config)
    with sdpa_kernel(SDPBackend.MATH):  # the kernel of attention that R1 can differentiate twice
        compare(reals, lambda i, *batch: reference.yoso(i, *batch[:2], config, batch[2], m),
                dict(generator=module, discriminator=m.discriminator), m.average, config.clip_norm)
    t = torch.cat([real.run.draws(i).randint(1, 1000) for i in range(3)])
    assert (t < 137).any() and (t > 137).any(), "level 0 is reached, and not always"
    snr = start.schedule.snr(t)
    assert snr.min() < config.weight_limit < snr.max(), "the limit acts, and not always"


@pytest.mark.parametrize("prediction, clip_norm", [("epsilon", 2.2), ("v_prediction", 0.7)])
def test_yoso_adapt(prediction, clip_norm):
    """Both stages of an epsilon network, stage II alone of one that predicts v."""
    runs = []
    for micro in (0, 2):
        pipe, teacher, codec = pipeline(0, prediction)
        bare = copy.deepcopy(teacher.net)
        config, records = real_adapt(teacher, codec, batch_size=4, micro_batch=micro, weight_decay=0.7,
                                     clip_norm=clip_norm, adapt_lr=3e-4, adapt_clamp=2.3)
        assert untouched(teacher.net, bare), "the teacher stays"
        runs.append(records)
    alpha, sigma = teacher.schedule.alpha, teacher.schedule.sigma
    stages = [(alpha, sigma), reference.zero_terminal_snr(alpha)]
    for reals, tables in zip(zip(*runs), stages[-len(records):], strict=True):
        m = base(pipe)
        m.teacher = reference.Net(bare, prediction, alpha, sigma)
        m.student = reference.Net(loaded(bare, reals[0].start["student"]), "v_prediction", *tables)
        reference.yoso_adapt_optimizer(m, config)
        compare(reals, lambda i, *batch, m=m: reference.yoso_adapt(i, *batch[:2], config, batch[2], m),
                dict(student=m.student.module), None, config.clip_norm if reals[0] is runs[0][0] else None)


# SwiftBrush v2

BRUSH = dict(
    batch_size=4, lr=2e-4, lr_b=1.1e-3, lr_lora_teacher=1.7e-3, weight_decay=0.7, clip_norm=0.5, ema=0.87,
    ema_ramp=False, lora_init="gaussian", guidance=(2.7,), null_share=0.5, t_min=31, t_max=877,
    lora_targets=("to_q", "to_v", "conv1"), rank=3, alpha=5, rank_b=2, alpha_b=7, tau=0.1, clip_weight=0.9,
    reward_tau=0.05, reward_weight=1.3, regularise_every=2, regularise_weight=0.41, regularise_num=5)


@pytest.mark.parametrize("stage, settings", [
    ("a", dict(clip_norm=0.1)), ("a", dict(clip_norm=0.1, guidance=(0.6, 4.1), prediction="v_prediction")),
    ("a", dict(clip_norm=0.1, regularise="pairs", guide_lora_teacher=False)),
    ("b", dict()), ("b", dict(guidance=(0.6, 4.1), regularise="pairs", clip_decay=False)),
    ("b", dict(own=True, guide_lora_teacher=False)), ("b", RISING),
    ("a", dict(clip_norm=0.1, score_updates=3)), ("b", dict(score_updates=2)),
    ("a", dict(clip_norm=0.1, weighting="x0")),
    ("b", dict(own=True, weighting="x0", clip_norm=0.7))], ids=str)
def test_swiftbrush(stage, settings):
    settings, reals = BRUSH | settings, []
    prediction, own = settings.pop("prediction", "epsilon"), settings.pop("own", False)
    scorers = scorers_of("clip", "reward")
    pairs = torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8), CAPTIONS[1:]
    for micro in (0, 2):
        pipe, teacher, codec = pipeline(0, prediction)
        # Student B is the teacher's own network with another adapter, or has a network of its own.
        start = pipeline(2)[1] if own else teacher
        bare, start_bare = copy.deepcopy(teacher.net), copy.deepcopy(start.net)
        config, real = real_swiftbrush(stage, teacher, codec, start, scorers, pairs, **settings,
                                       micro_batch=micro)
        assert untouched(teacher.net, bare), "the teacher stays"
        reals.append(real)
    m, tables = base(pipe), (teacher.schedule.alpha, teacher.schedule.sigma)
    m.stage, m.scorers, (m.pairs_z, m.pairs_x0, m.pairs_y) = stage, scorers, pairs
    m.teacher = reference.Net(bare, prediction, *tables)
    lora_teacher = reference.Adapted(bare, real.start["lora_teacher"], 5 / 3)
    m.lora_teacher = reference.Net(lora_teacher, prediction, *tables)
    student = (loaded(start_bare, real.start["student"]) if stage == "a" else
               reference.Adapted(start_bare, real.start["student"], 7 / 2))
    m.student = reference.Net(student, start.prediction_type, *tables)
    m.average = dict(real.start["ema"])
    reference.swiftbrush_optimizers(m, config)
    compare(reals, lambda i, prompts, draws: reference.swiftbrush(i, prompts, config, draws, m),
            dict(student=student, lora_teacher=lora_teacher), m.average, config.clip_norm,
            (config.tau, config.reward_tau) if stage == "b" else ())


# Diff-Instruct*

STAR = dict(
    batch_size=4, lr=2e-4, lr_assistant=1.1e-3, beta1=0.3, clip_norm=14.0, ema=0.87, ema_ramp=False,
    lora_init="gaussian", huber_c=0.7, alpha_rew=23.0, alpha_cfg=1.6, t_min=31, t_max=877, warmup=1,
    assistant_warmup=0, lora_targets=("to_q", "to_v", "conv1"), rank=3, alpha=5)


@pytest.mark.parametrize("settings", [
    dict(), dict(huber_c=0.0, detach_normaliser=True, student_timestep=399, clip_norm=10.5),
    dict(distance="l2", cfg_choice=1, own=True, clip_norm=100.0),
    dict(divergence="kl", cfg_choice=1, assistant="lora", clip_norm=140.0),
    dict(divergence="kl", score_updates=3, clip_norm=0.8), RISING | dict(assistant_warmup=1),
    dict(assistant="lora", assistant_warmup=1, score_updates=2, own=True, prediction="v_prediction",
         clip_norm=0.2),
    dict(cfg_choice=1, alpha_cfg=0.9, detach_normaliser=True, assistant="lora", clip_norm=34.0),
    dict(weighting="x0", clip_norm=15.0), dict(weighting="x0", distance="l2", cfg_choice=1, clip_norm=300.0),
    dict(weighting="x0", divergence="kl", cfg_choice=1, clip_norm=900.0)], ids=str)
def test_diff_instruct(settings):
    settings, reals = STAR | settings, []
    prediction, own = settings.pop("prediction", "epsilon"), settings.pop("own", False)
    scorers = scorers_of("reward", "probe")
    for micro in (0, 2):
        pipe, teacher, codec = pipeline(0, prediction)
        start = pipeline(2)[1] if own else teacher
        bare, start_bare = copy.deepcopy(teacher.net), copy.deepcopy(start.net)
        config, real = real_diff_instruct(teacher, codec, start, scorers, **settings, micro_batch=micro)
        assert untouched(teacher.net, bare), "the reference stays"
        reals.append(real)
    m, tables = base(pipe), (teacher.schedule.alpha, teacher.schedule.sigma)
    length = config.student_timestep + 1 if config.student_timestep else 1000
    m.scorers, m.average = scorers, dict(real.start["ema"])
    m.reference = reference.Net(bare, prediction, *tables)
    student = loaded(start_bare, real.start["student"])
    m.student = reference.Net(student, start.prediction_type, *(v[:length] for v in tables))
    assistant = (loaded(bare, real.start["assistant"]) if config.assistant == "full" else
                 reference.Adapted(bare, real.start["assistant"], 5 / 3))
    m.assistant = reference.Net(assistant, prediction, *tables)
    reference.diff_instruct_optimizers(m, config)
    compare(reals, lambda i, prompts, draws: reference.diff_instruct(i, prompts, config, draws, m),
            dict(student=student, assistant=assistant), m.average, config.clip_norm)


# The conversion of a student's start

def test_conversion():
    reals = []
    for micro in (0, 2):
        pipe, start, codec = pipeline()
        bare = copy.deepcopy(start.net)
        start.schedule = start.schedule.up_to(399)
        config, real = real_convert(start, codec, batch_size=4, micro_batch=micro, convert_lr=3e-4,
                                    convert_clamp=2.3, clip_norm=0.95)
        assert untouched(start.net, bare), "the start stays"
        reals.append(real)
    m, tables = base(pipe), (start.schedule.alpha, start.schedule.sigma)
    m.start = reference.Net(bare, "epsilon", *tables)
    m.student = reference.Net(loaded(bare, real.start["student"]), "v_prediction", *tables)
    m.optimizer = torch.optim.Adam(m.student.parameters, lr=config.convert_lr)
    compare(reals, lambda i, prompts, draws: reference.convert(i, prompts, config, draws, m),
            dict(student=m.student.module), None, config.clip_norm)


# Beside public code

def test_beside_yosos_script():
    """Equal for one sample; for more, once its order of mean and softplus and its weighting are undone."""
    values = [torch.randn(6), torch.randn(6), *torch.rand(4, 6)]
    undone = reference.yoso_script(*values, undone=True)
    torch.testing.assert_close(yoso_losses(*values), undone, rtol=1e-14, atol=0)
    one = [v[:1] for v in values]
    torch.testing.assert_close(yoso_losses(*one), reference.yoso_script(*one), rtol=1e-14, atol=0)
    ours, theirs = yoso_losses(*values), reference.yoso_script(*values)
    assert [abs(a - b) > 1e-3 for a, b in zip(ours, theirs)] == [True, True, False, True]


def noised(kappa=1.0):
    """f, which requires grad, and two networks' predictions of eps and of x0 at its x_t, the first guided."""
    convolution = lambda: torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.Tanh(),
                                              torch.nn.Conv2d(8, 4, 3, padding=1))
    c, null, psi = convolution(), convolution(), convolution()
    schedule, t = NoiseSchedule.from_config(tiny.SD_BETAS), torch.tensor([23, 311, 655, 976])
    f, eps = torch.randn(4, 4, 8, 8, requires_grad=True), torch.randn(4, 4, 8, 8)
    alpha_t, sigma_t = schedule.alpha[t], schedule.sigma[t]
    x_t = alpha_t.view(-1, 1, 1, 1) * f + sigma_t.view(-1, 1, 1, 1) * eps
    eps_ref, eps_psi = null(x_t) + kappa * (c(x_t) - null(x_t)), psi(x_t)
    Y = [(x_t - sigma_t.view(-1, 1, 1, 1) * e) / alpha_t.view(-1, 1, 1, 1) for e in (eps_ref, eps_psi)]
    return SimpleNamespace(f=f, t=t, eps=eps, x_t=x_t, eps_ref=eps_ref, eps_psi=eps_psi, Y_ref=Y[0],
                           Y_psi=Y[1], alpha_t=alpha_t, sigma_t=sigma_t)


def gradient(loss, v):
    """d loss / d f."""
    return torch.autograd.grad(loss, v.f, retain_graph=True)[0]


def weights(v, **settings):
    """Diff-Instruct*'s weights of --weighting x0."""
    schedule = NoiseSchedule.from_config(tiny.SD_BETAS)
    config = di.Config(weighting="x0", **settings)
    return di.divergence_weights(config, schedule, v.f, v.x_t, v.t, v.eps_ref)


def assert_factor(ours, theirs, factor):
    """ours = factor theirs for every sample; [B, C, H, W] twice, [B]."""
    expected, least = factor.view(-1, 1, 1, 1) * theirs, 1e-12 * ours.abs().max().item()
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=least)


def test_beside_swiftbrush_v1():
    """The same f and the same gradient at it; its LoRA teacher's loss is ours times alpha_t^2."""
    v, (_, teacher, codec) = noised(), pipeline()
    z, cond, last = torch.randn(2, 4, 8, 8), codec.cond(CAPTIONS[:2]), torch.tensor([999, 999])
    eps_T = teacher.net(z, timestep=last, **cond).sample
    alpha_T, sigma_T = teacher.schedule.alpha[-1], teacher.schedule.sigma[-1]
    expected = reference.swiftbrush_v1_student(z, eps_T, alpha_T, sigma_T)
    torch.testing.assert_close(common.one_step(teacher, z, cond), expected, rtol=1e-12, atol=1e-12)
    theirs = gradient(reference.swiftbrush_v1_loss(v.f, v.eps_ref, v.eps_psi, v.sigma_t), v)
    g = sb.vsd_gradient(v.eps_ref, v.eps_psi, v.sigma_t.view(-1, 1, 1, 1)).detach()
    assert_factor(gradient(sb.vsd_loss(v.f, g), v), theirs, torch.ones(4))
    theirs = reference.swiftbrush_v1_lora_loss(v.eps_psi, v.eps, v.alpha_t)
    ours = torch.stack([sb.lora_teacher_loss(a, b) for a, b in zip(v.eps_psi.split(1), v.eps.split(1))])
    torch.testing.assert_close(theirs, v.alpha_t**2 * ours, rtol=1e-12, atol=0)


def test_beside_dmd2():
    """Ours is theirs before the normaliser times alpha_t sigma_t; that is mean |f - Y_ref| of each sample."""
    v = noised(4.5)
    g = sb.vsd_gradient(v.eps_ref, v.eps_psi, v.sigma_t.view(-1, 1, 1, 1))
    assert_factor(g, reference.dmd2_direction(v.f, v.Y_ref, v.Y_psi, normalise=False), v.alpha_t * v.sigma_t)
    distance = (v.f - v.Y_ref).abs().mean((1, 2, 3))
    theirs = reference.dmd2_direction(v.f, v.Y_ref, v.Y_psi)
    assert_factor(g, theirs, v.alpha_t * v.sigma_t * distance)
    assert_factor(sb.vsd_gradient_x0(v.f, v.Y_ref, v.Y_psi), theirs, torch.ones(4))
    ours = gradient(4 * di.kl_loss(v.x_t, v.eps_psi, v.eps_ref, weights(v)[1]), v)
    assert_factor(ours, theirs, torch.ones(4))


@pytest.mark.parametrize("kappa", [1.0, 2.0, 4.5])
def test_beside_sid(kappa):
    """The l2 divergence's gradient is SiD's (alpha 1) times 2 alpha_t^2 / sigma_t^2; alpha 1.2 is another."""
    v = noised(kappa)
    ours = gradient(4 * di.score_loss(v.eps_psi, v.eps_ref, v.eps, "l2"), v)
    theirs = [gradient(reference.sid_loss(v.f, v.Y_ref, v.Y_psi, alpha).sum(), v) for alpha in (1.0, 1.2)]
    assert_factor(ours, theirs[0], 2 * v.alpha_t**2 / v.sigma_t**2)
    with pytest.raises(AssertionError):
        assert_factor(ours, theirs[1], 2 * v.alpha_t**2 / v.sigma_t**2)
    weight = weights(v, distance="l2")[0]
    ours = gradient(4 * di.score_loss(v.eps_psi, v.eps_ref, v.eps, "l2", weight=weight), v)
    assert_factor(ours, theirs[0], 2 / (v.f - v.Y_ref).abs().mean((1, 2, 3)))


def test_beside_diff_instruct():
    """kl_loss has Diff-Instruct's gradient at f times alpha_t^2 / sigma_t."""
    v = noised(2.0)
    ours = gradient(4 * di.kl_loss(v.x_t, v.eps_psi, v.eps_ref), v)
    theirs = gradient(reference.diff_instruct_loss(v.f, v.Y_ref, v.Y_psi).sum(), v)
    assert_factor(ours, theirs, v.alpha_t**2 / v.sigma_t)
