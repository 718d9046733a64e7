"""The three methods once more, each iteration in the plainest way: a page to read beside the fast one in the
scripts.

Nothing is shared with the scripts but the networks, the schedule's tables alpha and sigma, and the random
draws. There are no micro-batches, no forward serves two updates, nothing is frozen: autograd is asked for the
gradient of one loss by the parameters of one network. An adapter is no switch inside a network: its weights
are W + alpha / rank B A, written out. test_reference_steps.py compares the two.

Each function takes m, which holds a method's networks and optimisers, the average of what is trained by name,
and the parts of the pipeline. x_t = alpha_t x0 + sigma_t eps; pictures and latents are [B, C, H, W], t is
[B]. Numbers of equations are the papers'.
"""

import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.nn.functional import relu, softplus

# What every method needs

def col(values):
    """[B] -> [B, 1, 1, 1], to multiply pictures with."""
    return values.view(-1, 1, 1, 1)


class Net:
    """A diffusers network that predicts x0, eps or v, as functions of (x_t, t, cond) that give x0 and eps."""

    def __init__(self, module, kind, alpha, sigma):
        self.module, self.kind, self.alpha, self.sigma = module, kind, alpha, sigma
        self.parameters = list(module.parameters())

    def output(self, x_t, t, cond):
        """What the network says itself."""
        return self.module(x_t, timestep=t, **cond).sample

    def x0(self, x_t, t, cond):
        """x0 = (x_t - sigma_t eps) / alpha_t = alpha_t x_t - sigma_t v."""
        alpha_t, sigma_t, output = col(self.alpha[t]), col(self.sigma[t]), self.output(x_t, t, cond)
        if self.kind == "sample":
            return output
        if self.kind == "epsilon":
            return (x_t - sigma_t * output) / alpha_t
        return alpha_t * x_t - sigma_t * output

    def eps(self, x_t, t, cond):
        """eps = sigma_t x_t + alpha_t v."""
        alpha_t, sigma_t, output = col(self.alpha[t]), col(self.sigma[t]), self.output(x_t, t, cond)
        return output if self.kind == "epsilon" else sigma_t * x_t + alpha_t * output

    def one_step(self, z, cond):
        """f(z, y): the x0 that is predicted from pure noise at the last timestep T - 1."""
        return self.x0(z, torch.full((len(z),), len(self.alpha) - 1), cond)


class Adapted(torch.nn.Module):
    """A bare network with the weights W + scale B A of a LoRA; its parameters are A and B alone.

    lora: the matrices by peft's names. For a convolution, A is one to `rank` channels and B a 1 x 1
    convolution behind it: together they are one convolution, whose kernel is again a product of matrices.
    """

    def __init__(self, bare, lora, scale):
        super().__init__()
        self.bare, self.scale = [bare], scale  # in a list: its weights are none of the parameters
        self.lora = {name: torch.nn.Parameter(value.detach().clone()) for name, value in lora.items()}
        self.registered = torch.nn.ParameterList(self.lora.values())

    def forward(self, *args, **kwargs):
        """The bare network's forward, with the folded weights."""
        weights = dict(self.bare[0].named_parameters())
        for name, A in self.lora.items():
            if "lora_A" in name:
                W, B = name.split(".lora_A")[0] + ".weight", self.lora[name.replace("lora_A", "lora_B")]
                weights[W] = weights[W] + self.scale * (B.flatten(1) @ A.flatten(1)).view_as(weights[W])
        return functional_call(self.bare[0], weights, args, kwargs)


def descend(loss, parameters, optimizer, clip_norm=float("inf")):
    """One step down the gradient, scaled down where its norm over all parameters is above clip_norm; returns
    that norm.
    """
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    norm = sum((g**2).sum() for g in gradients if g is not None)**0.5
    # The 1e-6 is torch's: without it the last digits differ.
    scale = min(1.0, clip_norm / (norm + 1e-6))
    for p, g in zip(parameters, gradients):
        p.grad = None if g is None else scale * g
    optimizer.step()
    return norm


