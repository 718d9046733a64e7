"""A one-step student's start, its conversion, and its exports for other tools."""

import json
import pickle
import shutil
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import DDPMPipeline, LCMScheduler
from diffusers.utils import convert_state_dict_to_kohya
from huggingface_hub import hf_hub_download
from peft import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common import BETA_NAMES, Denoiser, UserError, enable_checkpointing, load, one_line, one_step
from plumbing.files import check_folder, write_folder, write_text, writing
from plumbing.shard import class_of, shard, whole


def load_teacher(model, dataset, device):
    """--model as (Denoiser, Codec); with --dataset cifar10 a failure says how to train one."""
    check_folder(model)
    try:
        return load(model, device)
    except UserError as error:
        if dataset == "cifar10":
            raise UserError(f"{error}; or train one: python tools/pretrain.py --dataset cifar10 "
                            "--out runs/teacher, then --model runs/teacher")
        raise


def check_highest(config, schedule):
    """Raises UserError if --t-max is no timestep of the model, or x0 cannot be had there to weight by."""
    if config.t_max >= len(schedule):
        raise UserError(f"--t-max {config.t_max}: the model has the timesteps 0 to {len(schedule) - 1}")
    if config.weighting == "x0" and schedule.alpha[config.t_max] == 0:
        raise UserError(f"--t-max {config.t_max}: the model's alpha is 0 there, so --weighting x0 has no x0; "
                        "give a lower one")


def starting_student(student, lora, model, teacher, codec):
    """The frozen Denoiser that a one-step student starts from: --student, or --model, either with --lora.

    student: a diffusers pipeline, or a file of network weights for the teacher's architecture (.safetensors,
    or a checkpoint that torch.load reads without unpickling code; local, or on the hub as OWNER/NAME/FILE);
    lora is merged into a pipeline. The student's schedule may end at a lower timestep than the teacher's.
    Raises UserError if the student does not fit the teacher.
    """
    if not student and not lora:
        return teacher
    if student.endswith((".safetensors", ".bin", ".pt", ".pth")):
        if lora:
            raise UserError("--lora: goes on a pipeline, not on a file of weights; "
                            "give --student a directory")
        net = _network_of(student, teacher.net, codec.device)
        return Denoiser(net, teacher.schedule, teacher.prediction_type)
    check_folder(student or model)
    start, start_codec = load(student or model, codec.device, lora)
    if start_codec.shape != codec.shape:
        raise UserError(f"--student {student}: works on x0 of shape {start_codec.shape}, "
                        f"--model {model} on {codec.shape}")
    shapes = [{k: v.shape for k, v in d.net.state_dict().items()} for d in (start, teacher)]
    if shapes[0] != shapes[1]:
        raise UserError(f"--student {student}: another architecture than --model {model}; "
                        "give two of the same")
    alpha, n = start.schedule.alpha, len(start.schedule)
    if n > len(teacher.schedule) or not torch.allclose(alpha, teacher.schedule.alpha[:n], atol=1e-6):
        raise UserError(f"--student {student}: another noise schedule than --model {model}; "
                        "give two of the same")
    return start


def _network_of(path, net, device):
    try:
        if not Path(path).exists() and path.count("/") >= 2 and not path.startswith((".", "/")):
            owner, name, file = path.split("/", 2)
            path = hf_hub_download(f"{owner}/{name}", file)
        if path.endswith(".safetensors"):
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        return dense_copy(net, state, device).requires_grad_(False)
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError, pickle.UnpicklingError,
            SafetensorError) as error:
        raise UserError(f"--student {path}: not weights of --model's network ({one_line(error)})")


def dense_copy(net, state, device):
    """A network of the same architecture with the weights `state`, in eval mode."""
    new = class_of(net).from_config(net.config)
    new.load_state_dict(state)
    return new.to(device).eval()


# The flags that a conversion depends on.
CONVERTED_BY = {"model", "student", "student_timestep", "lora", "prompts", "dataset", "seed", "batch_size",
                "precision", "cache_latents", "prediction", "convert_iterations", "convert_lr",
                "convert_clamp", "clip_norm"}


