"""Train a denoising diffusion model on FashionMNIST, measure how well it predicts noise, and draw samples with it.

examples:
  python run_ddpm.py                          T = 200: eight to ten minutes on two cores
  python run_ddpm.py --additions none         as in Ho et al. 2020: the network predicts eps, L_simple, Adam
  python run_ddpm.py --classes                the same, told what each image shows: samples of a class that one asks for
  python run_ddpm.py --train-images 12000     a first look in two minutes; samples are still rough
"""

from functools import partial

from scratchgen import diffusion, improved, tree  # before NumPy, whose threads it sets up
from scratchgen.data import CLASSES, load_fashion_mnist, scale
from scratchgen.denoisers import DENOISERS
from scratchgen.evaluate.load import ddpm_run
from scratchgen.evaluate.samples import classes, draw, draw_paths
from scratchgen.machinery import cli, plots
from scratchgen.machinery.parallel import in_parallel, ranks_for, sharded
from scratchgen.machinery.training import INIT, TEST, Run, rng_for
from scratchgen.muon import muon_step
from scratchgen.optim import adam_step, cosine_decay, ema_step, flush_denormals, init_moments

import numpy as np

EPOCHS = {"unet": 7, "mlp": 12}  # by default
SHARD = 32  # images that one rank measures at a time


def parse_arguments(argv):
    parser = cli.run_parser("run_ddpm.py", __doc__, EPOCHS, batch_size=128, lr=1e-2, out="runs/ddpm")
    parser.flag("--T", "steps from image to noise", type=cli.number(int, 1, high=100_000), default=200)
    parser.flag("--schedule", "how beta_t grows with t", choices=diffusion.SCHEDULES, default="linear")
    help, names = improved.help_for_additions(), ["none", "all", *improved.ADDITIONS]
    parser.flag("--additions", help, nargs="+", choices=names, default=["all"], metavar="NAME")
    parser.flag("--classes", "tell the network what each image shows, one of ten classes", action="store_true")
    parser.flag("--ema", "decay of the weights' moving average", type=cli.number(float, 0, 1), default=0.998)
    args = parser.parse_args(argv)
    args.additions = improved.chosen(args.additions, args.arch, parser.error)
    if args.classes and args.arch != "unet":
        parser.error(f"--classes is for --arch unet, not {args.arch}")
    args.epochs = args.epochs or EPOCHS[args.arch]
    return args


