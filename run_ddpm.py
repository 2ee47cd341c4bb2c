"""Train a denoising diffusion model on FashionMNIST, measure how well it predicts noise, and draw samples with it.

examples:
  python run_ddpm.py                          T = 200: eight to twelve minutes on two cores
  python run_ddpm.py --additions none         as in Ho et al. 2020: the network predicts eps, L_simple, Adam
  python run_ddpm.py --train-images 6000      a first look in two minutes; samples are still rough
"""

from functools import partial

from scratchgen import diffusion, improved, tree  # before NumPy, whose threads it sets up
from scratchgen.data import load_fashion_mnist, scale
from scratchgen.denoisers import DENOISERS
from scratchgen.gradients import in_parallel, sharded_training
from scratchgen.machinery import cli, plots
from scratchgen.machinery.training import INIT, PREVIEW, SAMPLES, TEST, Run, rng_for
from scratchgen.machinery.workers import Workers
from scratchgen.muon import muon_step
from scratchgen.optim import adam_step, cosine_decay, ema_step, init_moments

import numpy as np

EPOCHS = {"unet": 8, "mlp": 12}  # by default
SHARD, SAMPLE_SHARD = 32, 16  # images that one worker measures, or denoises, at a time


def parse_arguments(argv):
    parser = cli.run_parser("run_ddpm.py", __doc__, EPOCHS, batch_size=64, lr=1e-2, out="runs/ddpm")
    parser.flag("--T", "steps from image to noise", type=cli.number(int, 1, high=100_000), default=200)
    parser.flag("--schedule", "how beta_t grows with t", choices=diffusion.SCHEDULES, default="linear")
    help, names = improved.help_for_additions(), ["none", "all", *improved.ADDITIONS]
    parser.flag("--additions", help, nargs="+", choices=names, default=["all"], metavar="NAME")
    parser.flag("--ema", "decay of the weights' moving average", type=cli.number(float, 0, 1), default=0.998)
    args = parser.parse_args(argv)
    args.additions = improved.chosen(args.additions, args.arch, parser.error)
    args.epochs = args.epochs or EPOCHS[args.arch]
    return args


