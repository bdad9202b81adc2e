"""The tables, the figure and the Markdown page of the demonstration."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import statistics
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch

from .._extras import require
from ..ops import build_info
from ..sparsity import plot_masks_over_time
from ..tokens import draw_tokens
from .experiments import DEEP, ETA, GRID_ETA, GRID_LR, LR, MAX_NORM, POOR, SMALL, SMALL_ARMS, Results, Settings
from .private import DELTA, MAX_GRAD_NORM, WIDTHS, PrivateRun
from .private import LR as PRIVATE_LR
from .sampling import METHODS, SamplingResults
from .tokens import DEPTH, LARGE, PATCH, SIDE, SIGNS, WIDTH, TokenResults
from .train import BATCH, Run
from .transport import BLUR, COLOUR_REG, NAMES, SHARP_REG, TOLS, Solves, TransportResults

console = require("rich.console", extra="demo")
rich_box = require("rich.box", extra="demo")
rich_table = require("rich.table", extra="demo")
Figure = require("matplotlib.figure", extra="demo").Figure

INK, MUTED = "#24292f", "#8c959f"
COLORS = {"SGD": "#8c959f", "SGD + noise": "#0969da", "SGD, He init": "#1a7f37", "AdamW": "#bc4c00"}


@dataclass(frozen=True)
class Table:
    title: str
    columns: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        ruler = ["---", *["---:"] * (len(self.columns) - 1)]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in [self.columns, ruler, *self.rows])

    def show(self) -> None:
        table = rich_table.Table(
            title=self.title, title_justify="left", title_style="bold", box=rich_box.SIMPLE_HEAD, collapse_padding=True
        )
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if i else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        console.Console().print(table)


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def mean_test(runs: list[Run]) -> float:
    return statistics.fmean(run.test for run in runs)


def rms(runs: list[Run]) -> float:
    return statistics.fmean(run.weight_rms for run in runs)


def _table(title: str, arms: dict[str, list[Run]], weights: bool) -> Table:
    columns = ["", "accuracy, %", "worst", "best", *["weight rms"] * weights, "seconds", "memory, KiB"]
    rows = []
    for name, runs in arms.items():
        accuracies = [100 * run.test for run in runs]
        cells = [f"{a:.1f}" for a in (statistics.fmean(accuracies), min(accuracies), max(accuracies))]
        cells += [f"{rms(runs):.3f}"] * weights
        cells += [f"{statistics.fmean(run.seconds for run in runs):.2f}", f"{max(run.memory for run in runs) / 1024:,.1f}"]
        rows.append([name, *cells])
    return Table(title, columns, rows)


def _sparse_table(title: str, arms: dict[str, list[Run]], steps: int) -> Table:
    columns = ["", "accuracy, %", "worst", "best", "kept", "ms/step"]
    rows = []
    for name, runs in arms.items():
        accuracies = [100 * run.test for run in runs]
        cells = [f"{a:.1f}" for a in (statistics.fmean(accuracies), min(accuracies), max(accuracies))]
        cells += [percent(statistics.fmean(run.density for run in runs))]
        rows.append([name, *cells, f"{statistics.median(run.seconds for run in runs) / steps * 1e3:.2f}"])
    return Table(title, columns, rows)


def _private_table(title: str, arms: dict[float, list[PrivateRun]]) -> Table:
    columns = ["", "accuracy, %", "worst", "best", "noise multiplier", "ms/step", "times"]
    rows, plain = [], statistics.median(run.step_seconds for run in arms[math.inf])
    for runs in arms.values():
        accuracies, seconds = [100 * run.test for run in runs], statistics.median(run.step_seconds for run in runs)
        cells = [f"{a:.1f}" for a in (statistics.fmean(accuracies), min(accuracies), max(accuracies))]
        name = "without privacy" if math.isinf(runs[0].epsilon) else f"epsilon {runs[0].epsilon:.2f}"
        rows.append([name, *cells, f"{runs[0].noise_multiplier:.2f}", f"{1e3 * seconds:.2f}", f"{seconds / plain:.1f}"])
    return Table(title, columns, rows)


def _token_tables(found: TokenResults) -> list[Table]:
    rows = [
        [run.name, f"{100 * run.accuracy:.1f}", "merged" if math.isnan(run.found) else percent(run.found), percent(run.keep)]
        for run in found.runs
    ]
    title = f"Fewer tokens: {DEPTH} layers of {WIDTH}, {(SIDE // PATCH) ** 2} tokens"
    tables = [Table(title, ["", "accuracy, %", "signs kept", "tokens kept"], rows)]
    rows = [
        [
            name,
            *(f"{n / 1e9:.2f}" for n in c.flops),
            *(f"{1e3 * s:.1f}" for s in c.seconds),
            f"{c.seconds[0] / c.seconds[1]:.2f}",
        ]
        for name, c in found.comparisons.items()
    ]
    columns = ["", "GFLOP, all", "fewer", "ms, all", "fewer", "times as fast"]
    return [*tables, Table(f"What they cost: {(LARGE // PATCH) ** 2:,} tokens, one image", columns, rows)]


def seconds_to(solves: list[Solves], method: str, tol: float) -> float:
    """The median over the problems, inf where half of them or more end above tol."""
    return statistics.median(min((s for s, e in one.runs[method] if e <= tol), default=math.inf) for one in solves)


def _transport_tables(found: TransportResults) -> list[Table]:
    rows = []
    for name, distances in found.digits.items():
        divergences = [d.divergence for d in distances]
        cells = [f"{d:.2f}" for d in (statistics.fmean(divergences), min(divergences), max(divergences))]
        means = (statistics.fmean(of) for of in ([d.gaussian for d in distances], [d.sliced for d in distances]))
        rows.append([name, *cells, *(f"{mean:.3f}" for mean in means)])
    columns = ["", "divergence", "least", "most", "Gaussian", "sliced"]
    splits = f"splits: {found.sizes.splits}"
    tables = [Table(f"Transport: how far from real digits, {splits}", columns, rows)]
    ways = dict.fromkeys(way for _, way in found.colours)
    rows = [[way, *(f"{found.colours[name, way]:.3f}" for name in NAMES)] for way in ways]
    columns = ["", *(f"{name} as {other}" for name, other in zip(NAMES, reversed(NAMES)))]
    tables.append(Table(f"Colours: sliced W_2, {found.sizes.pixels:,} pixels", columns, rows))
    tols = TOLS[2::3]
    rows = []
    for method in found.solves[0].runs:
        times = (1e3 * seconds_to(found.solves, method, tol) for tol in tols)
        rows.append([method, *("not reached" if math.isinf(ms) else f"{ms:,.0f}" for ms in times)])
    exact = 1e3 * statistics.median(one.exact_seconds for one in found.solves)
    rows.append(["exact (scipy's assignment)", *[f"{exact:,.0f}"] * len(tols)])
    title = f"Solvers: {found.sizes.points} points, reg {SHARP_REG:g}, problems: {found.sizes.clouds}"
    return [*tables, Table(title, ["", *(f"ms to {tol:.0e}" for tol in tols)], rows)]


def _sampling_tables(found: SamplingResults) -> list[Table]:
    evaluations = found.budget.evaluations

    def table(
        title: str, values: dict[tuple[str, int], list[float]], digits: int, real: dict[str, float] | None = None
    ) -> Table:
        means = {m: [statistics.fmean(values[m, n]) for n in evaluations] for m in METHODS if values[m, evaluations[0]]}
        means |= {name: [value] * len(evaluations) for name, value in (real or {}).items()}
        rows = [[name, *(f"{mean:.{digits}f}" for mean in row)] for name, row in means.items()]
        return Table(f"{title}, by evaluations", ["", *map(str, evaluations)], rows)

    distance, spread = found.real
    return [
        table(
            f"Sampling: how far from real digits, draws: {found.budget.draws}",
            found.divergences,
            2,
            {"other real digits": distance},
        ),
        table("Variance within a class", found.spreads, 2, {"real digits": spread}),
        table("How far from the exact flow of the same model", found.errors, 4),
    ]


def tables(results: Results) -> list[Table]:
    seeds = f"seeds: {results.settings.seeds}"
    depth = f"{len(DEEP) - 2} hidden layers of {DEEP[1]}"
    found = [
        _table(f"Gradient noise: {depth}, {seeds}", results.deep, weights=True),
        _table(f"Optimizers: {' - '.join(map(str, SMALL))}, {seeds}", results.small, weights=False),
    ]
    title = f"N:M sparsity: {' - '.join(map(str, SMALL))}, {seeds}"
    found.append(_sparse_table(title, results.sparse, results.settings.small_steps))
    title = f"Private training: {' - '.join(map(str, WIDTHS))}, delta {DELTA:g}, {seeds}"
    found.append(_private_table(title, results.private))
    found += _token_tables(results.tokens)
    found += _transport_tables(results.transport)
    found += _sampling_tables(results.sampling)
    if results.grid:
        rows = [[f"lr {lr}", *(percent(results.grid[lr, eta]) for eta in GRID_ETA)] for lr in GRID_LR]
        columns = ["validation accuracy", *(f"eta {eta}" if eta else "no noise" for eta in GRID_ETA)]
        found.append(Table("How much noise: one seed", columns, rows))
    return found


def _smooth(losses: list[float], window: int = 20) -> torch.Tensor:
    return torch.tensor(losses).unfold(0, window, 1).mean(1)


def figure(results: Results, path: Path) -> None:
    """Loss curves of the deep network, accuracy over the grid, accuracies of the small network's optimizers."""
    panels = 3 if results.grid else 2
    fig = Figure(figsize=(5.2 * panels, 4.7), layout="constrained")
    axes = fig.subplots(1, panels, width_ratios=[1.25, 1, 1][:panels])
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.title.set_fontsize(11)
    for name, runs in results.deep.items():
        for run in runs:
            curve = _smooth(run.losses)
            label = f"{name}: {percent(mean_test(runs))}" if run is runs[0] else None
            axes[0].plot(curve, color=COLORS[name], lw=0.9, alpha=0.75, label=label)
    axes[0].set(xlabel="step", ylabel="training loss (mean of 20 batches)", ylim=(0, 2.6))
    axes[0].set_title(f"{len(DEEP) - 2} hidden ReLU layers, weights N(0, {POOR}²): a line per seed", loc="left")
    title = "mean test accuracy of the deep network"
    legend = fig.legend(loc="outside lower left", ncols=4, title=title, frameon=False, alignment="left")
    for line in legend.get_lines():
        line.set(lw=2, alpha=1)

    if results.grid:
        values = [[100 * results.grid[lr, eta] for eta in GRID_ETA] for lr in GRID_LR]
        axes[1].imshow(values, cmap="Blues", vmin=0, vmax=130, aspect="auto")
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                axes[1].text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if value > 70 else INK)
        axes[1].set_xticks(range(len(GRID_ETA)), [str(eta) for eta in GRID_ETA])
        axes[1].set_yticks(range(len(GRID_LR)), [str(lr) for lr in GRID_LR])
        axes[1].set(xlabel="noise_eta", ylabel="learning rate")
        axes[1].set_title("validation accuracy, %, of one seed", loc="left")
        axes[1].spines[:].set_visible(False)
        axes[1].tick_params(length=0)

    names = list(results.small)
    for i, name in enumerate(names):
        accuracies = [100 * run.test for run in results.small[name]]
        heights = torch.linspace(i - 0.2, i + 0.2, len(accuracies))
        axes[-1].scatter(accuracies, heights, s=26, color=COLORS["SGD + noise"], alpha=0.6, lw=0)
        axes[-1].plot([statistics.fmean(accuracies)] * 2, [i - 0.28, i + 0.28], color=INK, lw=1.5)
    axes[-1].set_yticks(range(len(names)), names)
    axes[-1].set_ylim(len(names) - 0.5, -0.5)
    axes[-1].grid(axis="x", color=MUTED, alpha=0.25, lw=0.6)
    axes[-1].set(xlabel="test accuracy, %: a dot per seed, a line for the mean")
    axes[-1].set_title(f"optimizers, layers {' - '.join(map(str, SMALL))}", loc="left")
    fig.savefig(path, dpi=150)


