"""Where a one-step student starts, its conversion, and what is exported for other tools."""

import json
import pickle
import shutil
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.utils.checkpoint
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common import BETA_NAMES, Denoiser, UserError, enable_checkpointing, load, one_step
from plumbing.shard import class_of, shard, whole


def load_teacher(model, dataset, device):
    """--model as (Denoiser, Codec); where CIFAR-10's cannot be had, the error says how to train one."""
    try:
        return load(model, device)
    except UserError as error:
        if dataset == "cifar10":
            raise UserError(
                f"{error}; or train one: python tools/pretrain.py --dataset cifar10 --out runs/teacher, "
                "then --model runs/teacher"
            )
        raise


def starting_student(student, lora, model, teacher, codec):
    """Where a one-step student starts, as a frozen Denoiser: the flags --student, with --lora, or the teacher
    itself (--model).

    student: a diffusers pipeline, or a file of network weights for the teacher's architecture (.safetensors,
    or a checkpoint that torch.load reads without unpickling code; local, or on the hub as OWNER/NAME/FILE).
    Its schedule may end at a lower timestep than the teacher's. Raises UserError if it does not fit the
    teacher.
    """
    if not student and not lora:
        return teacher
    if student.endswith((".safetensors", ".bin", ".pt", ".pth")):
        if lora:
            raise UserError("--lora: goes on a pipeline, not on a file of weights; give --student a directory")
        return Denoiser(_network_of(student, teacher.net, codec.device), teacher.schedule, teacher.prediction_type)
    start, start_codec = load(student or model, codec.device, lora)
    if start_codec.shape != codec.shape:
        raise UserError(f"--student {student}: works on x0 of shape {start_codec.shape}, --model {model} on {codec.shape}")
    shapes = [{k: v.shape for k, v in d.net.state_dict().items()} for d in (start, teacher)]
    if shapes[0] != shapes[1]:
        raise UserError(f"--student {student}: another architecture than --model {model}; give two of the same")
    n = len(start.schedule)
    if n > len(teacher.schedule) or not torch.allclose(start.schedule.alpha, teacher.schedule.alpha[:n], atol=1e-6):
        raise UserError(f"--student {student}: another noise schedule than --model {model}; give two of the same")
    return start


def _network_of(path, net, device):
    try:
        if not Path(path).exists() and path.count("/") >= 2 and not path.startswith((".", "/")):
            from huggingface_hub import hf_hub_download
            owner, name, file = path.split("/", 2)
            path = hf_hub_download(f"{owner}/{name}", file)
        if path.endswith(".safetensors"):
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        return dense_copy(net, state, device).requires_grad_(False)
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(f"--student {path}: not weights of --model's network ({' '.join(str(error).split())[:300]})")


def dense_copy(net, state, device):
    """A network of the same architecture with the weights `state`, in eval mode."""
    new = class_of(net).from_config(net.config)
    new.load_state_dict(state)
    return new.to(device).eval()


# The flags that a conversion depends on.
CONVERTED_BY = {"model", "student", "student_timestep", "lora", "prompts", "dataset", "seed", "batch_size", "precision",
                "cache_latents", "prediction", "convert_iterations", "convert_lr", "convert_clamp", "clip_norm"}