def main(argv=None):
    args = parse_arguments(argv)
    data, workers = load_fashion_mnist(args.data, labels=False), Workers(args.workers)
    train_images = cli.first_images(data["train_images"], args.train_images)
    x_test = scale(data["test_images"], -1, 1)
    schedule = diffusion.make_schedule(args.schedule, args.T)

    init, network = DENOISERS[args.arch]
    params = improved.init_denoiser(init, rng_for(args.seed, INIT), args.additions)
    arrays = {"params": params, "moments": init_moments(params), "ema": tree.map(np.copy, params)}
    run = Run("ddpm", args, (train_images, data["test_images"]), arrays, workers, ("train_loss", "test_loss"))
    ema = run.arrays["ema"]  # in memory that all workers see
    optimiser_step = partial(muon_step, beta2=0.99) if "muon" in args.additions else adam_step
    eps_theta, x_0_theta = improved.denoiser(network, schedule, args.additions)

    def loss(params, batch):  # batch is (x_0, t, eps), all drawn before; what is minimised, and what is reported
        if "weights" in args.additions:
            return improved.weighted_loss(partial(eps_theta, params), schedule, batch)
        value = diffusion.simple_loss(partial(eps_theta, params), schedule, batch)
        return value, {"loss": value}

    def errors(x_0, t, eps):  # (N, H, W, 1), (N,), (N, H, W, 1) -> (N,)
        return diffusion.squared_errors(eps, eps_theta(ema, diffusion.q_sample(schedule, x_0, t, eps), t))

    def update(arrays, gradient, step, lr):  # of all the weights, or of those that one of several workers steps
        optimiser_step(arrays["params"], gradient, arrays["moments"], step, lr)
        ema_step(arrays["ema"], arrays["params"], step, args.ema)

    differentiate, take_step = sharded_training(loss, update, run.arrays, run.shard_size, workers)
    evaluate = in_parallel(errors, SHARD, workers)
    t_test = 1 + np.arange(len(x_test)) * args.T // len(x_test)  # not at random, but evenly from 1 to T
    test_batch = (x_test, t_test, rng_for(args.seed, TEST).standard_normal(x_test.shape, dtype=np.float32))
    # Algorithm 2 as in the paper; with v the same steps from x_0, which eps in float32 loses where alpha_bar_t is tiny.
    algorithm, model = (improved.sample, x_0_theta) if "v" in args.additions else (diffusion.sample, eps_theta)
    sample = partial(algorithm, in_parallel(partial(model, ema), SAMPLE_SHARD, workers), schedule)

    print(f"diffusion {args.arch}: {tree.size(params):,} parameters, {len(train_images):,} training images")
    alpha_bar_T, prior_kl = float(schedule["alpha_bar"][-1]), float(diffusion.prior_kl(schedule, x_test).mean())
    print(f"T = {args.T}, alpha_bar_T = {alpha_bar_T:.2e}, prior KL = {prior_kl:.3g} nats per image")
    if prior_kl > 0.5:
        print("warning: x_T still shows the image, but sampling starts from pure noise: expect poor samples")

    with run:
        for epoch in run.epochs():
            for step, images in run.minibatches():
                batch = diffusion.draw_batch(schedule, scale(images, -1, 1), run.rng)  # Algorithm 1, lines 2 to 4
                value, means = differentiate(batch)  # line 5: the gradient, and the step along it
                take_step(step, cosine_decay(step, run.total_steps, args.lr))
                run.record(value, means)

            test_loss = float(evaluate(*(part[::5] for part in test_batch)).mean(dtype=np.float64))  # of a fifth
            summary = f"loss: train {run.epoch_means['loss']:.5f}, test {test_loss:.5f}"
            # The same noise each time, so that one sees the same pictures form.
            x_T = rng_for(args.seed, PREVIEW).standard_normal((32, 28, 28, 1), dtype=np.float32)
            *_, (_, x) = cli.progress_over(sample(x_T, rng_for(args.seed, PREVIEW, 1)), args.T, "preview")
            plots.save(plots.grid(x, 8, f"preview after epoch {epoch}", -1, 1), args.out / "preview.png")
            run.end_epoch({"train": run.epoch_means, "test": {"loss": test_loss}}, summary)

        test_errors = evaluate(*test_batch)
        test_loss = float(test_errors.mean(dtype=np.float64))
        run.write_metrics({"test_loss": test_loss, "alpha_bar_T": alpha_bar_T, "prior_kl": prior_kl}, ema)
        print(f"test loss {test_loss:.5f}: mean squared error of the predicted noise, per pixel and over all t")
        plots.save(plots.ddpm_loss(run.log, t_test, test_errors, args.T), args.out / "loss.png")

        times = [round(args.T * fraction) for fraction in (1, 0.5, 0.25, 0.1, 0.05, 0)]
        rng = rng_for(args.seed, SAMPLES)
        eps = rng.standard_normal(x_test[:1].shape, dtype=np.float32)
        noisy = diffusion.q_sample(schedule, x_test[:1], np.array(times), eps)  # one image at six times
        plots.save(plots.row_of_times(noisy, times, plots.FORWARD), args.out / "forward.png")
        frames = sorted({round(t) for t in np.linspace(args.T, 0, 51)}, reverse=True)  # of the animation
        x_T = rng.standard_normal((64, 28, 28, 1), dtype=np.float32)
        path = cli.progress_over(sample(x_T, rng), args.T, "sampling")
        seen = {args.T: x_T} | {t: x_t for t, x_t in path if t in times or t in frames}
        plots.save(plots.row_of_times([seen[t][0] for t in times], times, plots.REVERSE), args.out / "trajectory.png")
        plots.save(plots.grid(seen[0], 8, f"samples after {args.T} steps", -1, 1), args.out / "samples.png")
        plots.save_gif([seen[t][:16] for t in frames], 4, args.out / "sampling.gif")
        print(f"figures and numbers are in {args.out}")


if __name__ == "__main__":
    cli.run(main)