def update_average(m, student, config, n):
    """average = decay average + (1 - decay) p, after the student's step n, from 0."""
    decay = config.ema
    if config.ema_ramp:
        decay = min(decay, (1 + n) / (10 + n)) if n > 0 else 0
    for name, p in zip(m.average, student, strict=True):
        m.average[name] = decay * m.average[name] + (1 - decay) * p.detach()


def condition(m, prompts):
    """The text encoder's output, which the UNets attend to; nothing where there is none."""
    if m.text_encoder is None:
        return {}
    tokens = m.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return dict(encoder_hidden_states=m.text_encoder(tokens)[0].detach())


def encode(m, pictures):
    """The mean of the VAE's posterior, in the UNets' scale; without a VAE, the pictures."""
    if m.vae is None:
        return pictures
    return (m.vae.encode(pictures).latent_dist.mean * m.vae.config.scaling_factor).detach()


def decode(m, x0):
    """Latents -> pictures, with the gradient."""
    return m.vae.decode(x0 / m.vae.config.scaling_factor).sample


def cosine(clip, pictures, prompts):
    """The cosine of a CLIPModel's embeddings of pictures in [-1, 1] and of their prompts, [B]."""
    model, processor = clip
    length = model.config.text_config.max_position_embeddings
    tokens = processor.tokenizer(prompts, padding="max_length", max_length=length, truncation=True,
                                 return_tensors="pt")
    of_images, size = processor.image_processor, model.config.vision_config.image_size
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (of_images.image_mean, of_images.image_std))
    x = F.interpolate(pictures / 2 + 0.5, size=(size, size), mode="bicubic", antialias=True)
    image = model.get_image_features((x - mean) / std).pooler_output
    text = model.get_text_features(**tokens).pooler_output
    return (image * text).sum(1) / (image.norm(dim=1) * text.norm(dim=1))


def squared(a, b):
    """Mean squared difference of each pair, [B]."""
    return ((a - b)**2).mean((1, 2, 3))


def perceptual(m, a, b):
    """LPIPS on pictures that are enlarged first, [B]."""
    a, b = (F.interpolate(v, size=(224, 224), mode="bilinear") for v in (a, b))
    return m.lpips(a, b).flatten()


def warm_up(iteration, config, optimizers_and_rates):
    """The rates rise in equal steps, to their values in iteration lr_warmup - 1; iteration 0 is the first
    that updates what has them.
    """
    for optimizer, rate in optimizers_and_rates:
        for group in optimizer.param_groups:
            rises = config.lr_warmup and iteration < config.lr_warmup
            group["lr"] = rate * (iteration + 1) / config.lr_warmup if rises else rate


def convert(iteration, prompts, config, draws, m):
    """One step of a student's conversion, onto what its start draws in one step."""
    z, cond, clamp = draws(iteration).randn(*m.shape), condition(m, prompts), config.convert_clamp
    target = m.start.one_step(z, cond).clamp(-clamp, clamp).detach()
    L_convert = ((m.student.one_step(z, cond) - target)**2).mean()
    norm = descend(L_convert, m.student.parameters, m.optimizer, config.clip_norm)
    return dict(L_convert=L_convert, grad_student=norm)


# YOSO

def yoso_optimizers(m, config):
    """AdamW for both, without momentum for D; without decay, from scratch, it is Adam."""
    G, D = m.generator.parameters, m.discriminator.parameters()
    same = dict(eps=1e-8, weight_decay=config.weight_decay)
    m.optimizer_g = torch.optim.AdamW(G, lr=config.lr, betas=(0.9, 0.999), **same)
    m.optimizer_d = torch.optim.AdamW(D, lr=config.lr_d, betas=(0.0, 0.999), **same)