def private_figure(results: Results, path: Path) -> None:
    """Accuracy against epsilon."""
    fig = Figure(figsize=(7.2, 4.2), layout="constrained")
    ax = fig.subplots()
    ax.spines[["top", "right"]].set_visible(False)
    means = {epsilon: 100 * statistics.fmean(run.test for run in runs) for epsilon, runs in results.private.items()}
    epsilons = sorted(epsilon for epsilon in means if not math.isinf(epsilon))
    blue = COLORS["SGD + noise"]
    ax.axhline(means[math.inf], color=MUTED, ls="--", lw=1.5, label=f"without privacy: {means[math.inf]:.1f} %")
    ax.plot(
        epsilons,
        [means[e] for e in epsilons],
        color=blue,
        lw=1.5,
        marker="_",
        ms=12,
        label="private: the mean, and a dot per seed",
    )
    for epsilon in epsilons:
        accuracies = [100 * run.test for run in results.private[epsilon]]
        ax.scatter([epsilon] * len(accuracies), accuracies, s=26, color=blue, alpha=0.5, lw=0)
    ax.set_xscale("log", base=2)
    ax.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons])
    ax.grid(axis="y", color=MUTED, alpha=0.25, lw=0.6)
    ax.set(xlabel=f"epsilon at delta {DELTA:g}", ylabel="test accuracy, %")
    ax.set_title("Private training on 1,077 digits", loc="left", fontsize=11)
    ax.legend(frameon=False, loc="lower right")
    fig.savefig(path, dpi=150)


