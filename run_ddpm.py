"""Train a denoising diffusion model on FashionMNIST, measure how well it predicts noise, and draw samples with it.

examples:
  python run_ddpm.py --T 200                       ten to fifteen minutes on two cores
  python run_ddpm.py --T 200 --train-images 6000   a first look in two minutes; samples are still rough
  python run_ddpm.py --schedule cosine --arch mlp  another schedule, and the plainest network that can work
"""

import math
import time
from functools import partial

from scratchgen import checkpoint, cli, diffusion, plots, tree  # before NumPy, whose threads it sets up
from scratchgen.data import load_fashion_mnist, minibatches, scale
from scratchgen.denoisers import DENOISERS
from scratchgen.gradients import in_parallel, sharded_value_and_grad
from scratchgen.optim import cosine_decay, ema_step, init_adam, muon_step
from scratchgen.runtime import Workers

import numpy as np
from tqdm import tqdm

EPOCHS = {"unet": 8, "mlp": 12}  # by default
BATCH = 64  # images a gradient step, by default
SHARD = 32  # images that one worker differentiates at a time
SAMPLE_SHARD = 16  # images that one worker denoises at a time
CURVE_STRIDE = 5  # each epoch's point of the loss curve takes every fifth test image, the final number all
INIT, NOISE, ORDER, TEST, SAMPLES, PREVIEW = range(6)  # what a stream of random numbers is for


def parse_arguments():
    parser = cli.parser(__doc__, EPOCHS, batch_size=BATCH, lr=1e-2, out="runs/ddpm")
    flag = parser.add_argument
    flag(
        "--T",
        type=cli.number(int, 1, high=100_000),
        default=200,
        metavar="T",
        help="steps from image to noise (default: 200)",
    )
    flag("--schedule", choices=diffusion.SCHEDULES, default="linear", help="of beta_t (default: linear)")
    flag(
        "--ema",
        type=cli.number(float, 0, high=1),
        default=0.998,
        metavar="DECAY",
        help="of the moving average of the weights, which sampling uses (default: 0.998)",
    )
    args = parser.parse_args()
    args.epochs = args.epochs or EPOCHS[args.arch]
    return args