def main(argv=None):
    args = parse_arguments(argv)
    data, ranks = load_fashion_mnist(args.data, labels=args.classes), ranks_for(args.workers)
    kinds = ["images", "labels"] if args.classes else ["images"]
    train, test = ([data[f"{part}_{kind}"] for kind in kinds] for part in ("train", "test"))
    train, x_test = cli.first_images(train, args.train_images), scale(test[0], -1, 1)
    schedule = diffusion.make_schedule(args.schedule, args.T)

    init, network = DENOISERS[args.arch]
    params = improved.init_denoiser(init, rng_for(args.seed, INIT), args.additions, len(CLASSES) * args.classes)
    averages = ("ema", "early")[: 1 + ("guide" in args.additions)]  # of the weights, and that as it was early on
    arrays = {"params": params, "moments": init_moments(params)} | {k: tree.map(np.copy, params) for k in averages}
    run = Run("ddpm", args, (train, test), arrays, ranks, ("train_loss", "test_loss"))
    arrays = run.arrays  # in memory that all ranks see
    params, moments = arrays["params"], arrays["moments"]
    optimiser_step = partial(muon_step, beta2=0.99) if "muon" in args.additions else adam_step
    eps_theta, _ = improved.denoiser(network, schedule, args.additions)
    model = ddpm_run(run.config, arrays)  # its weights are the moving average
    early_step = improved.early_step(run.total_steps)

    def loss(params, batch):  # batch is (x_0, t, eps), all drawn before, and with --classes the labels
        draws, prediction = batch[:3], improved.told(partial(eps_theta, params), *batch[3:])
        if "weights" in args.additions:
            return improved.weighted_loss(prediction, schedule, draws)
        value = diffusion.simple_loss(prediction, schedule, draws)
        return value, {"loss": value}  # what is minimised, and what is reported

    def errors(x_0, t, eps, *labels):  # (N, H, W, 1), (N,), (N, H, W, 1) -> (N,)
        return diffusion.squared_errors(eps, model.eps_theta(diffusion.q_sample(schedule, x_0, t, eps), t, *labels))

    value_and_grad = sharded(loss, ranks, params, run.shard_size, args.batch_size)
    evaluate = in_parallel(errors, SHARD, ranks)
    t_test = 1 + np.arange(len(x_test)) * args.T // len(x_test)  # not at random, but evenly from 1 to T
    test_batch = (x_test, t_test, rng_for(args.seed, TEST).standard_normal(x_test.shape, dtype=np.float32), *test[1:])

    print(f"diffusion {args.arch}: {tree.size(params):,} parameters, {run.count:,} training images")
    alpha_bar_T, prior_kl = float(schedule["alpha_bar"][-1]), float(diffusion.prior_kl(schedule, x_test).mean())
    print(f"T = {args.T}, alpha_bar_T = {alpha_bar_T:.2e}, prior KL = {prior_kl:.3g} nats per image")
    if prior_kl > 0.5:
        print("warning: x_T still shows the image, but sampling starts from pure noise: expect poor samples")

    with ranks, run:  # from here on, each of several ranks runs the same lines
        for epoch in run.epochs():
            for step, (images, *labels) in run.minibatches():
                batch = diffusion.draw_batch(schedule, scale(images, -1, 1), run.rng)  # Algorithm 1, lines 2 to 4
                batch += tuple(improved.drop_some(given, run.rng) for given in labels)  # with --classes
                value, terms, gradient = value_and_grad(params, batch)  # line 5: the gradient, and the step along it
                if step % 100 == 0:
                    flush_denormals(ranks.own(moments))  # numbers so small that a processor is slow with them
                optimiser_step(params, gradient, moments, step, cosine_decay(step, run.total_steps, args.lr))
                ema_step(ranks.own(arrays["ema"]), params, step, args.ema)
                if step == early_step and "early" in arrays:
                    tree.map(np.copyto, ranks.own(arrays["early"]), arrays["ema"])
                run.record(value, terms)

            test_loss = float(evaluate(*(part[::5] for part in test_batch)).mean(dtype=np.float64))  # of a fifth
            summary = f"loss: train {run.epoch_means['loss']:.5f}, test {test_loss:.5f}"
            x = draw(model, 32, args.seed, ranks, guidance=0)  # from the same noise each time, and as samples.png
            plots.save(plots.grid(x, 8, f"preview after epoch {epoch}", 0, 255), args.out / "preview.png")
            run.end_epoch({"train": run.epoch_means, "test": {"loss": test_loss}}, summary)

        test_errors = evaluate(*test_batch)
        test_loss = float(test_errors.mean(dtype=np.float64))
        run.write_metrics({"test_loss": test_loss, "alpha_bar_T": alpha_bar_T, "prior_kl": prior_kl}, model.params)
        print(f"test loss {test_loss:.5f}: mean squared error of the predicted noise, per pixel and over all t")
        plots.save(plots.ddpm_loss(run.log, t_test, test_errors, args.T), args.out / "loss.png")

        draw_paths(model, x_test[:1], args.seed, args.out)
        plots.save(plots.grid(draw(model, 64, args.seed, ranks), 8, "samples", 0, 255), args.out / "samples.png")
        if args.classes:
            plots.save(classes(model, args.seed, ranks), args.out / "classes.png")
        print(f"figures and numbers are in {args.out}")


if __name__ == "__main__":
    cli.run(main)