def yoso(iteration, pictures, captions, config, draws, m):
    """Algorithm 1, Eq. 6 and the ablations. Level 0 is the data; m.of_d has D's and the features' text
    encoder.
    """
    G, D, draw = m.generator, m.discriminator, draws(iteration)
    alpha, sigma, T = G.alpha, G.sigma, len(G.alpha)
    t, eps, fresh = draw.randint(1, T), draw.randn(*m.shape), draw.randn(*m.shape)
    if config.flip:
        coins = draw.randint(0, 2)
        pictures = torch.stack([x.flip(2) if coin else x for x, coin in zip(pictures, coins)])
    cond = dict(class_labels=draw.randn(config.latent_z)) if config.latent_z else condition(m, captions)
    cond_d, x0 = condition(m.of_d, captions), encode(m, pictures)
    t_k = (t - max(1, round(config.real_offset * T / 1000))).clamp(min=0)
    t_m = (t - max(1, round(config.con_offset * T / 1000))).clamp(min=0)
    left = min(1, (1 - iteration / config.iterations) / config.lr_decay) if config.lr_decay else 1
    warm_up(iteration, config, [(m.optimizer_g, left * config.lr), (m.optimizer_d, left * config.lr_d)])

    def predict(level):
        x_level = col(alpha[level]) * x0 + col(sigma[level]) * eps
        return torch.where(col(level) == 0, x0, G.x0(x_level, level, cond))

    def seen_by_D(fake):
        return col(alpha[t_k]) * fake + col(sigma[t_k]) * fresh if config.adversary == "ufogen" else fake

    x_k = col(alpha[t_k]) * x0 + col(sigma[t_k]) * eps
    real = dict(self=predict(t_k), data=x0, ufogen=x_k)[config.adversary].detach().requires_grad_()
    level = t_k if config.adversary == "ufogen" else t
    D_real, D_fake = D(real, level, cond_d), D(seen_by_D(predict(t)).detach(), level, cond_d)
    L_D, penalty, target = softplus(-D_real).mean() + softplus(D_fake).mean(), 0, predict(t_m).detach()
    if config.r1 and iteration % config.r1_every == 0:
        slope, = torch.autograd.grad(D_real.sum(), real, create_graph=True)
        penalty = config.r1 / 2 * config.r1_every * (slope**2).sum((1, 2, 3)).mean()
    grad_D = descend(L_D + penalty, list(D.parameters()), m.optimizer_d)

    fake, zero = predict(t), torch.zeros_like(t)
    h = lambda x: m.features(x, zero, cond_d)
    d = dict(l2=squared, lpips=lambda a, b: perceptual(m, a, b), latent=lambda a, b: squared(h(a), h(b)))
    lambda_rec = alpha[t]**2 / sigma[t]**2
    lambda_con = dict(sqrt=1 / (sigma[t] / alpha[t] - sigma[t_m] / alpha[t_m]),
                      snr=1 / (sigma[t]**2 / alpha[t]**2 - sigma[t_m]**2 / alpha[t_m]**2))[config.con_weight]
    lambda_rec, lambda_con = (weight.clamp(max=config.weight_limit) for weight in (lambda_rec, lambda_con))
    L_rec = config.lambda_rec * (lambda_rec * d[config.rec_distance](fake, x0)).mean()
    L_con = config.lambda_con * (lambda_con * d[config.con_distance](fake, target)).mean()
    L_adv = softplus(-D(seen_by_D(fake), level, cond_d)).mean()
    grad_G = descend(L_rec + L_con + L_adv, G.parameters, m.optimizer_g, config.clip_norm)
    update_average(m, G.parameters, config, iteration)
    return dict(L_D=L_D, D_real=D_real.mean(), D_fake=D_fake.mean(), L_rec=L_rec, L_con=L_con, L_adv=L_adv,
                grad_D=grad_D, grad_G=grad_G)


def zero_terminal_snr(alpha):
    """Alpha shifted and stretched so that the last is 0 and the first stays; and its sigma."""
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    return alpha, (1 - alpha**2)**0.5


def yoso_adapt_optimizer(m, config):
    """As YOSO's G."""
    m.optimizer = torch.optim.AdamW(m.student.parameters, lr=config.adapt_lr, betas=(0.9, 0.999), eps=1e-8,
                                    weight_decay=config.weight_decay)