def token_figure(found: TokenResults, path: Path) -> None:
    """Two images of the test, and their tokens after the first layer."""
    fig = draw_tokens(found.pictures, found.records)
    fig.set_size_inches(2.4 * (1 + len(found.records)), 5.1)
    for ax in fig.axes:
        ax.title.set_fontsize(11)
    fig.savefig(path, dpi=100)


def convergence_figure(found: TransportResults, path: Path) -> None:
    """The marginals' error over time: a line for each problem."""
    fig = Figure(figsize=(7.2, 4.2), layout="constrained")
    ax = fig.subplots()
    ax.spines[["top", "right"]].set_visible(False)
    colors = dict(zip(found.solves[0].runs, (MUTED, "#0969da", "#bc4c00")))
    for one in found.solves:
        for method, runs in one.runs.items():
            label = f'"{method}"' if one is found.solves[0] else None
            style = {"ls": "", "marker": "."} if len(runs) == len(TOLS) else {"lw": 1.2}
            ax.plot(*zip(*runs), color=colors[method], alpha=0.8, label=label, **style)
    exact = statistics.median(one.exact_seconds for one in found.solves)
    ax.axvline(exact, color=INK, ls=":", lw=1, label="exact: scipy's assignment")
    ax.set(xscale="log", yscale="log", xlabel="seconds of one CPU thread", ylabel="L1 error of the marginals")
    ax.grid(color=MUTED, alpha=0.25, lw=0.6)
    title = f"Entropic transport, {found.sizes.points} points of the plane, reg / largest cost {SHARP_REG:g}"
    ax.set_title(title, loc="left", fontsize=11)
    ax.legend(frameon=False, loc="lower left")
    fig.savefig(path, dpi=150)


