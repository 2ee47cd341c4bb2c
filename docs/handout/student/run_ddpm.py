"""Train the diffusion model of question 11 on FashionMNIST, and draw the figures
of questions 11 and 12. A quarter of an hour; --epochs 1 is a first look.
"""

import argparse
from pathlib import Path

from scratchgen import diffusion, plots, tree
from scratchgen.data import DATA, load_fashion_mnist, minibatches, scale
from scratchgen.denoisers import init_unet, unet
from scratchgen.gradients import value_and_grad
from scratchgen.optim import adam_step, cosine_decay, ema_step, init_moments

import numpy as np
from tqdm import tqdm

T = 200
TIMES = [t for t in (200, 100, 50, 20, 10, 0) if t <= T]  # of question 12
BATCH_SIZE = 128


def eps_theta_of(params):
    """The network as a function eps_theta(x_t, t): a U-Net, in float32 whatever the dtype of x_t."""
    return lambda x_t, t: unet(params, np.asarray(x_t, np.float32), t)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=7, help="passes over the training images")
    parser.add_argument("--lr", type=float, default=1e-2, help="peak learning rate; it falls along a cosine to 0")
    parser.add_argument("--seed", type=int, default=0, help="decides every random number")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the four FashionMNIST files")
    parser.add_argument("--out", type=Path, default=Path("runs/ddpm"), help="folder for the figures")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    data = load_fashion_mnist(args.data)
    x_test = scale(data["test_images"][::5], -1, 1)
    rng = np.random.default_rng(args.seed)
    schedule = diffusion.make_schedule("linear", T)
    test_batch = diffusion.draw_batch(schedule, x_test, rng)
    params = init_unet(rng)
    next(iter(diffusion.sample(eps_theta_of(params), schedule, x_test[:1].copy(), rng)))  # fails now, or not at the end
    average = tree.map(np.copy, params)  # of the weights, over the last steps: its samples are better
    moments = init_moments(params)
    print(f"{tree.size(params):,} parameters, {len(data['train_images']):,} training images")
    print(f"x_T is {diffusion.prior_kl(schedule, x_test).mean():.3g} nats per image from pure noise")

    def loss(params, batch):
        return diffusion.simple_loss(eps_theta_of(params), schedule, batch)

    steps_per_epoch = -(-len(data["train_images"]) // BATCH_SIZE)
    total_steps = args.epochs * steps_per_epoch
    step = 0
    log = {"train": [], "test": []}
    for epoch in range(1, args.epochs + 1):
        values = []
        for images in tqdm(
            minibatches(data["train_images"], BATCH_SIZE, rng), f"epoch {epoch}", steps_per_epoch, leave=False
        ):
            step += 1
            x_0, t, eps = diffusion.draw_batch(schedule, scale(images, -1, 1), rng)
            value, _, gradient = value_and_grad(loss)(params, (x_0, t, eps.astype(np.float32)))
            adam_step(params, gradient, moments, step, cosine_decay(step, total_steps, args.lr))
            ema_step(average, params, step, 0.998)
            values.append(float(value))

        quarters = (tree.map(lambda part, k=k: part[k::4], test_batch) for k in range(4))
        log["train"].append(np.mean(values))
        log["test"].append(np.mean([float(loss(average, quarter)[0]) for quarter in quarters]))
        print(f"epoch {epoch}: loss {log['train'][-1]:.5f} in training, {log['test'][-1]:.5f} on test images")

    plots.curves(log, "squared error per pixel").savefig(args.out / "loss.png")
    x_T = rng.standard_normal((64, 28, 28, 1), dtype=np.float32)
    seen = {T: x_T[0]}
    steps = diffusion.sample(eps_theta_of(average), schedule, x_T.copy(), rng)
    for t, x in tqdm(steps, "samples", T, leave=False):
        seen[t] = np.array(x[0])  # a copy: sample may work in place
    plots.grid(np.clip(x, -1, 1), 8, "samples", -1, 1).savefig(args.out / "samples.png")
    plots.row_of_times([seen[t] for t in TIMES], TIMES, "$x_t$ of one sample").savefig(args.out / "trajectory.png")
    print(f"the figures of questions 11 and 12 are in {args.out}")


if __name__ == "__main__":
    main()