def yoso_adapt(iteration, pictures, captions, config, draws, m):
    """One step of the adaptation; in stage I the student has the teacher's tables, in stage II rescaled ones.
    """
    cond, x0, draw = condition(m, captions), encode(m, pictures), draws(iteration)
    t, eps = draw.randint(0, len(m.teacher.alpha)), draw.randn(*x0.shape[1:])
    alpha_t, sigma_t = col(m.teacher.alpha[t]), col(m.teacher.sigma[t])
    alpha_s, sigma_s = col(m.student.alpha[t]), col(m.student.sigma[t])
    x_t = alpha_t * x0 + sigma_t * eps
    eps_phi = m.teacher.eps(x_t, t, cond).detach()
    x_phi = ((x_t - sigma_t * eps_phi) / alpha_t).clamp(-config.adapt_clamp, config.adapt_clamp)
    v = m.student.output(alpha_s * x0 + sigma_s * eps, t, cond)
    L_adapt = ((v - (alpha_s * eps_phi - sigma_s * x_phi))**2).mean()
    norm = descend(L_adapt, m.student.parameters, m.optimizer, config.clip_norm)
    return dict(L_adapt=L_adapt, grad_student=norm)


# SwiftBrush v2

def swiftbrush_optimizers(m, config):
    """AdamW's own betas; no decay of the LoRA teacher."""
    same, lr = dict(betas=(0.9, 0.999), eps=1e-8), {"a": config.lr, "b": config.lr_b}[m.stage]
    student, lora_teacher = m.student.parameters, m.lora_teacher.parameters
    m.optimizer = torch.optim.AdamW(student, lr=lr, weight_decay=config.weight_decay, **same)
    m.optimizer_lora = torch.optim.AdamW(lora_teacher, lr=config.lr_lora_teacher, weight_decay=0, **same)


def swiftbrush(iteration, prompts, config, draws, m):
    """One iteration of student A or B, with the image regularisation by pairs."""
    warm_up(iteration, config, [(m.optimizer, {"a": config.lr, "b": config.lr_b}[m.stage]),
                                (m.optimizer_lora, config.lr_lora_teacher)])
    draw, alpha, sigma = draws(3 * iteration), m.teacher.alpha, m.teacher.sigma
    cond, null = condition(m, prompts), condition(m, [""] * len(prompts))
    z, t, eps = draw.randn(*m.shape), draw.randint(config.t_min, config.t_max + 1), draw.randn(*m.shape)
    w = config.guidance[0]
    if len(config.guidance) == 2:
        w = col(config.guidance[0] + (config.guidance[1] - config.guidance[0]) * draw.rand())
    w_lora = w if config.guide_lora_teacher else 1

    f = m.student.one_step(z, cond)
    x_t = (col(alpha[t]) * f + col(sigma[t]) * eps).detach()
    phi_c, phi_0 = m.teacher.eps(x_t, t, cond), m.teacher.eps(x_t, t, null)
    psi_c, psi_0 = m.lora_teacher.eps(x_t, t, cond), m.lora_teacher.eps(x_t, t, null)
    eps_phi, eps_psi = phi_0 + w * (phi_c - phi_0), psi_0 + w_lora * (psi_c - psi_0)
    g = col(sigma[t])**2 * (eps_phi - eps_psi)  # Eq. 4 with w(t) = sigma_t^2
    if config.weighting == "x0":
        Y_phi, Y_psi = ((x_t - col(sigma[t]) * e) / col(alpha[t]) for e in (eps_phi, eps_psi))
        g = dmd2_direction(f, Y_phi, Y_psi)
    losses = dict(L_vsd=((f - (f - g).detach())**2).mean() / 2)
    if m.stage == "b":
        fading = 1 - iteration / config.iterations_b if config.clip_decay else 1
        fits = {name: cosine(m.scorers[name], decode(m, f), prompts) for name in ("clip", "reward")}
        losses["L_clip"] = config.clip_weight * fading * relu(config.tau - fits["clip"]).mean()  # Eq. 5
        losses["L_reward"] = config.reward_weight * fading * relu(config.reward_tau - fits["reward"]).mean()
    if config.regularise and iteration % config.regularise_every == 0:
        chosen = draws(3 * iteration + 2).randint(0, len(m.pairs_y)).tolist()
        f_pair = m.student.one_step(m.pairs_z[chosen], condition(m, [m.pairs_y[k] for k in chosen]))
        distance = squared(decode(m, f_pair), decode(m, m.pairs_x0[chosen]).detach())
        losses["L_pairs"] = config.regularise_weight * distance.mean()
    norm = descend(sum(losses.values()), m.student.parameters, m.optimizer, config.clip_norm)

    draw = draws(3 * iteration + 1)
    for _ in range(config.score_updates):
        t, eps, emptied = draw.randint(0, len(alpha)), draw.randn(*m.shape), draw.rand() < config.null_share
        texts = [c["encoder_hidden_states"] for c in (null, cond)]
        texts = torch.where(emptied.view(-1, 1, 1), *texts)
        x_t = (col(alpha[t]) * f + col(sigma[t]) * eps).detach()
        L_lora_teacher = ((m.lora_teacher.eps(x_t, t, dict(encoder_hidden_states=texts)) - eps)**2).mean()
        norm_lora = descend(L_lora_teacher, m.lora_teacher.parameters, m.optimizer_lora, config.clip_norm)
    update_average(m, m.student.parameters, config, iteration)
    return losses | dict(L_lora_teacher=L_lora_teacher, grad_student=norm, grad_lora_teacher=norm_lora)