def colour_figure(found: TransportResults, path: Path) -> None:
    """Each photograph, and in the colours of the other, by both maps."""
    ways = list(dict.fromkeys(way for _, way in found.pictures))
    fig = Figure(figsize=(2.8 * len(ways), 4.1), layout="constrained")
    for row, name in zip(fig.subplots(len(NAMES), len(ways), squeeze=False), NAMES):
        for ax, way in zip(row, ways):
            ax.imshow(found.pictures[name, way].numpy(), interpolation="antialiased")
            ax.axis("off")
            if name == NAMES[0]:
                ax.set_title(way, fontsize=11)
    fig.savefig(path, dpi=100)


def sampling_figure(found: SamplingResults, path: Path) -> None:
    """Digits from the same noise: a row for each method, a column for each number of evaluations."""
    evaluations = found.budget.evaluations
    fig = Figure(figsize=(2.9 * len(evaluations), 1.15 * len(METHODS)), layout="constrained")
    for row, method in zip(fig.subplots(len(METHODS), len(evaluations), squeeze=False), METHODS):
        for ax, count in zip(row, evaluations):
            digits = torch.nn.functional.pad(found.pictures[method, count], (1, 1, 1, 1)).view(2, 5, 10, 10)
            ax.imshow(digits.transpose(1, 2).flatten(0, 1).flatten(1), cmap="gray_r", vmin=0, vmax=1)
            ax.set_xticks([])
            ax.set_yticks([])
            if method == next(iter(METHODS)):
                ax.set_title(f"{count} evaluations", fontsize=11)
        row[0].set_ylabel(method.replace("-Solver", ""), fontsize=9)
    fig.savefig(path, dpi=100)


