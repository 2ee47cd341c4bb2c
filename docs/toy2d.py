"""Diffusion in the plane, where all of it can be drawn: docs/figures/toy2d.png.

    python docs/toy2d.py

The data are 2,000 points on two spirals. They take the place of images: a point
is an image of one pixel with two channels, (N, 1, 1, 2), and diffusion.py and
samplers.py work on it as they are. The best denoiser is known here. A small
network learns by Algorithm 1 in ten seconds or so. The figure has its score
beside the exact one, the paths of 200 points from noise to the spirals, and the
effect of a guide.
"""

from functools import partial
from pathlib import Path

from scratchgen import diffusion, gradients, improved, ops, plots, samplers, tree  # before NumPy: sets its threads
from scratchgen.layers import init_mlp, mlp, time_embedding
from scratchgen.machinery import cli
from scratchgen.optim import adam_step, cosine_decay, init_moments

import autograd.numpy as np  # NumPy with functions that autograd can record

FIGURE = Path(__file__).resolve().parent / "figures" / "toy2d.png"
SCHEDULE = diffusion.make_schedule("linear", 200)
WIDTH = 32  # numbers that stand for t, and for each coordinate
STEPS, EARLY, BATCH, LR = 4000, 250, 256, 3e-3
FAR = 0.05  # of a sample from the nearest point; the jitter has a standard deviation of 0.02


def main(argv=None):
    cli.OneLineParser("docs/toy2d.py", __doc__).parse_args(argv)
    rng = np.random.default_rng(0)
    points = spirals(rng)
    params, early = train(points, rng)
    plots.save(everything(points, params, early, rng), FIGURE)
    print(f"the figure is in {FIGURE}")


def spirals(rng, N=2000):
    """N points on two spiral arms with a little jitter: (N, 1, 1, 2) in [-1, 1]."""
    turn = np.sqrt(rng.uniform(0.03, 1, N))  # the root: equally dense along an arm
    angle = 2 * np.pi * turn + np.pi * (np.arange(N) % 2)
    arms = 0.85 * turn * np.stack([np.cos(angle), np.sin(angle)])
    jitter = 0.02 * rng.standard_normal((N, 2))
    return (arms.T + jitter).reshape(N, 1, 1, 2).astype(np.float32)


# -------------------------------------------------------------------------------------------------- the exact denoiser


def exact_x_0(points, x_t, t):
    """E[x_0 | x_t] where x_0 is one of the points, each as likely as another: (K, 1, 1, 2), (N, 1, 1, 2), (N,) ->
    (N, 1, 1, 2).

    q(x_t) is a mixture of K Gaussians N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I), one around each point. By Bayes'
    rule the weight of a point is its likelihood q(x_t | x_0), divided by the sum over all points.
    """
    a = diffusion.at(SCHEDULE["sqrt_alpha_bar"], t)
    b = diffusion.at(SCHEDULE["sqrt_one_minus_alpha_bar"], t)
    x_0 = points.reshape(-1, 2)
    distances = (x_t - a * x_0).reshape(len(x_t), len(x_0), 2)  # (N, 1, 1, 2) and (N, 1, K, 2) before
    log_likelihood = -(distances**2).sum(axis=2) / (2 * b[:, 0, 0] ** 2)
    likelihood = np.exp(log_likelihood - log_likelihood.max(axis=1, keepdims=True))
    weights = likelihood / likelihood.sum(axis=1, keepdims=True)  # (N, K)
    return (weights @ x_0).reshape(x_t.shape)


def exact_eps(points, x_t, t):
    """E[eps | x_t], the best prediction of the noise, by Eq. (4) of Ho et al. solved for eps."""
    a = diffusion.at(SCHEDULE["sqrt_alpha_bar"], t)
    b = diffusion.at(SCHEDULE["sqrt_one_minus_alpha_bar"], t)
    return (x_t - a * exact_x_0(points, x_t, t)) / b


def score(eps_theta, x_t, t):
    """The gradient of log q(x_t): -E[eps | x_t] / sqrt(1 - alpha_bar_t). It points to where data are denser."""
    return -eps_theta(x_t, t) / diffusion.at(SCHEDULE["sqrt_one_minus_alpha_bar"], t)


# --------------------------------------------------------------------------------------------------------- the network


def init_network(rng, hidden=128):
    return init_mlp(rng, [3 * WIDTH, hidden, hidden, hidden, 2])


def network(params, x_t, t):  # (N, 1, 1, 2), (N,) -> (N, 1, 1, 2)
    """The predicted noise. Coordinates are embedded like times, as sines and cosines of 25 x: a plain MLP is slow
    to learn functions that change within a short distance, as from one arm to the next (Tancik et al. 2020)."""
    x = x_t.reshape(-1, 2)
    seen = [time_embedding(25 * x[:, 0], WIDTH), time_embedding(25 * x[:, 1], WIDTH), time_embedding(t, WIDTH)]
    return np.reshape(mlp(params, np.concatenate(seen, axis=1), ops.silu), x_t.shape)