# Diff-Instruct*

def diff_instruct_optimizers(m, config):
    """The same betas for both."""
    same = dict(betas=(config.beta1, 0.999), eps=1e-8)
    m.optimizer = torch.optim.Adam(m.student.parameters, lr=config.lr, **same)
    m.optimizer_assistant = torch.optim.Adam(m.assistant.parameters, lr=config.lr_assistant, **same)


def diff_instruct(iteration, prompts, config, draws, m):
    """One iteration: the assistant's updates, then, once its warm-up is over, the student's."""
    warm_up(iteration, config, [(m.optimizer_assistant, config.lr_assistant)])
    warm_up(iteration - config.assistant_warmup, config, [(m.optimizer, config.lr)])
    alpha, sigma, K = m.reference.alpha, m.reference.sigma, config.score_updates
    cond, null = condition(m, prompts), condition(m, [""] * len(prompts))
    for k in range(K):
        draw = draws((K + 1) * iteration + 1 + k)
        z, t, eps = draw.randn(*m.shape), draw.randint(0, len(alpha)), draw.randn(*m.shape)
        x_t = col(alpha[t]) * m.student.one_step(z, cond).detach() + col(sigma[t]) * eps
        L_assistant = ((m.assistant.eps(x_t, t, cond) - eps)**2).mean()
        norm_assistant = descend(L_assistant, m.assistant.parameters, m.optimizer_assistant, config.clip_norm)
    of_assistant = dict(L_assistant=L_assistant, grad_assistant=norm_assistant)
    if iteration < config.assistant_warmup:
        return of_assistant

    draw = draws((K + 1) * iteration)
    z, t, eps = draw.randn(*m.shape), draw.randint(config.t_min, config.t_max + 1), draw.randn(*m.shape)
    f = m.student.one_step(z, cond)
    x_t = col(alpha[t]) * f + col(sigma[t]) * eps  # with the graph: the scores are differentiated by x_t too
    eps_c, eps_0 = m.reference.eps(x_t, t, cond), m.reference.eps(x_t, t, null)
    eps_psi = m.assistant.eps(x_t, t, cond)
    eps_ref = eps_c + config.alpha_cfg * (eps_c - eps_0) if config.cfg_choice == 2 else eps_c
    y = eps_psi - eps_ref
    if config.divergence == "kl":
        L_divergence = (-y.detach() * x_t).sum((1, 2, 3)).mean()
    else:
        c = config.huber_c or 0.00054 * f[0].numel()**0.5
        norm = ((y**2).sum((1, 2, 3), keepdim=True) + c**2)**0.5
        norm = norm.detach() if config.detach_normaliser else norm
        slope = 2 * y if config.distance == "l2" else y / norm
        L_divergence = -(slope * (eps_psi - eps)).sum((1, 2, 3)).mean()  # Eq. 3.4
    if config.weighting == "x0":  # of x0 predictions, over SiD's normaliser
        Y_ref, Y_psi, Y_0 = ((x_t - col(sigma[t]) * e) / col(alpha[t]) for e in (eps_ref, eps_psi, eps_0))
        normaliser = (f - Y_ref).abs().mean((1, 2, 3)).detach()
        products = dict(kl=(Y_psi - Y_ref).detach() * x_t / col(alpha[t]),
                        l2=-2 * (Y_psi - Y_ref) * (Y_psi - f),
                        huber=slope * (Y_psi - f) if config.divergence == "score" else 0 * f)
        product = products[config.divergence if config.divergence == "kl" else config.distance]
        L_divergence = (product.sum((1, 2, 3)) / normaliser).mean()
    losses = dict(L_divergence=L_divergence)
    if config.cfg_choice == 1:
        # Eq. 3.6, its sign turned
        losses["L_cfg"] = config.alpha_cfg * ((eps_c - eps_0).detach() * x_t).sum((1, 2, 3)).mean()
        if config.weighting == "x0":
            product = (Y_ref - Y_0).detach() * x_t / col(alpha[t])
            losses["L_cfg"] = -config.alpha_cfg * (product.sum((1, 2, 3)) / normaliser).mean()
    reward, probe = (cosine(m.scorers[name], decode(m, f), prompts) for name in ("reward", "probe"))
    alpha_rew = config.alpha_rew if iteration >= config.assistant_warmup + config.warmup else 0
    scalars = losses | dict(reward=reward.mean(), probe=probe.mean())
    for name, loss in dict(divergence=sum(losses.values()), reward=-alpha_rew * reward.mean()).items():
        if alpha_rew or name == "divergence":
            slope, = torch.autograd.grad(len(f) * loss, f, retain_graph=True)  # of one sample's loss
            scalars[f"grad_{name}"] = slope.flatten(1).norm(dim=1).mean()
    L = sum(losses.values()) - alpha_rew * reward.mean()
    norm = descend(L, m.student.parameters, m.optimizer, config.clip_norm)
    update_average(m, m.student.parameters, config, iteration - config.assistant_warmup)
    return scalars | of_assistant | dict(grad_student=norm)