def cost(results: Results) -> str:
    """Time, and the most memory that the process had resident, libraries and all."""
    try:
        import resource
    except ImportError:  # not on Windows
        return f"{results.seconds:.0f} s"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{results.seconds:.0f} s and at most {peak / 2**20:.0f} MiB of resident memory"


INTRODUCTION = """Written by `python -m dither demo`, which trained and measured everything here. Sections are of the families
of dither: `dither.optim` (the first two), `sparsity`, `privacy`, `tokens`, `transport`, `sampling`. Data, settings and versions
are at the end."""


SPARSITY = """All layers keep n of every m weights along their inputs; kept: the fraction that is not 0 at the end. Mask decay
(Bambhaniya et al. 2024, MdGf) multiplies the others by a factor that falls from 1 to 0 over the first half of training; SR-STE
(Zhou et al. 2021) sets them to 0 from the start and pulls them towards it; pruned after training is the dense network, cut at
the end. Picture: the second layer under mask decay, 2:4, first seed. ms/step: the whole step, of a network so small that calls
count more than arithmetic."""


PRIVATE = f"""AdamW, lr {PRIVATE_LR}, Poisson batches of a quarter of the images on average, gradients of samples clipped to
{MAX_GRAD_NORM:.0f}, noise for epsilon at delta {DELTA:g}; without privacy the same batches, the mean loss and no
clipping. ms/step: the median step, and how many times that without privacy; the network is so small that calls count more than
arithmetic. The learning rate was better than 0.003 on the validation images; looking at them is not counted in epsilon."""


TOKENS = f"""The largest of {SIGNS} digits, each of them one token of a crop of a photograph (tested on another part of it):
patches of {PATCH} x {PATCH} pixels, no positions, the mean of all tokens to the classifier, AdamW, one seed. Tokens go after
the first layer, by PageRank or column sums of its attention, or by chance; signs kept: how many of the digits are among those
that stay. ToMe joins the most similar tokens instead. The first attention has already handed on part of what the signs say, so
chance does better than its share of signs. GFLOP and ms: of a call with all tokens, in torch's fused layers, and with fewer,
ranking included; medians of calls in turns. Picture: tokens that are gone are white, merged ones have their mean colour."""


TRANSPORT = f"""Distances from a third of all digits. Another third is what samples are drawn after, the last one are the other
real digits: any sample of the digits' law is about as far as they are. Divergence: Sinkhorn's, costs are squared distances of
pixels in [0, 1], reg {BLUR:g} of their mean; least and most over the splits. Gaussian: W_2 of the Gaussians of the same
moments, as in the Frechet distances of generated images; it cannot tell one Gaussian from ten, and sliced W_2 hardly can."""


COLOURS = f"""Colours of random pixels of both photographs are matched by entropic transport, reg {COLOUR_REG:g}; every pixel
then goes to the mean colour of its match, by the potentials. The Gaussian map is linear, and matches means and covariances.
Distances: of 20,000 pixels from as many of the other photograph."""