def convert(run, codec, start, prediction, prompts):
    """A copy of the start that predicts `prediction`, regressed onto the start's x0 at the last timestep.

    The start's x0 is clamped: at that timestep the x0 of an epsilon network has 1 / alpha_T times the
    network's error (14.6 for SD), the x0 of a v network is about -v. The run's config must have convert_lr,
    convert_clamp, clip_norm and gradient_checkpointing. Exports to OUT/pipeline.
    """
    config = run.config
    net = dense_copy(start.net, fold_lora(start.net, None), codec.device).requires_grad_(True)
    shard(config, net)
    if config.gradient_checkpointing:
        enable_checkpointing(net)
    student = Denoiser(net, start.schedule, prediction)
    optimizer = torch.optim.AdamW(net.parameters(), config.convert_lr, weight_decay=0.0, fused=True)

    def loss_student(batch):
        with torch.no_grad():
            target = one_step(start, batch.z, batch.cond).clamp(-config.convert_clamp, config.convert_clamp)
        loss = (one_step(student, batch.z, batch.cond) - target).square().mean()
        return loss, dict(L_convert=loss)

    run.begin(dict(student=net, optimizer=optimizer))
    for iteration, y in enumerate(run.prompts(prompts), run.start):
        batches = run.split(z=run.draws(iteration).randn(*codec.shape), cond=codec.cond(y))
        losses = run.descend(optimizer, batches, loss_student, config.clip_norm)
        if run.finish_iteration(iteration, losses):
            break
    run.end()
    optimizer.zero_grad()
    if run.shows:
        state = fold_lora(net, None)
        if run.rank == 0:
            # A LoRA student's file belongs on top of this.
            path = run.out / "pipeline"
            export_one_step(codec, dense_copy(net, state, "cpu"), prediction, path, len(start.schedule))
    net.requires_grad_(False)
    return student


def export_student(run, codec, student, ema, **more):
    """Writes the averaged student as a pipeline to OUT/pipeline; a LoRA also as a file of its own.

    more: as for export_one_step. Every process must call this.
    """
    if not run.shows:
        return
    with ema.applied() if student.adapter else nullcontext():
        state = {key: value.cpu() for key, value in fold_lora(student.net, student.adapter).items()}
        if student.adapter and run.rank == 0:
            save_lora(codec, student.net, student.adapter, run.out)
    if not student.adapter:
        state |= {name: whole(average).cpu() for name, average in ema.average.items()}
    if run.rank == 0:
        net = dense_copy(student.net, state, "cpu")
        path = run.out / "pipeline"
        export_one_step(codec, net, student.prediction_type, path, len(student.schedule), **more)


def model_card(method, config, codec, prior=False):
    """The README.md of an exported pipeline, as the Hugging Face hub reads it.

    method: the method's name; config: the run's flags; prior: whether one lies beside it.
    """
    defaults = type(config)()
    sources = ("model", "student", "lora", "generator", "generator_lora", "discriminator")
    paths = [path for name in sources if (path := getattr(config, name, ""))]
    # Of the hub: OWNER/NAME or OWNER/NAME/FILE. Places on this machine are nobody else's business, so of a
    # directory only its own name is told, of a run's pipeline/ the run's.
    public = lambda path: not path.startswith(("/", ".")) and not Path(path).exists()
    own = lambda path: next(part for part in reversed(Path(path).absolute().parts) if part != "pipeline")
    names = list(dict.fromkeys(path if public(path) else own(path) for path in paths))
    bases = list(dict.fromkeys("/".join(path.split("/")[:2]) for path in paths if public(path)))
    places = {"out", "resume", "device", "workers", "preset", "prompts", "dataset", "clip", "reward", "probe",
              "decoder", *sources}
    flags = [f"--{name.replace('_', '-')} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
             for name, value in vars(config).items()
             if value != getattr(defaults, name) and name not in places]
    start = ("Start from its informative_prior.safetensors; from plain noise the pictures are too grey.\n"
             if prior else "")
    several = len(names) > 1
    owner = "those-of-the-base-models" if several else "that-of-the-base-model"
    licence = ["license: other", f"license_name: {owner}"] if names else []
    listed = bases[0] if len(bases) == 1 else f"[{', '.join(bases)}]"
    front = ["---", *([f"base_model: {listed}"] if bases else []), "library_name: diffusers", *licence,
             "tags: [one-step, few-step, distillation]", "---"]
    holds = "whose licences all hold" if several else "whose licence also holds"
    source = f"{', '.join(names)}, {holds} for these weights" if names else "scratch"
    use = f"""```python
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(FOLDER_OR_ID)
images = pipe({"" if codec.vae is None else "PROMPT, guidance_scale=1, "}num_inference_steps=1).images
```"""
    if getattr(config, "latent_z", 0):
        use = "No diffusers pipeline draws its latent z: `python yoso.py sample` draws from the run's folder."
    return "\n".join(front) + f"""
# One-step generator, {method}

Trained from {source}. Preset {config.preset}, {config.iterations} iterations of batch {config.batch_size}.
Flags that differ from the defaults: `{" ".join(flags) or "none"}`.

{use}
{start}"""