def convert(run, codec, start, prediction, prompts):
    """The start as a network that predicts `prediction`: a regression of its x0 at the last timestep onto its old one.

    The old x0 is clamped: at that timestep an epsilon network's carries 1 / alpha_T times its error (14.6 for SD), a
    v network's is about -v. Reads from the run's config: convert_lr, convert_clamp, clip_norm,
    gradient_checkpointing. Exports to OUT/pipeline.
    """
    config = run.config
    net = dense_copy(start.net, fold_lora(start.net, None), codec.device).requires_grad_(True)
    shard(config, net)
    if config.gradient_checkpointing:
        enable_checkpointing(net)
    student = Denoiser(net, start.schedule, prediction)
    optimizer = torch.optim.AdamW(net.parameters(), config.convert_lr, weight_decay=0.0, fused=True)

    def loss_student(p):
        """The student's x0 against the start's."""
        with torch.no_grad():
            target = one_step(start, p.z, p.cond).clamp(-config.convert_clamp, config.convert_clamp)
        loss = (one_step(student, p.z, p.cond) - target).square().mean()
        return loss, dict(L_convert=loss)

    run.begin(dict(student=net, optimizer=optimizer))
    for iteration, y in enumerate(run.prompts(prompts), run.start):
        parts = run.split(z=run.draws(iteration).randn(*codec.shape), cond=codec.cond(y))
        if run.finish_iteration(iteration, run.descend(optimizer, parts, loss_student, config.clip_norm)):
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
    """The averaged student as a pipeline in OUT/pipeline, made on the CPU; a LoRA also as a file of its own.

    more: as for export_one_step. Every process calls it.
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
        export_one_step(
            codec,
            dense_copy(student.net, state, "cpu"),
            student.prediction_type,
            run.out / "pipeline",
            len(student.schedule),
            **more,
        )


def write_folder(path, save):
    """save(folder) into a new folder that is moved to `path` when complete."""
    path, temporary = Path(path), Path(path).with_name(Path(path).name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    save(temporary)
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)


def export_one_step(codec, net, prediction_type, path, length=0, zero_snr=False, prior=None):
    """The pipeline with `net` as its network, for num_inference_steps=1 (2, 4) and guidance_scale=1 in
    diffusers alone.

    Its LCMScheduler predicts x0, then adds fresh noise at the next lower level: the spacing of 4 steps is 999
    749 499 249. length: the timesteps of the student's own schedule, where it starts below the model's last;
    then for one step only. zero_snr: the schedule rescaled to SNR_T = 0; prior: an InformativePrior that is
    kept beside it.
    """
    from diffusers import DDPMPipeline, LCMScheduler
    betas = {k: v for k, v in codec.pipe.scheduler.config.items() if k in BETA_NAMES}
    steps = 4
    if 0 < length < len(codec.pipe.scheduler.alphas_cumprod):
        # Cut off above the start, the schedule's last timestep is where every tool begins.
        steps, betas = 1, dict(num_train_timesteps=length, trained_betas=codec.pipe.scheduler.betas[:length].tolist())
    if zero_snr:
        betas |= dict(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler = LCMScheduler(
        **betas,
        prediction_type=prediction_type,
        original_inference_steps=steps,
        clip_sample=False,
        steps_offset=1,
    )
    if codec.vae is None:
        pipe = DDPMPipeline(net, scheduler)
    else:
        name = "transformer" if "transformer" in codec.pipe.components else "unet"
        extra = dict(requires_safety_checker=False) if codec.name == "StableDiffusionPipeline" else {}
        pipe = type(codec.pipe)(**{**codec.pipe.components, name: net, "scheduler": scheduler}, **extra)

    def save(folder):
        """The pipeline and what lies beside it."""
        pipe.save_pretrained(folder)
        if codec.vae is None and codec.classes:
            (folder / "classes.json").write_text(json.dumps(codec.classes))
        if prior:
            prior.save(folder)

    write_folder(path, save)


def fold_lora(net, name):
    """The dense weights of a network with the LoRA `name` folded in (None: without any), under the bare
    network's keys.

    Of a sharded network the whole weights; then every process must call it.
    """
    state = {key.replace(".base_layer.", "."): whole(value) for key, value in net.state_dict().items() if "lora_" not in key}
    layers = {id(layer) for layer in getattr(net, "lora_layers", ())} if name else ()
    for path, module in net.named_modules():
        if id(module) in layers and name in module.lora_A:
            state[f"{path}.weight"] = state[f"{path}.weight"] + module.get_delta_weight(name)
    return state


def save_lora(codec, net, name, path):
    """The LoRA `name` in the file that `load_lora_weights` of a diffusers pipeline reads, and in
    kohya.safetensors with the keys of kohya's scripts, which ComfyUI and AUTOMATIC1111 expect; PixArt: an
    adapter folder of peft."""
    from diffusers.utils import convert_state_dict_to_kohya
    from peft import get_peft_model_state_dict
    state = get_peft_model_state_dict(net, adapter_name=name)
    if hasattr(codec.pipe, "save_lora_weights"):
        # Without the metadata an alpha other than the rank would be read with the wrong scale.
        codec.pipe.save_lora_weights(path, state, unet_lora_adapter_metadata=net.peft_config[name].to_dict())
        kohya = convert_state_dict_to_kohya({f"unet.{key}": value for key, value in state.items()})
        alpha = torch.tensor(float(net.peft_config[name].lora_alpha))  # diffusers writes the rank
        kohya = {key: alpha.clone() if key.endswith(".alpha") else value.contiguous() for key, value in kohya.items()}
        save_file(kohya, Path(path) / "kohya.safetensors")
    else:
        Path(path).mkdir(parents=True, exist_ok=True)
        net.peft_config[name].save_pretrained(path)
        state = {f"base_model.model.{key}": value.contiguous() for key, value in state.items()}
        save_file(state, Path(path) / "adapter_model.safetensors")
