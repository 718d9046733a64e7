"""A page on this machine that shows what one step means: teacher and student side by side, with their times.

    pip install "gradio>=6.31"         # only this tool needs it
    python tools/demo.py               # the mini model and its student, on http://127.0.0.1:7860
    python tools/demo.py --teacher assets/mini-sd --student runs/swiftbrush_v2/pipeline --device cpu

A slider moves the noise from one seed's to another's. The two pictures of a single network call follow it;
the teacher's many steps, which take too long for that, are drawn when it is let go.
"""

import base64
import io
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torchvision.transforms.v2 import functional as TF

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import Draws, InformativePrior, UserError, ddim_sample, load, one_step
from plumbing.cli import Parser, check_flags, run_command
from plumbing.files import check_folder
from plumbing.grids import to_levels
from plumbing.run import choose_device
from plumbing.shapes import BACKGROUNDS, COLOURS, SHAPES, SIZES
from swiftbrush_v2 import slerp
from yoso import Sampler

ONE_CALL, ALL = ("teacher", "student"), ("teacher", "student", "many")
CSS = """
.panel {margin: 0; text-align: center}
.panel img {width: 100%; border: 1px solid #8888; margin: 6px 0}
.panel .title {font-size: 1.3rem; font-weight: 600}
.panel .ms {font-size: 1.6rem; font-weight: 600}
#student .title {color: #1a7f37}
#many.waiting img {opacity: 0.2}
#many.waiting .ms {font-size: 0}
#many.waiting .ms::after {content: "drawn when the slider rests"; font-size: 1rem}
"""
WAIT = "() => document.getElementById('many').classList.add('waiting')"
DONE = "() => document.getElementById('many').classList.remove('waiting')"
# Only a pointer lets gradio's slider go; after an arrow key the many steps would wait for ever.
KEYS = """() => document.addEventListener('keyup', event => event.target.type === 'range' &&
    event.target.dispatchEvent(new PointerEvent('pointerup', {bubbles: true})))"""


def noise_of(seeds, u, shape):
    """The noise at u in [0, 1] between those of two seeds, by slerp: [2, *shape], on the CPU.

    The first is z, as `sample` draws it for a single picture with the seed; the second is for an informative
    prior.
    """
    draws = [Draws(seed, 0, 1, slice(None), "cpu") for seed in seeds]
    return slerp(*(torch.cat([draw.randn(*shape), draw.randn(*shape)]) for draw in draws), u)


@torch.no_grad()
def panels(teacher, student, caption, noise, steps, guidance, names=ALL):
    """{name: (uint8 picture [3, H, W], milliseconds)} of two yoso.Samplers, from what noise_of gave.

    Names: "teacher" and "student", an unguided network call each, and "many", the teacher's DDIM of so many
    steps with guidance. The time is that of network calls and decoding, without the caption's encoding.
    """
    def draw(sampler, x0_of):
        codec, prior = sampler.codec, sampler.prior
        z, eps_prime = noise.to(codec.device).split(1)
        x_T = prior.start(sampler.generator.schedule, z, eps_prime) if prior else z
        cond, null = codec.cond([caption]), codec.null(1) if guidance != 1 else None
        if codec.device.type != "cpu":
            torch.accelerator.synchronize()
        start = time.perf_counter()
        picture = to_levels(codec.decode(x0_of(sampler.generator, x_T, cond, null))[0]).cpu()  # waits for it
        return picture, 1000 * (time.perf_counter() - start)

    once = lambda generator, x_T, cond, null: one_step(generator, x_T, cond)
    many = lambda generator, x_T, cond, null: ddim_sample(generator, x_T, steps, cond, null, guidance)
    what = dict(teacher=(teacher, once), student=(student, once), many=(teacher, many))
    return {name: draw(*what[name]) for name in names}


