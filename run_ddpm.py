"""Train a denoising diffusion model on FashionMNIST, measure how well it predicts
noise, and draw samples with it.

examples:
  python run_ddpm.py                        T = 200: ten minutes on two cores
  python run_ddpm.py --additions none       Ho et al. 2020: eps, L_simple, Adam
  python run_ddpm.py --classes              draws the class you ask for
  python run_ddpm.py --epochs 2             three minutes; samples are rougher
"""

from functools import partial

from scratchgen import diffusion, improved, plots, tree  # before NumPy: sets NumPy's threads
from scratchgen.data import CLASSES, first_images, load_fashion_mnist, scale
from scratchgen.denoisers import DENOISERS
from scratchgen.machinery import cli, files
from scratchgen.machinery.parallel import in_parallel, ranks_for, sharded
from scratchgen.machinery.run import INIT, SAMPLES, TEST, Run, rng_for
from scratchgen.muon import muon_step
from scratchgen.optim import adam_step, cosine_decay, ema_step, flush_denormals, init_moments
from scratchgen.samplers import SamplerConfig
from scratchgen.trained import DDPM, draw

import numpy as np

EPOCHS = {"unet": 7, "mlp": 12}  # by default
SHARD = 32  # images that one rank (a process) measures at a time


def parse_arguments(argv):
    networks = "unet has convolutions at two resolutions, mlp dense layers: quick, for a first look"
    parser = cli.run_parser("run_ddpm.py", __doc__, EPOCHS, batch_size=128, lr=1e-2, out="runs/ddpm", networks=networks)
    parser.flag("--T", "steps from image to noise", type=cli.number(int, 1, high=100_000), default=200)
    parser.flag("--schedule", "how beta_t grows with t", choices=diffusion.SCHEDULES, default="linear")
    names = ["none", "all", *improved.ADDITIONS]
    each = "; ".join(f"{name} ({what})" for name, what in improved.ADDITIONS.items())
    help = f"additions to Ho et al. 2020: none, all, or any of {each} (default: all)"
    parser.flag("--additions", help, nargs="+", choices=names, default=["all"], metavar="NAME")
    parser.flag("--classes", "the network takes the label of each image, one of ten classes", action="store_true")
    parser.flag("--ema", "decay of the weights' moving average", type=cli.number(float, 0, 1), default=0.998)
    args = parser.parse_args(argv)
    args.additions = additions(args, parser.error)
    if args.classes and args.arch != "unet":
        parser.error(f"--classes is for --arch unet, not {args.arch}")
    args.epochs = args.epochs or EPOCHS[args.arch]
    return args


def additions(args, error):
    """The names chosen by the flag --additions, in the order of ADDITIONS."""
    names = args.additions
    if names == ["all"]:
        return [name for name in improved.ADDITIONS if name != "global" or args.arch == "unet"]
    if names == ["none"]:
        return []
    if {"none", "all"} & set(names):
        error(f"--additions {' '.join(names)}: none and all stand alone")
    if "global" in names and args.arch != "unet":
        error(f"--additions global is for --arch unet, not {args.arch}")
    return [name for name in improved.ADDITIONS if name in names]