def solvers_text(solves: list[Solves]) -> str:
    return f"""Points of N(0, I) and N(e_1, I) in the plane, squared distances, the largest 1, uniform weights. CPU times to an
    L1 error of the marginals, medians over the problems; Sinkhorn's are shares of one long run. Transport at this reg is near
    exact transport: its plans cost {percent(statistics.median(one.excess for one in solves))} more than the best, and exact
    solvers are a match for entropic ones. What these add is gradients, batches, and devices."""


def sampling_text(found: SamplingResults) -> str:
    return f"""A network of {found.parameters:,} weights learns the noise of noisy digits, given their labels; then
    every method draws digits of the labels of the test, which they are compared with, from the same first noise;
    means over the draws. Heun's method takes two evaluations a step, so that its steps are twice as long. The
    divergence is that of the table of transport, the variance is summed over pixels. Where the steps are short
    enough, what remains is the model's, the same for all methods without noise. The divergence likes digits that vary
    less than real ones: those of DDIM's long steps, and of noise on the way, may come nearer than other real digits
    do. The exact flow: {found.budget.exact} steps of Heun's method; distances from it are rms over pixels of standard
    deviation 1. They are what a method of higher order makes small."""


def _fill(text: str, indent: str = "") -> str:
    return textwrap.fill(" ".join(text.split()), 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def findings(results: Results) -> list[str]:
    """Paragraphs on the runs of the deep network, in the numbers of this run."""
    plain, noisy, he, adamw = (results.deep[name] for name in ("SGD", "SGD + noise", "SGD, He init", "AdamW"))
    pairs = ", ".join(f"{100 * a.test:.1f} → {100 * b.test:.1f}" for a, b in zip(plain, noisy))
    found = [
        f"""Without noise SGD reaches {percent(mean_test(plain))}, where chance is 10 %; with noise {percent(mean_test(noisy))}.
        Seed by seed, in %: {pairs}.""",
        f"""Weights of standard deviation {POOR} halve the signal in every layer, and the gradient on its way back. Noise adds
        up in the weights, most of it in the early steps, until signals pass: their rms goes from {POOR} to {rms(noisy):.3f},
        where He's rule asks for {(2 / DEEP[1]) ** 0.5:.3f}. So noise stands in for a good start: SGD from He's reaches
        {percent(mean_test(he))}, and AdamW, which divides by the size of the gradient, {percent(mean_test(adamw))} from the
        poor start.""",
    ]
    if results.grid:
        without = max(results.grid[lr, 0.0] for lr in GRID_LR)
        best = ", ".join(f"{percent(max(results.grid[lr, eta] for eta in GRID_ETA))} at lr {lr}" for lr in GRID_LR)
        found.append(
            f"""The right amount of noise is a narrow choice (table below, one seed): too little leaves the signal dead, too
            much drowns the gradient, and what counts is about lr² eta. Without noise no learning rate gets beyond
            {percent(without)}; with the best amount: {best}."""
        )
    return [_fill(text) for text in found]


def conditions(results: Results) -> list[str]:
    """What one has to know to read the numbers and to get them again."""
    settings, tuned, info, gpu = results.settings, Settings(), build_info(), results.device == "cuda"
    device = torch.cuda.get_device_name() if gpu else f"CPU ({info.get('cpu_capability', 'reference')})"
    memory = "the most that torch had allocated on the GPU" if gpu else "parameters, gradients and optimizer states"
    rates = ", ".join(f"{arm.name} {arm.optimizer.keywords['lr']}" for arm in SMALL_ARMS)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "numpy", "scikit-learn", "matplotlib")]
    found = [
        """Data: scikit-learn's digits, 1,797 scanned 8 x 8 images, in a fixed split with equal classes: 1,077 for training, 360
        for validation (learning rates, amount of noise), 360 for the test (tables, after the last step).""",
        f"""Gradient noise, after Neelakantan et al. 2015, "Adding Gradient Noise Improves Learning for Very Deep Networks":
        {len(DEEP) - 2} hidden ReLU layers of {DEEP[1]}, biases 0, weights N(0, {POOR}²) or, for He, N(0, 2/fan_in);
        {settings.deep_steps} batches of {BATCH}; the norm of all gradients clipped to {MAX_NORM:.0f}, then noise
        N(0, eta/(1+t)^0.55) after t steps, eta {ETA}. SGD has lr {LR} in all rows, AdamW 0.001 (the best of 0.0003, 0.001,
        0.003 on the validation images, after {tuned.deep_steps} batches).""",
        f"""Optimizers: {settings.small_steps} batches of {BATCH}; for each the best lr of 1e-4, 3e-4, 1e-3, 3e-3, 1e-2 on the
        validation images, after {tuned.small_steps} batches: {rates}.""",
        f"Seeds 0 to {settings.seeds - 1}. Runs of a seed share their batches and, up to scale, their initial weights.",
        f"Seconds: the training loop alone, mean over seeds. Memory: {memory}.",
        f"{device}, one CPU thread. Everything took {cost(results)}.",
        f"dither {info['version']}, {', '.join(versions)}, Python {platform.python_version()}, {platform.platform()}.",
    ]
    return [_fill("- " + text, indent="  ") for text in found]