def loss(params, batch):
    return diffusion.simple_loss(partial(network, params), SCHEDULE, batch)


def train(points, rng, steps=STEPS, early=EARLY):
    """Algorithm 1: the parameters after all steps, and those after the first few, ``early``, to be the guide."""
    params = init_network(rng)
    moments = init_moments(params)
    value_and_grad = gradients.value_and_grad(loss)
    for step in range(1, steps + 1):
        x_0 = points[rng.integers(0, len(points), BATCH)]  # line 2
        batch = diffusion.draw_batch(SCHEDULE, x_0, rng)  # lines 3 and 4
        _, _, gradient = value_and_grad(params, batch)  # line 5: the gradient, and the step
        adam_step(params, gradient, moments, step, cosine_decay(step, steps, LR))
        if step == early:
            guide = tree.map(np.copy, params)
    return params, guide


# --------------------------------------------------------------------------------------------------------- the samples


def x_0_theta(eps_theta, x_t, t):
    """The x_0 that the predicted noise implies."""
    return diffusion.predict_x_0(SCHEDULE, x_t, t, eps_theta(x_t, t))


def x_0_guided(eps_theta, eps_guide, w, x_t, t):
    """x_0 extrapolated away from the guide's prediction by w, as `improved.guided` does."""
    return improved.guided(x_0_theta(eps_theta, x_t, t), x_0_theta(eps_guide, x_t, t), w)


def guided_samples(eps_theta, eps_guide, w, N, seed=0):
    """N points by Algorithm 2 with guidance. For each w the noise is the same."""
    rng = np.random.default_rng(seed)
    x_T = noise(rng, N)
    *_, (_, x_0) = samplers.sample(partial(x_0_guided, eps_theta, eps_guide, w), SCHEDULE, x_T, rng)
    return x_0


def noise(rng, N):
    return rng.standard_normal((N, 1, 1, 2), dtype=np.float32)


def paths(eps_theta, x_T, rng):
    """Name -> x_T, .., x_0 of a path from noise to the spirals, (T + 1, N, 1, 1, 2): Algorithm 2, DDIM, and Euler's
    steps of flow matching, which has coordinates of its own."""
    predict = partial(x_0_theta, eps_theta)
    scale, _ = samplers.flow_path(SCHEDULE)
    x_tau = x_T / scale[-1]
    found = {
        "Algorithm 2": [x_T, *(x for _, x in diffusion.sample(eps_theta, SCHEDULE, x_T, rng))],
        "DDIM": [x_T, *(x for _, x in samplers.sample(predict, SCHEDULE, x_T, None, eta=0.0))],
        "flow matching": [x_tau, *(x for _, x in samplers.euler(predict, SCHEDULE, x_tau))],
    }
    return {name: np.stack(path) for name, path in found.items()}


def distances(points, x):
    """The distance of each x from the nearest point: (K, 1, 1, 2), (N, 1, 1, 2) -> (N,)."""
    return np.sqrt(((x.reshape(-1, 1, 2) - points.reshape(1, -1, 2)) ** 2).sum(axis=2).min(axis=1))


# --------------------------------------------------------------------------------------------------------- the figures


def everything(points, params, early, rng):
    """The three figures below in one."""
    figure = plots.new_figure(7.5, 8.6)
    scores, steps, guidance = figure.subfigures(3, 1, height_ratios=[1.1, 1.1, 0.9])
    eps_theta = partial(network, params)
    draw_scores(scores, points, eps_theta, rng)
    draw_paths(steps, points, paths(eps_theta, noise(rng, 200), rng))
    draw_guidance(guidance, points, eps_theta, partial(network, early))
    return figure


def panel(axes, points, title, extent=1.1):
    axes.scatter(*points.reshape(-1, 2).T, s=1, color="silver", linewidths=0)
    axes.set(xlim=(-extent, extent), ylim=(-extent, extent), xticks=[], yticks=[], aspect="equal")
    axes.set_title(title, fontsize="small")