def figure(title, note, picture, milliseconds):
    """A panel as HTML. Small pictures are enlarged without blur."""
    file = io.BytesIO()
    TF.to_pil_image(picture).save(file, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    enlarged = "pixelated" if picture.shape[-1] < 256 else "auto"
    return (f'<figure class="panel"><div class="title">{title}</div><div>{note}</div>'
            f'<img src="{source}" alt="{title}" style="image-rendering: {enlarged}">'
            f'<div class="ms">{milliseconds:,.0f} ms</div></figure>')


def import_gradio():
    """gradio, which then reports nothing to anyone. Raises UserError if it is not installed."""
    os.environ |= dict(GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False")
    try:
        import gradio
    except ImportError:
        raise UserError('gradio, which makes the page, is not installed: pip install "gradio>=6.31"')
    return gradio


def build(teacher, student, caption, steps, guidance, known=""):
    """The page, a gradio.Blocks; known: said beside the caption. Raises UserError if nothing can be drawn."""
    gr, calls = import_gradio(), steps * (1 if guidance == 1 else 2)
    words = dict(teacher=("Teacher, 1 step", "1 network call"), student=("Student, 1 step", "1 network call"),
                 many=(f"Teacher, {steps} steps", f"{calls} network calls, guidance {guidance:g}"))

    def figures(names, caption, u, *seeds):
        noise = noise_of(seeds, u, teacher.codec.shape)
        drawn = panels(teacher, student, caption, noise, steps, guidance, names)
        return [figure(*words[name], *drawn[name]) for name in names]

    def answer(names, caption, u, *seeds):
        if None in seeds or min(seeds) < 0:
            raise gr.Error("Give both seeds, from 0 on.", print_exception=False)
        try:
            return figures(names, caption, u, *seeds)
        except UserError as error:  # a caption that names no class
            raise gr.Error(str(error), print_exception=False)

    figures(ALL, caption, 0, 0, 1)  # the first calls of a network take longer
    with gr.Blocks(title="What one step means", analytics_enabled=False) as page:
        gr.Markdown("# What one step means\nOne caption and one noise, drawn three times. The student does "
                    f"in one network call what takes the teacher {calls}, and so it can follow the slider.")
        text = gr.Textbox(caption, label=f"Caption, then Enter{known}", visible=teacher.codec.guided)
        with gr.Row():
            seed_a = gr.Number(0, label="Seed of noise A", precision=0, min_width=100)
            u = gr.Slider(0, 1, 0, step=0.01, label="From noise A (0) to noise B (1)", scale=6)
            seed_b = gr.Number(1, label="Seed of noise B", precision=0, min_width=100)
        with gr.Row():
            shown = [gr.HTML(html, elem_id=name, min_width=160)
                     for name, html in zip(ALL, figures(ALL, caption, 0, 0, 1))]
        gr.Markdown(f"Time of one picture on this machine ({teacher.codec.device}): network calls and "
                    "decoding, without the caption's encoding and the way to this page.")
        # One drawing at a time, for two would share the processor and falsify each other's times.
        common = dict(inputs=[text, u, seed_a, seed_b], show_progress="hidden", trigger_mode="always_last",
                      concurrency_id="networks", concurrency_limit=1)
        u.input(None, js=WAIT)
        u.input(partial(answer, ONE_CALL), outputs=shown[:2], api_name="one_call", **common)
        drawn = gr.on([u.release, text.submit, seed_a.change, seed_b.change], partial(answer, ALL),
                      outputs=shown, api_name="all", **common)
        drawn.then(None, js=DONE)
    return page


def loaded(flag, path, device):
    """The pipeline of --teacher or --student as a yoso.Sampler. Raises UserError, which names the flag."""
    try:
        check_folder(path)
        return Sampler(*load(path, device))
    except UserError as error:
        raise UserError(f"--{flag} {error}")


def main(argv):
    """The command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="assets/mini-sd",
                        help="a diffusers pipeline, directory or hub id [%(default)s]")
    parser.add_argument("--student", default="assets/mini-student",
                        help="its one-step student, an exported pipeline [%(default)s]")
    parser.add_argument("--steps", type=int, default=25, help="the teacher's DDIM steps [%(default)s]")
    parser.add_argument("--guidance", type=float, default=2.0,
                        help="of these steps, 1: none, which halves the network calls [%(default)s]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps [%(default)s]")
    parser.add_argument("--port", type=int, default=7860, help="of the page on 127.0.0.1 [%(default)s]")
    args = parser.parse_args(argv)
    check_flags(args, teacher=dict(needed=True), student=dict(needed=True), steps=dict(least=1, most=1000),
                guidance=dict(least=0), port=dict(least=1, most=65535))
    import_gradio()  # what is missing is said before the models are loaded
    device = choose_device(args.device)
    teacher, student = (loaded(flag, getattr(args, flag), device) for flag in ONE_CALL)
    student.prior = InformativePrior.read(args.student, device)
    codec, timesteps = teacher.codec, len(teacher.generator.schedule)
    if args.steps > timesteps:
        raise UserError(f"--steps {args.steps}: {args.teacher} has {timesteps} timesteps; give no more")
    if args.guidance != 1 and not codec.has_null:
        raise UserError(f"--guidance {args.guidance}: {args.teacher} has no empty condition to guide "
                        "by; use --guidance 1")
    if student.codec.shape != codec.shape:
        raise UserError(f"--student {args.student}: draws from other noise ({student.codec.shape}) than "
                        f"--teacher {args.teacher} ({codec.shape}); give a student of this teacher")
    known = *map(" / ".join, (SIZES, COLOURS, SHAPES)), f"on {' / '.join(BACKGROUNDS)}"
    page = build(teacher, student, codec.classes[0] if codec.classes else "a small blue triangle on white",
                 args.steps, args.guidance, f" ({', '.join(known)})" * (Path(args.teacher).name == "mini-sd"))
    try:
        page.launch(server_name="127.0.0.1", server_port=args.port, share=False, ssr_mode=False, css=CSS,
                    js=KEYS, footer_links=[], quiet=True, prevent_thread_lock=True)
    except OSError:
        raise UserError(f"--port {args.port}: is taken, or may not be used; choose another")
    print(f"http://127.0.0.1:{args.port} shows the page; Ctrl-C ends it")
    page.block_thread()


if __name__ == "__main__":
    run_command(main)