def export_one_step(codec, net, prediction_type, path, length=0, zero_snr=False, prior=None, card=""):
    """Writes the pipeline with `net` as its network, for diffusers alone: 1 (2, 4) steps, guidance_scale=1.

    The pipeline's LCMScheduler predicts x0, then adds fresh noise at the next lower level: the spacing of 4
    steps is 999 749 499 249. length: the number of timesteps of the student's own schedule, if the student
    starts below the model's last timestep; then the pipeline is for one step only. zero_snr: the schedule is
    rescaled to SNR_T = 0. prior: an InformativePrior to be saved with the pipeline; card: its README.md.
    """
    betas = {k: v for k, v in codec.pipe.scheduler.config.items() if k in BETA_NAMES}
    steps = 4
    if 0 < length < len(codec.pipe.scheduler.alphas_cumprod):
        # Every tool begins at the schedule's last timestep, so the schedule is cut off above the start.
        steps, own = 1, codec.pipe.scheduler.betas[:length].tolist()
        betas = dict(num_train_timesteps=length, trained_betas=own)
    if zero_snr:
        betas |= dict(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler = LCMScheduler(**betas, prediction_type=prediction_type, original_inference_steps=steps,
                             clip_sample=False, steps_offset=1)
    if codec.vae is None:
        pipe = DDPMPipeline(net, scheduler)
    else:
        name = "transformer" if "transformer" in codec.pipe.components else "unet"
        extra = dict(requires_safety_checker=False) if codec.name == "StableDiffusionPipeline" else {}
        pipe = type(codec.pipe)(**{**codec.pipe.components, name: net, "scheduler": scheduler}, **extra)

    def save(folder):
        pipe.save_pretrained(folder)
        for tokenizer in {Path(file).parent for file in codec.tokenizer_files}:
            shutil.rmtree(folder / tokenizer)
            (folder / tokenizer).mkdir()
        for file, data in codec.tokenizer_files.items():
            (folder / file).write_bytes(data)
        if codec.vae is None and codec.classes:
            write_text(folder / "classes.json", json.dumps(codec.classes))
        if prior:
            prior.save(folder)
        if card:
            write_text(folder / "README.md", card)

    write_folder(path, save)


def fold_lora(net, name):
    """A network's dense weights, with the LoRA `name` folded in (None: no LoRA), by the bare network's keys.

    A sharded network's weights are gathered, so every process must call this.
    """
    state = {key.replace(".base_layer.", "."): whole(value) for key, value in net.state_dict().items()
             if "lora_" not in key}
    layers = {id(layer) for layer in getattr(net, "lora_layers", ())} if name else ()
    for path, module in net.named_modules():
        if id(module) in layers and name in module.lora_A:
            state[f"{path}.weight"] = state[f"{path}.weight"] + module.get_delta_weight(name)
    return state


def save_lora(codec, net, name, path):
    """Writes the LoRA `name` into a folder: a file for diffusers, one for kohya; of PixArt, a peft adapter.

    `load_lora_weights` of a diffusers pipeline reads the first; the second, kohya.safetensors, has the keys
    of kohya's scripts, which ComfyUI and AUTOMATIC1111 expect.
    """
    with writing(path):
        _save_lora(codec, net, name, path)


def _save_lora(codec, net, name, path):
    state = get_peft_model_state_dict(net, adapter_name=name)
    if hasattr(codec.pipe, "save_lora_weights"):
        # Without the metadata a reader would take alpha = rank.
        metadata = net.peft_config[name].to_dict()
        codec.pipe.save_lora_weights(path, state, unet_lora_adapter_metadata=metadata)
        kohya = convert_state_dict_to_kohya({f"unet.{key}": value for key, value in state.items()})
        alpha = torch.tensor(float(net.peft_config[name].lora_alpha))  # diffusers writes the rank
        kohya = {key: alpha.clone() if key.endswith(".alpha") else value.contiguous()
                 for key, value in kohya.items()}
        save_file(kohya, Path(path) / "kohya.safetensors")
    else:
        Path(path).mkdir(parents=True, exist_ok=True)
        net.peft_config[name].save_pretrained(path)
        state = {f"base_model.model.{key}": value.contiguous() for key, value in state.items()}
        save_file(state, Path(path) / "adapter_model.safetensors")