def draw_scores(figure, points, eps_theta, rng, t=8):
    """The directions of the exact score and the learned one, dark where it is small; the loss of both at each t."""
    figure.suptitle(
        "the score points to where $x_t$ is more likely (colour: its length, dark is short)", fontsize="medium"
    )
    exact, learned, by_t = figure.subplots(1, 3)
    line = np.linspace(-1.02, 1.02, 17, dtype=np.float32)
    x_t = np.stack(np.meshgrid(line, line), axis=2).reshape(-1, 1, 1, 2)
    for axes, name, eps in ((exact, "exact", partial(exact_eps, points)), (learned, "learned", eps_theta)):
        panel(axes, points, f"{name}, t = {t}")
        arrows = score(eps, x_t, np.full(len(x_t), t)).reshape(-1, 2).T
        length = np.sqrt((arrows**2).sum(axis=0))
        axes.quiver(
            *x_t.reshape(-1, 2).T,
            *arrows / length,
            length,
            width=0.008,
            scale=18,
            pivot="mid",
            headlength=4,
            headwidth=4,
        )
    times = np.array([1, 2, 3, 5, 8, 12, 18, 25, 35, 50, 70, 100, 140, 200])
    losses = {"learned": [], "exact": []}
    for t in times:
        x_0, eps = np.tile(points, (4, 1, 1, 1)), noise(rng, 4 * len(points))
        every_t = np.full(len(x_0), t)
        x_t = diffusion.q_sample(SCHEDULE, x_0, every_t, eps)
        for name, predict in (("exact", partial(exact_eps, points)), ("learned", eps_theta)):
            losses[name].append(diffusion.squared_errors(eps, predict(x_t, every_t)).mean())
    by_t.semilogx(times, losses["learned"], color="C0", label="learned")
    by_t.semilogx(times, losses["exact"], color="C1", linestyle="--", label="exact: no loss is lower")
    by_t.set_title("the loss at each t", fontsize="small")
    by_t.set(xlabel="t", ylim=(0, 1))
    by_t.grid(alpha=0.3)
    by_t.legend(fontsize="small")


def draw_paths(figure, points, found):
    """A panel for each of the `paths`: where the points begin, where they end, and the whole path of some of them."""
    figure.suptitle("from noise (orange) to samples (black), and the whole path of some points", fontsize="medium")
    for axes, (name, path) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        x = path.reshape(len(path), -1, 2)
        panel(axes, points, f"{name}: {detour(x):.1f} times the distance", 2.6)
        axes.scatter(*x[0].T, s=3, color="C1", linewidths=0, zorder=3)
        axes.scatter(*x[-1].T, s=3, color="black", linewidths=0, zorder=3)
        followed = 3 if name == "Algorithm 2" else 12  # its paths are long, and more would hide everything else
        axes.plot(x[:, :followed, 0], x[:, :followed, 1], linewidth=0.5 if followed == 3 else 0.8)
        for end in (x[0], x[-1]):
            axes.scatter(*end[:followed].T, s=18, facecolors="none", edgecolors="black", linewidths=0.7, zorder=4)


def detour(x):
    """How long the paths are, (T + 1, N, 2), as a multiple of the distance between their two ends."""
    lengths = np.sqrt(((x[1:] - x[:-1]) ** 2).sum(axis=2)).sum(axis=0)
    return lengths.sum() / np.sqrt(((x[-1] - x[0]) ** 2).sum(axis=1)).sum()


def draw_guidance(figure, points, eps_theta, eps_guide, N=1000):
    """Samples of the guide alone, unguided ones of the network, and of the network guided away from the guide."""
    figure.suptitle(
        f"1,000 samples, guidance of strength w; red: farther than {FAR} from the data (grey)", fontsize="medium"
    )
    titles = {-1: "the guide alone", 0: "w = 0", 1: "w = 1", 2: "w = 2"}  # w = -1 leads to what the guide predicts
    for axes, (w, title) in zip(figure.subplots(1, len(titles)), titles.items(), strict=True):
        x_0 = guided_samples(eps_theta, eps_guide, w, N)
        outside = distances(points, x_0) > FAR
        panel(axes, points, f"{title}: {outside.mean():.1%} red")
        for where, colour in ((~outside, "C0"), (outside, "C3")):
            axes.scatter(*x_0[where].reshape(-1, 2).T, s=3, color=colour, linewidths=0)


def animation(points, found, frames=16):
    """Algorithm 2 beside DDIM, of the `paths`: in a notebook HTML(animation(..).to_jshtml()) has a slider for t."""
    figure = plots.new_figure(5, 2.8)
    figure.set_dpi(60)  # a frame is a picture of its own
    dots = {}
    for axes, name in zip(figure.subplots(1, 2), ("Algorithm 2", "DDIM"), strict=True):
        panel(axes, points, name, 2.2)
        dots[name] = axes.scatter([], [], s=4, color="C0")

    def show(t):
        figure.suptitle(f"t = {t}", fontsize="medium")
        for name, dot in dots.items():
            dot.set_offsets(found[name][SCHEDULE["T"] - t].reshape(-1, 2))

    times = samplers.timesteps(SCHEDULE["T"], frames)
    return plots.import_matplotlib().animation.FuncAnimation(figure, show, times, interval=150)


if __name__ == "__main__":
    cli.run(main, "stopped: the figure that was there is still there")