def main():
    args = parse_arguments()
    data = load_fashion_mnist(args.data)
    train = cli.first_images(data["train_images"], args.train_images)
    x_test = scale(data["test_images"], -1, 1)
    schedule = diffusion.make_schedule(args.schedule, args.T)
    workers = Workers(args.workers)

    def stream(*purpose):
        return np.random.default_rng([args.seed, *purpose])

    init, network = DENOISERS[args.arch]
    params = init(stream(INIT))
    arrays = workers.share({"params": params, "ema": tree.map(np.copy, params), "moments": init_adam(params)})
    params, ema, noise = arrays["params"], arrays["ema"], stream(NOISE)
    config = {"model": "ddpm"} | checkpoint.settings(args) | {"train_images": checkpoint.fingerprint(train)}
    args.out.mkdir(parents=True, exist_ok=True)
    state, save = checkpoint.begin(args.out / "checkpoint.npz", config, arrays, noise, args.resume)

    def predict_noise(params, x_t, t):  # eps_theta(x_t, t)
        return diffusion.predict_noise(partial(network, params), schedule, x_t, t)

    def loss(params, batch):
        return diffusion.weighted_loss(partial(predict_noise, params), schedule, batch)

    def errors(x_0, t, eps):  # (N, H, W, 1), (N,), (N, H, W, 1) -> (N,)
        return diffusion.squared_errors(partial(predict_noise, ema), schedule, (x_0, t, eps))

    gradient_of = sharded_value_and_grad(loss, SHARD, workers)
    evaluate = in_parallel(errors, SHARD, workers)
    eps_theta = in_parallel(partial(predict_noise, ema), SAMPLE_SHARD, workers)
    t_test = 1 + np.arange(len(x_test)) * args.T // len(x_test)  # not at random, but evenly from 1 to T
    test_batch = (x_test, t_test, stream(TEST).standard_normal(x_test.shape, dtype=np.float32))

    prior_kl = float(diffusion.prior_kl(schedule, x_test).mean())
    print(f"diffusion {args.arch}, T = {args.T}: {tree.size(params):,} parameters, {len(train):,} training images")
    print(f"alpha_bar_T = {schedule['alpha_bar'][-1]:.2e}, prior KL = {prior_kl:.3g} nats per image")
    if prior_kl > 0.5:
        print("warning: x_T still shows the image, but sampling starts from pure noise: expect poor samples")

    steps = math.ceil(len(train) / args.batch_size)  # in one epoch
    began = time.monotonic() - state["seconds"]
    done = state["step"] // steps * len(train) + state["step"] % steps * args.batch_size
    bar = cli.progress(args.epochs * len(train), done)
    with bar, cli.StopBetweenSteps() as stop:
        for epoch in range(state["step"] // steps, args.epochs):
            # The order depends on seed and epoch alone: a run that resumes inside the epoch skips what it has seen.
            for images in minibatches(train, args.batch_size, stream(ORDER, epoch), skip=state["step"] % steps):
                stop.here(save)
                batch = diffusion.draw_batch(schedule, scale(images, -1, 1), noise)
                (value, means), gradient = gradient_of(params, batch)
                cli.check_finite(value, state["step"])
                lr = cosine_decay(state["step"], args.epochs * steps, args.lr)
                state["step"] += 1
                muon_step(params, gradient, arrays["moments"], state["step"], lr, beta2=0.99)
                ema_step(ema, params, state["step"], args.ema)

                cli.add_to_epoch(state["sums"], means, len(images) / len(train))
                state["seconds"] = time.monotonic() - began
                bar.set_postfix(loss=f"{means['loss']:.4f}", refresh=False)
                bar.update(len(images))

            row = {"epoch": epoch + 1, "step": state["step"], "train_loss": state["sums"]["loss"]}
            row["test_loss"] = float(evaluate(*(part[::CURVE_STRIDE] for part in test_batch)).mean(dtype=np.float64))
            cli.check_finite(row["test_loss"], state["step"])
            row["seconds"] = state["seconds"] = time.monotonic() - began
            state["log"].append(row)
            state["sums"] = {}
            checkpoint.write_log(args.out / "log.csv", state["log"])
            save()
            tqdm.write(
                f"epoch {row['epoch']}/{args.epochs}  loss: train {row['train_loss']:.5f}, "
                f"test {row['test_loss']:.5f}  {row['seconds']:.0f} s"
            )
            # The same noise each time, so that one sees the same pictures form.
            *_, (_, x) = diffusion.sample(eps_theta, schedule, noise_images(32, stream(PREVIEW)), stream(PREVIEW, 1))
            figure = plots.grid(x, 8, f"preview after epoch {row['epoch']}", -1, 1)
            plots.save(figure, args.out / "preview.png")
        stop.here(save)

    test_errors = evaluate(*test_batch)
    numbers = {
        "test_loss": float(test_errors.mean(dtype=np.float64)),
        "alpha_bar_T": float(schedule["alpha_bar"][-1]),
        "prior_kl": prior_kl,
    }
    checkpoint.write_metrics(args, numbers, ema, state)
    print(f"test loss {numbers['test_loss']:.5f}: mean squared error of the predicted noise, per pixel and over all t")
    plots.save(plots.ddpm_loss(state["log"], t_test, test_errors, args.T), args.out / "loss.png")

    strip = [round(args.T * fraction) for fraction in (1, 0.5, 0.25, 0.1, 0.05, 0)]
    frames = sorted({round(t) for t in np.linspace(args.T, 0, 51)}, reverse=True)
    rng = stream(SAMPLES)
    x_0, eps = np.repeat(x_test[:1], 6, axis=0), np.repeat(noise_images(1, rng), 6, axis=0)
    noisy = diffusion.q_sample(schedule, x_0, np.array(strip), eps)
    plots.save(plots.row_of_times(noisy, strip, "forward: $x_t \\sim q(x_t|x_0)$"), args.out / "forward.png")

    x_T = noise_images(64, rng)
    seen = {args.T: x_T}
    for t, x_t in cli.progress_over(diffusion.sample(eps_theta, schedule, x_T, rng), args.T, "sampling"):
        if t in strip or t in frames:
            seen[t] = x_t
    figure = plots.row_of_times([seen[t][0] for t in strip], strip, "reverse: $x_{t-1} \\sim p_\\theta(x_{t-1}|x_t)$")
    plots.save(figure, args.out / "trajectory.png")
    plots.save(plots.grid(seen[0], 8, f"samples after {args.T} steps", -1, 1), args.out / "samples.png")
    plots.save_gif([seen[t][:16] for t in frames], 4, args.out / "sampling.gif")
    print(f"figures and numbers are in {args.out}")


def noise_images(N, rng):
    return rng.standard_normal((N, 28, 28, 1), dtype=np.float32)


if __name__ == "__main__":
    cli.run(main)