def markdown(results: Results) -> str:
    deep, small, sparse, privately, kept, cost_of_tokens, distances, colours, solvers, *rest = (
        f"**{table.title}**\n\n{table.markdown()}" for table in tables(results)
    )
    (sampled, spreads, flows), grid = rest[:3], rest[3:]
    bfloat16 = _fill(
        """AdamW bfloat16 keeps parameters, gradients and both moments in bfloat16 and rounds stochastically: half
        their bytes. Differences smaller than the spread of the seeds mean nothing (one test image is 0.28 %)."""
    )
    paragraphs = [
        "# Gradient noise, fused optimizers, sparsity, privacy, fewer tokens, optimal transport and sampling on real digits",
        _fill(INTRODUCTION),
        "![Loss curves and accuracies](figure.png)",
        "## Gradient noise",
        deep,
        *findings(results),
        *grid,
        "## Optimizers",
        small,
        bfloat16,
        "## N:M sparsity",
        sparse,
        _fill(SPARSITY),
        "![How the mask of a layer settles](masks.png)",
        "## Private training",
        privately,
        _fill(PRIVATE),
        "![Accuracy against epsilon](privacy.png)",
        "## Fewer tokens",
        kept,
        cost_of_tokens,
        _fill(TOKENS),
        "![Photographs with signs, and the tokens that are kept](tokens.png)",
        "## Optimal transport",
        distances,
        _fill(TRANSPORT),
        colours,
        _fill(COLOURS),
        "![Photographs in the colours of one another](colours.png)",
        solvers,
        _fill(solvers_text(results.transport.solves)),
        "![Error of the marginals over time](transport.png)",
        "## Sampling",
        sampled,
        spreads,
        flows,
        _fill(sampling_text(results.sampling)),
        "![Digits from the same noise, by method and number of evaluations](sampling.png)",
        "## Settings",
        "\n".join(conditions(results)),
    ]
    return "\n\n".join(paragraphs) + "\n"


def write(results: Results, out: Path) -> None:
    """Print the tables; write the pictures and `report.md`."""
    for table in tables(results):
        table.show()
    figure(results, out / "figure.png")
    plot_masks_over_time(next(runs[0].masks for runs in results.sparse.values() if runs[0].masks), out / "masks.png")
    private_figure(results, out / "privacy.png")
    token_figure(results.tokens, out / "tokens.png")
    convergence_figure(results.transport, out / "transport.png")
    colour_figure(results.transport, out / "colours.png")
    sampling_figure(results.sampling, out / "sampling.png")
    (out / "report.md").write_text(markdown(results), encoding="utf-8")
    names = ", ".join(path.name for path in sorted(out.glob("*.png")))
    print(f"Took {cost(results)}. Wrote report.md, {names} into {out}")