# What public code computes, from its equations; f is a student's picture, Y a prediction of x0 at its x_t

def yoso_script(D_real, D_fake, e_rec, e_con, w_rec, w_con, undone=False):
    """(L_D, L_rec, L_con, L_adv) of the authors' fine-tuning script; logits, errors and weights are [B] each.

    It averages logits before the softplus, and multiplies the whole batch's error with each sample's weight:
    E[w] E[e]. undone: without these two averages, which is ours.
    """
    if not undone:
        D_real, D_fake, e_rec = D_real.mean(), D_fake.mean(), e_rec.mean()
    L_D = softplus(-D_real).mean() + softplus(D_fake).mean()
    return L_D, (w_rec * e_rec).mean(), (w_con * e_con).mean(), softplus(-D_fake).mean()


def swiftbrush_v1_student(z, eps_T, alpha_T, sigma_T):
    """f of the first version's trainer, which takes the scheduler's last level."""
    return (z - sigma_T * eps_T) / alpha_T


def swiftbrush_v1_loss(f, eps_phi, eps_psi, sigma_t):
    """Its distillation loss, whose gradient is the direction g over the number of entries."""
    g = (col(sigma_t)**2 * (eps_phi - eps_psi)).detach()
    return 0.5 * F.mse_loss(f, (f - g).detach())


def swiftbrush_v1_lora_loss(eps_psi, eps, alpha_t):
    """Its LoRA teacher's loss, [B]: both sides times alpha_t."""
    return ((col(alpha_t) * eps_psi - col(alpha_t) * eps)**2).mean((1, 2, 3))


def dmd2_direction(f, Y_ref, Y_psi, normalise=True):
    """What DMD2 moves f against: (f - Y_ref) - (f - Y_psi), over the mean of |f - Y_ref| of each sample."""
    p_real, p_fake = f - Y_ref, f - Y_psi
    return (p_real - p_fake) / (p_real.abs().mean((1, 2, 3), keepdim=True) if normalise else 1)


def sid_loss(f, Y_ref, Y_psi, alpha=1.0):
    """SiD's loss of the student before its weight, [B]; Y_ref is guided by kappa in SiD-LSG."""
    return ((Y_ref - Y_psi) * ((Y_ref - f) - alpha * (Y_ref - Y_psi))).sum((1, 2, 3))


def diff_instruct_loss(f, Y_ref, Y_psi):
    """Diff-Instruct's, [B]: the two predictions' difference, a constant, times f."""
    return ((Y_psi - Y_ref).detach() * f).sum((1, 2, 3))