def main(argv=None):
    args = parse_arguments(argv)
    ranks = ranks_for(args.workers)
    data = load_fashion_mnist(args.data, labels=args.classes)
    train, test = ((data[f"{part}_images"], data.get(f"{part}_labels")) for part in ("train", "test"))
    train = first_images(train, args.train_images)
    x_test = scale(data["test_images"], -1, 1)

    schedule = diffusion.make_schedule(args.schedule, args.T)
    init, _ = DENOISERS[args.arch]
    weights = improved.step_weights(schedule) if "weights" in args.additions else None
    optimiser_step = partial(muon_step, beta2=0.99) if "muon" in args.additions else adam_step
    params = improved.init_denoiser(init, rng_for(args.seed, INIT), args.additions, len(CLASSES) if args.classes else 0)
    arrays = {"params": params, "moments": init_moments(params), "ema": tree.map(np.copy, params)}
    if "guide" in args.additions:
        arrays["early"] = tree.map(np.copy, params)  # the moving average "ema" early in training
    if args.classes or "groups" in args.additions:
        count = improved.GROUPS if "groups" in args.additions else len(CLASSES)
        arrays["groups"] = improved.find_groups(*train, count, rng_for(args.seed, INIT, 1))
    arrays["previews"] = np.zeros((min(args.epochs, 12), 10, 28, 28, 1), np.uint8)  # of the last twelve epochs
    settings = {name: getattr(args, name) for name in ("arch", "T", "schedule", "additions", "classes", "ema")}
    run = Run(args, {"model": "ddpm"} | settings, (train, test), arrays, ranks)
    arrays = run.arrays  # in memory that forked ranks share
    params = arrays["params"]
    moments = arrays["moments"]
    model = DDPM(run.config, arrays)  # its weights are the moving average
    early_step = improved.early_step(run.total_steps)

    def loss(params, batch):  # batch is (x_0, t, eps, groups), all drawn beforehand
        *draws, groups = batch
        return diffusion.simple_loss(partial(model.denoiser.eps, params, groups=groups), schedule, draws, weights)

    def errors(x_0, t, eps, groups):  # (N, H, W, 1), (N,), (N, H, W, 1), (N,) -> (N,)
        return diffusion.squared_errors(eps, model.eps_theta(diffusion.q_sample(schedule, x_0, t, eps), t, groups))

    value_and_grad = sharded(loss, ranks, params, run.shard_size, args.batch_size)
    evaluate = in_parallel(errors, SHARD, ranks)
    t_test = 1 + np.arange(len(x_test)) * args.T // len(x_test)  # evenly spaced from 1 to T, not random
    eps_test = rng_for(args.seed, TEST).standard_normal(x_test.shape, dtype=np.float32)
    test_batch = (x_test, t_test, eps_test, model.groups_of(x_test, data.get("test_labels")))

    print(f"diffusion {args.arch}: {tree.size(params):,} parameters, {run.count:,} training images")
    alpha_bar_T = float(schedule["alpha_bar"][-1])
    prior_kl = float(diffusion.prior_kl(schedule, x_test).mean())
    print(f"T = {args.T}, alpha_bar_T = {alpha_bar_T:.2e}, prior KL = {prior_kl:.3g} nats per image")
    if prior_kl > 0.5:
        print("warning: x_T still shows the image, but sampling starts from pure noise: expect poor samples")

    with ranks, run:  # as in run_vae.py
        for epoch in run.epochs():
            for step, (images, labels) in run.minibatches():
                x_0, t, eps = diffusion.draw_batch(schedule, scale(images, -1, 1), run.rng)  # Algorithm 1, lines 3, 4
                groups = improved.drop_groups(model.groups_of(x_0, labels), run.rng)  # or None: there are no groups
                value, terms, gradient = value_and_grad(params, (x_0, t, eps, groups))  # line 5: the gradient ...
                if step % 100 == 0:
                    flush_denormals(ranks.own(moments))  # denormals become 0: processors are slow with them
                lr = cosine_decay(step, run.total_steps, args.lr)
                optimiser_step(params, gradient, moments, step, lr)  # ... and the step
                ema_step(ranks.own(arrays["ema"]), params, step, args.ema)
                if step == early_step and "early" in arrays:
                    tree.map(np.copyto, ranks.own(arrays["early"]), arrays["ema"])
                run.record(value, terms)

            fifth = tree.map(lambda part: part[::5], test_batch)
            test_loss = float(evaluate(*fifth).mean(dtype=np.float64))
            summary = f"loss: train {run.epoch_means['loss']:.5f}, test {test_loss:.5f}"
            if epoch == 1 and test_loss > 0.9:
                summary += " (predicting no noise at all has a loss of 1: try a smaller --lr)"
            draw_preview(model, arrays["previews"], epoch, args.seed, ranks, args.out)
            run.end_epoch({"train": run.epoch_means, "test": {"loss": test_loss}}, summary)

        test_errors = evaluate(*test_batch)
        test_loss = float(test_errors.mean(dtype=np.float64))
        run.write_metrics({"test_loss": test_loss, "alpha_bar_T": alpha_bar_T, "prior_kl": prior_kl}, model.params)
        print(f"test loss {test_loss:.5f}: mean squared error of the predicted noise, per pixel and over all t")
        plots.save(plots.ddpm_loss(run.log, t_test, test_errors), args.out / "loss.png")

        draw_trajectories(model, x_test[:1], args.seed, args.out)
        config = model.sampler_config()
        x = draw(model, 100 if args.classes else 64, args.seed, ranks, config=config)
        plots.save(plots.grid(x[:64], 8, f"diffusion model, {args.arch}: {config}", 0, 255), args.out / "samples.png")
        plots.save(plots.nearest(x[:10], train[0]), args.out / "nearest.png")
        if args.classes:  # one class after the other, so that each has a column
            plots.save(plots.grid(x, 10, f"by class: {config}", 0, 255, (), CLASSES), args.out / "classes.png")
        print(f"figures and numbers are in {args.out}")
    model.log = run.log
    return model


def draw_preview(model, previews, epoch, seed, ranks, folder):
    """Draw preview.png: one row for each of the last epochs, kept in ``previews``, (rows, 10, H, W, 1) uint8."""
    config = model.sampler_config(guidance=0)  # early in training there is no guide yet
    rows = len(previews)
    previews[epoch % rows] = draw(model, 10, seed, ranks, description="preview", config=config)  # from the same noise
    shown = range(max(1, epoch + 1 - rows), epoch + 1)
    x = np.concatenate([previews[number % rows] for number in shown])
    labels = [f"epoch {number}" for number in shown]
    with files.optional():
        plots.save(plots.grid(x, 10, f"previews: {config}", 0, 255, labels), folder / "preview.png")


def draw_trajectories(model, x_0, seed, folder):
    """Draw forward.png, an image x_0, (1, H, W, 1), on its way to noise. And draw 16 images from noise by Algorithm 2:
    the first in trajectory.png, all in sampling.gif."""
    T = model.config["T"]
    rng = rng_for(seed, SAMPLES)
    times = {round(T * fraction) for fraction in (1, 0.5, 0.25, 0.1, 0.05, 0)}
    times = sorted(times, reverse=True)  # 200, 100, 50, 20, 10, 0
    eps = rng.standard_normal(x_0.shape, dtype=np.float32)
    noisy = diffusion.q_sample(model.schedule, x_0, np.array(times[::-1]), eps)  # one image at six times
    plots.save(plots.row_of_times(noisy, times[::-1], plots.FORWARD), folder / "forward.png")

    frames = sorted({round(t) for t in np.linspace(T, 0, 51)}, reverse=True)  # of the animation
    x_T = rng.standard_normal((16, *x_0.shape[1:]), dtype=np.float32)
    trajectory = model.trajectory(x_T, rng, config=SamplerConfig("ddpm", T))
    trajectory = cli.progress(T, "trajectory.png, sampling.gif", " steps", trajectory)
    seen = {T: x_T} | {t: x_t for t, x_t in trajectory if t in times or t in frames}
    plots.save(plots.row_of_times([seen[t][0] for t in times], times, plots.REVERSE), folder / "trajectory.png")
    plots.save_gif({t: seen[t] for t in frames}, 4, folder / "sampling.gif")


if __name__ == "__main__":
    cli.run(main)
